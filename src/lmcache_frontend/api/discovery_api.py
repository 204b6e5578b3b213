"""`/heartbeat`, `/lmcache_heartbeat` and `/lmcache_infos`: this frontend as the discovery service of others."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import msgspec
from aiohttp import web

from lmcache_frontend.app import DISCOVERY, POLICY
from lmcache_frontend.discovery.service import KEEP_SECONDS, Beat, Full, Report
from lmcache_frontend.nodes.found import MAX_FOUND, SCHEME, read_api_address
from lmcache_frontend.nodes.stores import StoreAway
from lmcache_frontend.proxy.rules import Number, is_numeral, number_of
from lmcache_shared.access.attempts import network_of
from lmcache_shared.access.caller import FRONTEND_VIA, is_local_caller, seen_address
from lmcache_shared.access.gate import caller_of
from lmcache_shared.access.roles import Role
from lmcache_shared.address import TcpAddress
from lmcache_shared.blocking import BlockingPool
from lmcache_shared.errors import AddressError, Refusal
from lmcache_shared.responses import json_response
from lmcache_shared.schema import parse_query

router = web.RouteTableDef()

MAX_OF_ONE = 32
"""Frontends that one host may report, so that it does not fill the room of all."""

MAX_VERSION_LENGTH = 100
MAX_OTHER_INFO_BYTES = 4096
MAX_PID_DIGITS = 18
AGAIN_SECONDS = "5"

LOOKUP_SECONDS = 5.0
"""How long a heartbeat waits for the name that it reports."""

LOOKUPS: web.AppKey[BlockingPool] = web.AppKey("lookups of reported names", BlockingPool)
"""Anybody can have names looked up that take long: they have threads of their own."""


def setup(app: web.Application) -> None:
    app.cleanup_ctx.append(_lookups)


async def _lookups(app: web.Application) -> AsyncIterator[None]:
    app[LOOKUPS] = BlockingPool("reported-names", threads=4, waiting=64)
    yield
    app[LOOKUPS].close()


@dataclass(frozen=True)
class InfosQuery:
    hour: int | None = None
    minute: int | None = None


@router.get("/heartbeat", allow_head=False)
@router.get("/lmcache_heartbeat", allow_head=False)
async def heartbeat(request: web.Request) -> web.Response:
    """Keep a frontend's heartbeat; one without `api_address` is a success too, and nothing is kept of it."""
    _refuse_browsers_of_others(request)
    if request.query.get("api_address"):
        try:
            await request.app[DISCOVERY].keep(await _beat(request))
        except StoreAway as away:
            raise Refusal(503, f"the heartbeat is not kept: {away}", {"Retry-After": AGAIN_SECONDS}) from None
        except Full:
            problem = f"{MAX_FOUND} frontends send heartbeats here already; a further one needs another service"
            raise Refusal(503, problem, {"Retry-After": AGAIN_SECONDS}) from None
    return json_response({"status": "success"})


@router.get("/lmcache_infos")
async def infos(request: web.Request) -> web.Response:
    """Who has sent heartbeats; `?hour=` and `?minute=` ask for those of the last so many."""
    query = parse_query(request, InfosQuery)
    seconds = KEEP_SECONDS
    if query.hour is not None:
        seconds = query.hour * 3600.0
    elif query.minute is not None:
        seconds = query.minute * 60.0
    reports = request.app[DISCOVERY].since(seconds)
    return json_response(
        {
            "processCount": len(reports),
            "versionCount": len({report.version for report in reports.values()}),
            "versions": None,
            "processInfos": {address: _info(address, report) for address, report in reports.items()},
        }
    )


def _info(address: str, report: Report) -> dict[str, object]:
    entity = {
        "apiAddress": address,
        "ipAddress": None,
        "pid": report.pid,
        "version": report.version,
        "startTime": _clock(report.started),
        "lastReportTime": _clock(report.reported),
        "otherInfo": report.other_info,
    }
    return {"count": 1, "lmCacheInfoEntities": [entity]}


def _clock(seconds: float) -> str:
    """Local time, as LMCache's service writes it."""
    return datetime.fromtimestamp(seconds, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _refuse_browsers_of_others(request: web.Request) -> None:
    """A link on another site may lead to a page here; it may not make a proxy known.

    Raises:
        Refusal: 403.
    """
    if not {"none", "same-origin"}.issuperset(request.headers.getall("Sec-Fetch-Site", [])):
        raise Refusal(403, "a page of another site made this request; it is refused (Sec-Fetch-Site)")


async def _beat(request: web.Request) -> Beat:
    """The heartbeat's parameters; of a repeated one the first counts, as with LMCache's service.

    Raises:
        Refusal: 400.
    """
    query = request.query
    try:
        return Beat(
            api_address=await _api_address(request),
            pid=_pid(query.get("pid", "")),
            version=_version(query.get("version", "1.0.0")),
            other_info=_other_info(query.get("other_info") or "{}"),
        )
    except ValueError as error:
        raise Refusal(400, str(error)) from None


async def _api_address(request: web.Request) -> str:
    text = request.query["api_address"]
    if not text.startswith(SCHEME):
        raise AddressError(f"api_address {text[:100]!r}: expected http://host:port")
    try:
        where = read_api_address(text)
    except AddressError as error:
        raise AddressError(f"api_address {error}") from None
    if where.is_loopback and not is_local_caller(request):
        raise AddressError(f"api_address {where}: is this machine and not yours; report another with --report-host")
    return f"{SCHEME}{await _allowed(request, where)}"


async def _allowed(request: web.Request, where: TcpAddress) -> TcpAddress:
    """What is reported can be reached through the proxy: anybody may report himself, and an operator everybody.

    A name of its sender is kept as the address that it resolves to: whoever owns it cannot lead it elsewhere later.

    Raises:
        Refusal: 403.
    """
    if any(FRONTEND_VIA in via for via in request.headers.getall("Via", ())):  # which may have shown its own token here
        raise Refusal(403, f"api_address {where}: a frontend reports by itself, not through the proxy of another one")
    caller = seen_address(request)
    if caller_of(request).role >= Role.OPERATOR or request.app[POLICY].names(where):
        return where
    sender = number_of(caller)
    if sender is not None and not sender.is_loopback and await _leads_to(request, where.host, sender):
        itself = where if number_of(where.host) == sender else replace(where, host=str(sender))
        _refuse_many_of_one(request, itself)
        return itself
    raise Refusal(
        403,
        f"api_address {where}: this heartbeat comes from {caller}, and may report that address or a name that"
        f" resolves to it; allow this one"
        f" with --allow-target {where}",
    )


async def _leads_to(request: web.Request, host: str, sender: Number) -> bool:
    """Whether a host is the sender: this address, or a name that has it."""
    number = number_of(host)
    if number is not None or is_numeral(host):
        return number == sender
    what = f"looking up {host}"
    return sender in await request.app[LOOKUPS].run(lambda: _addresses(host), seconds=LOOKUP_SECONDS, what=what)


def _addresses(name: str) -> set[Number | None]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {number_of(str(info[4][0])) for info in found}


def _refuse_many_of_one(request: web.Request, where: TcpAddress) -> None:
    """Raises:
    Refusal: 403.
    """
    known, network = request.app[DISCOVERY].since(), network_of(where.host)
    if f"{SCHEME}{where}" in known:
        return
    if sum(network_of(read_api_address(one).host) == network for one in known) >= MAX_OF_ONE:
        raise Refusal(
            403,
            f"api_address {where}: {MAX_OF_ONE} frontends of this host are known already; allow more with"
            f" --allow-target {where}",
        )


def _pid(text: str) -> int | None:
    """As LMCache's service: what is no number is none."""
    digits = text.strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= MAX_PID_DIGITS else None


def _version(text: str) -> str:
    if len(text) > MAX_VERSION_LENGTH or not text.isprintable():
        raise ValueError(f"version: expected at most {MAX_VERSION_LENGTH} printable characters")
    return text


def _other_info(text: str) -> str:
    try:
        data = text.encode()
        msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        data = b""
    if not data or len(data) > MAX_OTHER_INFO_BYTES:
        raise ValueError(f"other_info: expected JSON of at most {MAX_OTHER_INFO_BYTES} bytes")
    return text
