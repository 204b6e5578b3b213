"""Why a discovery service could not be asked, without what its URL holds."""

from __future__ import annotations

import aiohttp


class Refused(Exception):
    """The service answers, and not as it should; the text is ours."""


def reason(error: Exception) -> str:
    """Why asking failed, for logs, problems and the status.

    Many of aiohttp's errors quote the URL, or what a service sent that may quote it, and the URL may hold a password or
    a token: of those that are not known to tell of hosts alone only the type is told.
    """
    if isinstance(error, aiohttp.ClientResponseError):
        return f"what it answers is no HTTP that can be used ({type(error).__name__})"
    if isinstance(error, Refused | aiohttp.ClientConnectorError):
        return " ".join(ascii(str(error))[1:-1].split())[:200]
    strerror = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}: {strerror}"[:200] if strerror else type(error).__name__
