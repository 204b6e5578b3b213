"""Sources laid over one another, and what a name means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lmcache_frontend.nodes.node import LOCAL_PROXY, Node, Proxy, Reach
from lmcache_frontend.nodes.registry import NEIGHBOURS, Registry, view_of
from lmcache_frontend.workers.snapshot import decoded, encoded
from lmcache_shared.address import TcpAddress, tcp_address


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(clock: Clock) -> Registry:
    return Registry(host="h", port=1, identity="us", stale_seconds=60, now=clock)


def node(name: str, port: int = 7000, host: str = "10.0.0.1", **more: object) -> Node:
    return replace(Node(name, host, port, tcp_address(host, port)), **more)  # type: ignore[arg-type]


def head(name: str, host: str = "10.0.0.9", *nodes: Node, found: bool = False) -> Proxy:
    return Proxy(name, host, 8000, tcp_address(host, 8000), nodes, found=found)


def names(registry: Registry) -> dict[str, list[str]]:
    return {proxy.name: [node.name for node in proxy.nodes] for proxy in registry.proxies()}


def test_what_is_said_by_hand_wins_and_keeps_its_place(registry: Registry) -> None:
    registry.publish("nodes", [node("a", 1), node("b", 2)])
    registry.publish("file", [node("b", 3), node("c", 4)])
    registry.publish_by_hand([Proxy(LOCAL_PROXY, "", 0, tcp_address("h", 1), (node("a", 5), node("d", 6)))], [])
    assert [(found.name, found.port, found.source) for found in registry.nodes()] == [
        ("a", 5, "hand"),
        ("b", 2, "nodes"),
        ("c", 4, "file"),
        ("d", 6, "hand"),
    ]
    registry.publish_by_hand([], [(LOCAL_PROXY, "a")])
    assert [(found.name, found.port) for found in registry.nodes()] == [("b", 2), ("c", 4)]


def test_what_is_no_longer_discovered_is_stale_and_then_leaves(registry: Registry, clock: Clock) -> None:
    registry.publish("supplier", [head("p"), head("q")], lasting=True)
    registry.publish_neighbours("p", [node("w", path="/proxy2/w")])
    registry.publish("supplier", [head("q")], lasting=True)
    assert [(proxy.name, proxy.stale) for proxy in registry.proxies()] == [("p", True), ("q", False)]
    clock.now += 59
    registry.publish("supplier", [head("q")], lasting=True)  # does not give it new time
    registry.tick()
    assert names(registry) == {"p": ["w"], "q": []}
    clock.now += 1
    registry.tick()
    assert names(registry) == {"q": []}
    assert registry.find("w") is None
    registry.publish("supplier", [head("p"), head("q")], lasting=True)
    assert names(registry) == {"p": [], "q": []}  # what it had told of is forgotten


def test_what_comes_back_in_time_is_not_stale(registry: Registry, clock: Clock) -> None:
    registry.publish("supplier", [head("p")], lasting=True)
    registry.publish("supplier", [], lasting=True)
    clock.now += 30
    registry.publish("supplier", [head("p")], lasting=True)
    clock.now += 40
    registry.tick()
    assert [(proxy.name, proxy.stale) for proxy in registry.proxies()] == [("p", False)]


def test_a_files_entry_leaves_at_once(registry: Registry) -> None:
    registry.publish("file", [node("a")])
    registry.publish("file", [])
    assert names(registry) == {}


def test_what_was_found_and_tells_of_no_nodes_is_itself_the_leaf(registry: Registry) -> None:
    registry.publish("dns", [head("proxy_10.0.0.9_8000", found=True)])
    assert names(registry) == {"proxy_10.0.0.9_8000": ["proxy_10.0.0.9_8000"]}
    (leaf,) = registry.nodes()
    assert leaf.reach == Reach(TcpAddress("10.0.0.9", 8000))
    registry.publish_neighbours("proxy_10.0.0.9_8000", [node("w", path="/proxy2/w")])
    assert names(registry) == {"proxy_10.0.0.9_8000": ["w"]}
    registry.publish_by_hand([], [("proxy_10.0.0.9_8000", "w")])
    assert names(registry) == {"proxy_10.0.0.9_8000": []}


def test_who_was_found_takes_no_address_of_another_host(registry: Registry) -> None:
    registry.publish("heartbeats", [head("found", found=True)])  # at 10.0.0.9: anybody can report himself
    registry.publish_neighbours(
        "found", [node("w", 7000, "10.0.0.1", path="/w"), node("v", 7000, "10.0.0.9", path="/v")]
    )
    assert registry.find("w") == Reach(TcpAddress("10.0.0.9", 8000), "/w")
    assert registry.at(TcpAddress("10.0.0.9", 7000)) == Reach(TcpAddress("10.0.0.9", 8000), "/v")
    for view in (view_of(tuple(registry.proxies())), view_of(decoded(encoded(registry.proxies())))):
        assert TcpAddress("10.0.0.1", 7000) not in view.by_address
        assert TcpAddress("10.0.0.9", 7000) in view.by_address


def test_a_told_node_is_reached_through_its_proxy(registry: Registry) -> None:
    registry.publish("file", [head("p")])
    registry.publish_neighbours("p", [node("w", 7000, "10.0.0.1", path="/proxy2/rack/proxy2/w")])
    through = Reach(TcpAddress("10.0.0.9", 8000), "/proxy2/rack/proxy2/w")
    assert registry.find("w") == through
    assert registry.at(TcpAddress("10.0.0.1", 7000)) == through  # `/proxy/10.0.0.1/7000` works, the same way
    assert not registry.has(TcpAddress("10.0.0.1", 7000))
    found = registry.node("p", "w")
    assert found is not None
    assert registry.path_of("p", found) == "/proxy2/p/proxy2/w"
    assert found.source == NEIGHBOURS


def test_a_name_of_several_proxies_is_ambiguous_unless_it_is_ours(registry: Registry) -> None:
    registry.publish("file", [head("p", "10.0.0.8", node("w")), head("q", "10.0.0.9", node("w", 7001))])
    assert registry.find("w") == ("p", "q")
    assert [known.proxy for known in registry.nodes_named("w")] == ["p", "q"]
    registry.publish("nodes", [node("w", 7002)])
    assert registry.find("w") == Reach(TcpAddress("10.0.0.1", 7002))
    assert [known.proxy for known in registry.nodes_named("w")] == [LOCAL_PROXY]


def test_a_path_is_clear_whatever_other_names_there_are(registry: Registry) -> None:
    registry.publish("nodes", [node("p"), node("w")])
    registry.publish("file", [head("p", "10.0.0.9", node("w"))])
    paths = {
        (proxy.name, found.name): registry.path_of(proxy.name, found)
        for proxy in registry.proxies()
        for found in proxy.nodes
    }
    assert paths == {
        (LOCAL_PROXY, "p"): "/proxy2/local_proxy/proxy2/p",  # a proxy has this name
        (LOCAL_PROXY, "w"): "/proxy2/w",
        ("p", "w"): "/proxy2/p/proxy2/w",
    }


def test_a_node_that_is_known_on_several_ways_is_counted_once_on_the_shortest(registry: Registry) -> None:
    registry.publish("file", [head("far", "10.0.0.8"), head("near", "10.0.0.9")])
    origin = ("x", "/proxy2/w")
    registry.publish_neighbours("far", [node("w", path="/proxy2/near/proxy2/w", through=("f", "x"), origin=origin)])
    assert names(registry) == {"far": ["w"], "near": []}
    registry.publish_neighbours("near", [node("w", path="/proxy2/w", through=("x",), origin=origin)])
    assert names(registry) == {"far": [], "near": ["w"]}
    registry.publish_neighbours("near", [])  # stale there now: the other way counts
    assert names(registry) == {"far": ["w"], "near": []}


def test_a_proxy_that_is_this_frontend_is_not_shown(registry: Registry) -> None:
    registry.publish("heartbeats", [head("us", found=True)])
    registry.publish_selves(["us"])
    assert names(registry) == {}
    assert [found.name for found in registry.heads()] == [
        "us"
    ]  # and is asked again: another may have its address one day


def test_the_same_again_changes_nothing(registry: Registry) -> None:
    registry.publish("file", [head("p", "10.0.0.8", node("w"))])
    before, proxies = registry.revision, list(registry.proxies())
    registry.publish("file", [head("p", "10.0.0.8", node("w"))])
    registry.tick()
    assert registry.revision == before
    assert next(registry.proxies()) is proxies[0]


def test_nodes_of_a_stale_proxy_are_stale(registry: Registry) -> None:
    registry.publish("supplier", [head("p")], lasting=True)
    registry.publish_neighbours("p", [node("w", path="/proxy2/w")])
    registry.publish("supplier", [], lasting=True)
    assert [found.stale for found in registry.nodes()] == [True]


def test_this_frontends_own_node_is_not_found_a_second_time(registry: Registry) -> None:
    registry.publish("nodes", [node("w", 8000, "10.0.0.9")])
    registry.publish("heartbeats", [head("proxy_10.0.0.9_8000", found=True)])
    assert names(registry) == {LOCAL_PROXY: ["w"]}
    registry.publish_neighbours("proxy_10.0.0.9_8000", [node("x", path="/proxy2/x")])
    assert names(registry) == {LOCAL_PROXY: ["w"], "proxy_10.0.0.9_8000": ["x"]}
