"""The processes of `soak.py`: the frontend, which tells on SIGUSR1 what it holds, and the targets, hostile ones.

    python soak_host.py frontend OPTIONS...
    python soak_host.py target PORT_OR_SOCKET SEED

What a target does is told by the path it is asked for; see `Target`. The bytes of every body depend on where they stand
in it (`content`), so that one that is lost, doubled or somebody else's is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import random
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import uvloop

from lmcache_frontend.options import PROGRAM, read_options
from lmcache_frontend.server import serve
from lmcache_shared import program

PERIOD = 65521
"""A prime: no buffer's size is a multiple of it."""

LARGEST = 1 << 18
"""Bytes of content that are asked for at once, at most."""

TABLE = random.Random(PERIOD).randbytes(PERIOD) * (LARGEST // PERIOD + 2)


def content(key: int, start: int, size: int) -> bytes:
    """So many bytes of the body `key`, from `start` on."""
    at = (key * 7919 + start) % PERIOD
    return TABLE[at : at + size]


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset, as a process that is killed with bytes unread."""
    sock = writer.get_extra_info("socket")
    if sock is not None:  # uvloop tells none of one that is closed
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def frames(reader: asyncio.StreamReader, head: bytes) -> AsyncIterator[bytes]:
    """A request's body, piece by piece."""
    fields = head.lower()
    if b"\r\ntransfer-encoding: chunked" in fields:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    elif b"\r\ncontent-length: " in fields:
        rest = int(fields.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0])
        while rest and (piece := await reader.read(min(rest, LARGEST))):
            rest -= len(piece)
            yield piece
        if rest:
            raise EOFError


@dataclass
class Asked:
    """A request, and the connection on which it came."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: bytes
    key: int
    size: int
    extra: int


class Target:
    """A target: `/{what}/{key}/{size}/{extra}` says what it does; `extra` is what that needs besides."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, EOFError, asyncio.LimitOverrunError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                what, key, size, extra = head.split(b" ", 2)[1].decode().strip("/").split("/")
                keep = await getattr(self, f"_{what}")(Asked(reader, writer, head, int(key), int(size), int(extra)))
                await writer.drain()
                if not keep:
                    break
        writer.close()

    async def _sized(self, it: Asked) -> bool:
        """The whole body, or, with `extra`, that much of it and then the end: a reset where it is odd."""
        it.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % it.size)
        return await self._body(it, cut=it.extra)

    async def _chunked(self, it: Asked) -> bool:
        it.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        keep = await self._body(it, cut=it.extra, chunked=True)
        if keep:
            it.writer.write(b"0\r\n\r\n" if it.key % 2 else b"0\r\nX-Trailer: 1\r\n\r\n")
        return keep

    async def _until_end(self, it: Asked) -> bool:
        it.writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        await self._body(it, cut=it.extra | 1 if it.extra else 0)
        return False

    async def _body(self, it: Asked, *, cut: int, chunked: bool = False) -> bool:
        writer, key, size = it.writer, it.key, it.extra if cut else it.size
        start = 0
        while start < size:
            step = min(size - start, self._random.choice((1, 100, 5_000, 65_536, LARGEST)))
            piece = content(key, start, step)
            writer.write(b"%x\r\n%b\r\n" % (step, piece) if chunked else piece)
            await writer.drain()
            start += step
        if cut:
            await asyncio.sleep(self._random.choice((0, 0.01)))
            if cut % 2:
                reset(writer)
        return not cut

    async def _digest(self, it: Asked) -> bool:
        """Takes a body and tells its checksum."""
        if b"\r\nexpect: " in it.head.lower():
            it.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        digest = hashlib.sha256()
        async for piece in frames(it.reader, it.head):
            digest.update(piece)
        told = digest.hexdigest().encode()
        it.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))
        return True

    async def _echo(self, it: Asked) -> bool:
        """Gives a body back while it comes."""
        it.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        async for piece in frames(it.reader, it.head):
            it.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await it.writer.drain()
        it.writer.write(b"0\r\n\r\n")
        return True

    async def _early(self, it: Asked) -> bool:
        """Refuses a body that it does not read."""
        it.writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        return False

    async def _half_head(self, it: Asked) -> bool:
        it.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Half"[: it.extra])
        await asyncio.sleep(0.01)
        if it.key % 2:
            reset(it.writer)
        return False

    async def _garbage(self, it: Asked) -> bool:
        it.writer.write(b"\0" + content(it.key, 0, it.size))
        return True

    async def _hang(self, it: Asked) -> bool:
        if it.extra:
            it.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nno")
        await it.reader.read()
        return False

    async def _events(self, it: Asked) -> bool:
        it.writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, it.size, 100):
            it.writer.write(b"64\r\n%b\r\n" % content(it.key, start, 100))
            await asyncio.sleep(0.02)
        it.writer.write(b"0\r\n\r\n")
        return True

    async def _tunnel(self, it: Asked) -> bool:
        """Gives every byte back, as many as are said, and ends."""
        it.writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        rest = it.size
        while rest and (piece := await it.reader.read(min(rest, LARGEST))):
            rest -= len(piece)
            it.writer.write(piece)
            await it.writer.drain()
        return False

    async def _stale(self, it: Asked) -> bool:
        """Answers, and hangs up a moment later without having said so."""
        await self._sized(replace(it, extra=0))
        await it.writer.drain()
        await asyncio.sleep(self._random.choice((0, 0.001, 0.02)))
        if it.extra:
            reset(it.writer)
        return False

    async def _surplus(self, it: Asked) -> bool:
        """An answer, and what looks like another one."""
        evil = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
        it.writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b%b"
            % (it.size, content(it.key, 0, it.size), evil[: it.extra])
        )
        await it.reader.read()
        return False

    async def _interim(self, it: Asked) -> bool:
        for _ in range(it.extra):
            it.writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
            await asyncio.sleep(0.005)
        return await self._sized(replace(it, extra=0))


async def target(place: str, seed: int) -> None:
    serving = Target(seed).serve
    if place.isdecimal():
        server = await asyncio.start_server(serving, "127.0.0.1", int(place), limit=LARGEST * 2, backlog=1024)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place)
        server = await asyncio.start_unix_server(serving, place, limit=LARGEST * 2, backlog=1024)
    async with server:
        await server.serve_forever()


def tell() -> None:
    """What is held now, on a line of its own."""
    gc.collect()
    tasks = sorted(task.get_coro().__qualname__ for task in asyncio.all_tasks())  # type: ignore[union-attr]
    os.write(1, f"\nsoak {len(tasks)} {','.join(tasks)}\n".encode())


def frontend(arguments: list[str]) -> int:
    options = read_options(arguments, os.environ)
    program.configure_logging(options.log_level)

    async def run(stop: asyncio.Event) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
        await serve(options, stop)

    return program.run(PROGRAM, run)


if __name__ == "__main__":
    if sys.argv[1] == "frontend":
        sys.exit(frontend(sys.argv[2:]))
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(target(sys.argv[2], int(sys.argv[3])))
