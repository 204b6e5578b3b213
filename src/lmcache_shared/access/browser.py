"""Who is calling: requests that a page of another site makes in an operator's browser are refused.

Browsers tell where a request comes from (`Sec-Fetch-Site`, Fetch Metadata; older ones `Origin`). Programs such as curl
and Prometheus send neither and are not touched. Following a link from elsewhere to a page is allowed, as
long as that only shows something (`gate.py`).
"""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit

from aiohttp import web

from lmcache_shared.access.asking import Asking, HandlerOf, R
from lmcache_shared.errors import Refusal
from lmcache_shared.listen import without_secrets

_OWN = frozenset({"none", "same-origin"})

MAX_NEXT = 2000
"""Characters of a path to which somebody is led back."""

_OWN_PATH = re.compile(r"/(?![/\\])[!-\[\]-~]*\Z")
"""A path of this server: `//host` and `/\\host` are others', and browsers pass over control characters."""


@web.middleware
async def own_site_only(request: R, handler: HandlerOf[R]) -> web.StreamResponse:
    """Refuse what another site's page asks.

    Raises:
        Refusal: 403.
    """
    if is_from_another_site(request):
        raise Refusal(403, "a page of another site made this request; it is refused (Sec-Fetch-Site, Origin)")
    return await handler(request)


def is_from_another_site(request: Asking) -> bool:
    headers = request.headers
    sites = headers.getall("Sec-Fetch-Site", [])
    if sites and not _OWN.issuperset(sites):
        return not (request.method == "GET" and headers.getall("Sec-Fetch-Mode", []) == ["navigate"])
    origins = headers.getall("Origin", [])
    return not sites and any(origin.partition("://")[2].lower() != request.host.lower() for origin in origins)


def followed_here(request: Asking) -> bool:
    """Whether no link on another site led here."""
    return _OWN.issuperset(request.headers.getall("Sec-Fetch-Site", []))


def own_path(text: str | None) -> str:
    """The path that was asked for, if it is one of this server; else `/`.

    What looks like a secret in its query is left out: within another address no log knows it for one.
    """
    if not text or len(text) > MAX_NEXT or not _OWN_PATH.match(text):
        return "/"
    path, _, query = text.partition("?")
    pairs = [pair for pair in query.split("&") if pair and without_secrets(f"?{pair}") == f"?{pair}"]
    return f"{path}?{'&'.join(pairs)}" if pairs else path


def with_next(page: str, path: str) -> str:
    """The address of a page that leads back to a path of this server."""
    path = own_path(path)
    return page if path == "/" else f"{page}?next={quote(path, safe='/')}"


def came_from(request: Asking) -> str:
    """The page of this server on which a link was followed or a form sent; `/` for any other."""
    try:
        referer = urlsplit(request.headers.get("Referer", ""))
    except ValueError:
        return "/"
    if referer.netloc != request.host:
        return "/"
    return own_path(f"{referer.path}?{referer.query}" if referer.query else referer.path)
