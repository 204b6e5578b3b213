"""The processes beside `proxy.py`: the load generator, and a plain proxy as anybody would write one with aiohttp.

proxy_host.py load: each line of standard input is a question, answered with one line of words:
`small <port> <path> <connections> <seconds> <varied>` → requests, seconds,
p50 and p99 in milliseconds, answers with those of the warm-up; with `varied` 1 each request has a field of its own;
`large <port> <path>` → bytes, seconds;
`upload <port> <path> <MiB>` → bytes, seconds.
proxy_host.py plain <port> <socket>
proxy_host.py sink <socket>: reads each request's sized body, and answers then
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
import threading
import time

import aiohttp
import uvloop
from aiohttp import web

WARM_UP_SECONDS = 0.5
IDS = itertools.count(100_000)
PIECE = bytes(1 << 20)


class Caller(asyncio.Protocol):
    """A keep-alive connection that asks again as soon as it is answered."""

    def __init__(self, request: bytes, times: list[float], varied: bool) -> None:
        self.request = request
        self.varied = varied
        self.times = times
        self.counts = self.stopped = False
        self.answers = 0
        self.failed = ""
        self._got = b""
        self._whole = 0
        self._asked = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._got, self._whole = b"", 0
        self._asked = time.perf_counter()
        request = self.request
        if self.varied:
            request = b"%bX-Request-Id: %d\r\n\r\n" % (request[:-2], next(IDS))
        self._transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._got = self._got + data if self._got else data
        if not self._whole:
            end = self._got.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._got[:end].lower()
            at = head.find(b"content-length: ")
            if not head.startswith(b"http/1.1 200") or at < 0:
                self.failed = repr(head[:100])
                self._transport.close()
                return
            self._whole = end + 4 + int(head[at + 16 :].split(b"\r", 1)[0])
        if len(self._got) >= self._whole:
            self.answers += 1
            if self.counts:
                self.times.append(time.perf_counter() - self._asked)
            if not self.stopped:
                self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.stopped:
            self.failed = self.failed or f"connection lost: {exc}"


async def small(port: int, path: str, connections: int, seconds: float, varied: bool) -> str:
    loop = asyncio.get_running_loop()
    times: list[float] = []
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: load\r\nAccept: */*\r\n\r\n".encode()
    pairs = [
        await loop.create_connection(lambda: Caller(request, times, varied), "127.0.0.1", port)
        for _ in range(connections)
    ]
    await asyncio.sleep(WARM_UP_SECONDS)
    for _, caller in pairs:
        caller.counts = True
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    for _, caller in pairs:
        caller.counts, caller.stopped = False, True
    took = time.perf_counter() - began
    for transport, _ in pairs:
        transport.close()
    failed = next((caller.failed for _, caller in pairs if caller.failed), "")
    if failed or not times:
        return "failed " + failed.replace(" ", "_")
    times.sort()
    quantiles = [times[min(len(times) - 1, int(len(times) * part))] * 1000 for part in (0.5, 0.99)]
    answers = sum(caller.answers for _, caller in pairs)
    return f"{len(times)} {took} {quantiles[0]} {quantiles[1]} {answers}"


def large(port: int, path: str) -> str:
    """One large answer, read by a plain socket into one buffer."""
    with socket.create_connection(("127.0.0.1", port), 60) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
        buffer = bytearray(1 << 20)
        began, count = time.perf_counter(), 0
        while got := sock.recv_into(buffer):
            count += got
        return f"{count} {time.perf_counter() - began}"


def upload(port: int, path: str, mib: int) -> str:
    """One large body, until its answer is there."""
    with socket.create_connection(("127.0.0.1", port), 60) as sock:
        head = (
            f"PUT {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {mib << 20}\r\nConnection: close\r\n\r\n"
        )
        began = time.perf_counter()
        sock.sendall(head.encode())
        for _ in range(mib):
            sock.sendall(PIECE)
        answer = sock.recv(1000)
        took = time.perf_counter() - began
    return f"{mib << 20} {took}" if answer.startswith(b"HTTP/1.1 200") else f"failed {answer[:60]!r}".replace(" ", "_")


def sink(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(16)
        while True:
            threading.Thread(target=_swallow, args=(server.accept()[0],), daemon=True).start()


def _swallow(sock: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    with sock, sock.makefile("rb", buffering=0) as stream:
        while True:
            data = b""
            while b"\r\n\r\n" not in data:
                piece = sock.recv(65536)
                if not piece:
                    return
                data += piece
            head, _, body = data.partition(b"\r\n\r\n")
            rest = int(head.lower().partition(b"content-length: ")[2].split(b"\r", 1)[0]) - len(body)
            while rest and (count := stream.readinto(buffer)):
                rest -= count
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def load() -> None:
    for line in sys.stdin:
        kind, port, path, *rest = line.split()
        if kind == "small":
            print(uvloop.run(small(int(port), path, int(rest[0]), float(rest[1]), rest[2] == "1")), flush=True)
        elif kind == "upload":
            print(upload(int(port), path, int(rest[0])), flush=True)
        else:
            print(large(int(port), path), flush=True)


async def plain(port: int, path: str) -> None:
    """A session, a handler, headers and pieces passed on: what one writes in ten minutes."""
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path), auto_decompress=False) as session:

        async def handler(request: web.Request) -> web.StreamResponse:
            headers = {name: value for name, value in request.headers.items() if name != "Host"}
            async with session.request(request.method, "http://localhost" + request.path_qs, headers=headers) as answer:
                response = web.StreamResponse(status=answer.status, headers=answer.headers)
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    if sys.argv[1] == "load":
        load()
    elif sys.argv[1] == "sink":
        sink(sys.argv[2])
    else:
        uvloop.run(plain(int(sys.argv[2]), sys.argv[3]))
