"""An answer on its way to the caller, below aiohttp's `StreamResponse`.

That builds a head from a dictionary of texts, field by field, which takes as long as all else that the proxy does. Here
the head is the target's own bytes, and goes out in one piece with what has come of the body.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from dataclasses import dataclass
from email.utils import formatdate

from aiohttp import HttpVersion11, web
from aiohttp.http import SERVER_SOFTWARE

from lmcache_frontend.proxy import limits
from lmcache_frontend.proxy.exchange import Answer, Fields, Opening, Proxying

_SANDBOX = b"Content-Security-Policy: sandbox\r\nX-Content-Type-Options: nosniff\r\n"
"""A node's page in a browser is kept out of the frontend's origin: no script of it runs, it installs nothing."""

_JOINED_BYTES = 64 << 10
"""Pieces of a body up to this go out in one write with their framing; a longer one is not copied for it."""


@dataclass
class Traffic:
    """What went through for one request: bytes of bodies, and whether an answer or its reader broke off."""

    sent: int = 0
    received: int = 0
    broke_off: bool = False


class Written(web.StreamResponse):
    """A response whose bytes have been written already: for the access log, and for whether the connection is kept."""

    def __init__(self, status: int, *, keep_alive: bool, length: int) -> None:
        super().__init__(status=status, reason="-")
        self._keep_alive = keep_alive
        self._body_length = length
        self._eof_sent = True


def opening_of(
    request: Proxying, answer: Answer, fields: list[tuple[bytes, bytes]], *, is_last: bool = False
) -> Opening:
    """How an answer with these fields begins; the last one on its connection, if it is to be."""
    if answer.status == 204:
        fields = without_length(fields)
    names = {name.lower(): value for name, value in fields}
    has_body = request.method != "HEAD" and answer.status not in (204, 304)
    length = names.get(b"content-length")
    is_11 = request.version >= HttpVersion11
    is_chunked = has_body and length is None and is_11
    keep_alive = (
        not is_last and request.keep_alive and (is_11 or length is not None or not has_body)
    )  # HTTP/1.0 knows no other end of a body
    head = [b"HTTP/1.1 %d %b\r\n" % (answer.status, answer.reason), *[b"%b: %b\r\n" % field for field in fields]]
    has_own_date = b"date" in names
    if not has_own_date:
        head.append(f"Date: {formatdate(time.time(), usegmt=True)}\r\n".encode())  # RFC 9110, section 6.6.1
    if has_body and length != b"0" and b"content-type" not in names:
        head.append(b"Content-Type: application/octet-stream\r\n")
    head.append(_SANDBOX)
    if is_chunked:
        head.append(b"Transfer-Encoding: chunked\r\n")
    if not keep_alive:
        head.append(b"Connection: close\r\n")
    elif not is_11:
        head.append(b"Connection: keep-alive\r\n")
    head.append(b"\r\n")
    return Opening(b"".join(head), is_chunked, keep_alive, has_own_date)


async def send_back(request: Proxying, answer: Answer, opening: Opening, traffic: Traffic) -> Written:
    """Send an answer that begins so to the caller, piece by piece; whether it takes the last one is for others to see.

    Raises:
        BrokenOff: the answer ends before its end; the caller's connection is to be broken off as well.
        ConnectionError: the caller is gone.
    """
    start, is_chunked, keep_alive, _ = opening
    transport, protocol = request.transport, request.protocol
    if transport is None:
        raise ConnectionResetError("the caller is gone")
    piece, is_end = answer.take()
    while True:
        traffic.received += len(piece)
        before, after = _framing(len(piece), is_end) if is_chunked else (b"", b"")
        if len(piece) <= _JOINED_BYTES:
            if data := b"".join((start, before, piece, after)):
                transport.write(data)
        else:
            transport.write(start + before)
            transport.write(piece)
            transport.write(after)
        if is_end:
            return Written(answer.status, keep_alive=keep_alive, length=traffic.received)
        if protocol.writing_paused:
            await taken(request)
        start = b""
        await answer.wait()
        piece, is_end = answer.take()


def in_one_piece(request: Proxying, response: web.Response) -> bytes:
    """An answer of the frontend's own, as aiohttp's server writes it."""
    body = response.body if isinstance(response.body, bytes) else b""
    headers = response.headers
    headers.setdefault("Content-Length", str(len(body)))
    headers.setdefault("Date", formatdate(time.time(), usegmt=True))
    headers.setdefault("Server", SERVER_SOFTWARE)
    if request.keep_alive != (request.version >= HttpVersion11):
        headers["Connection"] = "keep-alive" if request.keep_alive else "close"
    version = request.version
    lines = [f"HTTP/{version.major}.{version.minor} {response.status} {response.reason}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
    head = ("".join(lines) + "\r\n").encode("utf-8")
    return head if request.method == "HEAD" else head + body


def without_length(fields: Fields) -> list[tuple[bytes, bytes]]:
    """For answers that have none (RFC 9110, section 8.6): a caller may wait for what it promises."""
    return [field for field in fields if field[0].lower() != b"content-length"]


def send_interim(request: Proxying, status: int, reason: bytes, fields: Fields) -> None:
    """Send an answer before the answer, which may be `100 Continue`."""
    if request.transport is not None:
        lines = b"".join([b"%b: %b\r\n" % field for field in fields])
        request.transport.write(b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, reason, lines))


def break_off(request: Proxying) -> None:
    """Reset the caller's connection: for HTTP/1.0 its plain end would be the end of the body."""
    transport = request.transport
    if transport is None:
        return
    sock = transport.get_extra_info("socket")
    if sock is not None:  # uvloop tells none of one that is closed
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _framing(size: int, is_end: bool) -> tuple[bytes, bytes]:
    """What stands before and behind a piece of a chunked body (RFC 9112, section 7.1)."""
    last = b"0\r\n\r\n" if is_end else b""
    return (b"%x\r\n" % size, b"\r\n" + last) if size else (b"", last)


async def taken(request: Proxying) -> None:
    """Until the caller has taken enough of what was written. One that does not within `IDLE_SECONDS` is cut off.

    A timer, not `wait_for`: that makes a task for every piece up to Python 3.11.

    Raises:
        ConnectionError: the caller is gone.
    """
    timer = asyncio.get_running_loop().call_later(limits.IDLE_SECONDS, break_off, request)
    try:
        await request.writer.drain()
    finally:
        timer.cancel()
