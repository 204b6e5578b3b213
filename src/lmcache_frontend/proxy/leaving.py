"""That a caller leaves is seen while nobody reads what it sends.

A transport whose reading is paused, because the target takes no more, is not looked at by the event loop at all:
neither asyncio nor uvloop would tell of an end or a reset before it is read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import select


class Leaving:
    """Aborts a caller's transport when the other end has hung up, until it is closed.

    A descriptor of its own is watched in place of the connection's, which belongs to the event loop: it gets readable
    with an end or a reset of that, not with bytes. Where there is no descriptor left, nobody looks.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._epoll: select.epoll | None = None
        sock = transport.get_extra_info("socket")
        if sock is None or transport.is_closing():
            return
        with contextlib.suppress(OSError):
            self._epoll = select.epoll()
            self._epoll.register(sock.fileno(), select.EPOLLRDHUP)
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._left)

    def _left(self) -> None:
        self.close()
        self._transport.abort()

    def close(self) -> None:
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
