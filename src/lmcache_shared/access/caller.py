"""Who is on this machine: a caller that connects from here, and for whom no proxy speaks.

Where a proxy on this machine (nginx, an ssh tunnel's far end) connects for callers elsewhere, the fields that it adds
show it; one that adds none and names this machine in `Host` cannot be told from a caller here (docs/security.md).
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

from multidict import CIMultiDictProxy

from lmcache_shared.access.asking import Asking
from lmcache_shared.access.roles import Role
from lmcache_shared.address import is_loopback_host
from lmcache_shared.errors import Refusal

FRONTEND_VIA = "1.1 lmcache-frontend"
"""What a frontend of this project adds to `Via`."""

COOKIE_PREFIX = "lmcache_frontend_"
"""A frontend's cookie of who has signed in has its port behind it: browsers send cookies to every port of a host."""

SPEAKING_FOR_OTHERS = ("Forwarded", "X-Forwarded-For", "X-Real-IP")
"""Fields that a proxy adds to name the caller that it speaks for (RFC 7239, and custom)."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9.-]{1,253})(?::[0-9]{1,5})?", re.ASCII)
_ADDRESS_CHARACTERS = 64

_UNIX_SOCKET = "unix socket"
UNKNOWN = "unknown"
"""Who cannot be told (RFC 7239, section 6.1)."""


@dataclass(frozen=True)
class Caller:
    """Who calls: a name for the log, and a role.

    Attributes:
        by_token: a token said so; it is for this server and goes on to no other.
        refusal: why it is nobody: what was shown is no token. What needs a role is refused by it.
        is_here: it is on this machine, and callers there are trusted.
    """

    name: str
    role: Role
    by_token: bool = False
    refusal: Refusal | None = None
    is_here: bool = False


def is_local_caller(request: Asking, *, through_frontends: bool = False) -> bool:
    """Whether the caller is on this machine: it connects over loopback or a Unix socket, and no proxy speaks for it.

    A page in a local browser that came by a name that was made to point here (DNS rebinding) connects over loopback
    too; it does not count, and `Host` shows it. What a page of another site asks is refused before (`browser.py`).

    Args:
        through_frontends: also when frontends of this project on this machine stand between, and nobody else. They
            name the caller in `X-Forwarded-For`, a caller here as 127.0.0.1, or have found that it may ask for this
            and leave the field out. A caller that makes such fields up gains nothing that it would not have without.
    """
    headers = request.headers
    hops = _listed(headers, "Via") if "Via" in headers else []
    if hops and not (through_frontends and all(hop == FRONTEND_VIA for hop in hops)):
        return False
    for name in SPEAKING_FOR_OTHERS:
        if name in headers and not (hops and name == "X-Forwarded-For" and are_here(_listed(headers, name))):
            return False
    hosts = headers.getall("Host", [])
    asked = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    return asked is not None and is_loopback_host(asked[1]) and _connects_from_here(request)


def _listed(headers: CIMultiDictProxy[str], name: str) -> list[str]:
    return [one.strip() for value in headers.getall(name, ()) for one in value.split(",")]


def are_here(callers: list[str]) -> bool:
    """Whether none of those that `X-Forwarded-For` lists is elsewhere."""
    return all(is_loopback_host(caller.strip()) for caller in callers)


def _connects_from_here(request: Asking) -> bool:
    peer = _peer(request)
    return peer == _UNIX_SOCKET or is_loopback_host(peer)


def _peer(request: Asking) -> str:
    """From where it connects. Of who has reset a TCP connection before it was taken the kernel tells nothing."""
    transport = request.transport
    if transport is None:
        return UNKNOWN
    remote = request.remote or ""
    if is_loopback_host(remote):  # to ask the transport is a system call
        return remote
    peer = transport.get_extra_info("peername")
    if isinstance(peer, tuple):
        return str(peer[0])
    sock = transport.get_extra_info("socket")
    return _UNIX_SOCKET if sock is not None and sock.family == socket.AF_UNIX else UNKNOWN


def seen_address(request: Asking) -> str:
    """Where the caller is, for people and for counting: of a proxy on this machine the caller that it names last."""
    host = _peer(request)
    named = request.headers.getall("X-Forwarded-For", [])
    if named and _connects_from_here(request):
        host = named[-1].rpartition(",")[2].strip()[:_ADDRESS_CHARACTERS] or host
    return host if host.isprintable() else ascii(host)


def bearer_token(request: Asking) -> str | None:
    """What `Authorization: Bearer` holds (RFC 6750, section 2.1)."""
    values = request.headers.getall("Authorization", [])
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None
