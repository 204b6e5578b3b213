"""Proxies and nodes added, changed and removed over HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from lmcache_frontend.nodes import by_hand
from lmcache_frontend.nodes.by_hand import ByHand
from lmcache_frontend.nodes.node import Node, Proxy
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.nodes.stores import StoreAway
from lmcache_frontend.nodes.stores.memory import MemoryStore
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_shared.address import tcp_address
from lmcache_shared.errors import Refusal
from tests.contract.exchanges import ask, difference, read
from tests.frontend.registries import entries, registry_of

N1 = {"name": "n1", "host": "127.0.0.1", "port": "/run/example/worker0.sock"}
P2 = {"name": "p2", "host": "127.0.0.1", "port": "1"}


async def call(frontend: RunningFrontend, method: str, path: str, **more: Any) -> tuple[int, Any]:
    async with frontend.client.request(method, path, **more) as response:
        return response.status, await response.json()


async def names(frontend: RunningFrontend) -> dict[str, list[str]]:
    _, body = await call(frontend, "GET", "/api/nodes")
    return {proxy["name"]: [child["name"] for child in proxy["children"]] for proxy in body["nodes"]}


async def test_as_recorded(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(nodes=[N1])
    exchanges = [exchange for exchange in read("frontend.jsonl") if exchange.path.startswith("/api/")]
    assert len(exchanges) == 20
    for exchange in exchanges:
        status, content_type, body = await ask(frontend.client, exchange)
        text = json.dumps(exchange.body).replace("8202", str(frontend.server.address.port))
        if exchange.path == "/api/proxies" and status == 400:
            assert "missing required field `host`" in body.pop("reason")
        if exchange.path == "/api/heartbeat/status":  # ours tells more, and its own times
            assert list(body)[:4] == list(exchange.body)
            assert (body["running"], body["local_ip"]) == (False, "127.0.0.1")
            continue
        assert (status, content_type) == (exchange.status, exchange.content_type), str(exchange)
        assert difference(json.loads(text), body) is None, str(exchange)


async def test_the_whole_life_of_a_node(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    local = "/api/proxies/local_proxy/nodes"
    assert await call(frontend, "GET", local) == (200, {"nodes": []})
    assert await call(frontend, "POST", local, json=N1) == (
        200,
        {"status": "success", "message": "Node added to proxy"},
    )
    assert await call(frontend, "GET", local) == (200, {"nodes": [N1]})
    other = {**N1, "name": "renamed"}
    assert (await call(frontend, "PUT", "/api/nodes/n1", json=other))[0] == 200
    assert await names(frontend) == {"local_proxy": ["renamed"]}
    assert (await call(frontend, "DELETE", "/api/nodes/n1"))[0] == 404
    assert (await call(frontend, "DELETE", "/api/nodes/renamed"))[0] == 200
    assert await names(frontend) == {}


async def test_a_discovered_node_that_is_removed_stays_away_until_it_is_restored(
    frontend_server: StartFrontend,
) -> None:
    frontend = await frontend_server(nodes=[N1, {**P2, "nodes": [{**N1, "name": "w"}]}])
    for name in ("n1", "p2"):
        assert (await call(frontend, "DELETE", f"/api/nodes/{name}"))[0] == 200
    assert await names(frontend) == {}
    _, told = await call(frontend, "GET", "/api/sources")
    assert told["removed"] == [{"proxy": "local_proxy", "node": "n1"}, {"proxy": "p2"}]
    assert {"name": "hand", "place": "memory", "problems": []} in told["sources"]
    for name in ("n1", "p2"):
        assert (await call(frontend, "POST", f"/api/nodes/{name}/restore"))[0] == 200
    assert await names(frontend) == {"local_proxy": ["n1"], "p2": ["w"]}
    status, body = await call(frontend, "POST", "/api/nodes/n1/restore")
    assert (status, body["detail"]) == (404, "no discovered proxy or node named 'n1' was changed or removed by hand")


async def test_a_proxy_that_is_renamed_takes_its_nodes_along(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(nodes=[{**P2, "nodes": [{**N1, "name": "written"}]}])
    await call(frontend, "POST", "/api/proxies/p2/nodes", json={**N1, "name": "added"})
    assert (await call(frontend, "PUT", "/api/nodes/p2", json={**P2, "name": "p3"}))[0] == 200
    assert await names(frontend) == {"p3": ["written", "added"]}
    wanted = {**P2, "name": "p3", "nodes": [{**N1, "name": "only"}]}
    assert (await call(frontend, "PUT", "/api/nodes/p3", json=wanted))[0] == 200
    assert await names(frontend) == {"p3": ["only"]}
    assert (await call(frontend, "DELETE", "/api/nodes/p3"))[0] == 200
    assert await names(frontend) == {}


async def test_a_node_under_a_discovered_proxy_keeps_the_proxy(frontend_server: StartFrontend, tmp_path: Path) -> None:
    file = tmp_path / "nodes.json"
    file.write_text(json.dumps([{**P2, "nodes": []}]))
    frontend = await frontend_server(config=str(file))
    assert (await call(frontend, "POST", "/api/proxies/p2/nodes", json=N1))[0] == 200
    frontend.server.cluster.registry.publish("file", [])
    assert await names(frontend) == {"p2": ["n1"]}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "detail"),
    [
        ("POST", "/api/proxies", {**P2, "name": "local_proxy"}, 409, "Proxy name already exists"),
        ("POST", "/api/proxies", {**P2, "port": "0"}, 400, "Invalid proxy format"),
        ("POST", "/api/proxies", [], 400, "Invalid proxy format"),
        ("POST", "/api/proxies/p2/nodes", {**N1, "name": ""}, 400, "Invalid node format"),
        ("POST", "/api/proxies/p2/nodes", {**N1, "nodes": []}, 400, "Invalid node format"),
        ("POST", "/api/proxies/p2/nodes", {**N1, "name": "w"}, 409, "Node name already exists"),
        ("PUT", "/api/nodes/local_proxy", P2, 409, "local_proxy is this frontend itself"),
        ("DELETE", "/api/nodes/local_proxy", None, 409, "local_proxy is this frontend itself"),
        ("PUT", "/api/nodes/n1", {**N1, "name": "n2"}, 409, "Node name already exists"),
        ("PUT", "/api/nodes/n1", {**N1, "nodes": []}, 400, "'n1' is a node and has no nodes of its own"),
        ("PUT", "/api/nodes/p2", {**P2, "name": "p3"}, 409, "Proxy name already exists"),
        ("PUT", "/api/nodes/w", N1, 409, "2 nodes are named 'w'; say which one with ?proxy= (of p2, p3)"),
        ("DELETE", "/api/nodes/w", None, 409, "2 nodes are named 'w'"),
        ("DELETE", "/api/nodes/w?proxy=nope", None, 404, "Node not found"),
        ("GET", "/api/nodes?detail=x", None, 422, "Input should be a valid boolean"),
    ],
)
async def test_what_is_refused(
    frontend_server: StartFrontend, method: str, path: str, body: object, status: int, detail: str
) -> None:
    w = {**N1, "name": "w"}
    nodes = [N1, {**N1, "name": "n2"}, {**P2, "nodes": [w]}, {**P2, "name": "p3", "nodes": [w]}]
    frontend = await frontend_server(nodes=nodes)
    before = await names(frontend)
    found, answer = await call(frontend, method, path, json=body)
    assert found == status
    assert detail in json.dumps(answer["detail"])
    assert await names(frontend) == before


async def test_one_of_several_is_named_by_its_proxy(frontend_server: StartFrontend) -> None:
    w = {**N1, "name": "w"}
    frontend = await frontend_server(nodes=[{**P2, "nodes": [w]}, {**P2, "name": "p3", "nodes": [w]}])
    assert (await call(frontend, "DELETE", "/api/nodes/w", params={"proxy": "p3"}))[0] == 200
    assert await names(frontend) == {"p2": ["w"], "p3": []}


async def test_two_that_add_one_name_at_once() -> None:
    store = MemoryStore()
    await store.open()
    both = [ByHand(registry_of(), store) for _ in range(2)]
    for one in both:
        await one.read()
    (node,) = entries(N1)
    assert isinstance(node, Node)
    results = await asyncio.gather(*(one.add_node("local_proxy", node) for one in both), return_exceptions=True)
    refused = [result for result in results if result is not None]
    assert len(refused) == 1
    assert isinstance(refused[0], Refusal)
    assert refused[0].status == 409
    await store.close()


async def test_nothing_is_changed_while_the_store_is_away(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(nodes=[N1])
    store = frontend.server.cluster.store

    async def away(changes: object) -> bool:
        raise StoreAway("the disk is full: free some")

    store.apply = away  # type: ignore[method-assign,assignment]
    status, body = await call(frontend, "POST", "/api/proxies", json=P2)
    assert (status, body["detail"]) == (503, "nothing was changed: the disk is full: free some")
    assert await names(frontend) == {"local_proxy": ["n1"]}


async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_hand, "MAX_NODES", 2)
    store = MemoryStore()
    await store.open()
    one = ByHand(registry_of(), store)
    for number in range(2):
        await one.add_node("local_proxy", Node(f"n{number}", "h", 80, tcp_address("h", 80)))
    with pytest.raises(Refusal, match="3 proxies and nodes would be kept by hand, at most 2 are"):
        await one.add_node("local_proxy", Node("n2", "h", 80, tcp_address("h", 80)))
    await store.close()


async def test_records_of_another_version_are_passed_over() -> None:
    registry = Registry(host="h", port=1)
    one = ByHand(registry, MemoryStore())
    good = json.dumps(N1)
    one._take(
        {"identity": "us", '["local_proxy","n1"]': good, '["a","b","c"]': good, '["x"]': "{", "[": "", "[1]": good}
    )
    assert [node.name for node in registry.nodes()] == ["n1"]
    assert registry.identity == "us"


async def test_a_frontend_that_nobody_adds_to_leaves_no_file(frontend_server: StartFrontend, tmp_path: Path) -> None:
    frontend = await frontend_server(registry=f"sqlite:{tmp_path}/state/nodes.db", nodes=[N1])
    await asyncio.sleep(0.5)
    assert list(tmp_path.iterdir()) == []
    assert (await call(frontend, "POST", "/api/proxies", json=P2))[0] == 200
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["nodes.db"]


async def test_nodes_survive_a_restart(frontend_server: StartFrontend, tmp_path: Path) -> None:
    kept = f"sqlite:{tmp_path}/nodes.db"
    first = await frontend_server(registry=kept)
    await call(first, "POST", "/api/proxies", json=P2)
    await call(first, "POST", "/api/proxies/local_proxy/nodes", json=N1)
    await first.server.stop()
    again = await frontend_server(registry=kept)
    assert await names(again) == {"local_proxy": ["n1"], "p2": []}
    assert again.server.cluster.registry.identity == first.server.cluster.registry.identity


async def test_a_change_is_told_and_can_be_taken_back(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(nodes=[N1])
    assert (await call(frontend, "PUT", "/api/nodes/n1", json={**N1, "port": "/run/other.sock"}))[0] == 200
    _, told = await call(frontend, "GET", "/api/sources")
    assert (told["changed"], told["removed"]) == ([{"proxy": "local_proxy", "node": "n1"}], [])
    assert (await call(frontend, "POST", "/api/nodes/n1/restore"))[0] == 200
    assert await call(frontend, "GET", "/api/proxies/local_proxy/nodes") == (200, {"nodes": [N1]})


async def test_removed_while_its_source_is_silent(frontend_server: StartFrontend, tmp_path: Path) -> None:
    """The record remembers that it lies over a discovered one."""
    kept = f"sqlite:{tmp_path}/nodes.db"
    first = await frontend_server(registry=kept, nodes=[{**P2, "nodes": []}])
    assert (await call(first, "PUT", "/api/nodes/p2", json={**P2, "port": "2"}))[0] == 200
    await first.server.stop()
    again = await frontend_server(registry=kept)  # whoever told of it has not done so yet
    assert (await call(again, "DELETE", "/api/nodes/p2"))[0] == 200
    again.server.cluster.registry.publish("nodes", entries({**P2, "nodes": []}))
    assert await names(again) == {}


async def test_a_proxy_that_is_removed_while_it_is_given_a_node() -> None:
    """Either the node is there with its proxy, or neither is."""
    (node,) = entries(N1)
    (head,) = entries({**P2, "nodes": []})
    assert isinstance(node, Node)
    assert isinstance(head, Proxy)
    for _ in range(20):
        store = SlowStore()
        one, other = (ByHand(registry_of(), store) for _ in range(2))
        await one.add_proxy(head)
        await other.read()
        added, removed = await asyncio.gather(one.add_node("p2", node), other.remove("p2"), return_exceptions=True)
        assert removed is True
        assert added is None or (isinstance(added, Refusal) and added.status == 404)
        assert [key for key in await store.read() if key != "identity"] == []


class SlowStore(MemoryStore):
    """Somebody else has a turn in the middle."""

    async def read(self) -> dict[str, str]:
        found = await super().read()
        await asyncio.sleep(0)
        return found

    async def apply(self, changes: Any) -> bool:
        await asyncio.sleep(0)
        return await super().apply(changes)


async def test_who_waits_behind_a_store_that_does_not_answer_fails_with_it() -> None:
    class Hanging(MemoryStore):
        calls = 0

        async def apply(self, changes: Any) -> bool:
            self.calls += 1
            await asyncio.sleep(0.2)
            raise StoreAway("locked")

    store = Hanging()
    one = ByHand(registry_of(), store)
    await one.read()
    (node,) = entries(N1)
    assert isinstance(node, Node)
    results = await asyncio.gather(*(one.add_node("local_proxy", node) for _ in range(20)), return_exceptions=True)
    assert {str(result) for result in results} == {"503: nothing was changed: locked"}
    assert store.calls == 1


async def test_a_record_under_anothers_key_is_passed_over() -> None:
    registry = Registry(host="h", port=1)
    one = ByHand(registry, MemoryStore())
    one._take({'["local_proxy","k1"]': json.dumps({**N1, "name": "k2"})})
    assert list(registry.nodes()) == []


async def test_a_store_that_comes_back_with_less_is_told(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    one = ByHand(registry_of(), store)
    (node,) = entries(N1)
    assert isinstance(node, Node)
    await one.add_node("local_proxy", node)
    one.note(StoreAway("gone"))
    store._records.clear()
    await one.read()
    assert "can be used again, with 0 records where 2 were" in caplog.text


async def test_a_proxy_that_is_not_shown_keeps_its_nodes_by_hand_when_it_is_renamed(
    frontend_server: StartFrontend,
) -> None:
    frontend = await frontend_server()
    assert (await call(frontend, "POST", "/api/proxies", json=P2))[0] == 200
    assert (await call(frontend, "POST", "/api/proxies/p2/nodes", json=N1))[0] == 200
    frontend.server.cluster.registry.publish_selves(["p2"])
    assert (await call(frontend, "PUT", "/api/nodes/p2", json={**P2, "name": "p3"}))[0] == 200
    assert await names(frontend) == {"p3": ["n1"]}
    assert {key for key in await frontend.server.cluster.store.read() if "p2" in key} == set()


async def test_a_component_that_was_found_stays_when_it_is_given_a_node(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    found = Proxy("c", "127.0.0.1", 1, tcp_address("127.0.0.1", 1), found=True)
    frontend.server.cluster.registry.publish("dns", [found])
    assert await names(frontend) == {"c": ["c"]}
    assert (await call(frontend, "POST", "/api/proxies/c/nodes", json=N1))[0] == 200
    assert await names(frontend) == {"c": ["n1", "c"]}


async def test_removed_added_and_removed_again_while_its_source_is_silent(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(nodes=[N1])
    registry = frontend.server.cluster.registry
    assert (await call(frontend, "DELETE", "/api/nodes/n1"))[0] == 200
    registry.publish("nodes", [])
    assert (await call(frontend, "POST", "/api/proxies/local_proxy/nodes", json=N1))[0] == 200
    status, _ = await call(frontend, "POST", "/api/nodes/n1/restore")
    assert status == 409  # nothing would be left
    assert (await call(frontend, "DELETE", "/api/nodes/n1"))[0] == 200
    registry.publish("nodes", entries(N1))
    assert await names(frontend) == {}


async def test_what_no_store_could_keep_is_the_callers_fault(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    status, body = await call(frontend, "POST", "/api/proxies", json={**P2, "host": "h" * 70_000})
    assert status == 400, body
    deep = {"name": "\U0001f600" * 255, "host": "h", "port": 1}
    assert (await call(frontend, "POST", "/api/proxies", json=deep))[0] == 200
    where = f"/api/proxies/{deep['name']}/nodes"
    assert (await call(frontend, "POST", where, json=deep))[0] == 200
    _, told = await call(frontend, "GET", "/api/sources")
    assert {"name": "hand", "place": "memory", "problems": []} in told["sources"]
