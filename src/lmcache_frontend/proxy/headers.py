"""Which header fields go on to the other side (RFC 9110, sections 7.6.1 and 7.6.3)."""

from __future__ import annotations

import re

from aiohttp import web
from multidict import CIMultiDict, MultiMapping

from lmcache_shared.access.caller import FRONTEND_VIA
from lmcache_shared.errors import Refusal

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Fields that concern one connection alone. `Connection` names further ones."""

_ANSWERED_HERE = frozenset(
    {"host", "expect", "origin", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest", "sec-fetch-user"}
)
"""Request fields that this server has acted on: the target has a host of its own, `100 Continue` went out, and whether
another site's page asks has been looked at (`Origin` names this host, which is none to the target).
"""

_NOT_FOR_THIS_ORIGIN = frozenset({"clear-site-data", "service-worker-allowed", "content-security-policy"})

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

VIA = FRONTEND_VIA

MAX_FRONTENDS = 12
"""A request that has passed more frontends goes in a circle."""


def refuse_loops(request: web.Request) -> None:
    """Let a request pass so many frontends and no more.

    Raises:
        Refusal: 508 (RFC 5842, section 7.2).
    """
    passed = sum(via.count(VIA) for via in request.headers.getall("Via", []))
    if passed >= MAX_FRONTENDS:
        raise Refusal(508, f"the request has passed {passed} frontends: their proxies lead in a circle; take one out")


def request_headers(headers: MultiMapping[str]) -> CIMultiDict[str]:
    """What the target gets of a request's fields, and a `Via`."""
    forwarded = _end_to_end(headers, _ANSWERED_HERE)
    forwarded["Via"] = ", ".join([*map(sendable, headers.getall("Via", [])), VIA])
    return forwarded


def response_headers(headers: MultiMapping[str]) -> CIMultiDict[str]:
    """What the caller gets of a response's fields.

    A node's page in a browser is kept out of the frontend's origin: no script of it runs, it installs nothing.
    """
    forwarded = _end_to_end(headers, _NOT_FOR_THIS_ORIGIN)
    forwarded["Content-Security-Policy"] = "sandbox"
    forwarded["X-Content-Type-Options"] = "nosniff"
    return forwarded


def _end_to_end(headers: MultiMapping[str], also: frozenset[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for value in headers.getall("Connection", []) for name in value.split(",")}
    dropped = HOP_BY_HOP | also | named
    return CIMultiDict(
        (name, sendable(value))
        for name, value in headers.items()
        if name.lower() not in dropped and _TOKEN.fullmatch(name)
    )


def sendable(value: str) -> str:
    """What aiohttp reads and cannot write becomes `?`: control characters, and bytes that are no UTF-8."""
    clean = _CONTROL.sub("?", value)
    return clean if clean.isascii() else clean.encode("utf-8", "replace").decode("utf-8")
