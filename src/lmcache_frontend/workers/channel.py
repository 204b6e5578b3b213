"""What the main process and a worker send one another: frames over a Unix socket, some with an open file.

A frame is its kind, its length and its payload. An open file goes with the first byte of its frame (SCM_RIGHTS,
unix(7)): the kernel ends what one `recvmsg` gives before the next bytes that come with files, so files and frames keep
their order. What the other end does not take waits here; whoever sends looks at `waiting` first.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import enum
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable

MAX_FRAME_BYTES = 1 << 30
"""All sources full of nodes with the longest names, ways and tokens are half of it; 10,000 usual nodes are 1 MB."""

READ_BYTES = 256 << 10
READS_AT_ONCE = 8
"""Then others of the loop have their turn."""

MAX_FILES = 16
"""That one `recvmsg` takes; each frame has one at most."""

RETRY_SECONDS = 0.01
"""After the kernel has said that too many files are on their way (ETOOMANYREFS)."""

_HEAD = struct.Struct("!BI")

NO_FILE = -1


class Kind(enum.IntEnum):
    """From the main process: START, NODES, STOP. From a worker: the others."""

    START = 1
    """What the worker is to be (`worker.Start`)."""
    NODES = 2
    """The number of a snapshot, and the snapshot."""
    STOP = 3
    """End, and let requests in flight end first."""
    KNOWS = 4
    """The number of the snapshot by which the worker serves now."""
    COUNTED = 5
    """What the worker has counted since the last time (`tally.Counted`)."""
    CONNECTION = 6
    """A caller's connection, with its bytes that were read."""
    HAPPENED = 7
    """What was changed by the worker's callers since the last time: events of the timeline (`timeline.Event`)."""


_KINDS = frozenset(Kind)


class Channel:
    """One end.

    Args:
        sock: the socket; the channel closes it.
        received: called with each frame: its kind, its payload, and its open file or `NO_FILE`, which it then owns.
        lost: called once, when the other end is gone.
    """

    def __init__(
        self, sock: socket.socket, received: Callable[[Kind, bytes, int], None], lost: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._received = received
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._bytes = bytearray()
        self._files: deque[int] = deque()
        self._sending: deque[tuple[memoryview, int]] = deque()
        self._is_waiting = self._closed = False
        self._all_sent = asyncio.Event()
        self._all_sent.set()
        self._loop.add_reader(sock, self._read)

    @property
    def waiting(self) -> int:
        """Frames, or rests of them, that the other end has not taken yet."""
        return len(self._sending)

    def send(self, kind: Kind, payload: bytes = b"", file: int = NO_FILE) -> None:
        """Send a frame; the file is closed here when it is on its way, or cannot be sent."""
        if self._closed:
            _close(file)
            return
        self._all_sent.clear()
        self._sending.append((memoryview(_HEAD.pack(kind, len(payload)) + payload), file))
        if not self._is_waiting:
            self._write()

    async def sent(self) -> None:
        """Until the kernel has everything, or nothing more can be sent."""
        await self._all_sent.wait()

    def close(self) -> None:
        """Frames that wait are lost, and `lost` is not called."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for file in [*self._files, *(file for _, file in self._sending)]:
            _close(file)
        self._files.clear()
        self._sending.clear()
        self._all_sent.set()

    def _write(self) -> None:
        while self._sending and not self._closed:
            left, file = self._sending[0]
            rights = [] if file == NO_FILE else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
            try:
                sent = self._sock.sendmsg([left], rights)
            except (BlockingIOError, InterruptedError):
                self._wait()
                return
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    self._wait()
                    self._loop.remove_writer(self._sock)
                    self._loop.call_later(RETRY_SECONDS, self._again)
                    return
                self._end()
                return
            _close(file)
            if sent < len(left):
                self._sending[0] = (left[sent:], NO_FILE)
            else:
                self._sending.popleft()
        self._all_sent.set()
        if self._is_waiting and not self._closed:
            self._is_waiting = False
            self._loop.remove_writer(self._sock)

    def _wait(self) -> None:
        if not self._is_waiting:
            self._is_waiting = True
            self._loop.add_writer(self._sock, self._write)

    def _again(self) -> None:
        if not self._closed:
            self._is_waiting = False
            self._write()

    def _read(self) -> None:
        for _ in range(READS_AT_ONCE):
            files = array.array("i")
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    READ_BYTES, socket.CMSG_SPACE(MAX_FILES * files.itemsize), socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._end()
                return
            for level, kind, found in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    files.frombytes(found[: len(found) - len(found) % files.itemsize])
            self._files.extend(files)
            if flags & socket.MSG_CTRUNC and not files:
                self._files.append(NO_FILE)  # this process has no room for one more: its frame comes without it
            if not data:
                self._end()
                return
            self._bytes += data
            if not self._take():
                return

    def _take(self) -> bool:
        """Give the whole frames on; whether the channel is still open."""
        at = 0
        while len(self._bytes) - at >= _HEAD.size:
            number, length = _HEAD.unpack_from(self._bytes, at)
            if length > MAX_FRAME_BYTES or number not in _KINDS:
                self._end()
                return False
            if len(self._bytes) - at - _HEAD.size < length:
                break
            payload = bytes(memoryview(self._bytes)[at + _HEAD.size : at + _HEAD.size + length])
            at += _HEAD.size + length
            file = self._files.popleft() if number == Kind.CONNECTION and self._files else NO_FILE
            self._received(Kind(number), payload, file)
            if self._closed:
                return False
        del self._bytes[:at]
        return True

    def _end(self) -> None:
        if not self._closed:
            self.close()
            self._lost()


def _close(file: int) -> None:
    if file != NO_FILE:
        with contextlib.suppress(OSError):
            os.close(file)
