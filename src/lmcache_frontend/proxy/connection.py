"""A bare connection to a target: llhttp for the answers' heads, bytes passed on as they come.

A sized body passes the parser by. Nothing is made for a request but the bytes: a connection reads one answer after the
other, and has one timer, which looks at a deadline that moves (a timer for each request would cost more than the
parser).
"""

from __future__ import annotations

import asyncio
import math
import select
from collections.abc import Callable
from typing import Any, cast

import httptools

from lmcache_frontend.proxy import limits
from lmcache_frontend.proxy.exchange import (
    Body,
    BrokenOff,
    Fields,
    Interim,
    Opening,
    Outgoing,
    no_answer,
    timed_out,
)
from lmcache_shared.address import Address

_PRINTABLE = bytes(byte if 32 <= byte != 127 or byte == 9 else ord("?") for byte in range(256))

_WITHOUT_BODY = frozenset({204, 304})

_TOO_LONG = f"a head of more than {limits.MAX_HEAD_BYTES >> 10} KiB"

MAX_REMEMBERED_BYTES = 2048
"""Of a head that is compared with the next one."""


class Stale(Exception):
    """The connection ended before the first byte of an answer.

    Args:
        is_unsent: nor was a byte of the request written.
    """

    def __init__(self, *, is_unsent: bool = False) -> None:
        super().__init__()
        self.is_unsent = is_unsent


class Said:
    """How a target's last answer to a GET began. While it says the same, byte for byte, nothing is parsed.

    So it is when one thing is asked of it often: heads differ in `Date`, once a second.
    """

    def __init__(self) -> None:
        self.head = b""
        self.status = 0
        self.reason = b""
        self.fields: Fields = ()
        self.openings: dict[Any, Opening] = {}
        self.length = 0

    def begins(self, data: bytes) -> bool:
        return bool(self.head) and data.startswith(self.head)

    def remember(self, data: bytes, answer: Connection, length: int) -> None:
        """The answer has come whole, as `data`."""
        end = data.find(b"\r\n\r\n") + 4
        if data.startswith(b"HTTP/1.1 2") and len(data) == end + length and end <= MAX_REMEMBERED_BYTES:
            self.head, self.length = data[:end], length
            self.status, self.reason, self.fields = answer.status, answer.reason, answer.fields
            self.openings = answer.openings


class Connection(asyncio.Protocol):
    """One connection, and the answer that it reads, or the tunnel that it becomes: a `Tunnel`."""

    def __init__(self, address: Address, left: Callable[[Connection], None], said: Said) -> None:
        self.is_reused = False
        self.counts = False
        self.used_at = 0.0
        self.status = 0
        self.reason = b""
        self.fields: Fields = ()
        self.openings: dict[Any, Opening] = {}
        self._fields: list[tuple[bytes, bytes]] = []
        self._address = address
        self._left = left
        self._said = said
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._writing_paused = self._reading_paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = math.inf
        self._sending: asyncio.Task[None] | None = None
        self._interim: Interim | None = None
        self._wanted: asyncio.Future[None] | None = None
        """Done when the target wants the body that its caller holds back."""
        self._poll: select.poll | None = None
        self._begin("")

    def _begin(self, method: str) -> None:
        self._method = method
        self._in_use = bool(method)
        self._error: Exception | None = None
        self._received = 0
        """Bytes of the head, then of what came since the last piece of a body."""
        self._has_head = self._ended = self._is_tunnel = False
        self._keep = True
        """Whether the next request may use the connection."""
        self._chunked = False
        self._length: int | None = None
        self._rest = 0
        """Of a sized body that passes the parser by, bytes to come."""
        self._pieces: list[bytes] = []
        self._size = 0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, head: bytes, outgoing: Outgoing, body: Body | None) -> None:
        """Send a request and wait for the head of its answer."""
        self._begin(outgoing.method)
        self.status = 0
        self.reason = b""
        self._fields = []
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        if self._transport is None or self._transport.is_closing() or (self.is_reused and not self._is_quiet()):
            raise Stale(is_unsent=True)
        self._interim = outgoing.interim
        self._transport.write(head)
        self._expect(limits.FIRST_BYTE_SECONDS)
        if body is not None:
            if outgoing.is_held_back:
                self._wanted = self._loop.create_future()
            self._sending = self._loop.create_task(self._send(body))
        while not self._has_head:
            if self._error is not None:
                raise self._error
            await self.wait()
        if isinstance(self._error, BrokenOff) and not self._size:
            raise no_answer(str(self._error))  # in time to say so
        if self.status == 101 and not (self._is_tunnel and outgoing.upgrade):
            raise no_answer("it switches to a protocol that nobody asked for")

    def _is_quiet(self) -> bool:
        """Whether nothing has come since the last answer, not even an end that the event loop has not seen yet.

        What came would be taken for the answer to the next request.
        """
        if self._poll is None:
            assert self._transport is not None, "it is open"
            self._poll = select.poll()
            self._poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN | select.POLLRDHUP)
        return not self._poll.poll(0)

    def take(self) -> tuple[bytes, bool]:
        if self._size:
            data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces = []
            self._size = 0
            if self._reading_paused and self._transport is not None:
                self._reading_paused = False
                self._transport.resume_reading()
            if self._is_tunnel:
                self.touch()
            elif not self._ended:
                self._expect(limits.IDLE_SECONDS)
            return data, self._ended
        if not self._ended and self._error is not None:
            raise self._error
        return b"", self._ended

    async def wait(self) -> None:
        if self._size or self._ended or self._error is not None:
            return
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def push(self, data: bytes) -> bool:
        """Pass bytes on: a piece of a request's body, or of a tunnel."""
        if self._transport is None or self._transport.is_closing():
            return True  # `drained` tells
        if self._is_tunnel:
            self.touch()
        self._transport.write(data)
        return self._writing_paused

    async def drained(self) -> None:
        if self._writing_paused:
            self._writable = self._loop.create_future()
            try:
                await self._writable
            finally:
                self._writable = None
        if self._transport is None or self._transport.is_closing():
            raise BrokenOff("the target hangs up")

    def touch(self) -> None:
        self._expect(limits.UPGRADE_IDLE_SECONDS)

    def release(self) -> None:
        if not self._in_use:
            return
        self._in_use = False
        if self._sending is not None:
            if not self._sending.done():
                self._sending.cancel()
                self._keep = False
            self._sending = None
        self._interim = self._wanted = None
        if self._is_tunnel and self._error is None and self._transport is not None:
            self._transport.close()  # what was pushed still goes out, for so long
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(limits.IDLE_SECONDS, self.abort)
            return  # it counts until it is gone
        if not (self._ended and self._keep and self._error is None) or self._reading_paused:
            self.abort()
        self._deadline = math.inf
        self.is_reused = True
        self.used_at = self._loop.time()
        self._left(self)

    def abort(self) -> None:
        if self._transport is not None and (self._is_tunnel or not self._transport.is_closing()):
            self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._parser = None  # it holds this protocol, and is held by it

    async def _send(self, body: Body) -> None:
        """Send a body as it comes. The answer may come, and end, before."""
        if self._wanted is not None and not await self._is_wanted(self._wanted):
            return
        try:
            while True:
                self._deadline = math.inf  # the caller has a time limit of its own
                piece = await body.read()
                self._expect(limits.FIRST_BYTE_SECONDS)
                if not piece:
                    break
                if self.push(b"%x\r\n%b\r\n" % (len(piece), piece) if body.is_chunked else piece):
                    await self.drained()
            if body.is_chunked and self.push(b"0\r\n\r\n"):
                await self.drained()
        except ConnectionError:
            self._keep = False  # its reader finds out, unless an answer says why
        except Exception as error:
            self._fail(error)

    async def _is_wanted(self, wanted: asyncio.Future[None]) -> bool:
        """Wait until the target wants the body, or seems to know no `Expect`; `False` when it answers without one."""
        await asyncio.wait({wanted}, timeout=limits.CONTINUE_SECONDS)
        if self._has_head or self._error is not None:
            self._keep = False  # it was promised a body
            return False
        if not wanted.done():
            wanted.set_result(None)
            if self._interim is not None:
                self._interim(100, b"Continue", ())
        return True

    # -- what the transport and the parser tell

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of asyncio's

    def data_received(self, data: bytes) -> None:
        if self._rest:
            self._take_rest(data)
            self._wake()
        elif self._is_tunnel:
            self.on_body(data)
            self._wake()
        elif self._ended or not self._in_use or self._parser is None:
            self._keep = False  # nobody asked
            self.abort()
            self._wake()
        elif not self._has_head and not self._received and self._method == "GET" and self._said.begins(data):
            self._take_known(self._said, data)
        else:
            self._read(self._parser, data)

    def _read(self, parser: httptools.HttpResponseParser, data: bytes) -> None:
        had_head, size = self._has_head, self._size
        self._received += len(data)
        self._parse(parser, data)
        if self._has_head and (not had_head or self._size != size):
            self._received = 0
        elif self._received > limits.MAX_HEAD_BYTES and not self._ended:
            self._fail_reading(_TOO_LONG)
        if not self._has_head and self._error is None:
            return
        if self._ended:
            if not had_head and self._keep and self._length is not None and self._method == "GET":
                self._said.remember(data, self, self._length)
        elif self._has_head:
            self._expect(limits.IDLE_SECONDS)
            if self._length is not None and not self._is_tunnel and self._error is None:
                self._rest = self._length - self._size
                self._parser = None  # the rest passes it by
        self._wake()

    def _take_known(self, said: Said, data: bytes) -> None:
        """An answer that begins like the one before."""
        self._received = len(data)
        self._has_head = True
        self.status, self.reason, self.fields = said.status, said.reason, said.fields
        self.openings = said.openings
        self._length = self._rest = said.length
        self._ended = not said.length
        if len(data) > len(said.head):
            self._take_rest(data[len(said.head) :])
        else:
            self._expect(limits.IDLE_SECONDS)
        self._wake()

    def _take_rest(self, data: bytes) -> None:
        if len(data) > self._rest:
            self._keep = False
            data = data[: self._rest]
        self._rest -= len(data)
        self._expect(limits.IDLE_SECONDS)
        self.on_body(data)
        self._ended = not self._rest

    def _parse(self, parser: httptools.HttpResponseParser, data: bytes) -> None:
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._is_tunnel, self._keep = self.status == 101, False
            if rest := data[upgrade.args[0] :]:
                self.on_body(rest)
        except httptools.HttpParserError as error:
            self._keep = False
            if not self._ended:
                self._fail_reading(f"no HTTP: {error.__context__ or error}")

    def _fail_reading(self, problem: str) -> None:
        self._fail(BrokenOff(problem) if self._has_head else no_answer(problem))

    def on_message_begin(self) -> None:
        if self._has_head:
            self._keep = False  # an answer that nobody asked for

    def on_status(self, text: bytes) -> None:
        if self._has_head:
            self._keep = False
        else:
            self.reason += text

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_head:
            return  # a trailer, or an answer that nobody asked for
        value = value.rstrip(b" \t")
        self._fields.append((name, value))
        if len(name) == 14 and name.lower() == b"content-length":
            self._length = int(value)
        elif len(name) == 17 and name.lower() == b"transfer-encoding":
            self._chunked = True
            if value.lower() != b"chunked":
                raise ValueError("a transfer coding that is not chunked")

    def on_headers_complete(self) -> None:
        if self._has_head:
            self._keep = False
            return
        parser = self._parser
        if parser is None:
            return
        status = parser.get_status_code()
        if 100 <= status < 200 and status != 101:  # there is another one behind it (RFC 9110, section 15.2)
            self._on_interim(status)
            return
        if self._received > limits.MAX_HEAD_BYTES < sum(len(name) + len(value) + 4 for name, value in self._fields):
            raise ValueError(_TOO_LONG)
        if not (200 <= status <= 599 or status == 101):
            raise ValueError(f"the status {status}")
        self.status = status
        self.reason = self.reason.translate(_PRINTABLE)
        self.fields = self._fields
        self.openings = {}
        self._has_head = True
        self._keep = parser.should_keep_alive()
        if self._method == "HEAD" or status in _WITHOUT_BODY:
            if self._method == "HEAD" or self._length or self._chunked:
                self._keep = False  # a careless target sends a body, which could be taken for the next answer
            self._parser = None  # it expects what does not come
            self._length = None
            self._ended = True

    def _on_interim(self, status: int) -> None:
        fields, reason = self._fields, self.reason.translate(_PRINTABLE)
        self._fields = []
        self.reason = b""
        self._length = None
        self._chunked = False
        if status == 100 and self._wanted is not None:
            if self._wanted.done():
                return  # it has been told
            self._wanted.set_result(None)
        if self._interim is not None:
            self._interim(status, reason, fields)

    def on_body(self, data: bytes) -> None:
        if (self._ended and not self._is_tunnel) or self._method == "HEAD":
            self._keep = False  # a body where there is none, or another answer's
            return
        self._pieces.append(data)
        self._size += len(data)
        is_much = self._size > limits.BUFFERED_BYTES or len(self._pieces) > limits.BUFFERED_PIECES
        if is_much and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()
            self._deadline = math.inf  # the caller has a time limit of its own

    def on_message_complete(self) -> None:
        if self._has_head and self.status != 101:
            self._ended = True

    def eof_received(self) -> None:
        """The transport closes itself, and `connection_lost` tells."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep = False
        until_close = self._has_head and self._length is None and not self._chunked
        if until_close and exc is None and self._error is None:
            self._ended = True
        elif not self._ended:
            if self._has_head:
                self._fail(BrokenOff("the target hangs up in the middle of its answer"))
            else:
                self._fail(no_answer("it hangs up in the middle of an answer") if self._received else Stale())
        self.resume_writing()
        self._wake()
        self.abort()
        self._transport = None
        if not self._in_use:
            self._left(self)

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._keep = False
        self.abort()
        self._wake()

    def _expect(self, seconds: float) -> None:
        """Something has to come within so many seconds from now."""
        if self._reading_paused:
            return
        self._deadline = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > self._deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline, self._look_at_deadline)

    def _look_at_deadline(self) -> None:
        self._timer = None
        if self._deadline == math.inf or self._ended or not self._in_use:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._look_at_deadline)
        else:
            self._fail(BrokenOff("the target is too slow") if self._has_head else timed_out(self._address))
