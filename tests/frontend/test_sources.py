"""Where nodes come from: a discovery service, and the DNS; each really listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from lmcache_frontend.nodes import found
from lmcache_frontend.nodes.found import found_proxy, read_api_address
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.nodes.sources import Source
from lmcache_frontend.nodes.sources import dns as dns_module
from lmcache_frontend.nodes.sources import supplier as supplier_module
from lmcache_frontend.nodes.sources.dns import DnsSource
from lmcache_frontend.nodes.sources.supplier import SupplierSource, pause
from lmcache_frontend.options import read_options
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_shared.address import TcpAddress
from lmcache_shared.errors import AddressError, ConfigError
from tests.frontend.dns_server import DnsServer, dns_server
from tests.frontend.upstream import Upstream, serving


def registry() -> Registry:
    return Registry(host="127.0.0.1", port=1, stale_seconds=60)


def heads(registry: Registry, *, stale: bool = False) -> list[str]:
    return [proxy.name for proxy in registry.proxies() if proxy.stale == stale]


@contextlib.asynccontextmanager
async def running(source: Source) -> AsyncIterator[None]:
    task = asyncio.create_task(source.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(is_so: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


# An address that was found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("http://10.0.0.1:8000", "proxy_10.0.0.1_8000"),
        ("10.0.0.1:8000", "proxy_10.0.0.1_8000"),
        ("http://Node-1.lan:80/", "proxy_node-1.lan_80"),
        ("http://[2001:DB8::1]:80", "proxy_[2001_db8__1]_80"),
        ("http://[2001:db8:0::1]:80", "proxy_[2001_db8__1]_80"),
    ],
)
def test_the_name_of_an_address(text: str, name: str) -> None:
    proxy = found_proxy(read_api_address(text))
    assert (proxy.name, proxy.found) == (name, True)


@pytest.mark.parametrize(
    "text",
    ["", "x", "http://", "https://h:1", "http://h", "http://h:0", "http://h:65536", "http://h:1/x", "http://h:1?x",
     "http://u:secret@h:1", "unix:/run/x", "/run/x", "::1:80", "http://[::1:80", "http://0.0.0.0:80",
     "http://[::]:80", "http://224.0.0.1:80", "http://h h:1", "http://h\n:1", "h" * 5000 + ":1", "[[::1]]:1"],
)  # fmt: skip
def test_no_address(text: str) -> None:
    with pytest.raises(AddressError) as refused:
        read_api_address(text)
    assert "secret" not in str(refused.value)
    assert len(str(refused.value)) < 500


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    with contextlib.suppress(AddressError):
        where = read_api_address(text)
        assert read_api_address(f"http://{where}") == where


# The supplier


def infos(*addresses: object) -> dict[str, Any]:
    entities = {f"{i}": {"count": 1, "lmCacheInfoEntities": [{"apiAddress": it}]} for i, it in enumerate(addresses)}
    return {"processCount": len(entities), "processInfos": entities}


class Supplier:
    """Answers `body` with `status`; `source` asks it."""

    def __init__(self) -> None:
        self.status = 200
        self.body: bytes = json.dumps(infos()).encode()
        self.headers: dict[str, str] = {}
        self.times: list[float] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.times.append(time.monotonic())
        return web.Response(status=self.status, body=self.body, headers=self.headers)

    def tell(self, *addresses: object) -> None:
        self.body = json.dumps(infos(*addresses)).encode()


@contextlib.asynccontextmanager
async def supplying() -> AsyncIterator[Supplier]:
    supplier = Supplier()
    app = web.Application()
    app.router.add_get("/lmcache_infos", supplier.handle)
    async with TestServer(app, host="127.0.0.1") as server:
        supplier.url = str(server.make_url("/lmcache_infos"))
        yield supplier


async def test_what_a_supplier_tells_comes_becomes_stale_and_comes_back() -> None:
    async with supplying() as supplier:
        supplier.tell("http://127.0.0.1:1", "127.0.0.1:2", "http://[::1]:3")
        known = registry()
        async with running(SupplierSource(supplier.url, 0.05, known)):
            await until(lambda: heads(known) == ["proxy_127.0.0.1_1", "proxy_127.0.0.1_2", "proxy_[__1]_3"])
            assert [node.name for node in known.nodes()] == heads(known), "each may be a component itself"
            assert {proxy.source for proxy in known.proxies()} == {"supplier"}
            supplier.tell("127.0.0.1:2")
            await until(lambda: heads(known) == ["proxy_127.0.0.1_2"])
            assert heads(known, stale=True) == ["proxy_127.0.0.1_1", "proxy_[__1]_3"]
            supplier.tell("127.0.0.1:1", "127.0.0.1:2")
            await until(lambda: len(heads(known)) == 2)


async def test_a_supplier_that_is_away_changes_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supplier_module, "FIRST_PAUSE_SECONDS", 0.02)
    caplog.set_level(logging.INFO, "lmcache_frontend.nodes.sources")
    async with supplying() as supplier:
        supplier.tell("127.0.0.1:1")
        known = registry()
        source = SupplierSource(supplier.url + "?token=hidden&minute=2&ghp_hiddenhiddenhidden=x&hidden", 0.05, known)
        assert source.place == supplier.url + "?token=***&minute=2&***&***"
        async with running(source):
            await until(lambda: heads(known) == ["proxy_127.0.0.1_1"])
            assert source.problems == []
            revision = known.revision
            for status, body, problem in [
                (503, b"", "it answers 503"),
                (302, b"", "it answers 302"),
                (200, b"{}", "missing required field `processInfos`"),
                (200, b"[]", "it answers no list of a discovery service"),
                (200, b"{" * 100_000, "it answers no list of a discovery service"),
                (200, b'{"processInfos": null}', "it answers no list of a discovery service"),
                (200, b"\xff\x00", "it answers no list of a discovery service"),
                (200, bytes(9 << 20), "it answers more than 8388608 bytes"),
            ]:
                supplier.status, supplier.body, supplier.headers = status, body, {"Location": "/elsewhere"}
                await until(lambda problem=problem: any(problem in it for it in source.problems))  # type: ignore[misc]
                asked = len(supplier.times)
                await until(lambda asked=asked: len(supplier.times) >= asked + 2)  # type: ignore[misc]
            assert (heads(known), known.revision) == (["proxy_127.0.0.1_1"], revision), "as it was, and not stale"
            supplier.status = 200
            supplier.tell("127.0.0.1:1")
            await until(lambda: source.problems == [])
    told = [record.getMessage() for record in caplog.records]
    assert sum("503" in line for line in told) == 1
    assert told[-1] == f"nodes of supplier ({source.place}): all can be used again"
    assert caplog.records[-1].levelno == logging.INFO, "nobody is woken up because all is well"
    assert "hidden" not in caplog.text


async def test_entries_that_cannot_be_used_are_told_and_the_others_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async with supplying() as supplier:
        entities = [{"apiAddress": "http://127.0.0.1:1", "pid": "x"}, {"apiAddress": 7}, None, {}]
        entries = {"a": {"lmCacheInfoEntities": entities}, "b": {}, "c": 5, **infos("x", "h:0")["processInfos"]}
        supplier.body = json.dumps({"processInfos": entries}).encode()
        known = registry()
        source = SupplierSource(supplier.url, 0.05, known)
        async with running(source):
            await until(lambda: heads(known) == ["proxy_127.0.0.1_1"])
            assert len(source.problems) == 7
            supplier.tell(*(f"{i}.{'ü' * 400}" for i in range(100)))
            await until(lambda: source.problems[-1] == "and 80 entries more that cannot be used")
            assert len(source.problems) == 21
            assert all(len(problem) <= 300 and problem.isascii() for problem in source.problems)
            monkeypatch.setattr(supplier_module, "MAX_FOUND", 2)
            supplier.tell("h:1", "h:2", "h:3", "http://h:1", "h:4")
            await until(lambda: heads(known) == ["proxy_h_1", "proxy_h_2"])
            assert source.problems == ["2 entries are left out: of one service 2 are taken"]


def test_another_machines_loopback_is_not_ours() -> None:
    body = json.dumps(infos("http://127.0.0.1:1", "http://10.0.0.1:1")).encode()
    proxies, problems = supplier_module._read(body, near=False)
    assert [proxy.name for proxy in proxies] == ["proxy_10.0.0.1_1"]
    assert problems == ["127.0.0.1:1: is the reporter's own machine; it reports another with --report-host"]


async def test_a_supplier_that_speaks_no_http_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supplier_module, "ASK_SECONDS", 0.2)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        await asyncio.sleep(10)

    for upstream, problem in (
        (Upstream(b"hello secret\r\n\r\n"), "no HTTP that can be used"),
        (Upstream(talk=silent), "no answer within 0.2 seconds"),
    ):
        async with serving(upstream):
            source = SupplierSource(f"http://u:hidden@127.0.0.1:{upstream.port}/x?token=hidden", 1, registry())
            async with running(source):
                await until(lambda source=source, it=problem: it in source.problems[0])  # type: ignore[misc]
                assert "hidden" not in f"{source.problems}{source.place}"


async def test_asked_again_at_once_when_told_so() -> None:
    async with supplying() as supplier:
        source = SupplierSource(supplier.url, 3600, registry())
        async with running(source):
            await until(lambda: len(supplier.times) == 1)
            source.reload()
            await until(lambda: len(supplier.times) == 2)


def test_pauses_grow_to_four_intervals() -> None:
    assert all(24 <= pause(30, 0) <= 30 for _ in range(50))
    assert all(0.8 <= pause(30, 1) <= 1 for _ in range(50))
    assert all(96 <= pause(30, 10_000) <= 120 for _ in range(50))


async def test_the_supplier_of_a_frontend(frontend_server: StartFrontend) -> None:
    async with supplying() as supplier:
        supplier.tell("127.0.0.1:1", "nonsense")
        frontend = await frontend_server(node_supplier_url=supplier.url)
        await until(lambda: heads(frontend.server.cluster.registry) == ["proxy_127.0.0.1_1"])
        async with frontend.client.get("/api/sources") as response:
            told = (await response.json())["sources"][0]
        assert (told["name"], told["place"]) == ("supplier", supplier.url)
        assert told["problems"] == ["'nonsense': expected http://host:port"]


# The DNS


def source_of(server: DnsServer, known: Registry, *names: str, **how: Any) -> DnsSource:
    return DnsSource(names, server.where, known, **how)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHORTEST_PAUSE_SECONDS", "NOTHING_PAUSE_SECONDS"):
        monkeypatch.setattr(dns_module, name, 0.05)
    monkeypatch.setattr(dns_module, "QUESTION_SECONDS", 0.3)


async def test_every_address_of_a_name_is_a_node(quick: None) -> None:
    zone = {"lmcache. A": ["127.0.0.2", "127.0.0.1"], "lmcache. AAAA": ["::1"], "other. A": ["127.0.0.1"]}
    async with dns_server(zone=zone, ttl=0) as server:
        known = registry()
        source = source_of(server, known, "lmcache:8000", "other.:9000")
        assert source.place == "lmcache:8000, other.:9000"
        async with running(source):
            expected = {"proxy_127.0.0.1_8000", "proxy_127.0.0.2_8000", "proxy_[__1]_8000", "proxy_127.0.0.1_9000"}
            await until(lambda: set(heads(known)) == expected)
            assert source.problems == []
            assert all(proxy.found and proxy.source == "dns" for proxy in known.proxies())
            zone["lmcache. A"] = ["127.0.0.3"]
            del zone["lmcache. AAAA"]
            await until(lambda: set(heads(known)) == {"proxy_127.0.0.3_8000", "proxy_127.0.0.1_9000"})
            zone.clear()
            await until(lambda: heads(known) == [])
            assert len(heads(known, stale=True)) == 2 + 3, "no such name: stale, then gone"
            assert source.problems == []


async def test_the_targets_of_srv_records(quick: None) -> None:
    zone = {
        "_http._tcp.lmcache. SRV": ["0 0 8000 a.lmcache.", "10 5 8001 b.lmcache.", "0 0 7 none.lmcache."],
        "a.lmcache. A": ["127.0.0.1"],
        "b.lmcache. A": ["127.0.0.2"],
    }
    async with dns_server(zone=zone, ttl=0) as server:
        known = registry()
        async with running(source_of(server, known, "_http._tcp.lmcache")):
            await until(lambda: set(heads(known)) == {"proxy_127.0.0.1_8000", "proxy_127.0.0.2_8001"})
            zone["_http._tcp.lmcache. SRV"] = ["0 0 0 ."]
            await until(lambda: heads(known) == [])


@pytest.mark.parametrize("how", ["SERVFAIL", "REFUSED", "silent"])
async def test_no_answer_changes_nothing(how: str, quick: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmcache_frontend.nodes.sources")
    zone = {"lmcache. A": ["127.0.0.1"], "_a._tcp.b. SRV": ["0 0 1 c."], "c. A": ["127.0.0.2"]}
    async with dns_server(zone=zone, ttl=0) as server:
        known = registry()
        source = source_of(server, known, "lmcache:1", "_a._tcp.b")
        async with running(source):
            await until(lambda: len(heads(known)) == 2)
            revision = known.revision
            server.silent = how == "silent"
            server.rcodes = {} if server.silent else dict.fromkeys(("lmcache.", "_a._tcp.b.", "c."), how)
            await until(lambda: len(source.problems) >= 2)
            asked = len(server.asked)
            await until(lambda: len(server.asked) > asked + 6)
            assert (len(heads(known)), known.revision) == (2, revision)
            server.silent, server.rcodes = False, {}
            zone["lmcache. A"].append("127.0.0.3")
            await until(lambda: len(heads(known)) == 3)
            await until(lambda: source.problems == [])
    assert caplog.records[-1].getMessage().endswith("all can be used again")


async def test_one_target_or_type_without_an_answer_leaves_the_others(quick: None) -> None:
    zone = {"_a._tcp.b. SRV": ["0 0 1 c.", "0 0 1 d."], "c. A": ["127.0.0.1"], "d. A": ["127.0.0.2"]}
    async with dns_server(zone=zone, ttl=0) as server:
        known = registry()
        async with running(source_of(server, known, "_a._tcp.b")):
            await until(lambda: len(heads(known)) == 2)
            server.rcodes["c."] = "SERVFAIL"
            zone["d. A"] = ["127.0.0.3"]
            await until(lambda: set(heads(known)) == {"proxy_127.0.0.1_1", "proxy_127.0.0.3_1"})


async def test_never_answered_is_told_and_publishes_nothing(quick: None) -> None:
    async with dns_server(silent=True) as server:
        known = registry()
        source = source_of(server, known, "lmcache:1")
        assert source.problems == ["lmcache:1: it has not been answered yet"]
        async with running(source):
            await until(lambda: source.problems == ["lmcache:1: no answer within 0.3 seconds"])
            assert heads(known) == []
            server.silent = False
            await until(lambda: source.problems == [])


async def test_search_domains_as_a_pod_has_them(quick: None, tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(
        "nameserver 192.0.2.1\nsearch ns.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
    )
    zone = {"lmcache.ns.svc.cluster.local. A": ["127.0.0.1"]}
    async with dns_server(zone=zone) as server:
        known = registry()
        how = {"resolv_conf": str(resolv_conf)}
        for name in ("lmcache", "lmcache.ns", "lmcache.ns.svc", "lmcache.ns.svc.cluster.local."):
            server.asked.clear()
            async with running(source_of(server, known := registry(), f"{name}:80", **how)):
                await until(lambda known=known: heads(known) == ["proxy_127.0.0.1_80"])  # type: ignore[misc]
                assert server.asked[-1].startswith("lmcache.ns.svc.cluster.local. ")
        async with running(source_of(server, known, "lmcache:80", resolv_conf="/nonexistent")):
            await until(lambda: "lmcache. A" in server.asked, 2)


async def test_without_any_server(quick: None) -> None:
    source = DnsSource(["lmcache:80"], None, registry(), resolv_conf="/nonexistent")
    async with running(source):
        await until(lambda: "no DNS server to ask: " in source.problems[0])
    source = DnsSource(["lmcache:80"], "no-such-host.invalid", registry())
    async with running(source):
        await until(lambda: "no DNS server to ask: " in source.problems[0])


async def test_many_addresses_come_over_tcp_and_are_bounded(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = {"lmcache. A": [f"127.0.{i // 250}.{i % 250 + 1}" for i in range(1200)]}
    async with dns_server(zone=zone) as server:
        known = registry()
        source = source_of(server, known, "lmcache:1")
        async with running(source):
            await until(lambda: len(heads(known)) == found.MAX_FOUND)
            assert "TCP lmcache. A" in server.asked
            assert source.problems == ["1200 addresses, of which the first 1000 are taken"]


@pytest.mark.parametrize(("ttl", "low", "high"), [(0, 0.8, 1.0), (2, 1.6, 2.0), (100_000, 240, 300)])
async def test_asked_again_when_the_answers_time_is_over(ttl: int, low: float, high: float) -> None:
    async with dns_server(zone={"lmcache. A": ["127.0.0.1"]}, ttl=ttl) as server:
        known = registry()
        source = source_of(server, known, "lmcache:1")
        async with running(source):
            await until(lambda: heads(known) == ["proxy_127.0.0.1_1"])
            wait = source._followed[0].due - time.monotonic()
            assert low - 0.3 <= wait <= max(high, 1.0)
            source.reload()
            await until(lambda: server.asked.count("lmcache. A") == 2)


async def test_addresses_that_are_nobodys_are_told(quick: None) -> None:
    async with dns_server(zone={"lmcache. A": ["0.0.0.0", "127.0.0.1"]}) as server:
        known = registry()
        source = source_of(server, known, "lmcache:1")
        async with running(source):
            await until(lambda: heads(known) == ["proxy_127.0.0.1_1"])
            assert "0.0.0.0:1: is no address of one machine" in source.problems[0]


async def test_the_names_of_a_frontend(frontend_server: StartFrontend) -> None:
    async with dns_server(zone={"lmcache. A": ["127.0.0.1"]}) as server:
        frontend = await frontend_server(dns=["lmcache:1"], dns_server=server.where)
        await until(lambda: heads(frontend.server.cluster.registry) == ["proxy_127.0.0.1_1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dns", "lmcache"], "--dns lmcache: expected NAME:PORT, or an SRV name such as _http._tcp.lmcache"),
        (["--dns", "lmcache:0"], "--dns lmcache:0: expected NAME:PORT"),
        (["--dns", "a b:1"], "--dns a b:1: expected NAME:PORT"),
        (["--dns", "_http.lmcache"], "--dns _http.lmcache: expected NAME:PORT"),
        (["--dns", "10.0.0.1:80"], "--dns 10.0.0.1:80: is an address and no name; put it in --nodes"),
        (["--dns", "[::1]:80"], "--dns [::1]:80: is an address and no name; put it in --nodes"),
        ([f"--dns=n{i}:1" for i in range(17)], "--dns 17 names, but at most 16 are resolved"),
        (["--dns-server", "h:x"], "--dns-server h:x: expected the host or host:port of a DNS server"),
        (["--dns-server", ""], ""),
        (["--node-supplier-url", "x"], "--node-supplier-url expected a URL that begins with http:// or https://"),
        (["--node-supplier-url", "http://u:secret@[x"], "--node-supplier-url expected a URL such as"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], message: str) -> None:
    if not message:
        assert read_options(arguments, {}).dns_server is None
        return
    with pytest.raises(ConfigError) as refused:
        read_options(arguments, {})
    assert str(refused.value).startswith(message)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "where"),
    [("h", "h:53"), ("10.0.0.1", "10.0.0.1:53"), ("h:54", "h:54"), ("::1", "[::1]:53"), ("[::1]:54", "[::1]:54"),
     ("[::1]", "[::1]:53")],
)  # fmt: skip
def test_the_dns_server(text: str, where: str) -> None:
    server = dns_module.read_server(text)
    assert isinstance(server, TcpAddress)
    assert str(server) == where
