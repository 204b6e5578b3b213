"""An upgraded connection (RFC 9110, section 7.8): from `101 Switching Protocols` on, bytes both ways, as they come.

WebSocket's pings, close codes and extensions are between the two ends. What the caller sends goes on in the moment in
which it comes, so that the last frame of a caller that leaves arrives.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from aiohttp import HttpVersion11, web
from aiohttp.http import StreamWriter

from lmcache_frontend.proxy import limits
from lmcache_frontend.proxy.answering import Traffic, Written, taken
from lmcache_frontend.proxy.exchange import BrokenOff, Fields, Tunnel
from lmcache_frontend.proxy.leaving import Leaving

FIELDS = ((b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"))
"""What an upgrade needs of the fields that stop at each connection."""


def asks_for_upgrade(request: web.Request) -> bool:
    """Whether the request may become a tunnel; WebSocket is the one protocol that aiohttp's server lets through."""
    headers = request.headers
    return (
        "Upgrade" in headers
        and headers["Upgrade"].lower() == "websocket"
        and "upgrade" in [one.strip().lower() for one in ",".join(headers.getall("Connection", [])).split(",")]
        and request.method == "GET"
        and request.version == HttpVersion11
        and not request.body_exists
    )


def is_switched(fields: Fields) -> bool:
    """Whether an answer 101 switches to what was asked for."""
    return [value.lower() for name, value in fields if name.lower() == b"upgrade"] == [b"websocket"]


async def pass_on(
    request: web.Request, tunnel: Tunnel, fields: list[tuple[bytes, bytes]], traffic: Traffic
) -> web.StreamResponse:
    """Be the tunnel until one end closes it, or nothing has come for `UPGRADE_IDLE_SECONDS`.

    However the target's end comes, the caller still gets what came before it: frames tell whether they are whole.
    """
    writer = cast(StreamWriter, request.writer)
    lines = [b"%b: %b\r\n" % field for field in (*fields, *FIELDS)]
    await writer.write(b"HTTP/1.1 101 %b\r\n%b\r\n" % (tunnel.reason, b"".join(lines)), drain=False)
    caller = _Caller(request, tunnel, traffic)
    tunnel.touch()
    request.protocol.set_parser(cast(Any, caller))
    try:
        is_end = False
        while not is_end:
            await tunnel.wait()
            try:
                piece, is_end = tunnel.take()
            except BrokenOff:
                traffic.broke_off = True
                break
            traffic.received += len(piece)
            if piece:
                await writer.write(piece, drain=False)
            if request.protocol.writing_paused:
                await taken(request)
    finally:
        caller.end()
    return Written(101, keep_alive=False, length=traffic.received)


class _Caller:
    """The caller's end, as aiohttp's server feeds what has been upgraded."""

    def __init__(self, request: web.Request, tunnel: Tunnel, traffic: Traffic) -> None:
        self._transport = request.transport
        self._tunnel = tunnel
        self._traffic = traffic
        self._holding: asyncio.Task[None] | None = None

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._traffic.sent += len(data)
        is_full = self._tunnel.push(data)
        if is_full and self._holding is None and self._transport is not None:
            self._transport.pause_reading()
            self._holding = asyncio.get_running_loop().create_task(self._hold())
        return False, b""

    def feed_eof(self) -> None:
        """The caller is gone: its request is cancelled, and so is the tunnel."""

    def end(self) -> None:
        if self._holding is not None:
            self._holding.cancel()

    async def _hold(self) -> None:
        """The caller is not read until the target has taken what came."""
        leaving = Leaving(self._transport) if self._transport is not None else None
        try:
            await asyncio.wait_for(self._tunnel.drained(), limits.IDLE_SECONDS)
        except ConnectionError:
            return  # who reads the target finds out, and what it said last
        except asyncio.TimeoutError:
            if self._transport is not None:
                self._transport.abort()
            return
        finally:
            if leaving is not None:
                leaving.close()
        self._holding = None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
