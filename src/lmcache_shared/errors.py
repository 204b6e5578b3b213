"""One tree for everything this project refuses.

`OpsError` is the root. A `StartError` stops a program before it serves: its text is one line for the
operator, and the programs print it and end with exit code 2. A `Refusal` is the answer to one request:
a status and a JSON body `{"detail": …}`, the shape LMCache's own servers use.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping

from aiohttp import web

from lmcache_shared.access.asking import HandlerOf, R
from lmcache_shared.responses import json_response

logger = logging.getLogger(__name__)

START_FAILED = 2
"""Exit code of both programs when they refuse to start."""


class OpsError(Exception):
    """Root of every error that this project raises on purpose."""


class StartError(OpsError):
    """The program cannot start; the text names the value, the place and the way out, in one line."""


class ConfigError(StartError):
    """A setting, an option or a file of settings cannot be used."""


class AddressError(StartError, ValueError):
    """A text is not an address, or an address cannot be used on this machine."""


class AddressInUse(StartError):
    """Somebody else serves on this address already."""


class RouteError(StartError):
    """A route module cannot be imported, exports no router, or claims a route that is taken."""


class Refusal(OpsError):
    """The answer to one request that is refused: `status` and `{"detail": detail}`, and `reason` beside it if given."""

    def __init__(
        self, status: int, detail: object, headers: Mapping[str, str] | None = None, *, reason: str | None = None
    ) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.headers = headers
        self.reason = reason

    def response(self) -> web.Response:
        body = {"detail": self.detail} if self.reason is None else {"detail": self.detail, "reason": self.reason}
        return json_response(body, status=self.status, headers=self.headers)


class Failure(Refusal):
    """A `Refusal` in the shape that LMCache gives what its engine cannot do: `{"error": …, "message": …}`."""

    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(status, message)
        self.error = error

    def response(self) -> web.Response:
        return json_response({"error": self.error, "message": self.detail}, status=self.status, indent=2)


@web.middleware
async def refusals(request: R, handler: HandlerOf[R]) -> web.StreamResponse:
    """Give every failure the one JSON shape; a bug is logged in full and answered without a traceback."""
    try:
        response = await handler(request)
        if not isinstance(response, web.StreamResponse):
            raise TypeError(f"the handler of {request.path} returned a {type(response).__name__} and no response")
        return response
    except Refusal as refusal:
        return refusal.response()
    except web.HTTPException as error:
        if error.status < 400:
            raise
        allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        detail = error.reason if error.status != 413 else error.text
        return json_response({"detail": detail}, status=error.status, headers=allow)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return json_response({"detail": "Not Found"}, status=404)  # no static file can have such a name
        logger.exception("%s %s failed", request.method, request.path)
        return json_response({"detail": "Internal Server Error"}, status=500)
