"""The reference: a transport that is aiohttp's client, as everybody knows it. The tests run over both."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from multidict import CIMultiDict
from yarl import URL

from lmcache_frontend.proxy import limits
from lmcache_frontend.proxy.breaker import Breaker
from lmcache_frontend.proxy.connect import connect
from lmcache_frontend.proxy.exchange import (
    BrokenOff,
    Fields,
    Opening,
    Outgoing,
    Tunnel,
    no_answer,
    not_reached,
    overloaded,
    timed_out,
)
from lmcache_frontend.proxy.headers import texts
from lmcache_shared.address import Address, TcpAddress
from lmcache_shared.errors import Refusal

_LEFT_OUT = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Fields that aiohttp's client would add where the caller sent none."""

_FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class PlainTransport:
    """One target's `ClientSession`."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._breaker = Breaker(address)
        self._waiting = 0
        self._answers = 0
        self.session = aiohttp.ClientSession(
            connector=_Connector(address),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=limits.CONNECT_SECONDS,
                sock_connect=limits.CONNECT_SECONDS,
                sock_read=limits.IDLE_SECONDS,
            ),
            auto_decompress=False,
            skip_auto_headers=_LEFT_OUT,
        )

    @property
    def in_use(self) -> bool:
        return self._waiting > 0 or self._answers > 0

    def url(self, path: str) -> URL:
        """`path`, with its query, at this target; nothing in it is decoded, sorted or encoded anew."""
        if isinstance(self.address, TcpAddress):
            return URL.build(scheme="http", authority=str(self.address), path=path, encoded=True)
        return URL.build(scheme="http", host="localhost", path=path, encoded=True)

    async def request(self, outgoing: Outgoing) -> Tunnel:
        if self._waiting + self._answers >= limits.CONNECTIONS_PER_TARGET + limits.WAITING_PER_TARGET:
            raise overloaded(self.address)
        self._breaker.check()
        whole = outgoing.body.whole() if outgoing.body is not None else None
        broken: asyncio.Future[Refusal] = asyncio.get_running_loop().create_future()
        self._waiting += 1
        try:
            upstream = await self.session.request(
                outgoing.method,
                self.url(outgoing.path),
                headers=CIMultiDict(texts(outgoing.fields)),
                data=_pieces(outgoing, whole, broken) if outgoing.body is not None else None,
                expect100=outgoing.is_held_back and whole is None,
                allow_redirects=False,
            )
        except aiohttp.ConnectionTimeoutError:
            full = self._answers >= limits.CONNECTIONS_PER_TARGET
            raise (overloaded(self.address) if full else self._breaker.failed(timed_out(self.address))) from None
        except asyncio.TimeoutError:
            raise timed_out(self.address) from None
        except aiohttp.ClientConnectorError as error:
            raise self._breaker.failed(not_reached(self.address, error.os_error)) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise (broken.result() if broken.done() else no_answer(reason(error))) from None
        finally:
            self._waiting -= 1
        self._breaker.connected()
        if not (200 <= upstream.status <= 599 or (upstream.status == 101 and outgoing.upgrade)):
            upstream.close()
            raise no_answer(f"it answers with the status {upstream.status}")
        self._answers += 1
        return _PlainAnswer(self, upstream, broken)

    async def close(self) -> None:
        await self.session.close()

    def released(self) -> None:
        self._answers -= 1


class _Connector(aiohttp.BaseConnector):
    """Connects as the other transport does: to what has been checked."""

    def __init__(self, address: Address) -> None:
        limit = limits.CONNECTIONS_PER_TARGET
        super().__init__(limit=limit, limit_per_host=limit, keepalive_timeout=limits.KEEPALIVE_SECONDS)
        self._address = address

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: object, timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        try:
            return await connect(self._address, self._factory, limits.CONNECT_SECONDS)
        except asyncio.TimeoutError:
            raise
        except OSError as error:
            raise aiohttp.ClientConnectorError(req.connection_key, error) from None


class _PlainAnswer:
    """A `ClientResponse` as an `Answer`."""

    def __init__(
        self, transport: PlainTransport, upstream: aiohttp.ClientResponse, broken: asyncio.Future[Refusal]
    ) -> None:
        self.status = upstream.status
        self.reason = _CONTROL.sub(b"?", (upstream.reason or "").encode("utf-8", "replace"))
        self.fields: Fields = [
            (name, _CONTROL.sub(b"?", value)) for name, value in upstream.raw_headers if _FIELD.fullmatch(name)
        ]
        self.openings: dict[Any, Opening] = {}
        self._transport: PlainTransport | None = transport
        self._upstream = upstream
        self._content: aiohttp.StreamReader = upstream.content
        self._piece = b""
        self._lost: asyncio.Future[None] | None = None
        broken.add_done_callback(self._connection_lost)
        protocol = upstream.connection.protocol if upstream.connection is not None else None
        if protocol is not None:
            if protocol.closed is None:
                self._connection_lost()
            else:
                self._lost = protocol.closed
                self._lost.add_done_callback(self._connection_lost)
            if upstream.status == 101:
                self._content = aiohttp.StreamReader(protocol, limits.BUFFERED_BYTES, loop=asyncio.get_running_loop())
                protocol.set_parser(_Raw(self._content), self._content)

    def take(self) -> tuple[bytes, bool]:
        content = self._content
        try:
            piece, self._piece = self._piece or content.read_nowait(-1), b""
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise BrokenOff(str(error) or type(error).__name__) from None
        return piece, content.at_eof()

    async def wait(self) -> None:
        content = self._content
        try:
            if not self._piece and not content.at_eof():
                self._piece = await content.readany()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise BrokenOff(str(error) or type(error).__name__) from None

    def release(self) -> None:
        if self._transport is None:
            return
        if self._lost is not None:
            self._lost.remove_done_callback(self._connection_lost)  # a connection serves many answers
        if self._content.at_eof() and self.status != 101:
            self._upstream.release()
        else:
            self._upstream.close()
        self._transport.released()
        self._transport = None

    def push(self, data: bytes) -> bool:
        self.touch()
        connection = self._upstream.connection
        if connection is None or connection.transport is None or connection.transport.is_closing():
            return True
        connection.transport.write(data)
        return bool(connection.protocol is not None and connection.protocol.writing_paused)

    async def drained(self) -> None:
        connection = self._upstream.connection
        if connection is None or connection.protocol is None or connection.transport is None:
            raise BrokenOff("the target hangs up")
        await connection.protocol._drain_helper()

    def touch(self) -> None:
        connection = self._upstream.connection
        if connection is not None and connection.protocol is not None:
            connection.protocol.read_timeout = limits.UPGRADE_IDLE_SECONDS
            connection.protocol.start_timeout()

    def _connection_lost(self, _: object = None) -> None:
        """aiohttp (3.14) closes the connection when the framing of a body breaks in the middle, but never tells the
        reader, who would wait for ever.
        """
        content = self._content
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection was lost"))


class _Raw:
    """What comes on an upgraded connection, as aiohttp's client feeds it."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._content.feed_data(data)
        return False, b""

    def feed_eof(self) -> None:
        self._content.feed_eof()


async def _pieces(outgoing: Outgoing, whole: bytes | None, broken: asyncio.Future[Refusal]) -> AsyncIterator[bytes]:
    """A request's body; asked for the first piece when the target has said `100 Continue`, where it is asked to.

    That it is `broken` is told apart: aiohttp (3.14) tells the reader of an answer that has begun nothing of it.
    """
    if whole is not None:
        yield whole
        return
    if outgoing.is_held_back and outgoing.interim is not None:
        outgoing.interim(100, b"Continue", ())
    body = outgoing.body
    try:
        while body is not None and (piece := await body.read()):
            yield piece
    except Refusal as refusal:
        broken.set_result(refusal)
        raise


def reason(error: Exception) -> str:
    """In one line: aiohttp tells of broken HTTP in several, with a pointer at the byte."""
    text = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
    return " ".join(text.split())[: limits.MAX_REASON_LENGTH] or type(error).__name__
