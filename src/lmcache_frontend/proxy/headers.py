"""Which header fields go on to the other side (RFC 9110, sections 7.6.1 and 7.6.3)."""

from __future__ import annotations

from multidict import CIMultiDict, MultiMapping

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

_ANSWERED_HERE = frozenset({"host", "expect"})
"""Request fields that this server has acted on: the target has a host of its own, and `100 Continue` went out."""

VIA = "1.1 lmcache-frontend"


def request_headers(headers: MultiMapping[str]) -> CIMultiDict[str]:
    """What the target gets of a request's fields, and a `Via`."""
    forwarded = _end_to_end(headers, _ANSWERED_HERE)
    via = headers.get("Via")
    forwarded["Via"] = f"{via}, {VIA}" if via else VIA
    return forwarded


def response_headers(headers: MultiMapping[str]) -> CIMultiDict[str]:
    """What the caller gets of a response's fields."""
    return _end_to_end(headers, frozenset())


def _end_to_end(headers: MultiMapping[str], also: frozenset[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for value in headers.getall("Connection", []) for name in value.split(",")}
    dropped = HOP_BY_HOP | also | named
    return CIMultiDict((name, _sendable(value)) for name, value in headers.items() if name.lower() not in dropped)


def _sendable(value: str) -> str:
    """aiohttp reads a byte that is no UTF-8 as a lone surrogate and cannot write it; such a byte becomes `?`."""
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
