"""The merged metrics of all nodes: what each may do to the others, and what Prometheus is told."""

import asyncio
import contextlib
import gzip
import json
import logging
import re
import time
import zlib
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_frontend.api import metrics_api, sd_api
from lmcache_frontend.api.metrics_api import SCRAPER
from lmcache_frontend.nodes.node import Node, Proxy, read_list
from lmcache_frontend.options import Options
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_frontend.telemetry.metrics import exposition, scrape
from lmcache_frontend.telemetry.metrics.negotiation import wants_gzip, wants_openmetrics
from lmcache_frontend.telemetry.metrics.own import FAMILIES, OTHER, OwnMetrics, TargetLabels
from lmcache_frontend.telemetry.metrics.tally import Counted, Tally
from lmcache_shared.address import TcpAddress, UnixAddress
from lmcache_shared.errors import Refusal
from tests.frontend.boards import settled
from tests.frontend.registries import entries, registry_of
from tests.frontend.upstream import Upstream, raw, serving

GOOD = b'# HELP a_total Some.\n# TYPE a_total counter\na_total{x="1"} 5\na_total{x="2"} 6\n'
PROMETHEUS_ACCEPTS = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


_START = HealthBoard.start


@pytest.fixture(autouse=True)
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upstreams here count what reaches them: no node is checked before a test wants it."""
    monkeypatch.setattr(HealthBoard, "start", lambda board: None)


def answer(body: bytes, *fields: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def node_of(upstream: Upstream, name: str) -> dict[str, Any]:
    return {**upstream.node, "name": name}


def samples_of(text: str, *, openmetrics: bool = False) -> Samples:
    """Every sample by its name and labels; a series that is there twice fails."""
    found: Samples = {}
    for family in (openmetrics_families if openmetrics else text_string_to_metric_families)(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


async def scraped(frontend: RunningFrontend, query: str = "", **headers: str) -> str:
    url = URL(f"{frontend.url}/metrics{query}", encoded=True)
    async with frontend.client.get(url, headers=headers) as response:
        assert response.status == 200, await response.text()
        return await response.text()


def successes(text: str) -> dict[str, float]:
    return {
        dict(labels)["node"]: value
        for (name, labels), value in samples_of(text).items()
        if name == "lmcache_frontend_scrape_success"
    }


def value_of(text: str, name: str, **labels: str) -> float | None:
    return samples_of(text).get((name, frozenset(labels.items())))


async def test_every_sample_has_the_labels_of_its_node(api_server: StartApi, frontend_server: StartFrontend) -> None:
    on_port, on_socket = await api_server(tcp=True), await api_server(role="worker", worker_id=1)
    assert isinstance(on_socket.address, UnixAddress)
    proxy = {"name": "rack2", "host": "127.0.0.1", "port": 1, "nodes": [{**on_port.node, "name": "w"}]}
    frontend = await frontend_server(nodes=[{**on_socket.node, "name": "w"}, proxy])
    text = await scraped(frontend)
    wanted = [
        {"node": "w", "proxy": "local_proxy", "instance": on_socket.address.path},
        {"node": "w", "proxy": "rack2", "instance": str(on_port.address)},
    ]
    for labels in wanted:
        assert value_of(text, "lmcache_frontend_scrape_success", **labels) == 1
        count = value_of(text, "lmcache_frontend_scrape_samples", **labels)
        assert count is not None
        of_node = [key for key in samples_of(text) if labels.items() <= dict(key[1]).items()]
        assert len(of_node) == count + 4
        assert ("lmcache:lmcache_is_healthy" in {name for name, _ in of_node}) is True
        length = value_of(text, "lmcache_frontend_scrape_bytes", **labels)
        assert length is not None
        assert length > 10_000
    assert len(re.findall("^# TYPE lmcache:lmcache_is_healthy ", text, re.MULTILINE)) == 1


async def test_without_nodes_there_are_the_frontends_own(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    async with frontend.client.get("/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = await response.text()
    assert value_of(text, "lmcache_frontend_nodes", state="unknown") == 0
    assert "lmcache_frontend_process_resident_memory_bytes" in text
    assert "_created" not in text


async def test_a_proxys_node_is_asked_through_it(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(role="worker")
    far = await frontend_server(nodes=[worker.node])
    rack = {"name": "rack", "host": "127.0.0.1", "port": far.server.address.port, "nodes": [worker.node]}
    near = await frontend_server(nodes=[rack])
    text = await scraped(near)
    assert list(successes(text).values()) == [1]
    (target,) = await (await near.client.get("/sd/prometheus")).json()
    async with near.client.get(as_prometheus_asks(near.url, target["labels"]["__metrics_path__"])) as response:
        assert "lmcache:lmcache_is_healthy" in await response.text()


async def hang(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b"# " + b"x" * 65533 + b"\n\r\n")
        await writer.drain()


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        writer.write(b"#")
        await writer.drain()
        await asyncio.sleep(0.01)


def bomb() -> bytes:
    packing = zlib.compressobj(9, wbits=31)
    packed = b"".join(packing.compress(b"# " + b"x" * (1 << 20) + b"\n") for _ in range(64))
    return packed + packing.flush()


BAD: dict[str, tuple[Upstream, str]] = {
    "hangs": (Upstream(talk=hang), "no answer within 0.5 seconds"),
    "trickles": (Upstream(talk=trickle), "no answer within 0.5 seconds"),
    "endless": (Upstream(talk=endless), "larger than 8388608 bytes"),
    "bomb": (Upstream(answer(bomb(), "Content-Encoding: gzip")), "larger than 8388608 bytes"),
    "half a gzip": (Upstream(answer(gzip.compress(GOOD)[:-5], "Content-Encoding: gzip")), "breaks off in its gzip"),
    "two gzips": (Upstream(answer(gzip.compress(GOOD) * 2, "Content-Encoding: gzip")), "behind the end of its gzip"),
    "no gzip": (Upstream(answer(b"no gzip", "Content-Encoding: gzip")), "no gzip"),
    "brotli": (Upstream(answer(GOOD, "Content-Encoding: br")), "'br', which was not asked for"),
    "garbage": (Upstream(answer(b"<html>no metrics</html>")), ""),
    "binary": (Upstream(answer(b"a_total \xff\xfe\x00")), ""),
    "an error": (Upstream(answer(b"", status="500 No")), "answers 500"),
    "elsewhere": (Upstream(answer(b"", "Location: /", status="302 Found")), "answers 302"),
    "no HTTP": (Upstream(b"SSH-2.0-OpenSSH\r\n\r\n"), "no HTTP"),
    "half": (Upstream(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n" + GOOD), "no answer within 0.5 seconds"),
}


WITHOUT_A_LAST_NEWLINE: dict[str, tuple[bytes, bool]] = {
    "with its length": (answer(b"a 1\nb 15"), True),
    "in chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\na 1\nb 15\r\n0\r\n\r\n", True),
    "as gzip": (answer(gzip.compress(b"a 1\nb 15"), "Content-Encoding: gzip"), True),
    "until the connection ends": (b"HTTP/1.1 200 OK\r\n\r\na 1\nb 15", False),
    "in chunks without an end": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\na 1\nb 15\r\n", False),
}
"""An answer, and whether it is known to be whole: the last number may else be half of one."""


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_node_costs_its_own_samples_alone(
    frontend_server: StartFrontend, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    bad, problem = BAD[kind]
    async with serving(bad) as broken, serving(Upstream(answer(GOOD))) as good:
        frontend = await frontend_server(nodes=[node_of(broken, "bad"), node_of(good, "good")], scrape_seconds=0.5)
        began = time.monotonic()
        text = await scraped(frontend)
        assert time.monotonic() - began < 2
        assert successes(text) == {"bad": 0, "good": 1}
        labels = {"node": "good", "proxy": "local_proxy", "instance": f"127.0.0.1:{good.port}"}
        assert value_of(text, "a_total", x="1", **labels) == 5
        assert 'node="bad"' not in re.sub("^lmcache_frontend_.*", "", text, flags=re.MULTILINE)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"no metrics of bad of local_proxy (127.0.0.1:{broken.port}): ")
        assert problem in lines[0]
        await scraped(frontend)
        assert len(caplog.records) == 1, "a reason is told once"
        for _ in range(100):
            await asyncio.sleep(0.01)
            if not frontend.server._runner.app[SCRAPER]._held:
                break
        assert frontend.server._runner.app[SCRAPER]._room._free == scrape.MAX_BYTES


async def test_a_reason_is_told_when_it_comes_changes_and_goes(
    frontend_server: StartFrontend, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Upstream(answer(b"", status="500 No"))) as upstream:
        down = {"name": "down", "host": "127.0.0.1", "port": free_port()}
        frontend = await frontend_server(nodes=[node_of(upstream, "n"), down])
        await scraped(frontend)
        upstream.answer = answer(b"", status="404 No")
        await scraped(frontend)
        upstream.answer = answer(GOOD)
        await scraped(frontend)
        messages = [record.getMessage() for record in caplog.records]
    told = [message for message in messages if re.match(r"(no metrics of )?n of local_proxy \(", message)]
    assert [line.rpartition(" ")[2] for line in told] == ["500", "404", "again"]
    assert sum("down" in record.getMessage() for record in caplog.records) == 1


async def test_nodes_that_hang_do_not_keep_others_waiting(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrape, "SCRAPES_AT_ONCE", 2)
    async with serving(Upstream(talk=hang)) as slow, serving(Upstream(answer(GOOD))) as good:
        hanging = [node_of(slow, f"slow{i}") for i in range(6)]
        frontend = await frontend_server(nodes=[*hanging, node_of(good, "good")], scrape_seconds=1)
        assert successes(await scraped(frontend))["good"] == 1
        began = time.monotonic()
        found = asyncio.create_task(scraped(frontend))
        while len(good.heads) < 2:
            await asyncio.sleep(0.005)
        assert time.monotonic() - began < 0.1, "those that failed last time come last"
        await found


async def test_all_together_are_bounded(frontend_server: StartFrontend) -> None:
    body = b"".join(b"a%d 1\n" % i for i in range(100))
    async with serving(Upstream(answer(body))) as upstream:
        frontend = await frontend_server(nodes=[node_of(upstream, f"n{i}") for i in range(5)])
        scraper = frontend.server._runner.app[SCRAPER]
        scraper._room = scrape.Room(3 * len(body))
        for _ in range(2):  # what a round took is given back
            assert sum(successes(await scraped(frontend)).values()) == 3
        assert scraper._room._free == 3 * len(body)


async def test_conflicting_types_stay_one_valid_exposition(frontend_server: StartFrontend) -> None:
    other = b"# TYPE a_total gauge\na_total 1\n"
    async with serving(Upstream(answer(other))) as bad, serving(Upstream(answer(GOOD))) as good:
        frontend = await frontend_server(nodes=[node_of(bad, "bad"), *(node_of(good, f"n{i}") for i in range(2))])
        for accept in ("text/plain", PROMETHEUS_ACCEPTS):
            text = await scraped(frontend, Accept=accept)
            found = samples_of(text, openmetrics=accept != "text/plain")
            assert found["lmcache_frontend_type_conflicts", frozenset()] == 1
            named = re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)
            assert len(named) == len(set(named))
            assert sum(name == "a_total" for name, _ in found) == 4


@pytest.mark.parametrize(
    "line",
    [
        b"# TYPE lmcache_frontend_nodes histogram\n",
        b'lmcache_frontend_scrape_success{node="good"} 0\n',
        b" \tlmcache_frontend_scrape_success 1\n",
        b"# HELP  lmcache_frontend_nodes x\n",
    ],
)
async def test_no_node_speaks_for_the_frontend(
    frontend_server: StartFrontend, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    fine = GOOD + b'b{said="\\nlmcache_frontend_nodes"} 1\n'
    async with serving(Upstream(answer(GOOD + line))) as bad, serving(Upstream(answer(fine))) as good:
        frontend = await frontend_server(nodes=[node_of(bad, "bad"), node_of(good, "good")])
        assert successes(await scraped(frontend)) == {"bad": 0, "good": 1}
        assert "make it a proxy with its nodes" in caplog.records[0].getMessage()


async def test_openmetrics_and_gzip_as_prometheus_asks(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(role="worker")
    frontend = await frontend_server(nodes=[worker.node])
    headers = {"Accept": PROMETHEUS_ACCEPTS, "Accept-Encoding": "gzip", "X-Prometheus-Scrape-Timeout-Seconds": "10"}
    async with frontend.client.get("/metrics", headers=headers) as response:
        assert response.headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        assert response.headers["Content-Encoding"] == "gzip"
        text = await response.text()  # aiohttp's client inflates it
    assert text.endswith("# EOF\n")
    assert successes_in(samples_of(text, openmetrics=True)) == [1]
    async with frontend.client.get("/metrics", headers={"Accept-Encoding": "identity"}) as response:
        assert "Content-Encoding" not in response.headers
        plain = await response.text()
    names = {name for name, _ in samples_of(plain)}
    assert names >= {"lmcache:lmcache_is_healthy", "lmcache_frontend_build_info"}


def successes_in(samples: Samples) -> list[float]:
    return [value for (name, _), value in samples.items() if name == "lmcache_frontend_scrape_success"]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (PROMETHEUS_ACCEPTS, True),
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=1.0.0;q=0.6", False),
        ("application/openmetrics-text;version=2.0.0,text/plain;q=0.5", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.2,*/*;q=0.9", False),
        ('APPLICATION/OpenMetrics-Text; version="1.0.0"; q=nonsense, text/plain;q=0.5', True),
    ],
)
def test_which_format_is_meant(accept: str, expected: bool) -> None:
    assert wants_openmetrics(accept) is expected


@pytest.mark.parametrize(
    ("field", "expected"),
    [("gzip", True), ("deflate, gzip;q=0.5", True), ("gzip;q=0", False), ("*", True), ("identity", False), ("", False)],
)
def test_whether_gzip_is_meant(field: str, expected: bool) -> None:
    assert wants_gzip(field) is expected


async def test_two_who_ask_at_once_share_one_round(frontend_server: StartFrontend) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream.heads.append(await reader.readuntil(b"\r\n\r\n"))
        await asyncio.sleep(0.2)
        writer.write(answer(GOOD))

    async with serving(Upstream(talk=slow)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        one, two = await asyncio.gather(scraped(frontend), scraped(frontend, Accept=PROMETHEUS_ACCEPTS))
        assert len(upstream.heads) == 1
        assert successes(one) == {"upstream": 1}
        assert "# EOF" in two
        await asyncio.gather(scraped(frontend), scraped(frontend, "?match[]=a_total"))
        assert len(upstream.heads) == 3, "other parameters, another round"
        assert frontend.server._runner.app[SCRAPER]._rounds == {}


async def test_a_slow_reader_keeps_its_own_round_and_nobody_gets_it_later(frontend_server: StartFrontend) -> None:
    body = b"".join(b'large_total{number="%d"} 1\n' % i for i in range(150_000))
    async with serving(Upstream(answer(body))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        scraper = frontend.server._runner.app[SCRAPER]
        async with frontend.client.get("/metrics", headers={"Accept-Encoding": "identity"}):  # and reads nothing yet
            assert (len(upstream.heads), len(scraper._held), scraper._rounds) == (1, 1, {})
            await scraped(frontend)
            assert len(upstream.heads) == 2
            assert scraper._room._free < scrape.MAX_BYTES
        for _ in range(100):
            await asyncio.sleep(0.01)
            if not scraper._held:
                break
        assert scraper._room._free == scrape.MAX_BYTES


async def test_how_a_node_is_asked(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(answer(GOOD))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        await scraped(frontend)
        (head,) = upstream.heads
    line, *fields = head.decode().strip().split("\r\n")
    assert line == "GET /metrics HTTP/1.1"
    assert set(fields) >= {"Accept-Encoding: identity", "Connection: close", f"Host: 127.0.0.1:{upstream.port}"}
    assert "Accept: text/plain;version=0.0.4;q=1,*/*;q=0.1" in fields


async def test_one_who_leaves_does_not_take_the_round_along(frontend_server: StartFrontend) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream.heads.append(await reader.readuntil(b"\r\n\r\n"))
        await asyncio.sleep(0.3)
        writer.write(answer(GOOD))

    async with serving(Upstream(talk=slow)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        leaving = asyncio.create_task(scraped(frontend))
        staying = asyncio.create_task(scraped(frontend))
        await asyncio.sleep(0.1)
        leaving.cancel()
        assert successes(await staying) == {"upstream": 1}
        assert len(upstream.heads) == 1


async def test_too_many_different_rounds(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(talk=hang)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], scrape_seconds=1)
        asked = [asyncio.create_task(scraped(frontend, f"?match[]=a{i}")) for i in range(scrape.MAX_ROUNDS)]
        await asyncio.sleep(0.2)
        async with frontend.client.get("/metrics") as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
        await asyncio.gather(*asked)


async def test_slow_readers_keep_nobody_from_scraping_until_the_room_is_full() -> None:
    scraper = scrape.Scraper(lambda *_: lambda: b"a 1\n" + b"\n" * 396, lambda *_: True, max_own_bytes=12 * 400)
    wanted = scrape.Wanted((), (), 1, True)
    async with contextlib.AsyncExitStack() as readers:
        for _ in range(12):
            await readers.enter_async_context(scraper.round(wanted))
        assert len(scraper._held) == 12 > scrape.MAX_ROUNDS
        with pytest.raises(Refusal, match="held for other scrapes") as refused:
            await readers.enter_async_context(scraper.round(wanted))
        assert refused.value.status == 503
        assert len(scraper._held) == 12
    assert (scraper._own_room._free, scraper._held) == (12 * 400, set())
    async with scraper.round(wanted):
        pass
    await scraper.close()


async def test_problems_are_forgotten_with_their_nodes_whichever_are_asked(frontend_server: StartFrontend) -> None:
    down, other = ({"name": name, "host": "127.0.0.1", "port": free_port()} for name in ("down", "other"))
    frontend = await frontend_server(nodes=[down, other])
    scraper = frontend.server._runner.app[SCRAPER]
    await scraped(frontend, "?node=down")
    await scraped(frontend, "?node=other")
    assert set(scraper._problems) == {("local_proxy", "down"), ("local_proxy", "other")}
    frontend.server.cluster.registry.publish("nodes", entries(other))
    await scraped(frontend, "?node=other")
    assert set(scraper._problems) == {("local_proxy", "other")}
    frontend.server.cluster.registry.publish("nodes", [])
    await scraped(frontend, "?node=")
    assert scraper._problems == {}


@pytest.mark.parametrize("kind", WITHOUT_A_LAST_NEWLINE)
async def test_a_last_line_without_its_end(frontend_server: StartFrontend, kind: str) -> None:
    sent, is_whole = WITHOUT_A_LAST_NEWLINE[kind]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)  # and it closes the connection

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        text = await scraped(frontend)
        assert successes(text) == {"upstream": float(is_whole)}
        assert sum(value for (name, _), value in samples_of(text).items() if name == "b") == 15 * is_whole


async def test_narrowed_by_node(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(answer(GOOD))) as a, serving(Upstream(answer(GOOD))) as b:
        rack = {"name": "rack", "host": "127.0.0.1", "port": 1, "nodes": [node_of(a, "a"), node_of(b, "b/c d")]}
        frontend = await frontend_server(nodes=[node_of(a, "a"), node_of(b, "b"), rack])

        async def chosen(query: str) -> set[tuple[str, str]]:
            text = await scraped(frontend, query)
            others = {name for name, _ in samples_of(text) if not name.startswith("lmcache_frontend_scrape_")}
            assert others == {"a_total"}, "the rest is told where all nodes are"
            labels = [dict(key[1]) for key in samples_of(text) if key[0] == "a_total"]
            return {(label["proxy"], label["node"]) for label in labels}

        assert await chosen("?node=a") == {("local_proxy", "a"), ("rack", "a")}
        assert await chosen("?node=rack/a&node=b") == {("rack", "a"), ("local_proxy", "b")}
        assert await chosen("?node=rack/b/c%20d") == {("rack", "b/c d")}
        text = await scraped(frontend, "?node=")
        assert successes(text) == {}
        assert {name[:17] for name, _ in samples_of(text)} == {"lmcache_frontend_"}
        async with frontend.client.get("/metrics?node=a&node=nobody") as response:
            assert (response.status, await response.json()) == (404, {"detail": "Node with name 'nobody' not found"})


async def test_narrowed_by_match(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(answer(GOOD + b"# TYPE b gauge\nb 1\n"))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        text = await scraped(frontend, "?match[]=b&match[]=lmcache_frontend_scrape_success")
        assert {name for name, _ in samples_of(text)} == {"b", "lmcache_frontend_scrape_success"}
        text = await scraped(frontend, "?match[]=" + quote('{__name__=~"a.*",x="2"}'))
        assert [(name, dict(labels)["x"]) for name, labels in samples_of(text)] == [("a_total", "2")]
        async with frontend.client.get("/metrics", params={"match[]": "{{"}) as response:
            (problem,) = (await response.json())["detail"]
            assert (response.status, problem["loc"], problem["input"]) == (422, ["query", "match[]"], "{{")
        async with frontend.client.get("/metrics?" + "&".join(["match[]=a"] * 65)) as response:
            assert response.status == 422


@pytest.mark.parametrize("text", ["x", "", "0", "-1", "nan", "inf"])
async def test_a_timeout_that_is_none(frontend_server: StartFrontend, text: str) -> None:
    frontend = await frontend_server()
    async with frontend.client.get("/metrics", headers={metrics_api.TIMEOUT_FIELD: text}) as response:
        assert response.status == 400


async def test_prometheus_own_timeout_counts_when_it_is_shorter(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(talk=hang)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        began = time.monotonic()
        headers = {metrics_api.TIMEOUT_FIELD: "1"}
        assert successes(await scraped(frontend, **headers)) == {"upstream": 0}
        assert 0.4 < time.monotonic() - began < 0.9


async def test_head_asks_no_node(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(answer(GOOD))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        async with frontend.client.head("/metrics") as response:
            assert response.status == 200
        assert upstream.connections == 0


async def test_the_event_loop_goes_on(frontend_server: StartFrontend) -> None:
    """An exposition of 8 MiB is merged and written beside other requests."""
    line = b'large_total{number="%d",more="' + b"x" * 80 + b'"} 1\n'
    body = b"".join(line % i for i in range((7 << 20) // len(line)))
    async with serving(Upstream(answer(body))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        longest = 0.0
        asked = asyncio.create_task(scraped(frontend, **{"Accept-Encoding": "gzip"}))
        while not asked.done():
            began = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - began)
        assert (await asked).count("large_total{") == len(body.splitlines())
        assert longest < 2, "merging and compressing take seconds, on a busy machine; the loop waits for neither"


async def test_proxied_requests_are_counted(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(answer(b"12345"))) as upstream, serving(Upstream(talk=hang)):
        down = {"name": "down", "host": "127.0.0.1", "port": free_port()}
        frontend = await frontend_server(nodes=[node_of(upstream, "n"), down])
        for _ in range(3):
            await (await frontend.client.post("/proxy2/n/a", data=b"abc")).read()
        await (await frontend.client.get(f"/proxy/127.0.0.1/{upstream.port}/version")).read()
        assert (await frontend.client.get("/proxy2/down/a")).status == 502
        assert (await frontend.client.get("/proxy/10.9.9.9/80/a")).status == 403
        assert (await frontend.client.get("/proxy/10.9.9.8/80/a")).status == 403
        text = await scraped(frontend)
    own = {"node": "n", "proxy": "local_proxy"}
    name = "lmcache_frontend_proxy_requests_total"
    assert value_of(text, name, **own, code="2xx") == 4
    assert value_of(text, name, node="down", proxy="local_proxy", code="5xx") == 1
    assert value_of(text, name, node="other", code="4xx") == 2
    assert value_of(text, "lmcache_frontend_proxy_bytes_total", **own, direction="sent") == 9
    assert value_of(text, "lmcache_frontend_proxy_bytes_total", **own, direction="received") == 20
    errors = "lmcache_frontend_proxy_errors_total"
    assert value_of(text, errors, node="down", proxy="local_proxy", reason="unreachable") == 1
    assert value_of(text, errors, node="other", reason="forbidden") == 2
    assert value_of(text, "lmcache_frontend_proxy_request_seconds_count", kind="node") == 5


def test_whom_a_proxied_request_is_for() -> None:
    rack = {"name": "rack", "host": "h", "port": 80, "nodes": [{"name": "w", "host": "x", "port": "/run/w"}]}
    nodes = [{"name": "n", "host": "h2", "port": 1}, rack]
    registry = registry_of(read_list(json.dumps(nodes).encode(), "nodes"))
    metrics = OwnMetrics(registry, HealthBoard(registry))
    (behind,) = [node.reach for node in registry.nodes() if node.name == "w"]

    assert metrics._targets.refresh() and not metrics._targets.refresh()

    def whom(host: str, port: int, path: str) -> TargetLabels:
        return metrics._targets.labels(TcpAddress(host, port), path)

    assert whom("h2", 1, "/a?b") == TargetLabels("n", "local_proxy")
    assert whom("h", 80, f"{behind.prefix}/metrics?x=/y") == TargetLabels("w", "rack")
    assert whom("h", 80, "/api/nodes") == TargetLabels("", "rack")
    assert whom("h", 80, "/" * 5000) == TargetLabels("", "rack")
    assert whom("h", 81, "/") == OTHER
    assert [whom("h2", 1, "").kind, whom("h", 80, "").kind, OTHER.kind] == ["node", "proxy", "other"]


def test_series_of_nodes_that_are_gone_end() -> None:
    registry = registry_of(node_called("gone"))
    metrics = OwnMetrics(registry, HealthBoard(registry))

    def told() -> str:
        return metrics.describe(scrape.Wanted((), (), 1, True), [], 0)().decode()

    with metrics.watching(TcpAddress("127.0.0.1", 7000), "/") as watched:
        watched.status = 200
    assert 'node="gone"' in told()
    with metrics.watching(TcpAddress("127.0.0.1", 7000), "/") as watched:
        watched.status = 200
        registry.publish("nodes", [])
        assert 'node="gone"' not in told()
    text = told()
    assert 'node="gone"' not in text
    name = "lmcache_frontend_proxy_requests_total"
    assert value_of(text, name, node="other", proxy="", code="2xx") == 1, "one that left while it was asked"


def test_series_do_not_pile_up_where_nobody_reads_them() -> None:
    registry = registry_of()
    metrics = OwnMetrics(registry, HealthBoard(registry))
    for number in range(20):
        registry.publish("nodes", node_called(f"n{number}"))
        with metrics.watching(TcpAddress("127.0.0.1", 7000), "/") as watched:
            watched.status = 200
            watched.traffic.sent = 1
    assert {target for target, _, _ in metrics._tally.counts()} == {TargetLabels("n19", "local_proxy")}


def node_called(name: str) -> list[Node | Proxy]:
    return entries({"name": name, "host": "127.0.0.1", "port": 7000})


async def test_states_and_roles_are_told(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(role="worker")
    gone = {"name": "gone", "host": "127.0.0.1", "port": free_port()}
    frontend = await frontend_server(nodes=[worker.node, gone])
    text = await scraped(frontend)
    assert value_of(text, "lmcache_frontend_nodes", state="unknown") == 2
    _START(frontend.server.cluster.health)
    await settled(frontend)
    text = await scraped(frontend)
    states = {
        state: value_of(text, "lmcache_frontend_nodes", state=state) for state in ("up", "slow", "down", "unknown")
    }
    assert states == {"up": 1, "slow": 0, "down": 1, "unknown": 0}
    targets = await (await frontend.client.get("/sd/prometheus")).json()
    assert [target["labels"].get("role") for target in targets] == ["worker", None]


def as_prometheus_asks(base: str, metrics_path: str) -> URL:
    """Go's `url.URL.EscapedPath`."""
    return URL(base + quote(metrics_path, safe="$&+,/:;=@-_.~"), encoded=True)


async def test_targets_of_service_discovery(api_server: StartApi, frontend_server: StartFrontend) -> None:
    on_socket, on_port = await api_server(role="worker"), await api_server(tcp=True, internal_api_server_host="::1")
    frontend = await frontend_server(nodes=[{**on_socket.node, "name": "a b/c"}, {**on_port.node, "name": "six"}])
    async with frontend.client.get("/sd/prometheus", headers={"Host": "front.example:8080"}) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        found = await response.json()
    assert [target["targets"] for target in found] == [["front.example:8080"]] * 2
    assert [target["labels"]["node"] for target in found] == ["a b/c", "six"]
    assert found[0]["labels"]["instance"] == str(on_socket.address)
    for target in found:
        async with frontend.client.get(
            as_prometheus_asks(frontend.url, target["labels"]["__metrics_path__"])
        ) as response:
            assert response.status == 200
            assert "lmcache:lmcache_is_healthy" in await response.text()


@pytest.mark.parametrize("path", ["/proxy/localhost/%252Ftmp%252Fa%2520b%2525c", "/proxy2/a%20b", "/proxy2/50%25"])
def test_paths_arrive_as_they_are_meant(path: str) -> None:
    assert as_prometheus_asks("http://h", sd_api.as_prometheus_takes_it(path)).raw_path == path


async def test_a_name_with_a_slash_arrives_encoded_twice_and_is_found(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(answer(GOOD))) as upstream:
        frontend = await frontend_server(nodes=[node_of(upstream, "a/b c")])
        path = as_prometheus_asks(frontend.url, sd_api.as_prometheus_takes_it("/proxy2/a%2Fb%20c/metrics"))
        assert path.raw_path == "/proxy2/a%252Fb%20c/metrics"
        async with frontend.client.get(path) as response:
            assert response.status == 200


async def test_a_host_that_is_none(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    line = b"GET /sd/prometheus HTTP/1.1\r\nHost: a b/c\r\nConnection: close\r\n\r\n"
    assert (await raw(frontend.server.address.port, line)).startswith(b"HTTP/1.1 400")


async def test_every_family_of_ours_is_told_as_it_is(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(answer(b"a 1\n"))) as upstream:
        down = {"name": "down", "host": "127.0.0.1", "port": free_port()}
        frontend = await frontend_server(nodes=[node_of(upstream, "n"), down])
        await (await frontend.client.post("/proxy2/n/a", data=b"abc")).read()
        await (await frontend.client.get("/proxy2/down/a")).read()
        text = await scraped(frontend)
    types = dict(re.findall(r"^# TYPE (lmcache_frontend_\S+) (\S+)$", text, re.MULTILINE))
    own = {name: kind for name, kind in types.items() if not name.startswith("lmcache_frontend_process_")}
    assert own == {family.name: family.kind for family in FAMILIES.values()}
    for family in FAMILIES.values():
        labels = [dict(key[1]) for key in samples_of(text) if key[0].startswith(family.name)]
        assert {frozenset(label) - {"le"} for label in labels} == {frozenset(family.labels)}, family.name


def test_the_options_default_is_below_prometheus_own_timeout() -> None:
    assert Options().scrape_seconds < 10
    assert logging.getLogger(scrape.__name__).level == logging.NOTSET


def test_what_is_held_at_once_can_be_one_answer() -> None:
    line = b'lmcache:h10_bucket{le="%d.0",worker_id="0",model="m/llama",role="worker"} 5\n'
    text = b"".join(line % number for number in range(750))
    assert 55_000 < len(text) < 60_000, "as many samples as there may be in a node's 57 KB"
    assert scrape.MAX_BYTES / len(text) * 750 <= exposition.MAX_SAMPLES


def test_what_another_process_has_counted_is_added() -> None:
    registry = registry_of(node_called("n0"))
    ours, theirs = (OwnMetrics(registry, HealthBoard(registry)) for _ in range(2))
    for metrics, status in ((ours, 200), (theirs, 200), (theirs, 502)):
        with metrics.watching(TcpAddress("127.0.0.1", 7000), "/") as watched:
            watched.status = status
            watched.traffic.received = 10
    with contextlib.suppress(asyncio.CancelledError), theirs.watching(TcpAddress("127.0.0.1", 7001), "/"):
        raise asyncio.CancelledError

    taken = msgspec.msgpack.decode(msgspec.msgpack.encode(theirs.take()), type=Counted)
    ours.add(2, taken)
    ours.add(2, theirs.take())  # nothing is told twice

    text = ours.describe(scrape.Wanted((), (), 1, True), [], 0)().decode()
    name, own = "lmcache_frontend_proxy_requests_total", {"node": "n0", "proxy": "local_proxy"}
    assert value_of(text, name, **own, code="2xx") == 2
    assert value_of(text, name, **own, code="5xx") == 1
    assert value_of(text, "lmcache_frontend_proxy_bytes_total", **own, direction="received") == 30
    assert value_of(text, "lmcache_frontend_proxy_request_seconds_count", kind="node") == 3
    assert value_of(text, "lmcache_frontend_proxy_request_seconds_bucket", kind="node", le="+Inf") == 3
    assert value_of(text, "lmcache_frontend_worker_requests_total", worker="0") == 1
    assert value_of(text, "lmcache_frontend_worker_requests_total", worker="2") == 3


def test_seconds_fall_into_the_bucket_that_begins_below_them() -> None:
    tally = Tally[str]()
    for seconds in (0.0, 0.001, 0.0011, 60.0, 61.0):
        tally.observe("node", seconds)
    buckets = tally.seconds()["node"].buckets
    assert (buckets[:2], buckets[2:-2], buckets[-2:]) == ([2, 1], [0] * (len(buckets) - 4), [1, 1])
