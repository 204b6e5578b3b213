"""The front of the server: connections that carry proxied requests, read and answered below aiohttp's server.

That spends more on a request than all that the proxy does. A connection stays here for as long as each of its requests
is one for the proxy, without a body. With the first other one it is handed over, for good and with all that has come of
it: to aiohttp's server, where the same rules are asked by the same functions, by `api/proxy_api.py` too. So nothing
here has to know how a body is framed, or what to say to who speaks no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import socket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from aiohttp import HttpVersion, web
from multidict import CIMultiDictProxy

from lmcache_frontend.proxy import limits, passing
from lmcache_frontend.proxy.answering import Written, in_one_piece, taken
from lmcache_frontend.proxy.head import MAX_HEAD_BYTES, Fields, Head, Heads
from lmcache_frontend.proxy.leaving import Leaving
from lmcache_shared.access.asking import HandlerOf
from lmcache_shared.errors import refusals
from lmcache_shared.listen import KEEPALIVE_SECONDS, AccessLogger

logger = logging.getLogger(__name__)

MAX_PIPELINED_BYTES = 64 << 10
"""Of what has come behind a request that is not answered yet; then the caller is not read."""

Others = Callable[[asyncio.Transport, bytes], None]
"""Takes a connection for good, with what has been read of it and not been served."""


class Front:
    """Serves proxied requests: a factory of protocols, for `loop.create_server`.

    Args:
        app: the frontend's application, whose rules and targets are used.
        others: takes the connections that carry other requests.
        access_log: where a line for each request goes.
    """

    def __init__(self, app: web.Application, others: Others, *, access_log: logging.Logger | None = None) -> None:
        self.app = app
        self.others = others
        self.heads = Heads()
        self.by_address = _judged(app, passing.by_address)
        self.by_name = _judged(app, passing.by_name)
        self.access_log = AccessLogger(access_log, "") if access_log is not None else None
        self.is_stopping = False
        self._connections: set[_Connection] = set()
        self._all_gone = asyncio.Event()

    def __call__(self) -> asyncio.Protocol:
        return _Connection(self)

    async def shutdown(self, seconds: float) -> None:
        """Close idle connections, let requests in flight and their answers take so long, and cut off the others."""
        self.is_stopping = True
        for connection in list(self._connections):
            connection.close_if_idle()
        if self._connections:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._all_gone.wait(), seconds)
        tasks = [connection.task for connection in self._connections if connection.task is not None]
        for connection in list(self._connections):
            connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)

    def came(self, connection: _Connection) -> None:
        self._connections.add(connection)
        self._all_gone.clear()

    def left(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._all_gone.set()


def _judged(app: web.Application, handler: HandlerOf[_Request]) -> HandlerOf[_Request]:
    """The rules of the application around a handler: its middlewares."""
    for rule in reversed(app.middlewares):
        handler = functools.partial(cast(Any, rule), handler=handler)
    return handler


class _Route(NamedTuple):
    resource: None = None


class _Match(NamedTuple):
    """As a request of aiohttp's tells which route it took."""

    handler: object
    route: _Route = _Route()
    http_exception: None = None


_MATCH = _Match(passing.by_name)  # both need the same


class _Request(dict[Any, Any]):
    """One request on its connection: `exchange.Proxying`."""

    __slots__ = ("app", "head", "headers", "keep_alive", "method", "protocol", "raw_headers", "raw_path")

    body_exists = False
    match_info = _MATCH
    cookies: Mapping[str, str] = {}

    def __init__(self, head: Head, connection: _Connection, app: web.Application) -> None:
        self.app = app
        self.head = head
        self.protocol = connection
        self.method: str = head.method
        self.raw_path: str = head.raw_path
        self.raw_headers: Fields = head.raw_headers
        self.headers: CIMultiDictProxy[str] = head.headers
        self.keep_alive: bool = head.keep_alive

    @property
    def version(self) -> HttpVersion:
        return self.head.version

    @property
    def transport(self) -> asyncio.Transport | None:
        return self.protocol.transport

    @property
    def remote(self) -> str | None:
        return self.protocol.remote

    @property
    def writer(self) -> _Connection:
        return self.protocol

    @property
    def host(self) -> str:
        host = self.headers.get("Host")
        return self.protocol.own_host if host is None else host

    @property
    def path(self) -> str:
        return self.head.url.path

    @property
    def path_qs(self) -> str:
        return self.raw_path

    @property
    def query_string(self) -> str:
        return self.head.url.query_string

    @property
    def query(self) -> Mapping[str, str]:
        return self.head.query


class _Connection(asyncio.Protocol):
    """One connection. It reads a head and has a task answer it; what comes meanwhile waits.

    One timer looks at a deadline that moves: until the next request's first byte, from then until the head's end.
    """

    __slots__ = (
        "_deadline",
        "_drained",
        "_front",
        "_head",
        "_head_bytes",
        "_leaving",
        "_loop",
        "_passed",
        "_pending",
        "_reading_paused",
        "_timer",
        "remote",
        "task",
        "transport",
        "writing_paused",
    )  # fmt: skip

    def __init__(self, front: Front) -> None:
        self.transport: asyncio.Transport | None = None
        self.task: asyncio.Task[None] | None = None
        self.remote: str | None = None
        self.writing_paused = False
        self._front = front
        self._loop = asyncio.get_running_loop()
        self._pending = b""
        self._head_bytes = b""
        self._head: Head | None = None
        self._passed: passing.Passed | None = None
        self._reading_paused = False
        self._leaving: Leaving | None = None
        self._drained: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = math.inf

    @property
    def own_host(self) -> str:
        """As `web.Request.host` is for who names none."""
        name = self.transport.get_extra_info("sockname") if self.transport is not None else None
        if isinstance(name, tuple):
            return f"[{name[0]}]" if len(name) == 4 else str(name[0])
        return str(name or "")

    def close_if_idle(self) -> None:
        if self.task is None and self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        if self.task is not None:
            self.task.cancel()

    # -- what the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of asyncio's
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.remote = str(peer[0])
            _watch(transport.get_extra_info("socket"))
        elif peer:
            self.remote = str(peer)
        self._front.came(self)
        self._expect(KEEPALIVE_SECONDS)

    def data_received(self, data: bytes) -> None:
        is_first = not self._pending
        self._pending = data if is_first else self._pending + data
        if self.task is None:
            self._read(is_first)
        if len(self._pending) > MAX_PIPELINED_BYTES and not self._reading_paused and self.transport is not None:
            self._reading_paused = True
            self.transport.pause_reading()
            self._leaving = Leaving(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self.transport = self._passed = None
        if self.task is not None:
            self.task.cancel()  # and with it what it asks of its target
        self.resume_writing()

    def pause_writing(self) -> None:
        self.writing_paused = True

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    async def drain(self) -> None:
        """Until the caller has taken most of what was written."""
        if self.writing_paused:
            self._drained = self._loop.create_future()
            await self._drained
        if self.transport is None:
            raise ConnectionResetError("the caller is gone")

    # -- one request after the other

    def _read(self, is_first: bool) -> None:
        """Answer the next request, hand the connection over, or wait for more of a head."""
        data = self._pending
        end = data.find(b"\r\n\r\n") + 4
        heads = self._front.heads
        if end > 3:
            of_head = data if end == len(data) else data[:end]
            is_repeated = of_head == self._head_bytes
            head = self._head if is_repeated else heads.read(of_head)
            if head is not None:
                self._pending = data[end:]
                self._deadline = math.inf
                request = _Request(head, self, self._front.app)
                handler = self._front.by_name if head.is_named else self._front.by_address
                if not is_repeated:
                    self._head_bytes, self._head, self._passed = of_head, head, None
                elif self._passed is not None and passing.may_pass_again(self._front.app, self._passed):
                    handler = self._again
                else:
                    request[passing.REPEATED] = True
                self.task = self._loop.create_task(self._answer(request, handler))
                return
        elif len(data) <= MAX_HEAD_BYTES and heads.may_become_one(data):
            if is_first:
                self._expect(limits.HEAD_SECONDS)
            return
        self._hand_over()

    async def _again(self, request: _Request) -> web.StreamResponse:
        return await refusals(request, self._pass_again)

    async def _pass_again(self, request: _Request) -> web.StreamResponse:
        assert self._passed is not None, "asked for when there is one"
        return await passing.again(request, self._passed)

    async def _answer(self, request: _Request, handler: HandlerOf[_Request]) -> None:
        began = self._loop.time()
        try:
            response = await handler(request)
            self._passed = request.pop(passing.PASSED, self._passed)
            if not isinstance(response, Written):
                response = self._write(request, response)
                if self.writing_paused:
                    await taken(request)
            if self._front.access_log is not None:
                self._front.access_log.log(cast(Any, request), response, self._loop.time() - began)
        except Exception as error:  # `refusals` has answered all others
            if not isinstance(error, ConnectionError):
                logger.exception("%s %s failed", request.method, request.path)
            if self.transport is not None:
                self.transport.abort()
            return
        except asyncio.CancelledError:
            return
        finally:
            self.task = None
        self._answered(bool(response.keep_alive))

    def _answered(self, keep_alive: bool) -> None:
        if self.transport is None:
            return
        if not keep_alive or self._front.is_stopping:
            self.transport.close()
            return
        if self._reading_paused and len(self._pending) <= MAX_PIPELINED_BYTES:
            self._go_on_reading(self.transport)
        if self._pending:
            self._expect(limits.HEAD_SECONDS)
            self._read(is_first=False)
        else:
            self._expect(KEEPALIVE_SECONDS)

    def _write(self, request: _Request, response: web.StreamResponse) -> Written:
        """Write a refusal."""
        if self.transport is None:
            raise ConnectionResetError("the caller is gone")
        data = in_one_piece(request, cast(web.Response, response))
        self.transport.write(data)
        return Written(response.status, keep_alive=request.keep_alive, length=len(data))

    def _hand_over(self) -> None:
        transport, data = self.transport, self._pending
        assert transport is not None, "who is gone sends nothing"
        if self._reading_paused:
            self._go_on_reading(transport)
        self._leave()
        self.transport = None
        self._pending = b""
        self._front.others(transport, data)

    def _leave(self) -> None:
        self._front.left(self)
        self._watch_no_more()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go_on_reading(self, transport: asyncio.Transport) -> None:
        self._reading_paused = False
        self._watch_no_more()
        transport.resume_reading()

    def _watch_no_more(self) -> None:
        if self._leaving is not None:
            self._leaving.close()
            self._leaving = None

    def _expect(self, seconds: float) -> None:
        self._deadline = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > self._deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline, self._look_at_deadline)

    def _look_at_deadline(self) -> None:
        self._timer = None
        if self._deadline == math.inf:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._look_at_deadline)
        elif self.transport is not None:
            self.transport.close()


def _watch(sock: socket.socket) -> None:
    """Have the kernel cut a caller off that is gone, or that takes nothing of what was written for `IDLE_SECONDS`.

    Also when all has been written, and the connection is closed, or is another server's.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.IDLE_SECONDS * 1000))
