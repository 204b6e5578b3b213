"""A process of `health.py`: the nodes that are checked, or the peer that checks them.

`health_host.py nodes FOLDER COUNT` serves so many nodes, every second one on a Unix socket, the others on TCP ports,
and answers each line on standard input with the number of requests so far. `health_host.py peer FILE INTERVAL` asks
each node of the file with a client of its own, as the frontend did once. Both end with their standard input.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
from pathlib import Path
from typing import cast

import aiohttp
import uvloop

ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n"0.1.0-embedded"'
META = b'HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 18\r\n\r\n{"role": "worker"}'
SECONDS = 2.0


class Served(asyncio.Protocol):
    """A node for next to nothing: whatever piece comes is a request, and its answer is always the same."""

    requests = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        Served.requests += 1
        self._transport.write(META if data.startswith(b"GET /meta") else ANSWER)


async def serve(folder: Path, count: int) -> None:
    loop = asyncio.get_running_loop()
    nodes: list[dict[str, str | int]] = []
    servers = []  # uvloop closes a server that nobody holds
    for number in range(count):
        if number % 2:
            path = str(folder / f"s{number}")
            servers.append(await loop.create_unix_server(Served, path, backlog=128))
            nodes.append({"name": f"n{number}", "host": "localhost", "port": path})
        else:
            servers.append(await loop.create_server(Served, "127.0.0.1", 0, backlog=128))
            port = servers[-1].sockets[0].getsockname()[1]
            nodes.append({"name": f"n{number}", "host": "127.0.0.1", "port": port})
    (folder / "nodes.json").write_text(json.dumps(nodes), encoding="utf-8")
    print("ready", flush=True)
    await asyncio.to_thread(_answer_lines)


def _answer_lines() -> None:
    for _ in sys.stdin:
        print(Served.requests, flush=True)


async def check(nodes: list[dict[str, str | int]], interval: float) -> None:
    tasks = [asyncio.create_task(_check_again(node, interval)) for node in nodes]
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    await stop.wait()
    for task in tasks:
        task.cancel()


async def _check_again(node: dict[str, str | int], interval: float) -> None:
    await asyncio.sleep(random.uniform(0, interval))
    while True:
        await asyncio.wait_for(_check(node["host"], node["port"]), SECONDS)
        await asyncio.sleep(interval)


async def _check(host: str | int, port: str | int) -> None:
    connector: aiohttp.BaseConnector
    if isinstance(port, str):
        connector, url = aiohttp.UnixConnector(port), "http://localhost/version"
    else:
        connector, url = aiohttp.TCPConnector(), f"http://{host}:{port}/version"
    async with (
        aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session,
        session.get(url, allow_redirects=False) as response,
    ):
        json.loads(await response.content.read(65536))


if __name__ == "__main__":
    kind, first, second = sys.argv[1:]
    if kind == "nodes":
        uvloop.run(serve(Path(first), int(second)))
    else:
        uvloop.run(check(json.loads(Path(first).read_text(encoding="utf-8")), float(second)))
