"""Discovery together with LMCache's own: its dashboard reports to ours and asks ours, its service is our supplier."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from tests.lmcache.processes import Child, client_of, free_ports, lmcache_environ, short_folder

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(120)]

START_SECONDS = 40.0
DASHBOARD = "lmcache.lmcache_frontend.app"
SERVICE = "lmcache.tools.simple_discover_service"
BEAT = {"api_address": "http://127.0.0.1:9", "pid": "7", "version": "0.5.6", "other_info": '{"nodes_count":0}'}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@contextlib.contextmanager
def running(python: str, module: str, folder: Path, port: int, *options: str) -> Iterator[str]:
    """A module of LMCache's on a port; its URL once it listens."""
    log = folder / f"{module}-{port}.log"
    command = [python, "-m", module, "--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=lmcache_environ(folder), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    child = Child(process, log)
    try:
        child.wait_until(lambda: listens(port), seconds=START_SECONDS, what=module)
        yield f"http://127.0.0.1:{port}"
    finally:
        child.end()


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def their_service(lmcache_python: str, folder: Path) -> Iterator[str]:
    """LMCache's reference discovery service, which needs flask."""
    (port,) = free_ports(1)
    with running(lmcache_python, SERVICE, folder, port) as url:
        yield url


async def until(is_so: Callable[[], Coroutine[Any, Any, bool]], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not await is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


async def get(client: aiohttp.ClientSession, path: str, **how: Any) -> tuple[int, str, Any]:
    async with client.get(path, **how) as response:
        return response.status, response.content_type, await response.json()


async def tree(client: aiohttp.ClientSession) -> dict[str, list[str]]:
    """The names of the proxies with those of their nodes."""
    _, _, answer = await get(client, "/api/nodes")
    return {proxy["name"]: [child["name"] for child in proxy["children"]] for proxy in answer["nodes"]}


@contextlib.asynccontextmanager
async def both(their_service: str, frontend: RunningFrontend) -> AsyncIterator[list[aiohttp.ClientSession]]:
    async with client_of(their_service) as theirs:
        yield [theirs, frontend.client]


async def test_heartbeats_and_infos_are_answered_alike(their_service: str, frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    async with both(their_service, frontend) as clients:
        answers = []
        for client in clients:
            found: list[Any] = [await get(client, "/lmcache_infos"), await get(client, "/lmcache_infos?minute=1")]
            found += [await get(client, path) for path in ("/heartbeat", "/lmcache_heartbeat?api_address=")]
            for changed in ({}, {"api_address": "http://127.0.0.1:8", "pid": "x"}, {"version": "0.5.7"}):
                found.append(await get(client, "/lmcache_heartbeat", params={**BEAT, **changed}))
            found.append(await get(client, "/heartbeat?api_address=http://127.0.0.1:7"))
            for query in ("", "?hour=1", "?minute=1", "?hour=1&minute=0", "?minute=-1"):
                status, kind, infos = await get(client, f"/lmcache_infos{query}")
                for info in infos["processInfos"].values():
                    for entity in info["lmCacheInfoEntities"]:
                        for name in ("startTime", "lastReportTime"):
                            at = datetime.strptime(entity.pop(name), "%Y-%m-%d %H:%M:%S")
                            assert abs((datetime.now() - at).total_seconds()) < 30
                del infos["versionCount"]  # LMCache counts processes there, and with a filter nothing
                found.append((status, kind, infos))
            answers.append(found)
        theirs, ours = answers
        assert len(theirs[8][2]["processInfos"]) == 3
        for expected, answered in zip(theirs, ours, strict=True):
            assert answered == expected


async def test_their_service_is_our_supplier(
    their_service: str, api_server: StartApi, frontend_server: StartFrontend
) -> None:
    worker = await api_server(role="worker")
    far = await frontend_server(nodes=[worker.node], report_host="127.0.0.1")
    assert far.server.heartbeat.start(f"{their_service}/lmcache_heartbeat", interval=1)
    near = await frontend_server(node_supplier_url=f"{their_service}/lmcache_infos", refresh_interval=1)
    name = f"proxy_127.0.0.1_{far.server.address.port}"

    async def is_known() -> bool:
        return (await tree(near.client)).get(name) == [worker.node["name"]]

    await until(is_known)
    path = f"/proxy2/{name}/proxy2/{worker.node['name']}/version"
    status, _, version = await get(near.client, path)
    assert (status, version) == (200, "0.1.0-embedded")


async def test_their_dashboard_reports_to_us(
    lmcache_python: str, folder: Path, api_server: StartApi, frontend_server: StartFrontend
) -> None:
    worker = await api_server(role="worker", tcp=True)
    ours = await frontend_server()
    (port,) = free_ports(1)
    node = {**worker.node, "name": "w", "port": str(worker.node["port"])}
    options = ["--nodes", json.dumps([node]), "--heartbeat-url", f"{ours.url}/lmcache_heartbeat"]
    options += ["--report-host", "127.0.0.1", "--heartbeat-interval", "1"]
    with running(lmcache_python, DASHBOARD, folder, port, *options):

        async def is_known() -> bool:
            return (await tree(ours.client)).get(f"proxy_127.0.0.1_{port}") == ["w"]

        await until(is_known)
        _, _, infos = await get(ours.client, "/lmcache_infos?minute=1")
        (entity,) = infos["processInfos"][f"http://127.0.0.1:{port}"]["lmCacheInfoEntities"]
        assert json.loads(entity["otherInfo"])["nodes_count"] == 1
        assert isinstance(entity["pid"], int)
        assert entity["startTime"] <= entity["lastReportTime"]
        status, _, version = await get(ours.client, "/proxy2/w/version")
        assert (status, version) == (200, "0.1.0-embedded")


async def test_we_are_their_supplier(
    lmcache_python: str, folder: Path, api_server: StartApi, frontend_server: StartFrontend
) -> None:
    worker = await api_server(role="worker", tcp=True)
    service = await frontend_server()
    far = await frontend_server(nodes=[worker.node], report_host="127.0.0.1")
    assert far.server.heartbeat.start(f"{service.url}/heartbeat", interval=1)
    alone = f"http://127.0.0.1:{worker.node['port']}"
    assert (await get(service.client, "/heartbeat", params={"api_address": alone}))[0] == 200

    async def both_have_reported() -> bool:
        return bool((await get(service.client, "/lmcache_infos"))[2]["processCount"] == 2)

    await until(both_have_reported)
    (port,) = free_ports(1)
    # It asks its supplier before it listens, in a loop that ends; so ours have to answer meanwhile.
    with_supplier = ["--node-supplier-url", f"{service.url}/lmcache_infos"]
    context = running(lmcache_python, DASHBOARD, folder, port, *with_supplier)
    url = await asyncio.to_thread(context.__enter__)
    try:
        async with client_of(url) as theirs:
            known = await tree(theirs)
            alone_name = f"proxy_127.0.0.1_{worker.node['port']}"
            assert known == {
                f"proxy_127.0.0.1_{far.server.address.port}": [worker.node["name"]],
                alone_name: [alone_name],
            }
            status, _, version = await get(theirs, f"/proxy2/{alone_name}/version")
            assert (status, version) == (200, "0.1.0-embedded")
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


async def test_heartbeats_of_both_begin_and_end_alike(
    lmcache_python: str, folder: Path, frontend_server: StartFrontend
) -> None:
    ours = await frontend_server()
    (port,) = free_ports(1)
    with running(lmcache_python, DASHBOARD, folder, port) as url:
        async with client_of(url) as theirs:
            answers = []
            for client in (theirs, ours.client):
                status = (await get(client, "/api/heartbeat/status"))[2]
                found: list[Any] = [list(status)[:4], {name: type(status[name]) for name in list(status)[:4]}]
                start = {"heartbeat_url": "http://127.0.0.1:9/", "initial_delay": 60, "interval": 60}
                for path, body in (("stop", {}), ("start", {}), ("start", start), ("start", start), ("stop", {})):
                    async with client.post(f"/api/heartbeat/{path}", json=body) as response:
                        found.append((path, response.status, response.content_type, await response.json()))
                    found.append((await get(client, "/api/heartbeat/status"))[2]["running"])
                answers.append(found)
            assert answers[1] == answers[0]
