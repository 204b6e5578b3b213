"""The one place that lets a request in or not: who calls against what the route needs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from lmcache_shared.access.asking import Asking, HandlerOf, R
from lmcache_shared.access.attempts import Attempts
from lmcache_shared.access.browser import followed_here, with_next
from lmcache_shared.access.caller import Caller, bearer_token, is_local_caller, seen_address
from lmcache_shared.access.roles import Role, needed
from lmcache_shared.access.tokens import Tokens
from lmcache_shared.errors import Refusal

logger = logging.getLogger(__name__)

CALLER: Any = web.RequestKey("caller", Caller) if hasattr(web, "RequestKey") else "lmcache_caller"
"""Under this key a request carries its `Caller`; aiohttp before 3.14 knows texts alone."""

_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="lmcache"'}


_LOCAL = Caller("local", Role.ADMIN, is_here=True)


@dataclass(frozen=True)
class Names:
    """What the options of a program are called, so that a refusal can name the way out."""

    token: str
    token_file: str
    no_auth: str
    page: str = ""
    """The path of the page on which a browser can sign in."""


class Gate:
    """Knows callers.

    Args:
        tokens: whose token is whose.
        cookie: the cookie in which a browser that has signed in shows its token.
        names: what the options are called.
        trust_local: a caller on this machine is an admin.
        open_to_viewers: whoever shows no token is a viewer, and not nobody.
        no_auth: everybody is.
    """

    def __init__(
        self,
        tokens: Tokens,
        names: Names,
        *,
        trust_local: bool = True,
        open_to_viewers: bool = True,
        no_auth: bool = False,
        cookie: str | None = None,
    ) -> None:
        self._tokens = tokens
        self._names = names
        self._trust_local = trust_local
        self._otherwise = Role.VIEWER if open_to_viewers else Role.NOBODY
        self._no_auth = no_auth
        self.cookie = cookie
        self._attempts = Attempts()
        self._cookie_attempts = Attempts()  # a browser asks by itself, and must not keep others of its address out
        if no_auth:
            logger.warning("%s: whoever reaches this server may do everything", names.no_auth)

    async def caller(self, request: Asking) -> Caller:
        """Who calls.

        Raises:
            Refusal: 401 for a token that is none, 429 after too many of them.
        """
        token = bearer_token(request) if self._tokens.configured else None
        is_local = self._trust_local and is_local_caller(request, through_frontends=True)
        if self._no_auth or is_local:
            known = None if token is None else await self._tokens.find(token)
            if known is None:
                return _LOCAL if is_local else Caller("anybody", Role.ADMIN)
            return Caller(known.name, Role.ADMIN, by_token=True, is_here=is_local)
        if token is not None:
            return await self.holder(request, token)
        return await self._signed_in(request) or Caller("anonymous", self._otherwise)

    async def _signed_in(self, request: Asking) -> Caller | None:
        """Whose cookie it is. One whose token was taken back is no mistake of its browser's: it may look on."""
        value = request.cookies.get(self.cookie) if self.cookie is not None and self._tokens.configured else None
        address = seen_address(request)
        if not value or self._cookie_attempts.wait_seconds(address, value):
            return None
        found = await self._tokens.find(unquote(value))
        if found is None:
            self._cookie_attempts.failed(address, value)
        else:
            self._cookie_attempts.was_right(address, value)
        return found

    async def holder(self, request: Asking, token: str) -> Caller:
        """Whose token it is.

        Raises:
            Refusal: 401 for one that is none, 429 after too many of them.
        """
        address = seen_address(request)
        if seconds := self._attempts.wait_seconds(address, token):
            raise Refusal(429, f"too many wrong tokens from {address}; wait", {"Retry-After": str(seconds)})
        found = await self._tokens.find(token)
        if found is None:
            if self._attempts.failed(address, token):
                logger.warning("a wrong token from %s", address)
            names = self._names
            known = f"it knows those of {names.token} and {names.token_file}"
            raise Refusal(401, f"the token of this request is none that this server knows; {known}", _CHALLENGE)
        self._attempts.was_right(address, token)
        return found

    def require(self, request: Asking, role: Role) -> None:
        """Raises:
        Refusal: 401 for who may show a token, 403 for whose token is not enough; the text names the way out.
            401 or 429 as of `caller` for a token that is none.
        """
        caller = caller_of(request)
        if role >= Role.OPERATOR and not followed_here(request):
            raise Refusal(403, "a link on another site led here; it may show, and change or reveal nothing")
        if caller.role >= role:
            return
        if caller.refusal is not None:
            raise caller.refusal
        asked = f"{request.method} {request.path[:200]} needs the role {role.title}"
        if caller.by_token:
            raise Refusal(403, f"{asked}, and the token of {caller.name!r} has the role {caller.role.title}")
        names = self._names
        page = f", or sign in at {names.page}" if names.page else ""
        raise Refusal(
            401,
            f"{asked}: ask from the host itself, or send `Authorization: Bearer <token>` with a token of {names.token}"
            f" or {names.token_file}{page}; {names.no_auth} lets everybody do everything",
            _CHALLENGE,
        )

    def signs_in(self, request: Asking, refusal: Refusal) -> web.Response | None:
        """A person who opens a page and has to show a token is led to where that is done, and from there back.

        What an open page asks for by a script stays refused: the page itself leads there.
        """
        is_page = request.method == "GET" and "text/html" in request.headers.get("Accept", "")
        is_script = request.headers.get("HX-Request") == "true"
        if refusal.status != 401 or not is_page or is_script or not self._names.page:
            return None
        location = with_next(self._names.page, request.raw_path)
        return web.Response(status=303, headers={"Location": location, "Cache-Control": "no-store"})


GATE: web.AppKey[Gate] = web.AppKey("gate", Gate)


@web.middleware
async def admitted(request: R, handler: HandlerOf[R]) -> web.StreamResponse:
    """Find out who calls, and let in who has the role that the route needs.

    Raises:
        Refusal: 401, 403 or 429.
    """
    gate = request.app[GATE]
    role = needed(request)
    try:
        request[CALLER] = await gate.caller(request)
    except Refusal as refusal:
        if role > Role.NOBODY:
            raise
        request[CALLER] = Caller("anonymous", Role.NOBODY, refusal=refusal)  # what is proxied is judged later
    try:
        gate.require(request, role)
        response = await handler(request)
    except Refusal as refusal:
        page = gate.signs_in(request, refusal)
        if page is None:
            raise
        return page
    if role >= Role.OPERATOR and not response.prepared:
        response.headers.setdefault("Cache-Control", "no-store")  # it may reveal something, and nobody keeps a copy
    return response


def caller_of(request: Asking) -> Caller:
    """Who calls, behind `admitted`."""
    found: Caller = request[CALLER]
    return found
