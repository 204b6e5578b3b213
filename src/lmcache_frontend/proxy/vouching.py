"""What a frontend says to a target of the caller for whom it asks.

Every target gets `X-Forwarded-For`, and judges by that. A caller on this machine is one for a target on this machine
too (`access/caller.py`); one that only connects from here, as a proxy does, is none, and `unknown` stands before it.
For a caller elsewhere the target would not do what only operators and admins may; where the frontend has found that
this one may, and has no token of the target's entry to show, it *vouches*: nothing but `Via` shows that somebody else
asks, and a target on this machine takes the request as one from there. It vouches for what an operator asks and the
table knows, and for what an admin asks, whatever it is: of a path that the table does not know, the target may need
more. The token of the target's entry is shown alike, and for what viewers may ask and the table knows.
"""

from __future__ import annotations

from lmcache_frontend.proxy.headers import Introduction
from lmcache_shared.access.asking import Asking
from lmcache_shared.access.gate import GATE, caller_of
from lmcache_shared.access.roles import Role
from lmcache_shared.access.table import Proxied, of_proxied


def require(request: Asking, asked: Proxied) -> None:
    """Let the caller pass that has what is `asked` for.

    Raises:
        Refusal: 401 or 403.
    """
    request.app[GATE].require(request, max(asked.role, Role.VIEWER))


def admitted(request: Asking, path: str, method: str) -> Proxied:
    """What it needs to ask `path` at a target by `method`, if the caller has it.

    Raises:
        Refusal: 401 or 403.
    """
    asked = of_proxied(method, path)
    require(request, asked)
    return asked


def introduction(request: Asking, asked: Proxied, token: str | None) -> Introduction:
    """How a caller that has what is `asked` for is introduced to a target whose entry has this token."""
    caller = caller_of(request)
    is_settled = caller.role == Role.ADMIN or asked.known
    shown = token if is_settled else None
    needs_trust = asked.role >= Role.OPERATOR or not asked.known
    cookie = request.app[GATE].cookie if "Cookie" in request.headers else None
    return Introduction(
        is_vouched_for=(
            is_settled and needs_trust and shown is None and caller.role >= Role.OPERATOR and not caller.is_here
        ),
        is_here=caller.is_here,
        hides_authorization=caller.by_token,
        authorization=None if shown is None else f"Bearer {shown}".encode(),
        cookie=b"" if cookie is None else cookie.encode(),
    )
