import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.cluster import Cluster
from lmcache_frontend.nodes import node
from lmcache_frontend.nodes.node import Node, Reach, read_list
from lmcache_frontend.options import Options
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_shared.address import TcpAddress, UnixAddress
from lmcache_shared.errors import ConfigError
from tests.contract.exchanges import read
from tests.frontend.boards import settled
from tests.frontend.registries import entries, registry_of

N1 = {"name": "n1", "host": "127.0.0.1", "port": "/run/example/worker0.sock"}


async def test_health_as_recorded(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(nodes=[N1])
    recorded = {str(exchange): exchange.body for exchange in read("frontend.jsonl")}
    async with frontend.client.get("/health") as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert await response.json() == recorded["GET /health"]


async def test_refusals_of_the_proxy_as_recorded(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(nodes=[N1], socket_prefix=["/tmp/"])
    exchanges = {str(exchange): exchange for exchange in read("frontend.jsonl")}
    for name in ("GET /proxy2/nope/version", "GET /proxy/localhost/%252Ftmp%252Fno_such_socket/version"):
        exchange = exchanges[name]
        async with frontend.client.get(frontend.url + exchange.path.replace("%252F", "%2F")) as response:
            said = await response.json()
            said.pop("reason", None)  # ours: why there is no connection
            assert (response.status, said) == (exchange.status, exchange.body)
    refused = exchanges["GET /proxy/127.0.0.1/1/version"]
    headers = {"X-Forwarded-For": "10.0.0.1"}  # a caller on this machine itself may reach its ports
    async with frontend.client.get(refused.path, headers=headers) as response:
        said = await response.json()
        assert said.pop("reason") == "add it with --nodes or --config, or allow it with --allow-target 127.0.0.1:1"
        assert (response.status, said) == (refused.status, refused.body)


def test_plain_nodes_are_children_of_local_proxy_and_proxies_stand_beside_it() -> None:
    proxy = {"name": "p2", "host": "h2", "port": "8001", "nodes": [{"name": "w9", "host": "h2", "port": 8002}]}
    registry = registry_of(entries(N1, proxy))
    assert [(found.name, [child.name for child in found.nodes]) for found in registry.proxies()] == [
        ("local_proxy", ["n1"]),
        ("p2", ["w9"]),
    ]
    assert registry.find("n1") == Reach(UnixAddress("/run/example/worker0.sock"))
    assert registry.find("w9") == Reach(TcpAddress("h2", 8002))
    assert registry.find("p2") == Reach(TcpAddress("h2", 8001))
    assert registry.find("nope") is None
    assert list(registry_of().proxies()) == []


def test_a_socket_behind_a_proxy_lies_on_the_proxys_machine() -> None:
    proxy = {"name": "p2", "host": "h2", "port": 8001, "nodes": [{"name": "w", "host": "x", "port": "/run/w"}]}
    registry = registry_of(entries(proxy, {**N1, "name": "w"}))
    behind = Reach(TcpAddress("h2", 8001), "/proxy/localhost/%252Frun%252Fw")
    assert [node.reach for node in registry.nodes()] == [Reach(UnixAddress(str(N1["port"]))), behind]
    assert behind.proxy_path == "/proxy/h2/8001/proxy/localhost/%252Frun%252Fw"
    assert registry.find("w") == Reach(UnixAddress(str(N1["port"])))  # of one name, this frontend's own comes first
    assert registry.has(TcpAddress("h2", 8001))
    assert not registry.has(UnixAddress("/run/w"))


def test_a_loopback_port_behind_a_proxy_lies_on_the_proxys_machine() -> None:
    child = {"name": "w", "host": "127.0.0.1", "port": 7000}
    registry = registry_of(entries({"name": "p2", "host": "h2", "port": 8001, "nodes": [child]}))
    assert registry.find("w") == Reach(TcpAddress("h2", 8001), "/proxy/127.0.0.1/7000")
    assert registry.at(TcpAddress("127.0.0.1", 7000)) is None
    near = registry_of(entries({"name": "p2", "host": "localhost", "port": 8001, "nodes": [child]}))
    assert near.find("w") == Reach(TcpAddress("127.0.0.1", 7000))


async def test_through_two_frontends(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(role="worker")
    far = await frontend_server(nodes=[worker.node])
    itself = {"name": "far", "host": "127.0.0.1", "port": far.server.address.port}
    near = await frontend_server(nodes=[{**itself, "nodes": [{**worker.node, "name": "w"}]}])
    async with near.client.get("/proxy2/w/version") as response:
        assert (response.status, await response.json()) == (200, "0.1.0-embedded")
    async with near.client.get("/proxy2/far/proxy2/lmcache_worker0/version") as response:
        assert (response.status, await response.json()) == (200, "0.1.0-embedded")
    (found,) = await settled(near)
    assert (found.state, found.role) == ("up", "worker")
    await far.server.stop()
    async with near.client.get("/proxy2/w/version") as response:
        assert response.status == 502


def test_other_keys_and_both_kinds_of_port_are_taken() -> None:
    taken = entries({"name": "a", "host": "h", "port": 80, "proxy_id": "x", "zone": 5}, {**N1, "port": "81"})
    assert [(entry.port, entry.address.port) for entry in taken] == [(80, 80), ("81", 81)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a JSON list of nodes"),
        ("{", "expected a JSON list of nodes"),
        ("{}", "Expected `array`, got `object`"),
        ("[1]", "[0]: expected a node {name, host, port}: Expected `object`, got `int`"),
        ('[{"name": "a", "host": "h"}]', "missing required field `port`"),
        ('[{"name": 1, "host": "h", "port": 1}]', "Expected `str`, got `int` - at `$.name`"),
        ('[{"name": "", "host": "h", "port": 1}]', "length >= 1 - at `$.name`"),
        ('[{"name": "a\\nb", "host": "h", "port": 1}]', "at `$.name`"),
        ('[{"name": "a", "host": "h", "port": true}]', "Expected `int | str`, got `bool`"),
        ('[{"name": "a", "host": "h", "port": 0}]',
         "--nodes: [0]: 'a': '0': expected a port from 1 to 65535, or the absolute path of a Unix socket"),
        ('[{"name": "a", "host": "h h", "port": 1}]', "'h h': expected a host name"),
        ('[{"name": "p", "host": "h", "port": 1, "nodes": [{"name": "a", "host": "h", "port": "x"}]}]',
         "--nodes: [0].nodes[0]: 'a': 'x': expected a port"),
        ('[{"name": "p", "host": "h", "port": 1, "nodes": [{"name": "a", "host": "h", "port": 1, "nodes": []}]}]',
         "[0].nodes[0]: 'a' has nodes of its own"),
        ("[" * 100_000, "expected a JSON list of nodes"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_nodes(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_list(text.encode(), "--nodes")
    assert str(refused.value).startswith("--nodes: ")
    assert message in str(refused.value)


@given(st.binary(max_size=60))
def test_any_bytes_are_taken_or_refused(data: bytes) -> None:
    try:
        read_list(data, "x")
    except ConfigError:
        return


def test_names_are_one_of_a_kind() -> None:
    with pytest.raises(ConfigError, match="two nodes of local_proxy are named 'n1'"):
        entries(N1, N1)
    proxy = {"name": "p", "host": "h", "port": 1, "nodes": []}
    with pytest.raises(ConfigError, match="two proxies are named 'p'"):
        entries(proxy, proxy)
    with pytest.raises(ConfigError, match="two nodes of p are named 'n1'"):
        entries({**proxy, "nodes": [N1, N1]})
    with pytest.raises(ConfigError, match="two proxies are named 'local_proxy'"):
        entries({**proxy, "name": "local_proxy"})


def test_lists_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "MAX_NODES", 2)
    with pytest.raises(ConfigError, match="3 entries, but at most 2"):
        entries(*[{**N1, "name": str(i)} for i in range(3)])


def test_a_file_and_the_command_line_together(tmp_path: Path) -> None:
    file = tmp_path / "nodes.json"
    file.write_text(json.dumps([N1]))
    nodes = '[{"name": "n2", "host": "h", "port": 1}]'
    cluster = Cluster(Options(config=str(file), nodes=nodes, registry="memory"))
    assert [(node.name, node.source) for node in cluster.registry.nodes()] == [("n2", "nodes"), ("n1", "file")]
    with pytest.raises(ConfigError, match=f"{tmp_path}/none: cannot read the nodes: No such file"):
        Cluster(Options(config=f"{tmp_path}/none", registry="memory"))
    file.write_text("[")
    with pytest.raises(ConfigError, match=f"{file}: expected a JSON list"):
        Cluster(Options(config=str(file), registry="memory"))


def test_the_seed_files() -> None:
    file = Path(__file__).parents[2] / "config" / "config.json"
    assert [str(entry.address) for entry in read_list(file.read_bytes(), str(file)) if isinstance(entry, Node)] == [
        "/tmp/lmcache_internal_api_server/socket_6999",
        "/tmp/lmcache_internal_api_server/socket_7000",
    ]
