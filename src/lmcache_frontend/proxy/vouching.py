"""What a frontend says to a target of the caller for whom it asks.

Where the frontend has found that the caller may ask for this, it *vouches*: nothing but `Via` shows that somebody else
asks, and a target on the same machine takes the request as one from there. For any other caller it names the caller in
`X-Forwarded-For`, and the target judges by its own table. It vouches for what an admin asks, whatever it is, and for
what an operator asks and the table knows: of a path that the table does not know, the target may need more. The token
of the target's entry is shown alike, and for what viewers may ask and the table knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from aiohttp import web
from multidict import CIMultiDict

from lmcache_frontend.proxy.headers import VIA
from lmcache_shared.access.caller import SPEAKING_FOR_OTHERS, seen_address
from lmcache_shared.access.gate import GATE, caller_of
from lmcache_shared.access.roles import Role
from lmcache_shared.access.table import of_proxied


@dataclass(frozen=True)
class Introduction:
    """How the caller is introduced: fit for the fields that `request_headers` has made.

    Attributes:
        role: what the request needs.
        cookie: the name of the cookie of who has signed in here.
    """

    vouched: bool
    address: str
    hides_authorization: bool
    role: Role
    cookie: str
    token: str | None = field(default=None, repr=False)

    def write(self, headers: CIMultiDict[str]) -> None:
        if "Cookie" in headers:
            headers["Cookie"] = _without(headers["Cookie"], self.cookie)
            if not headers["Cookie"]:
                del headers["Cookie"]
        if self.hides_authorization:  # it is this frontend's token, and nobody else's business
            headers.popall("Authorization", None)
        if self.token is not None:
            headers.popall("Authorization", None)
            headers["Authorization"] = f"Bearer {self.token}"
        if self.vouched:
            for name in SPEAKING_FOR_OTHERS:
                headers.popall(name, None)
            passed = headers.get("Via", "").count(VIA)
            headers["Via"] = ", ".join([VIA] * max(1, passed))
        elif not any(name in headers for name in SPEAKING_FOR_OTHERS):
            headers["X-Forwarded-For"] = self.address


def introduction(request: web.Request, path: str, token: str | None) -> Introduction:
    """Let a request pass to `path` at a target, whose entry has this token, if its caller may ask for that.

    Raises:
        Refusal: 401 or 403.
    """
    asked = of_proxied(request.method, path)
    gate = request.app[GATE]
    gate.require(request, max(asked.role, Role.VIEWER))
    caller = caller_of(request)
    settled = caller.role == Role.ADMIN or asked.known
    vouched = settled and caller.role >= Role.OPERATOR
    return Introduction(
        vouched, seen_address(request), caller.by_token, asked.role, gate.cookie or "", token if settled else None
    )


def _without(cookies: str, name: str) -> str:
    """A `Cookie` field without that cookie (RFC 6265, section 4.2.1)."""
    return "; ".join(it for pair in cookies.split(";") if (it := pair.strip()) and it.partition("=")[0].strip() != name)
