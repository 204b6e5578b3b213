"""A caller's connection on its way from a worker to the main process: with its bytes that were read, and its address.

The connection itself moves, not what is said on it: who calls is seen from the socket here as it was there, and no
field has to be believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import cast

from lmcache_frontend.proxy.front import Others
from lmcache_frontend.workers.channel import NO_FILE, Channel, Kind
from lmcache_shared.errors import Refusal

logger = logging.getLogger(__name__)

MAX_WAITING = 256
"""Connections that wait for the main process to take them; the next caller is refused."""

MAX_ADOPTING = 256
"""Connections that are being taken up at once; the next one is closed."""

WRITTEN_SECONDS = 60.0
"""How long a caller may take to read the answers before the request for which its connection leaves."""

_BUSY = Refusal(503, "the main process of this frontend is busy; ask again", {"Retry-After": "1"})


def sending_over(channel: Channel) -> Others:
    """Sends connections to the main process."""

    def send(transport: asyncio.Transport, data: bytes) -> None:
        transport.pause_reading()
        leaving = _Leaving(channel, transport, data)
        transport.set_protocol(leaving)
        leaving.look()

    return send


class _Leaving(asyncio.Protocol):
    """A connection that leaves as soon as the answers that went before are with the kernel."""

    def __init__(self, channel: Channel, transport: asyncio.Transport, data: bytes) -> None:
        self._channel = channel
        self._transport = transport
        self._data = data
        self._timer: asyncio.TimerHandle | None = None

    def look(self) -> None:
        if self._transport.get_write_buffer_size() == 0:
            self._go()
        else:
            self._timer = asyncio.get_running_loop().call_later(WRITTEN_SECONDS, self._transport.abort)
            self._transport.set_write_buffer_limits(high=0)  # `resume_writing` now says that nothing is left

    def resume_writing(self) -> None:
        if self._transport.get_write_buffer_size() == 0 and not self._transport.is_closing():
            self._go()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _go(self) -> None:
        file = NO_FILE
        if self._channel.waiting < MAX_WAITING:
            with contextlib.suppress(OSError):  # no room for one more open file
                file = os.dup(self._transport.get_extra_info("socket").fileno())
        if file == NO_FILE:
            self._transport.write(_plain(_BUSY))
            self._transport.close()
        else:
            self._transport.abort()  # closes this process' end alone
            self._channel.send(Kind.CONNECTION, self._data, file)


def _plain(refusal: Refusal) -> bytes:
    """A refusal as it is written to who is closed afterwards."""
    response = refusal.response()
    body = cast(bytes, response.body)
    fields = {**response.headers, "Content-Length": str(len(body)), "Connection": "close"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {refusal.status} {response.reason}\r\n{lines}\r\n".encode() + body


class Adopting:
    """Takes up connections in the main process.

    Args:
        others: goes on with each.
    """

    def __init__(self, others: Others) -> None:
        self._others = others
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, file: int, data: bytes) -> None:
        """A connection that came as an open file; it is closed when it cannot be served."""
        sock = socket.socket(fileno=file)
        if len(self._tasks) >= MAX_ADOPTING:
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(self._take(sock, data), name="adopting")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take(self, sock: socket.socket, data: bytes) -> None:
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: _Adopted(self._others, data), sock)
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            logger.info("a connection of a worker was lost: %s", error.strerror or error)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)


class _Adopted(asyncio.Protocol):
    """Gives the connection on before anything more is read of it."""

    def __init__(self, others: Others, data: bytes) -> None:
        self._others = others
        self._data = data

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._others(cast(asyncio.Transport, transport), self._data)
