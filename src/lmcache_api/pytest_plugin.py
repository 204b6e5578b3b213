"""pytest fixtures that bring internal API servers up, for whoever writes an endpoint.

pytest_plugins = ["lmcache_api.pytest_plugin", "lmcache_frontend.pytest_plugin"]

async def test_my_feature(api_server):
    worker = await api_server(role="worker", internal_api_server_route_folders=["routes"])
    async with worker.client.get("/my_feature") as response:
        assert response.status == 200
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest_asyncio

from lmcache_api.component import Component
from lmcache_api.embedded import EmbeddedComponent, EmbeddedControllerComponent
from lmcache_api.server import ComponentServer
from lmcache_shared.address import Address, TcpAddress
from lmcache_shared.placement import CONTROLLER_INDEX, SCHEDULER_INDEX, Role
from lmcache_shared.settings import Settings


@dataclass(frozen=True)
class RunningApi:
    """A server that serves: its component, its address, its node for a frontend, and a client that asks it."""

    component: Component
    address: Address
    node: dict[str, str | int]
    client: aiohttp.ClientSession


StartApi = Callable[..., Coroutine[Any, Any, RunningApi]]


@pytest_asyncio.fixture
async def api_server() -> AsyncIterator[StartApi]:
    """Start a server: `await api_server(role="worker", worker_id=0, tcp=False, **settings)`.

    Each listens on a Unix socket in a temporary folder, or with `tcp=True` on a free port of 127.0.0.1; what
    `component(settings, index)` makes is served, by default the embedded component of the role, which may be
    `controller` too. The test's end stops all of them.
    """
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            role: Role = "worker",
            *,
            worker_id: int = 0,
            tcp: bool = False,
            component: Callable[[Settings, int], Any] | None = None,
            **settings: Any,
        ) -> RunningApi:
            index = {"controller": CONTROLLER_INDEX, "scheduler": SCHEDULER_INDEX, "worker": 1 + worker_id}[role]
            if tcp and role == "controller":
                settings.setdefault("controller_port", free_port())
            elif tcp:
                settings.setdefault("internal_api_server_port_start", free_port() - index)
            else:
                folder = tempfile.mkdtemp(prefix="lmc")  # short: a socket's path has 107 bytes at most
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                settings.setdefault("internal_api_server_socket_path_prefix", f"{folder}/socket")
            made = (component or _embedded)(Settings(internal_api_server_enabled=True, **settings), index)
            if isinstance(made, contextlib.AbstractContextManager):
                stack.enter_context(made)
            server = await stack.enter_async_context(ComponentServer(made))
            client = await stack.enter_async_context(client_for(server.placement.address))
            return RunningApi(made, server.placement.address, server.placement.node, client)

        yield start


def _embedded(settings: Settings, index: int) -> EmbeddedComponent | EmbeddedControllerComponent:
    return EmbeddedControllerComponent(settings) if index == CONTROLLER_INDEX else EmbeddedComponent(settings, index)


def client_for(address: Address) -> aiohttp.ClientSession:
    """A client whose relative paths go to `address`."""
    base = f"http://{address}" if isinstance(address, TcpAddress) else "http://localhost"
    return aiohttp.ClientSession(base, connector=address.connector(limit=20, keepalive_timeout=15))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
