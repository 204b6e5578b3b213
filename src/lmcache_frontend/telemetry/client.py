"""One question to a node: a connection, one GET, its answer, the end. For checks and scrapes, which are many.

aiohttp's client costs several times as much for a connection that is used once (`benchmarks/health.py`), and LMCache's
servers close an idle connection before the next check comes. Whatever a node does, a question ends within its times and
holds a bounded number of bytes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import aiohappyeyeballs
import httptools

from lmcache_frontend.telemetry.names import AddressInfo, Names, NotAsked
from lmcache_shared.address import Address, TcpAddress, UnixAddress
from lmcache_shared.version import VERSION

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 2.0
"""From the connection to the answer's last byte, unless more is asked for."""

MAX_HEAD_BYTES = 16 << 10
"""Of an answer's head, with every 1xx before it."""

MAX_ANSWER_BYTES = 64 << 10
"""Of an answer behind its head, unless more is asked for; what is longer has a status and no body."""

ACCEPT = "application/json, text/plain"

HELD_UP_SECONDS = 0.1
"""A wait that ends so much too late met a busy moment of this process: what has come meanwhile counts."""

SECOND_ADDRESS_SECONDS = 0.25
"""After these the next address of a name is tried beside the first (RFC 8305)."""

_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL})
"""Errors that tell of this machine and not of the node."""

_NO_HTTP = "answers something that is no HTTP"


class NoAnswer(Exception):
    """The node did not answer; the text says why."""


@dataclass(frozen=True)
class Answer:
    """`body` is `None` when it is longer than what is read of one, `is_sized` says whether it had an end other than the
    connection's; `milliseconds` from connecting to the last byte.

    `sandboxed`: it carries `Content-Security-Policy: sandbox`, as frontends of ours send what they have from a target.
    """

    status: int
    body: bytes | None
    milliseconds: float
    sandboxed: bool = False
    encoding: str = ""
    is_sized: bool = True


def request_bytes(address: Address, path: str, *, accept: str = ACCEPT, token: str | None = None) -> bytes:
    """The whole request for `path`, which is quoted as it is to be sent; `token` is shown."""
    shown = "" if token is None else f"Authorization: Bearer {token}\r\n"
    host = "localhost"
    if isinstance(address, TcpAddress):  # an IPv6 scope is for this machine alone (RFC 6874)
        host = str(TcpAddress(address.host.partition("%")[0], address.port))
    return (
        f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: lmcache-frontend/{VERSION}\r\n"
        f"Accept: {accept}\r\nAccept-Encoding: identity\r\n{shown}Connection: close\r\n\r\n"
    ).encode("ascii")


async def ask(
    address: Address,
    request: bytes,
    names: Names,
    *,
    seconds: float | None = None,
    most: int = MAX_ANSWER_BYTES,
    take: Callable[[int], None] | None = None,
) -> Answer:
    """Send the request and read its answer.

    Args:
        seconds, most: instead of `ANSWER_SECONDS` and `MAX_ANSWER_BYTES`.
        take: told of each piece's length before it is kept; its `NoAnswer` ends the question.

    Raises:
        NoAnswer: the node cannot be reached, is too slow, or answers no HTTP.
        NotAsked: it could not be asked, for a reason that lies on this side.
    """
    try:
        found = await names.addresses(address) if isinstance(address, TcpAddress) else []
    except OSError as error:
        raise NoAnswer(error.strerror or str(error)) from None
    seconds = ANSWER_SECONDS if seconds is None else seconds
    begun = time.perf_counter()
    reader = _Reader(most, take)
    connecting = asyncio.ensure_future(_connect(address, found, reader))
    try:
        if not await _done_within(connecting, CONNECT_SECONDS):
            raise NoAnswer(f"no connection within {CONNECT_SECONDS:g} seconds")
        try:
            connecting.result()
        except OSError as error:
            if isinstance(address, TcpAddress):
                names.forget(address.host)  # it may have moved
            raise _cannot_connect(error) from None
        reader.send(request)
        if not await _done_within(reader.answer, seconds):
            what = "no whole answer" if reader.received else "no answer"
            raise NoAnswer(f"{what} within {seconds:g} seconds")
        status, body = reader.answer.result()
        milliseconds = (time.perf_counter() - begun) * 1000
        return Answer(status, body, milliseconds, reader.sandboxed, reader.encoding, reader.is_sized)
    finally:
        connecting.cancel()
        if connecting.done() and not connecting.cancelled():
            connecting.exception()  # seen: asyncio does not complain
        reader.end()


async def _connect(address: Address, found: Sequence[AddressInfo], reader: _Reader) -> None:
    loop = asyncio.get_running_loop()
    if isinstance(address, UnixAddress):
        await loop.create_unix_connection(lambda: reader, address.path)
    elif len(found) > 1:
        sock = await aiohappyeyeballs.start_connection(found, happy_eyeballs_delay=SECOND_ADDRESS_SECONDS, interleave=1)
        await loop.create_connection(lambda: reader, sock=sock)
    else:
        host = found[0][4][0] if found else address.host
        await loop.create_connection(lambda: reader, host, address.port)


async def _done_within(future: asyncio.Future[Any], seconds: float) -> bool:
    """Not `wait_for`, which up to Python 3.11 can forget that its caller was cancelled."""
    deadline = time.monotonic() + seconds
    await asyncio.wait({future}, timeout=seconds)
    if not future.done() and time.monotonic() - deadline > HELD_UP_SECONDS:
        await asyncio.wait({future}, timeout=HELD_UP_SECONDS)
    return future.done()


def _cannot_connect(error: OSError) -> Exception:
    number = error.errno or 0
    text = os.strerror(number) if number > 0 else " ".join(str(error).split()) or type(error).__name__
    if number in _OURS:
        return NotAsked(f"could not be asked: {text}")
    if number == errno.EAGAIN:
        return NoAnswer("is too busy to take a connection")  # a Unix socket whose line is full
    return NoAnswer(text)


class _Reader(asyncio.Protocol):
    """Reads one answer; `answer` gets its status and body, or why there is none."""

    def __init__(self, most: int, take: Callable[[int], None] | None) -> None:
        self.answer: asyncio.Future[tuple[int, bytes | None]] = asyncio.get_running_loop().create_future()
        self.received = 0
        self.sandboxed = False
        self.encoding = ""
        self.is_sized = False
        """Whether the head says where the body ends; else the connection's end does."""
        self._most = most
        self._take = take
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._ended = False
        self._status = 0
        """Of the answer, once its head is whole."""
        self._pieces: list[bytes] = []

    def send(self, request: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():  # uvloop raises where it is
            self._transport.write(request)

    def end(self) -> None:
        """Let the connection go, also one that is made only after this."""
        self._ended = True
        self.answer.cancel()
        if not self.answer.cancelled():
            self.answer.exception()  # seen: asyncio does not complain
        if self._transport is not None:
            self._transport.abort()
        self._parser = None  # it holds this protocol, and is held by it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of asyncio's
        if self._ended:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self.answer.done():
            return
        self.received += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(_NO_HTTP)  # unless the answer was whole before
        if self._status:
            if self.received > MAX_HEAD_BYTES + self._most:
                self._finish(None)
        elif self.received > MAX_HEAD_BYTES:
            self._fail(f"answers with a head of more than {MAX_HEAD_BYTES >> 10} KiB")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._status and not self.is_sized and exc is None:
            self._finish(b"".join(self._pieces))
        else:
            self._fail("breaks off in the middle of its answer" if self.received else "hangs up without an answer")

    def on_message_begin(self) -> None:
        self.is_sized = False
        self.encoding = ""

    def on_header(self, name: bytes, value: bytes) -> None:
        field = name.lower()
        if field == b"content-length" or (field == b"transfer-encoding" and value.lower().endswith(b"chunked")):
            self.is_sized = True
        elif field == b"content-security-policy" and value.strip().lower() == b"sandbox":
            self.sandboxed = True
        elif field == b"content-encoding":
            self.encoding = value.decode("ascii", "replace").strip().lower()

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code() if self._parser is not None else 0
        if status == 101 or status < 100:
            self._fail(_NO_HTTP)
        elif status >= 200:
            self._status = status

    def on_body(self, body: bytes) -> None:
        if self.answer.done():
            return
        try:
            if self._take is not None:
                self._take(len(body))
        except NoAnswer as refused:
            self.answer.set_exception(refused)
        else:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self._status:  # not a 1xx
            self._finish(b"".join(self._pieces))

    def _finish(self, body: bytes | None) -> None:
        if not self.answer.done():
            whole = body is not None and len(body) <= self._most
            self.answer.set_result((self._status, body if whole else None))

    def _fail(self, problem: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(NoAnswer(problem))
