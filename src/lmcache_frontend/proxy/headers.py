"""Which header fields go on to the other side (RFC 9110, sections 7.6.1 and 7.6.3), and what they say there.

They are read and written as bytes, as they came: a value in some old encoding reaches the other side unharmed. What a
field may hold has been checked by the parser that read it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lmcache_frontend.proxy.exchange import Fields, Proxying
from lmcache_frontend.proxy.target import ProxiedPath
from lmcache_shared.access.asking import Asking
from lmcache_shared.access.browser import followed_here
from lmcache_shared.access.caller import COOKIE_PREFIX, FRONTEND_VIA, SPEAKING_FOR_OTHERS, UNKNOWN, are_here
from lmcache_shared.address import Address, TcpAddress
from lmcache_shared.errors import Refusal

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Fields that concern one connection alone. `Connection` names further ones."""

_OF_A_REQUEST = HOP_BY_HOP | {
    b"host",
    b"expect",
    b"origin",
    b"sec-fetch-site",
    b"sec-fetch-mode",
    b"sec-fetch-dest",
    b"sec-fetch-user",
    b"via",
    b"x-forwarded-for",
    b"x-forwarded-host",
    b"x-forwarded-proto",
    b"x-forwarded-prefix",
}
"""And those that this server has acted on: the target has a host of its own, a transport says `Expect`, and whether
another site's page asks has been looked at (`Origin` names this host, which is none to the target). `Via` and
`X-Forwarded-*` are continued.
"""

_OF_AN_ANSWER = HOP_BY_HOP | {
    b"clear-site-data",
    b"service-worker-allowed",
    b"content-security-policy",
    b"x-content-type-options",
    b"strict-transport-security",
    b"alt-svc",
    b"nel",
    b"report-to",
    b"reporting-endpoints",
    b"location",
    b"set-cookie",
}
"""A node's page in a browser is kept out of the frontend's origin: no script of it runs, it installs nothing, and what
speaks for a whole origin is not its to say.
"""

_NAMING = frozenset(name.lower().encode() for name in SPEAKING_FOR_OTHERS)

_FRAMING = frozenset({b"content-length", b"host"})
"""What `Connection` cannot make anybody drop: it would change where the body ends."""

_CONTINUED = frozenset(
    {b"host", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-prefix"}
)
_REWRITTEN = frozenset({b"location", b"set-cookie"})

_COOKIE_DOMAIN = re.compile(rb";[ \t]*domain[ \t]*(=[^;]*)?(?=;|$)", re.IGNORECASE)
_COOKIE_PATH = re.compile(rb"(;[ \t]*path[ \t]*=[ \t]*)(/[^;]*)", re.IGNORECASE)


_VIA = FRONTEND_VIA.encode()
_UNKNOWN = UNKNOWN.encode()

_FOLLOWED_A_LINK = ((b"Sec-Fetch-Site", b"cross-site"), (b"Sec-Fetch-Mode", b"navigate"))
"""For the target, which may change something where the frontend knows of nothing."""

MAX_FRONTENDS = 12
"""A request that has passed more frontends goes in a circle."""

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass
class Introduction:
    """What a target is told of the caller for whom it is asked (`vouching.py`).

    Attributes:
        is_vouched_for: nothing names the caller; `Via` alone shows that somebody else asks.
        is_here: it is on this machine. Any other is named so that nobody takes it for one that is.
        authorization: what stands in place of the caller's own `Authorization`, which `hides_authorization` takes out
            in any case: it was for this frontend.
        cookie: the name of the cookie of who has signed in here.
    """

    is_vouched_for: bool = False
    is_here: bool = False
    hides_authorization: bool = False
    authorization: bytes | None = dataclasses.field(default=None, repr=False)
    cookie: bytes = b""


def refuse_loops(request: Asking) -> None:
    """Let a request pass so many frontends and no more.

    Raises:
        Refusal: 508 (RFC 5842, section 7.2).
    """
    if "Via" not in request.headers:
        return
    passed = sum(via.count(FRONTEND_VIA) for via in request.headers.getall("Via"))
    if passed >= MAX_FRONTENDS:
        raise Refusal(508, f"the request has passed {passed} frontends: their proxies lead in a circle; take one out")


def request_fields(request: Proxying, prefix: str, caller: Introduction) -> list[tuple[bytes, bytes]]:
    """What the target gets of a request's fields; `Via`, and whom and what the caller asked for, are continued.

    Args:
        request: the caller's.
        prefix: what its path has before the target's own.
        caller: what the target is told of the caller, and in whose name it is asked.
    """
    fields, own = _end_to_end(request.raw_headers, _OF_A_REQUEST, _CONTINUED)
    path = prefix.encode("utf-8", "surrogateescape")
    peer = (request.remote or "").encode()
    if len(own) == 1 and own[0][0].lower() == b"host":  # as of every caller that is no proxy
        via, host, proto = _VIA, own[0][1], b"http"
    else:
        via = _joined(own, b"via", _VIA)
        peer = _joined(own, b"x-forwarded-for", peer) if peer else b""
        host = _first(own, b"x-forwarded-host") or _first(own, b"host")
        proto = _first(own, b"x-forwarded-proto") or b"http"
        path = _first(own, b"x-forwarded-prefix").rstrip(b"/") + path
    if not caller.is_here and (not peer or are_here(peer.decode("utf-8", "surrogateescape").split(","))):
        peer = b"%b, %b" % (_UNKNOWN, peer) if peer else _UNKNOWN
    if not followed_here(request):
        fields += _FOLLOWED_A_LINK
    if caller.is_vouched_for:
        fields = [field for field in fields if field[0].lower() not in _NAMING]
        via = b", ".join([_VIA] * via.count(_VIA))
    elif peer:
        fields.append((b"X-Forwarded-For", peer))
    if host:
        fields.append((b"X-Forwarded-Host", host))
    fields += ((b"Via", via), (b"X-Forwarded-Proto", proto), (b"X-Forwarded-Prefix", path))
    if caller.authorization is not None or caller.hides_authorization:
        fields = [field for field in fields if field[0].lower() != b"authorization"]
        if caller.authorization is not None:
            fields.append((b"Authorization", caller.authorization))
    if caller.cookie and "Cookie" in request.headers:
        fields = list(_without_cookie(fields, caller.cookie))
    return fields


def _without_cookie(fields: Fields, cookie: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The fields, and of a cookie nothing (RFC 6265, section 4.2.1); a `Cookie` that held no other goes."""
    for name, value in fields:
        if name.lower() != b"cookie" or cookie not in value:
            yield name, value
        elif kept := [it for pair in value.split(b";") if (it := pair.strip()).partition(b"=")[0].strip() != cookie]:
            yield name, b"; ".join(kept)


def answer_fields(raw: Fields, wanted: ProxiedPath) -> list[tuple[bytes, bytes]]:
    """What the caller gets of an answer's fields, without the two that every proxied answer has.

    Where they tell of the target's own paths (`Location`, a cookie's `Path`), they tell of the same under the frontend.
    """
    fields, own = _end_to_end(raw, _OF_AN_ANSWER, _REWRITTEN)
    if own:
        prefix, skipped = wanted.prefix.encode("utf-8", "surrogateescape"), wanted.skipped.encode()
        is_root = wanted.path[len(wanted.skipped) :].partition("?")[0] == "/"
        for name, value in own:
            if name.lower() == b"set-cookie":
                if not is_own_cookie(value):
                    cookie = _confined(value, prefix, skipped)
                    if is_root and not _names_path(cookie):
                        cookie += b"; Path=%b/" % prefix  # by default it is for what lies beside the prefix too
                    fields.append((name, cookie))
            else:
                fields.append((name, _location(value, wanted.address, prefix, skipped)))
    return fields


def kept_by_nobody(fields: list[tuple[bytes, bytes]]) -> None:
    """Have an answer that may reveal something kept by no cache, unless its node says how."""
    if not any(name.lower() == b"cache-control" for name, _ in fields):
        fields.append((b"Cache-Control", b"no-store"))


def is_own_cookie(value: bytes) -> bool:
    """Whether a `Set-Cookie` would set what a frontend keeps of who has signed in: a node must not.

    Browsers cut white space off a name (RFC 6265, section 5.2), and send one without a name as its value alone.
    """
    return value.partition(b";")[0].lstrip(b"= \t").lower().startswith(COOKIE_PREFIX.encode())


def _confined(value: bytes, prefix: bytes, skipped: bytes) -> bytes:
    """A cookie for the target's paths under the frontend, and for no other host: `Domain` would name others."""
    value = _COOKIE_DOMAIN.sub(b"", value)
    return _COOKIE_PATH.sub(lambda found: found[1] + _cookie_path(found[2], prefix, skipped), value)


def _names_path(cookie: bytes) -> bool:
    """Whether it says for which paths it is (RFC 6265, section 5.2.4): the last `Path` counts, if it is one."""
    attributes = [it.partition(b"=") for it in cookie.split(b";")[1:]]
    paths = [value.strip(b" \t") for name, _, value in attributes if name.strip(b" \t").lower() == b"path"]
    return bool(paths) and paths[-1].startswith(b"/")


def _cookie_path(path: bytes, prefix: bytes, skipped: bytes) -> bytes:
    is_there = not skipped or (path + b"/").startswith(skipped + b"/")
    return _moved(path, prefix, skipped) if is_there else prefix + b"/"


def _location(value: bytes, address: Address, prefix: bytes, skipped: bytes) -> bytes:
    """A reference (RFC 9110, section 10.2.2): one to the target leads through the frontend."""
    authority = str(address) if isinstance(address, TcpAddress) else "localhost"
    start, path = value[: len(authority) + 7], value[len(authority) + 7 :]
    if start.lower() == f"http://{authority}".lower().encode() and path[:1] in (b"", b"/", b"?", b"#"):
        return _moved(path if path.startswith(b"/") else b"/" + path, prefix, skipped)
    return _moved(value, prefix, skipped) if value.startswith(b"/") and not value.startswith(b"//") else value


def _moved(path: bytes, prefix: bytes, skipped: bytes) -> bytes:
    """A path on the target as the caller has to ask for it; `skipped` was put there by the frontend in between."""
    if skipped and not path.startswith(skipped):
        return path
    return prefix + path[len(skipped) :]


def _joined(own: Fields, wanted: bytes, last: bytes) -> bytes:
    return b", ".join([*(value for name, value in own if name.lower() == wanted), last])


def _first(own: Fields, wanted: bytes) -> bytes:
    return next((value for name, value in own if name.lower() == wanted), b"")


def _end_to_end(
    raw: Fields, dropped: frozenset[bytes], kept: frozenset[bytes]
) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """The fields without those to be dropped, and of those the ones to be `kept` apart."""
    fields: list[tuple[bytes, bytes]] = []
    apart: list[tuple[bytes, bytes]] = []
    named: set[bytes] = set()
    for field in raw:
        name = field[0].lower()
        if name not in dropped:
            fields.append(field)
        elif name in kept:
            apart.append(field)
        elif name == b"connection":
            named.update(one.strip() for one in field[1].lower().split(b","))
    named -= _FRAMING
    if not named <= dropped:
        fields = [field for field in fields if field[0].lower() not in named]
    return fields, apart


def texts(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """Fields for aiohttp's client."""
    return [(name.decode("ascii", "replace"), sendable(value)) for name, value in fields]


def sendable(value: bytes) -> str:
    """What aiohttp reads and cannot write becomes `?`: control characters, and bytes that are no UTF-8."""
    return _CONTROL.sub("?", value.decode("utf-8", "replace").replace("\N{REPLACEMENT CHARACTER}", "?"))
