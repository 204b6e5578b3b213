"""Nodes behind other frontends: told of by them, reached through them, in chains and circles."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.nodes import neighbours
from lmcache_frontend.nodes.node import Node, Proxy
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_shared.address import TcpAddress


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
    (
        '{"frontend": "x", "nodes": [{"name": "a", "host": "h", "port": 1, "through": ["'
        + '","'.join("123456789")
        + '"]}]}',
        [],
        None,
    ),
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


async def far(answer: object, stack: contextlib.AsyncExitStack, seconds: float = 0.0) -> int:
    """The port of somebody who answers `/api/nodes` so."""
    body = answer if isinstance(answer, str) else json.dumps(answer)

    async def nodes(_: web.Request) -> web.Response:
        await asyncio.sleep(seconds)
        return web.Response(text=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/api/nodes", nodes)
    server = await stack.enter_async_context(TestServer(app, host="127.0.0.1"))
    assert server.port is not None
    return server.port


async def test_nobody_takes_anothers_node_by_claiming_it(frontend_server: StartFrontend) -> None:
    honest = await frontend_server(nodes=[{"name": "w", "host": "10.0.0.7", "port": 7000}])
    theirs = honest.server.cluster.registry.identity
    child = {"name": "w", "host": "10.0.0.6", "port": 1, "origin": [theirs, "/proxy2/w"]}
    near = await frontend_server(nodes=[proxy("honest", honest)])
    await refreshed(near, "honest")
    async with contextlib.AsyncExitStack() as stack:
        for name, lie in {
            "a_silent": {"nodes": [{"name": "local_proxy", "children": [child]}]},
            "a_between": {"frontend": "liar", "nodes": [{"name": "local_proxy", "children": [child]}]},
            "a_told": {
                "frontend": "x",
                "nodes": [{"name": "local_proxy", "children": [{**child, "through": [theirs]}]}],
            },
            "a_twin": {"frontend": theirs, "nodes": [{"name": "local_proxy", "children": [child]}]},
        }.items():
            port = await far(lie, stack)
            head = Proxy(name, "127.0.0.1", port, TcpAddress("127.0.0.1", port), found=True)
            near.server.cluster.registry.publish("heartbeats", [head])
            await refreshed(near, name)
            assert names(near)["honest"] == ["w"], name


async def test_those_that_hang_take_no_turn_of_those_that_answer(frontend_server: StartFrontend) -> None:
    """Far more addresses than are asked at once are found, and none of them ever answers."""
    good = await frontend_server(nodes=[{"name": "w", "host": "10.0.0.7", "port": 7000}])
    near = await frontend_server()
    async with contextlib.AsyncExitStack() as stack:
        port = await far({}, stack, seconds=60)
        heads = [
            Proxy(f"h{i}", f"127.0.1.{i}", port, TcpAddress(f"127.0.1.{i}", port), found=True) for i in range(1, 200)
        ]
        near.server.cluster.registry.publish("heartbeats", heads)
        await asyncio.sleep(0.7)
        async with near.client.post("/api/proxies", json=proxy("good", good)) as response:
            assert response.status == 200
        await until(lambda: names(near)["good"] == ["w"], 4)
        await refreshed(near, "good")


@pytest.mark.parametrize("many", ['{"nodes": [{"name": "p", "children": [%s]}]}', '{"nodes": [%s]}'])
async def test_lists_that_are_none_are_not_read(frontend_server: StartFrontend, many: str) -> None:
    near = await frontend_server()
    async with contextlib.AsyncExitStack() as stack:
        for name, item in (("objects", "{}"), ("numbers", "1")):
            port = await far(many % ",".join([item] * 1_500_000), stack)
            async with near.client.post(
                "/api/proxies", json={"name": name, "host": "127.0.0.1", "port": port}
            ) as response:
                assert response.status == 200
            status, body = await answer(near, f"/api/proxies/{name}/refresh")
            assert (status, "lists more than nodes" in body["detail"]) == (502, True)


async def test_all_neighbours_nodes_together_are_bounded(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "MAX_TOLD", 3)
    near = await frontend_server()
    async with contextlib.AsyncExitStack() as stack:
        for name in ("p", "q"):
            children = [{"name": f"{name}{i}", "host": "h", "port": 1} for i in range(2)]
            port = await far({"nodes": [{"name": "local_proxy", "children": children}]}, stack)
            await near.client.post("/api/proxies", json={"name": name, "host": "127.0.0.1", "port": port})
            await answer(near, f"/api/proxies/{name}/refresh")
        assert names(near) == {"p": ["p0", "p1"], "q": ["q0"]}
        _, told = await answer(near, "/api/sources")
        (problem,) = [source for source in told["sources"] if source["name"] == "proxy"]
        assert problem["place"].startswith("q (127.0.0.1:")
        assert problem["problems"] == ["1 of its nodes are left out: 3 behind all proxies are kept"]


async def test_half_a_character_costs_one_node(frontend_server: StartFrontend) -> None:
    near = await frontend_server()
    async with contextlib.AsyncExitStack() as stack:
        text = r'{"nodes": [{"name": "a\ud800", "host": "h", "port": 1}, {"name": "b", "host": "h\udc00", "port": 1},'
        port = await far(text + r' {"name": "c\ud83d\ude00", "host": "h", "port": 1}]}', stack)
        await near.client.post("/api/proxies", json={"name": "p", "host": "127.0.0.1", "port": port})
        await refreshed(near, "p")
        assert names(near) == {"p": ["a\ufffd", "c\U0001f600"]}


async def test_a_proxy_that_turned_out_to_be_this_frontend_can_be_removed(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    itself = proxy("itself", frontend)
    assert (await frontend.client.post("/api/proxies", json=itself)).status == 200
    await refreshed_or_gone(frontend, "itself")
    _, told = await answer(frontend, "/api/sources")
    assert [source["problems"] for source in told["sources"] if source["name"] == "proxy"] == [
        ["it is this frontend itself"]
    ]
    assert (await frontend.client.post("/api/proxies", json=itself)).status == 409
    assert (await frontend.client.delete("/api/nodes/itself")).status == 200
    assert list(frontend.server.cluster.registry.heads()) == []


async def refreshed_or_gone(frontend: RunningFrontend, name: str) -> None:
    await answer(frontend, f"/api/proxies/{name}/refresh")
    await until(lambda: name not in names(frontend))


async def test_another_address_is_another_frontend(frontend_server: StartFrontend) -> None:
    one = await frontend_server(nodes=[{"name": "w", "host": "h", "port": 1}])
    near = await frontend_server(nodes=[proxy("p", one)])
    await refreshed(near, "p")
    assert names(near) == {"p": ["w"]}
    assert (await near.client.put("/api/nodes/p", json={"name": "p", "host": "127.0.0.1", "port": 1})).status == 200
    status, _ = await answer(near, "/api/proxies/p/refresh")
    assert (status, names(near)) == (502, {"p": []})
    two = await frontend_server(nodes=[{"name": "x", "host": "h", "port": 1}])
    assert (await near.client.put("/api/nodes/p", json={**proxy("p", two)})).status == 200
    await until(lambda: names(near) == {"p": ["x"]})


async def test_an_address_where_no_frontend_is_any_more(frontend_server: StartFrontend) -> None:
    near = await frontend_server(stale_seconds=0.2)
    registry = near.server.cluster.registry
    async with contextlib.AsyncExitStack() as stack:
        app = web.Application()
        answers = ['{"nodes": [{"name": "w", "host": "h", "port": 1}]}']

        async def nodes(_: web.Request) -> web.Response:
            return web.Response(text=answers[0]) if answers else web.Response(status=404)

        app.router.add_get("/api/nodes", nodes)
        server = await stack.enter_async_context(TestServer(app, host="127.0.0.1"))
        assert server.port is not None
        registry.publish(
            "dns", [Proxy("p", "127.0.0.1", server.port, TcpAddress("127.0.0.1", server.port), found=True)]
        )
        await refreshed(near, "p")
        assert names(near) == {"p": ["w"]}
        answers.clear()
        await refreshed(near, "p")
        await until(lambda: names(near) == {"p": ["p"]})


async def test_thousands_of_nodes_are_told_in_pieces(frontend_server: StartFrontend) -> None:
    nodes = [{"name": f"n{i}", "host": "10.0.0.7", "port": 1 + i} for i in range(2001)]
    racks = [
        {"name": rack, "host": "10.0.0.8", "port": 1, "nodes": nodes[:count]} for rack, count in (("a", 0), ("b", 1))
    ]
    frontend = await frontend_server(nodes=[*nodes, *racks], health_interval=3600)
    status, plain = await answer(frontend, "/api/nodes")
    _, detailed = await answer(frontend, "/api/nodes?detail=true")
    assert status == 200
    keys = ("id", "name", "host", "port", "is_proxy")
    assert [
        [{key: child[key] for key in (*keys, "proxy_id")} for child in one["children"]] for one in detailed["nodes"]
    ] == [one["children"] for one in plain["nodes"]]
    assert [{key: one[key] for key in keys} for one in detailed["nodes"]] == [
        {key: one[key] for key in keys} for one in plain["nodes"]
    ]
    async with frontend.client.head("/api/nodes?detail=true") as response:
        assert response.status == 200


async def test_a_written_proxy_that_is_no_frontend_any_more(frontend_server: StartFrontend) -> None:
    near = await frontend_server(stale_seconds=0.2)
    async with contextlib.AsyncExitStack() as stack:
        port = await far({}, stack)
        await near.client.post("/api/proxies", json={"name": "p", "host": "127.0.0.1", "port": port})
        child = Node("w", "h", 1, TcpAddress("h", 1), path="/proxy2/w")
        near.server.cluster.registry.publish_neighbours("p", [child])
        status, _ = await answer(near, "/api/proxies/p/refresh")
        assert status == 502
        await until(lambda: names(near) == {"p": []})


async def test_who_refreshes_one_proxy_at_once_shares_a_question(frontend_server: StartFrontend) -> None:
    asked = 0

    async def nodes(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.3)
        return web.json_response({"nodes": []})

    app = web.Application()
    app.router.add_get("/api/nodes", nodes)
    async with TestServer(app, host="127.0.0.1") as server:
        near = await frontend_server(nodes=[{"name": "p", "host": "127.0.0.1", "port": server.port, "nodes": []}])
        answers = await asyncio.gather(*(answer(near, "/api/proxies/p/refresh") for _ in range(50)))
        assert {status for status, _ in answers} == {200}
        assert asked <= 3
