"""A transport on bare connections (`connection.py`): a pool of them for each target.

A request's head is one piece of bytes, written with its body where that is here already.
"""

from __future__ import annotations

import asyncio
from collections import deque

from lmcache_frontend.proxy import limits
from lmcache_frontend.proxy.breaker import Breaker
from lmcache_frontend.proxy.connect import connect
from lmcache_frontend.proxy.connection import Connection, Said, Stale
from lmcache_frontend.proxy.exchange import (
    Outgoing,
    Tunnel,
    no_answer,
    not_reached,
    overloaded,
    timed_out,
)
from lmcache_shared.address import Address, TcpAddress
from lmcache_shared.errors import Refusal

_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
"""Methods that may be sent again when nobody knows whether they arrived (RFC 9110, section 9.2.2)."""


class Room:
    """How many connections there are to all targets together."""

    def __init__(self) -> None:
        self.taken = 0


class NativeTransport:
    """The pool of one target.

    Args:
        address: the target's.
        room: counts this one's connections too.
    """

    def __init__(self, address: Address, room: Room | None = None) -> None:
        self.address = address
        self._room = room or Room()
        self._breaker = Breaker(address)
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._connecting = 0
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        host = "localhost"
        if isinstance(address, TcpAddress):  # an IPv6 scope is for this machine alone (RFC 6874)
            host = str(TcpAddress(address.host.partition("%")[0], address.port))
        self._said = Said()
        self._after_path = f" HTTP/1.1\r\nHost: {host}\r\n".encode()

    async def request(self, outgoing: Outgoing) -> Tunnel:
        body = outgoing.body
        whole = body.whole() if body is not None else None
        is_held_back = outgoing.is_held_back and whole is None
        head = outgoing.head = outgoing.head or self._head(outgoing, is_held_back)
        if whole is not None:
            head, body = head + _framed(whole, outgoing), None
        may_retry = body is None and outgoing.method in _IDEMPOTENT
        if not may_retry and self._idle:
            # The target may hang up on a kept one in this very moment, and nobody would know whether it has acted:
            # what cannot be sent again goes over a new one, in the place of that.
            self._idle.pop().abort()
        connection = (self._reused() if may_retry else None) or await self._new(may_retry)
        while True:
            is_reused = connection.is_reused
            try:
                await connection.ask(head, outgoing, body)
                return connection
            except Stale as stale:
                connection.release()
                if stale.is_unsent:
                    connection = (self._reused() if may_retry else None) or await self._new(may_retry)
                    continue
                if not (is_reused and may_retry):
                    raise no_answer("it hangs up without an answer") from None
                may_retry = False
            except BaseException:
                connection.release()
                raise
            connection = await self._new(may_be_kept=False)

    async def close(self) -> None:
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in [*self._idle, *self._busy]:
            connection.abort()
        self._idle.clear()
        while self._waiting:
            self._give_way()

    @property
    def in_use(self) -> bool:
        return bool(self._busy or self._connecting or self._waiting)

    def _head(self, outgoing: Outgoing, is_held_back: bool) -> bytes:
        lines = [b"%s: %s\r\n" % field for field in outgoing.fields]
        if outgoing.body is not None and outgoing.body.is_chunked:
            lines.append(b"Transfer-Encoding: chunked\r\n")
        if is_held_back:
            lines.append(b"Expect: 100-continue\r\n")
        start = f"{outgoing.method} {outgoing.path}".encode("ascii")
        return b"".join([start, self._after_path, *lines, b"\r\n"])

    def _reused(self) -> Connection | None:
        """The connection that was used last, for the others to grow old and go."""
        if not self._idle:
            return None
        oldest = asyncio.get_running_loop().time() - limits.KEEPALIVE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.used_at > oldest:
                self._busy.add(connection)
                return connection
            connection.abort()
        return None

    async def _new(self, may_be_kept: bool) -> Connection:
        """A new connection, or, if it may, one that another request has done with while this one stood in line."""
        loop = asyncio.get_running_loop()
        until = loop.time() + limits.CONNECT_SECONDS
        if self._waiting or len(self._busy) + self._connecting >= limits.CONNECTIONS_PER_TARGET:
            given = await self._stand_in_line()
            if given is not None:
                if may_be_kept:
                    return given
                self._replace(given)
        else:
            self._connecting += 1
        connection = None
        try:
            connection = await self._connected(until - loop.time())
        finally:
            self._connecting -= 1
            if connection is None:
                self._give_way()
        self._busy.add(connection)
        connection.counts = True
        return connection

    async def _connected(self, seconds: float) -> Connection:
        if self._room.taken >= limits.CONNECTIONS:
            raise overloaded(self.address)
        if self._closed:
            raise not_reached(self.address)
        self._breaker.check()
        self._room.taken += 1
        connection = None
        try:
            connection = await connect(self.address, lambda: Connection(self.address, self._left, self._said), seconds)
        except asyncio.TimeoutError:
            raise self._breaker.failed(timed_out(self.address)) from None
        except OSError as error:
            raise self._breaker.failed(not_reached(self.address, error)) from None
        except BaseException:
            self._breaker.gave_up()
            raise
        finally:
            if connection is None:
                self._room.taken -= 1
        self._breaker.connected()
        return connection

    async def _stand_in_line(self) -> Connection | None:
        """A connection, or the right to make one, which counts as one that is being made."""
        if len(self._waiting) >= limits.WAITING_PER_TARGET:
            raise overloaded(self.address)
        loop = asyncio.get_running_loop()
        place: asyncio.Future[Connection | None] = loop.create_future()
        self._waiting.append(place)
        timer = loop.call_later(limits.CONNECT_SECONDS, _refuse, place, overloaded(self.address))
        try:
            return await place
        except BaseException:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._return(place.result())
            elif place in self._waiting:
                self._waiting.remove(place)
            raise
        finally:
            timer.cancel()

    def _return(self, given: Connection | None) -> None:
        """What was handed to a waiting request that has gone meanwhile."""
        if given is not None:
            self._left(given)
        else:
            self._connecting -= 1
            self._give_way()

    def _replace(self, given: Connection) -> None:
        """Give up a connection for one that is being made."""
        self._connecting += 1
        self._busy.discard(given)
        if given.counts:
            given.counts = False
            self._room.taken -= 1
        given.abort()

    def _left(self, connection: Connection) -> None:
        """A connection has done its work, or is lost."""
        if not connection.is_open or self._closed:
            self._busy.discard(connection)
            if connection.counts:
                connection.counts = False
                self._room.taken -= 1
                self._give_way()
            connection.abort()
            return
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(connection)  # it stays busy
                return
        self._busy.discard(connection)
        self._idle.append(connection)
        if self._sweeper is None:
            loop = asyncio.get_running_loop()
            self._sweeper = loop.call_later(limits.KEEPALIVE_SECONDS / 2, self._sweep)

    def _give_way(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                self._connecting += 1  # nobody else takes it meanwhile
                place.set_result(None)
                return

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        oldest = loop.time() - limits.KEEPALIVE_SECONDS
        kept = []
        for connection in self._idle:
            if connection.is_open and connection.used_at > oldest:
                kept.append(connection)
            else:
                connection.abort()
        self._idle = kept
        self._sweeper = loop.call_later(limits.KEEPALIVE_SECONDS / 2, self._sweep) if kept else None


def _framed(whole: bytes, outgoing: Outgoing) -> bytes:
    if outgoing.body is None or not outgoing.body.is_chunked:
        return whole
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(whole), whole) if whole else b"0\r\n\r\n"


def _refuse(place: asyncio.Future[Connection | None], refusal: Refusal) -> None:
    if not place.done():
        place.set_exception(refusal)
