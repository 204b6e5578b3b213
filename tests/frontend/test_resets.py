"""Who resets a connection before the server has taken it: the kernel no longer says where it came from."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from lmcache_api.pytest_plugin import free_port
from lmcache_frontend.options import Options
from lmcache_frontend.server import FrontendServer
from lmcache_frontend.telemetry.health.board import HealthBoard
from tests.frontend.upstream import Upstream, raw, serving

KNOWN = b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

Test = Callable[[FrontendServer, Upstream], Awaitable[None]]


@pytest.fixture(autouse=True)
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HealthBoard, "start", lambda board: None)


def serve(test: Test) -> None:
    """In the loop of the program: asyncio's own notes who connects before."""

    async def run() -> None:
        async with serving(Upstream()) as upstream:
            options = Options(port=free_port(), host="127.0.0.1", registry="memory", nodes=json.dumps([upstream.node]))
            async with FrontendServer(options) as server:
                await test(server, upstream)

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()


async def reset(server: FrontendServer, request: bytes) -> None:
    """Ask and reset, before the server, which is in this loop, sees anything of it."""
    for _ in range(8):
        with socket.socket() as sock:
            sock.connect(("127.0.0.1", server.address.port))
            sock.sendall(request)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert (await raw(server.address.port, KNOWN)).startswith(b"HTTP/1.1 200 ")  # it has taken them by now


def test_it_is_no_caller_on_this_machine_for_a_node() -> None:
    async def test(server: FrontendServer, upstream: Upstream) -> None:
        for _ in range(50):  # whether the node hears of a request that is cancelled soon is chance
            await reset(server, b"GET /proxy2/upstream/mine HTTP/1.1\r\nHost: localhost\r\n\r\n")
            mine = [head for head in upstream.heads if head.startswith(b"GET /mine ")]
            if mine:
                break
        assert mine, "the node was asked"
        assert all(b"\r\nX-Forwarded-For: unknown\r\n" in head for head in mine)

    serve(test)


def test_it_reports_nobody() -> None:
    async def test(server: FrontendServer, upstream: Upstream) -> None:
        for host in (b"localhost", b"frontend.example"):
            report = b"GET /heartbeat?api_address=http://10.0.0.5:80 HTTP/1.1\r\nHost: %b\r\n" % host
            await reset(server, report + b"X-Forwarded-For: 10.0.0.5\r\n\r\n")
            await reset(server, report + b"\r\n")
        assert server.cluster.discovery.since() == {}

    serve(test)
