"""How a request gets to its target and the answer back: streamed both ways, through one client per target."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

import aiohttp
from aiohttp import HttpVersion11, web
from multidict import CIMultiDict
from yarl import URL

from lmcache_frontend.proxy.headers import request_headers, response_headers, sendable
from lmcache_shared.address import Address, TcpAddress
from lmcache_shared.errors import Refusal

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
"""To get a connection, its place in the pool included."""

READ_SECONDS = 60.0
"""Between two pieces of an answer, its head included: LMCache's frontend waits as long for the whole."""

CONNECTIONS_PER_TARGET = 100

KEEPALIVE_SECONDS = 4.0
"""An idle connection is dropped before its server does so: uvicorn, under LMCache's own servers, waits 5 seconds."""

MAX_UNREGISTERED_TARGETS = 64
"""Clients kept for targets that are no registered nodes; the one unused for longest goes first."""

MAX_REASON_LENGTH = 300

_LEFT_OUT = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Fields that aiohttp's client would add where the caller sent none."""


class Target:
    """One target's client, with its pool of connections."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.in_use = 0
        self.session = aiohttp.ClientSession(
            connector=address.connector(limit=CONNECTIONS_PER_TARGET, keepalive_timeout=KEEPALIVE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None, connect=CONNECT_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS
            ),
            auto_decompress=False,
            skip_auto_headers=_LEFT_OUT,
        )

    def __enter__(self) -> aiohttp.ClientSession:
        self.in_use += 1
        return self.session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.in_use -= 1

    def url(self, path: str) -> URL:
        """`path`, with its query, at this target; nothing in it is decoded, sorted or encoded anew."""
        if isinstance(self.address, TcpAddress):
            return URL.build(scheme="http", authority=str(self.address), path=path, encoded=True)
        return URL.build(scheme="http", host="localhost", path=path, encoded=True)


class Targets:
    """The clients of all targets. A registered node's lives as long as it is registered.

    Args:
        is_registered: whether a node is registered at an address.
    """

    def __init__(self, is_registered: Callable[[Address], bool]) -> None:
        self._is_registered = is_registered
        self._targets: OrderedDict[Address, Target] = OrderedDict()

    async def get(self, address: Address) -> Target:
        """The target at `address`, made at its first use."""
        target = self._targets.get(address)
        if target is not None:
            self._targets.move_to_end(address)
            return target
        target = self._targets[address] = Target(address)
        with target:  # nobody else drops it while this waits
            for unused in self._take_unused():
                await unused.session.close()
        return target

    def _take_unused(self) -> list[Target]:
        """The targets to give up, taken out at once: while they are closed, others may come and go."""
        others = [address for address in self._targets if not self._is_registered(address)]
        surplus = others[: max(0, len(others) - MAX_UNREGISTERED_TARGETS)]
        return [self._targets.pop(address) for address in surplus if self._targets[address].in_use == 0]

    async def close(self) -> None:
        while self._targets:
            _, target = self._targets.popitem()
            await target.session.close()


@dataclass
class Traffic:
    """What went through for one request: bytes of bodies, and whether an answer or its reader broke off."""

    sent: int = 0
    received: int = 0
    broke_off: bool = False


async def forward(
    request: web.Request,
    target: Target,
    path: str,
    traffic: Traffic,
    introduce: Callable[[CIMultiDict[str]], None],
) -> web.StreamResponse:
    """Send the request on to `path` at `target`, and its answer back; `traffic` is counted meanwhile.

    `introduce` writes into the fields that go on who asks.

    No body is held whole. An answer that breaks off breaks the caller's connection off too, so that half an answer
    never looks whole.

    Raises:
        Refusal: 502 when the target cannot be reached or speaks no HTTP, 504 when it is too slow.
    """
    headers = request_headers(request.headers)
    introduce(headers)
    with target as session:
        try:
            upstream = await session.request(
                request.method,
                target.url(path),
                headers=headers,
                data=_pieces(request, traffic) if request.can_read_body else None,
                allow_redirects=False,
            )
        except asyncio.TimeoutError:
            raise Refusal(504, _timed_out(target.address)) from None
        except aiohttp.ClientConnectorError as error:
            logger.debug("cannot connect to %s: %s", target.address, error)  # a scraper asks a dead target without end
            raise Refusal(502, _not_reached(target.address)) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Refusal(502, f"Error communicating with target service: {reason(error)}") from None
        async with upstream:
            return await _send_back(request, upstream, traffic)


async def _send_back(request: web.Request, upstream: aiohttp.ClientResponse, traffic: Traffic) -> web.StreamResponse:
    if not 200 <= upstream.status <= 599:
        raise Refusal(502, f"Error communicating with target service: it answers with the status {upstream.status}")
    headers = response_headers(upstream.headers)
    response = web.StreamResponse(status=upstream.status, reason=sendable(upstream.reason or ""), headers=headers)
    if request.version < HttpVersion11 and "Content-Length" not in headers:
        response.force_close()  # HTTP/1.0 knows no other end of such a body
    try:
        with _lost_connections_end(upstream):
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                traffic.received += len(chunk)
                with _cut_off_late_reader(request):
                    await response.write(chunk)
        with _cut_off_late_reader(request):
            await response.write_eof()
    except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as error:
        traffic.broke_off = True
        logger.info("%s %s broke off: %s", request.method, request.path, error or type(error).__name__)
        if request.transport is not None:
            request.transport.abort()
    return response


async def _pieces(request: web.Request, traffic: Traffic) -> AsyncIterator[bytes]:
    """The request's body as it comes; a caller that stops sending does not hold a connection to the target."""
    while piece := await asyncio.wait_for(request.content.readany(), READ_SECONDS):
        traffic.sent += len(piece)
        yield piece


@contextlib.contextmanager
def _cut_off_late_reader(request: web.Request) -> Iterator[None]:
    """A caller that takes no piece within `READ_SECONDS` is cut off: it must not hold a connection to the target.

    A timer, not `wait_for`: that makes a task for every piece up to Python 3.11.
    """
    if request.transport is None:
        yield
        return
    timer = asyncio.get_running_loop().call_later(READ_SECONDS, request.transport.abort)
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _lost_connections_end(upstream: aiohttp.ClientResponse) -> Iterator[None]:
    """Reading the answer ends with an error when its connection is gone and the answer is not whole.

    aiohttp (3.14) closes the connection when the framing of a body breaks in the middle, but never tells the reader,
    who would wait for ever.
    """

    def lost(_: object = None) -> None:
        if not upstream.content.is_eof() and upstream.content.exception() is None:
            upstream.content.set_exception(aiohttp.ClientPayloadError("the connection was lost"))

    protocol = upstream.connection.protocol if upstream.connection is not None else None
    if protocol is None:  # the answer came whole with its head
        yield
        return
    closed = protocol.closed
    if closed is None:
        lost()
        yield
        return
    closed.add_done_callback(lost)
    try:
        yield
    finally:
        closed.remove_done_callback(lost)  # a connection serves many answers


def reason(error: Exception) -> str:
    """In one line: aiohttp tells of broken HTTP in several, with a pointer at the byte."""
    text = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
    return " ".join(text.split())[:MAX_REASON_LENGTH] or type(error).__name__


def _not_reached(address: Address) -> str:
    kind = "target service" if isinstance(address, TcpAddress) else "socket:"
    return f"Failed to connect to {kind} {address}"


def _timed_out(address: Address) -> str:
    kind = "target service" if isinstance(address, TcpAddress) else "socket"
    return f"Connection to {kind} {address} timed out"
