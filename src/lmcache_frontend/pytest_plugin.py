"""pytest fixtures that bring the frontend up on a free port, beside those of `lmcache_api.pytest_plugin`.

async def test_through_the_proxy(api_server, frontend_server):
    worker = await api_server(role="worker")
    frontend = await frontend_server(nodes=[worker.node])
    async with frontend.client.get(f"/proxy2/{worker.node['name']}/version") as response:
        assert response.status == 200
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest_asyncio

from lmcache_frontend.options import Options
from lmcache_frontend.server import FrontendServer


@dataclass(frozen=True)
class RunningFrontend:
    """A frontend that serves: the server, its URL, and a client that asks it."""

    server: FrontendServer
    url: str
    client: aiohttp.ClientSession


StartFrontend = Callable[..., Coroutine[Any, Any, RunningFrontend]]


@pytest_asyncio.fixture
async def frontend_server() -> AsyncIterator[StartFrontend]:
    """Start a frontend: `await frontend_server(nodes=[…], **options)`; the test's end stops it."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(nodes: Sequence[dict[str, Any]] = (), **options: Any) -> RunningFrontend:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                options.setdefault("port", sock.getsockname()[1])
            options.setdefault("host", "127.0.0.1")
            options.setdefault("registry", "memory")
            server = FrontendServer(Options(nodes=json.dumps(list(nodes)), **options))
            await stack.enter_async_context(server)
            url = f"http://{server.address}"
            client = await stack.enter_async_context(aiohttp.ClientSession(url))
            return RunningFrontend(server, url, client)

        yield start
