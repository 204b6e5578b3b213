"""Nodes behind other frontends: told of by them, reached through them, in chains and circles."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.nodes import neighbours
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend


def proxy(name: str, frontend: RunningFrontend) -> dict[str, Any]:
    return {"name": name, "host": "127.0.0.1", "port": frontend.server.address.port, "nodes": []}


def names(frontend: RunningFrontend) -> dict[str, list[str]]:
    return {found.name: [node.name for node in found.nodes] for found in frontend.server.cluster.registry.proxies()}


async def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to this"
        await asyncio.sleep(0.05)


async def answer(frontend: RunningFrontend, path: str) -> tuple[int, Any]:
    async with frontend.client.get(path) as response:
        return response.status, await response.json()


async def refreshed(frontend: RunningFrontend, name: str) -> Any:
    status, body = await answer(frontend, f"/api/proxies/{name}/refresh")
    assert status == 200, body
    return body["nodes"]


async def test_to_any_depth(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(role="worker")
    node = {**worker.node, "name": "w/1 ü"}
    frontends = [await frontend_server(nodes=[node])]
    for depth in range(1, 4):
        frontends.append(await frontend_server(nodes=[proxy(f"p{depth}", frontends[-1])]))
        await refreshed(frontends[-1], f"p{depth}")
    top = frontends[-1]
    assert names(top) == {"p3": ["w/1 ü"]}
    (found,) = top.server.cluster.registry.nodes()
    assert found.reach.prefix == "/proxy2/p2/proxy2/w%2F1%20%C3%BC"
    assert len(found.through) == 3
    quoted = "w%2F1%20%C3%BC"
    for path in (
        f"/proxy2/{quoted}/version",
        f"/proxy2/p3/proxy2/{quoted}/version",
        f"/proxy2/p3/proxy2/p2/proxy2/{quoted}/version",
    ):
        async with top.client.get(f"{top.url}{path}".replace(top.url, "")) as response:
            assert (response.status, await response.json()) == (200, "0.1.0-embedded")


async def test_nodes_are_told_as_lmcaches_frontend_tells_them(frontend_server: StartFrontend) -> None:
    far = await frontend_server(nodes=[{"name": "w", "host": "10.0.0.7", "port": "7000"}])
    near = await frontend_server(nodes=[proxy("far", far)])
    child = {"id": "node_w", "name": "w", "host": "10.0.0.7", "port": "7000", "is_proxy": False, "proxy_id": "far"}
    assert await refreshed(near, "far") == [child]
    status, body = await answer(near, "/api/nodes")
    assert body["nodes"][0]["children"] == [child]
    status, body = await answer(near, "/api/nodes?detail=true")
    assert status == 200
    (told,) = body["nodes"]
    assert (told["source"], told["stale"], told["problem"]) == ("nodes", False, None)
    (leaf,) = told["children"]
    assert leaf["path"] == "/proxy2/far/proxy2/w"
    assert leaf["origin"] == [far.server.cluster.registry.identity, "/proxy2/w"]
    assert leaf["through"] == [far.server.cluster.registry.identity]
    assert body["frontend"] == near.server.cluster.registry.identity


async def test_two_frontends_that_have_each_other_are_no_circle(
    api_server: StartApi, frontend_server: StartFrontend
) -> None:
    worker = await api_server(role="worker")
    one = await frontend_server(nodes=[{**worker.node, "name": "a"}])
    two = await frontend_server(nodes=[{**worker.node, "name": "b"}, proxy("one", one)])
    async with one.client.post("/api/proxies", json=proxy("two", two)) as response:
        assert response.status == 200
    for _ in range(3):
        await refreshed(one, "two")
        await refreshed(two, "one")
    assert names(one) == {"local_proxy": ["a"], "two": ["b"]}
    assert names(two) == {"local_proxy": ["b"], "one": ["a"]}
    assert await answer(one, "/proxy2/b/version") == (200, "0.1.0-embedded")


async def test_a_node_known_on_two_ways_is_there_once(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(role="worker")
    owner = await frontend_server(nodes=[{**worker.node, "name": "w"}])
    between = await frontend_server(nodes=[proxy("owner", owner)])
    await refreshed(between, "owner")
    top = await frontend_server(nodes=[proxy("between", between), proxy("owner", owner)])
    await refreshed(top, "between")
    await refreshed(top, "owner")
    assert names(top) == {"between": [], "owner": ["w"]}
    assert await answer(top, "/proxy2/w/version") == (200, "0.1.0-embedded")


async def test_a_proxy_that_is_this_frontend(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(nodes=[{"name": "w", "host": "h", "port": 1}])
    async with frontend.client.post("/api/proxies", json=proxy("itself", frontend)) as response:
        assert response.status == 200
    await until(lambda: names(frontend) == {"local_proxy": ["w"]})


async def test_names_that_two_proxies_of_a_proxy_have(frontend_server: StartFrontend) -> None:
    child = {"name": "w", "host": "10.0.0.7", "port": 7000}
    racks = [{"name": rack, "host": "10.0.0.8", "port": 1, "nodes": [child]} for rack in ("r1", "r2")]
    far = await frontend_server(nodes=racks)
    near = await frontend_server(nodes=[proxy("far", far)])
    await refreshed(near, "far")
    assert names(near) == {"far": ["w", "w@r2"]}
    found = near.server.cluster.registry.node("far", "w@r2")
    assert found is not None
    assert found.reach.prefix == "/proxy2/r2/proxy2/w"
    status, body = await answer(far, "/proxy2/w/version")
    assert (status, body["detail"]) == (
        409,
        "2 nodes are named 'w'; ask for /proxy2/r1/proxy2/w, /proxy2/r2/proxy2/w",
    )


async def test_local_proxy_by_its_name(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(role="worker")
    frontend = await frontend_server(nodes=[{**worker.node, "name": "w"}])
    assert await answer(frontend, "/proxy2/local_proxy/proxy2/w/version") == (200, "0.1.0-embedded")
    status, body = await answer(frontend, "/proxy2/local_proxy/proxy2/nope/version")
    assert (status, body["detail"]) == (404, "Node with name 'nope' not found")


async def test_a_request_that_goes_in_a_circle_ends(frontend_server: StartFrontend) -> None:
    """Two frontends whose written nodes are each other's."""
    one = await frontend_server()
    node = {"name": "x", "host": "127.0.0.1", "port": one.server.address.port}
    two = await frontend_server(nodes=[node])
    back = {"name": "x", "host": "127.0.0.1", "port": two.server.address.port}
    async with one.client.post("/api/proxies/local_proxy/nodes", json=back) as response:
        assert response.status == 200
    path = "/proxy2/x" * 30 + "/version"
    status, body = await answer(one, path)
    assert status == 508
    assert "their proxies lead in a circle" in body["detail"]


async def test_a_proxy_that_is_away_keeps_its_nodes(frontend_server: StartFrontend) -> None:
    far = await frontend_server(nodes=[{"name": "w", "host": "h", "port": 1}])
    near = await frontend_server(nodes=[proxy("far", far)])
    await refreshed(near, "far")
    await far.server.stop()
    status, body = await answer(near, "/api/proxies/far/refresh")
    assert status == 502
    assert body["detail"].startswith(f"far (127.0.0.1:{far.server.address.port}) does not tell of its nodes: ")
    assert names(near) == {"far": ["w"]}
    _, detailed = await answer(near, "/api/nodes?detail=true")
    assert detailed["nodes"][0]["problem"] is not None


FAR_ANSWERS: list[tuple[str, list[str], str | None]] = [
    ('{"nodes": [{"name": "leaf", "host": "h", "port": "7"}]}', ["leaf"], None),
    ('{"nodes": [{"name": "p", "host": "h", "port": 1, "is_proxy": true, "children": []}]}', [], None),
    ('{"nodes": [{"name": "p", "children": [{"name": "a", "host": "h", "port": 1}, 7, {"name": "b"}]}]}', ["a"], None),
    ('{"nodes": [{"name": "a", "host": "h", "port": 1, "path": "/api/nodes"}]}', [], None),
    ('{"nodes": [{"name": "a\\u0000", "host": "h", "port": 1}]}', [], None),
    ('{"nodes": [{"name": "a", "host": "h h", "port": 1}]}', [], None),
    ('{"nodes": [{"name": "a", "host": "h", "port": 1, "through": ["1","2","3","4","5","6","7","8","9"]}]}', [], None),
    ('{"nodes": 7}', [], "it is no frontend: it has no /api/nodes"),
    ("<html>", [], "it is no frontend: it has no /api/nodes"),
    ("[" * 100_000, [], "it is no frontend: it has no /api/nodes"),
    (" " * 70_000, [], "/api/nodes answers more than 65536 bytes"),
]


@pytest.mark.parametrize(("text", "children", "problem"), FAR_ANSWERS)
async def test_whatever_a_proxy_answers(
    frontend_server: StartFrontend,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    children: list[str],
    problem: str | None,
) -> None:
    monkeypatch.setattr(neighbours, "MAX_ANSWER_BYTES", 65536 if problem and "more than" in problem else 1 << 20)

    async def nodes(_: web.Request) -> web.Response:
        return web.Response(text=text, content_type="application/json")

    app = web.Application()
    app.router.add_get("/api/nodes", nodes)
    async with TestServer(app, host="127.0.0.1") as server:
        near = await frontend_server(nodes=[{"name": "far", "host": "127.0.0.1", "port": server.port, "nodes": []}])
        status, body = await answer(near, "/api/proxies/far/refresh")
        assert [child["name"] for child in body.get("nodes", [])] == children
        assert (
            (status, body.get("detail", "")) == (200, "")
            if problem is None
            else (status, problem in body["detail"]) == (502, True)
        )
        json.dumps(body)


async def test_a_slow_proxy_holds_nobody_up(frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ASK_SECONDS", 0.3)

    async def hang(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    app = web.Application()
    app.router.add_get("/api/nodes", hang)
    async with TestServer(app, host="127.0.0.1") as server:
        slow = {"name": "slow", "host": "127.0.0.1", "port": server.port, "nodes": []}
        far = await frontend_server(nodes=[{"name": "w", "host": "h", "port": 1}])
        near = await frontend_server(nodes=[slow, proxy("far", far)])
        await until(lambda: names(near) == {"slow": [], "far": ["w"]})
        status, body = await answer(near, "/api/proxies/slow/refresh")
        assert (status, "no answer within 0.3 seconds" in body["detail"]) == (502, True)
