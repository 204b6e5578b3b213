"""LMCache's bundled dashboard behind our frontend, and ours behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.pytest_plugin import StartFrontend
from tests.lmcache.processes import free_ports, short_folder
from tests.lmcache.test_discovery import DASHBOARD, running

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(120)]

VERSION = "0.1.0-embedded"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


def proxy(name: str, port: int) -> dict[str, Any]:
    return {"name": name, "host": "127.0.0.1", "port": str(port)}


async def answer(client: aiohttp.ClientSession, path: str) -> tuple[int, Any]:
    async with client.get(path) as response:
        return response.status, await response.json(content_type=None)


async def test_theirs_behind_ours(
    api_server: StartApi, frontend_server: StartFrontend, lmcache_python: str, folder: Path
) -> None:
    on_socket, on_port = await api_server(role="worker"), await api_server(role="scheduler", tcp=True)
    port_node = {**on_port.node, "port": str(on_port.node["port"])}
    (port,) = free_ports(1)
    with running(lmcache_python, DASHBOARD, folder, port, "--nodes", json.dumps([on_socket.node, port_node])):
        ours = await frontend_server()
        async with ours.client.post("/api/proxies", json=proxy("theirs", port)) as response:
            assert response.status == 200
        status, body = await answer(ours.client, "/api/proxies/theirs/refresh")
        assert status == 200
        assert [child["name"] for child in body["nodes"]] == [on_socket.node["name"], on_port.node["name"]]
        for node in (on_socket.node, on_port.node):
            assert await answer(ours.client, f"/proxy2/{node['name']}/version") == (200, VERSION)
            assert await answer(ours.client, f"/proxy2/theirs/proxy2/{node['name']}/version") == (200, VERSION)
        assert await ours.server.cluster.health.settled(20)
        assert {health.state for health in ours.server.cluster.health.all()} == {"up"}


async def test_ours_behind_theirs(
    api_server: StartApi, frontend_server: StartFrontend, lmcache_python: str, folder: Path
) -> None:
    worker = await api_server(role="worker")
    ours = await frontend_server(nodes=[worker.node])
    (port,) = free_ports(1)
    with running(lmcache_python, DASHBOARD, folder, port, "--nodes", "[]") as url:
        async with aiohttp.ClientSession(url) as theirs:
            async with theirs.post("/api/proxies", json=proxy("ours", ours.server.address.port)) as response:
                assert response.status == 200
            status, body = await answer(theirs, "/api/proxies/ours/refresh")
            assert (status, [child["name"] for child in body["nodes"]]) == (200, [worker.node["name"]])
            assert await answer(theirs, f"/proxy2/ours/proxy2/{worker.node['name']}/version") == (200, VERSION)


async def test_ours_behind_theirs_behind_ours(
    api_server: StartApi, frontend_server: StartFrontend, lmcache_python: str, folder: Path
) -> None:
    worker = await api_server(role="worker")
    far = await frontend_server(nodes=[worker.node])
    (port,) = free_ports(1)
    with running(lmcache_python, DASHBOARD, folder, port, "--nodes", "[]") as url:
        async with aiohttp.ClientSession(url) as theirs:
            async with theirs.post("/api/proxies", json=proxy("far", far.server.address.port)) as response:
                assert response.status == 200
            assert (await answer(theirs, "/api/proxies/far/refresh"))[0] == 200
        near = await frontend_server(nodes=[{**proxy("theirs", port), "nodes": []}])
        assert (await answer(near.client, "/api/proxies/theirs/refresh"))[0] == 200
        assert await answer(near.client, f"/proxy2/{worker.node['name']}/version") == (200, VERSION)
        path = f"/proxy2/theirs/proxy2/far/proxy2/{worker.node['name']}/version"
        assert await answer(near.client, path) == (200, VERSION)
