"""Heartbeats, sent to a service that really listens."""

import asyncio
import contextlib
import json
import logging
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from datetime import datetime

import pytest
from aiohttp import web
from yarl import URL

from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_frontend.discovery import heartbeat as module
from lmcache_frontend.discovery import version as version_module
from lmcache_frontend.discovery.heartbeat import HEARTBEAT, Heartbeat, address_towards, pause
from lmcache_frontend.discovery.version import first_version
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.options import Options, read_options
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_frontend.server import serve
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_shared.errors import ConfigError
from tests.frontend.discovery import discovery_service, success
from tests.frontend.registries import entries, registry_of
from tests.frontend.upstream import Upstream, serving

LOGGER = "lmcache_frontend.discovery.heartbeat"


def registry(*nodes: object) -> Registry:
    return registry_of(entries(*nodes), host="0.0.0.0", port=8000)


@contextlib.asynccontextmanager
async def board(*nodes: object) -> AsyncIterator[HealthBoard]:
    health = HealthBoard(registry(*nodes))
    health.start()
    yield health
    await health.close()


def beating(*, port: int = 1, report_host: str | None = None) -> Heartbeat:
    """One without nodes."""
    return Heartbeat(registry(), HealthBoard(registry()), port=port, report_host=report_host)


async def stopped(heartbeat: Heartbeat) -> None:
    assert await heartbeat.stop()
    assert not heartbeat.status()["running"]


async def test_a_heartbeat_as_lmcaches_frontend_sends_it(api_server: StartApi) -> None:
    worker = await api_server(role="worker")  # on a Unix socket
    dead = {"name": "dead", "host": "127.0.0.1", "port": free_port()}
    async with discovery_service() as service, board(dead, worker.node) as health:
        heartbeat = Heartbeat(registry(dead, worker.node), health, port=8123)
        before = datetime.now().astimezone()
        assert heartbeat.start(service.url)
        assert not heartbeat.start(service.url), "it runs already"
        (sent,) = await service.receive(1)
        assert sent.keys() == {"api_address", "pid", "version", "other_info"}
        assert sent["api_address"] == "http://127.0.0.1:8123"  # the way to a service on this machine
        assert sent["pid"] == str(os.getpid())
        async with worker.client.get("/version") as response:
            assert sent["version"] == await response.json()
        other = json.loads(sent["other_info"])
        assert other.keys() == {"startup_time", "nodes_count"}
        assert other["nodes_count"] == 2
        assert abs((datetime.fromisoformat(other["startup_time"]) - before).total_seconds()) < 5
        status = heartbeat.status()
        assert (status["running"], status["local_ip"], status["failures"]) == (True, "127.0.0.1", 0)
        assert status["startup_time"] == other["startup_time"]
        await stopped(heartbeat)
        assert not await heartbeat.stop(), "it is over"


async def test_the_interval_the_initial_delay_and_a_stop_at_once() -> None:
    async with discovery_service() as service:
        heartbeat = beating()
        began = time.monotonic()
        heartbeat.start(service.url, initial_delay=0.3, interval=0.2)
        await service.receive(3)
        assert service.times[0] - began >= 0.3
        assert all(0.2 <= later - earlier < 1 for earlier, later in zip(service.times, service.times[1:], strict=False))
        clock = time.monotonic()
        await stopped(heartbeat)
        assert time.monotonic() - clock < 0.5
        count = len(service.heartbeats)
        await asyncio.sleep(0.4)
        assert len(service.heartbeats) == count
        assert heartbeat.start(service.url), "and again"
        await service.receive(count + 1)
        await stopped(heartbeat)


@pytest.mark.parametrize(
    ("host", "reported"),
    [
        ("frontend.example", "http://frontend.example:7"),
        ("2001:db8::1", "http://[2001:db8::1]:7"),
        ("[::1]", "http://[::1]:7"),
    ],
)
async def test_the_host_that_the_operator_names(host: str, reported: str) -> None:
    async with discovery_service() as service:
        heartbeat = beating(port=7, report_host=host)
        heartbeat.start(service.url + "?token=t%20%26&pid=x")
        (sent,) = await service.receive(1)
        await stopped(heartbeat)
    assert sent["api_address"] == reported
    assert sent["token"] == "t &", "the service's own parameters stay"
    assert sent["pid"] == str(os.getpid())
    assert (sent["version"], json.loads(sent["other_info"])["nodes_count"]) == ("1.0.0", 0)


async def test_the_address_is_the_one_on_the_way_to_the_service() -> None:
    assert await address_towards(URL("http://localhost:1/x")) in ("127.0.0.1", "::1")
    assert await address_towards(URL("http://127.0.0.9:1/x")) == "127.0.0.1"
    with pytest.raises(OSError):
        await address_towards(URL("http://no-such-host.invalid/x"))


def test_pauses_grow_to_some_minutes_and_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pause(30, 0) == 30
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    assert [pause(30, failures) for failures in (1, 2, 3, 4, 5, 10_000)] == [30, 60, 120, 180, 180, 180]
    assert pause(600, 9) == 600, "never shorter than the interval"
    monkeypatch.undo()
    assert len({pause(30, 4) for _ in range(20)}) > 10
    assert all(90 <= pause(30, 4) <= 180 for _ in range(100))


async def test_failures_are_told_once_and_the_end_of_them_too(caplog: pytest.LogCaptureFixture) -> None:
    broken = [3]

    async def answer(request: web.Request) -> web.StreamResponse:
        if broken[0]:
            broken[0] -= 1
            return web.Response(status=503)
        return await success(request)

    caplog.set_level(logging.WARNING, LOGGER)
    async with discovery_service(answer) as service:
        heartbeat = beating()
        url = service.url.replace("http://", "http://user:hidden@") + "?token=hidden"
        heartbeat.start(url, interval=0.05)
        await service.receive(3)
        assert heartbeat.status()["problem"] == "it answers 503"
        await service.receive(6)
        assert (heartbeat.status()["failures"], heartbeat.status()["problem"]) == (0, None)
        await stopped(heartbeat)
    assert [record.getMessage() for record in caplog.records] == [
        f"the heartbeat to {service.url} failed (1 in a row): it answers 503",
        f"the heartbeat to {service.url} is answered again, after 3 failures",
    ]
    _, _, third, fourth, fifth, sixth = service.times[:6]
    assert fourth - third > 0.09, "0.05 doubled twice, halved at most"
    assert sixth - fifth < 0.5, "and back"


@pytest.mark.parametrize("kind", ["nobody listens", "no such host", "no HTTP", "a redirect", "breaks off"])
async def test_a_service_that_cannot_be_used_stops_nothing(kind: str, frontend_server: StartFrontend) -> None:
    answers = {
        "no HTTP": b"hello\r\n\r\n",
        "a redirect": b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
        "breaks off": b"",
    }

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with serving(Upstream(answers.get(kind, b""), talk=hang_up if kind == "breaks off" else None)) as upstream:
        host = "no-such-host.invalid" if kind == "no such host" else "127.0.0.1"
        port = free_port() if kind == "nobody listens" else upstream.port
        frontend = await frontend_server(heartbeat_url=f"http://{host}:{port}/heartbeat", heartbeat_interval=1)
        heartbeat = frontend.server.heartbeat
        while not heartbeat.status()["failures"]:
            await asyncio.sleep(0.02)
        assert heartbeat.status()["running"]
        async with frontend.client.get("/health") as response:
            assert response.status == 200
        assert len(upstream.heads) == (1 if kind in ("no HTTP", "a redirect") else 0), "no redirect is followed"
        await frontend.server.stop()
        assert not heartbeat.status()["running"]


@pytest.mark.parametrize("answer", ["GET {path} HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK\r\n{path}\r\n\r\n", ""])
@pytest.mark.parametrize("user", ["user:hidden%E2%9C%93@", ""])
async def test_no_failure_tells_what_the_url_holds(answer: str, user: str, caplog: pytest.LogCaptureFixture) -> None:
    """A service that sends back what it was asked, and aiohttp, which quotes that, or the URL."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer.format(path=head.split()[1].decode()).encode())
        writer.close()

    caplog.set_level(logging.DEBUG, LOGGER)
    async with serving(Upstream(talk=echo)) as upstream:
        heartbeat = beating()
        heartbeat.start(f"http://{user}127.0.0.1:{upstream.port}/x?token=hidden", interval=0.05)
        while not heartbeat.status()["problem"]:
            await asyncio.sleep(0.01)
        status = heartbeat.status()
        await stopped(heartbeat)
    assert "hidden" not in f"{caplog.text} {status}"
    assert "\u2713" not in f"{caplog.text} {status}"
    assert f"http://127.0.0.1:{upstream.port}/x failed (1 in a row): " in caplog.text


async def test_slow_and_huge_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    written = [0]

    async def huge(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(10_000):
            await response.write(bytes(1 << 16))
            written[0] += 1 << 16
        return response

    async with discovery_service(huge) as service:
        heartbeat = beating()
        heartbeat.start(service.url, interval=0.05)
        await service.receive(3)
        assert heartbeat.status()["failures"] == 0, "its status says success"
        await stopped(heartbeat)
    assert written[0] < 64 << 20

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        return await never(request)

    monkeypatch.setattr(module, "SEND_SECONDS", 0.3)

    async def never(request: web.Request) -> web.StreamResponse:
        while request.transport is not None:
            await asyncio.sleep(0.02)
        return web.Response()

    for answer in (slow, never):
        async with discovery_service(answer) as service:
            heartbeat = beating()
            heartbeat.start(service.url, interval=0.05)
            await service.receive(2)
            assert heartbeat.status()["problem"] == "no answer within 0.3 seconds"
            clock = time.monotonic()
            await stopped(heartbeat)
            assert time.monotonic() - clock < 0.2, "also in the middle of one"


async def test_the_version_is_that_of_the_first_node_that_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_module, "TOTAL_SECONDS", 0.5)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(Upstream(talk=silent)) as upstream, contextlib.AsyncExitStack() as stack:
        nodes = [{**upstream.node, "name": f"n{i}"} for i in range(10)]
        for version in (b'"9.9"', b'"8.8"'):
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n%s" % version
            node = await stack.enter_async_context(serving(Upstream(answer)))
            nodes.append({**node.node, "name": version.decode()})
        async with board(*nodes) as health:
            clock = time.monotonic()
            assert await first_version(health) == "9.9"
            assert time.monotonic() - clock < 1.5, "it does not wait for those that hang"
        async with board(*nodes[:10]) as health:
            assert await first_version(health) is None


async def test_inside_the_frontend(frontend_server: StartFrontend) -> None:
    async with discovery_service() as service:
        frontend = await frontend_server(heartbeat_url=service.url, report_host="h")
        (sent,) = await service.receive(1)
        assert sent["api_address"] == f"http://h:{frontend.server.address.port}"
        assert frontend.server._runner.app[HEARTBEAT] is frontend.server.heartbeat
    silent = await frontend_server()
    assert not silent.server.heartbeat.status()["running"]


async def test_heartbeats_alone(capsys: pytest.CaptureFixture[str]) -> None:
    async with discovery_service() as service:
        port = free_port()
        options = read_options(["--no-http", "--heartbeat-url", service.url, "--port", str(port)], {})
        stop = asyncio.Event()
        running = asyncio.create_task(serve(options, stop))
        (sent,) = await service.receive(1)
        assert sent["api_address"] == f"http://127.0.0.1:{port}"
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", port)) != 0
        stop.set()
        await asyncio.wait_for(running, 1)
    assert capsys.readouterr().out.splitlines() == [
        "frontend sends heartbeats and serves nothing (0 nodes)",
        "stopping",
    ]


async def test_a_port_in_use_sends_nothing() -> None:
    async with discovery_service() as service:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen()
            options = Options(host="127.0.0.1", port=sock.getsockname()[1], heartbeat_url=service.url)
            with pytest.raises(Exception, match="in use"):
                await serve(options, asyncio.Event())
        await asyncio.sleep(0.1)
        assert service.heartbeats == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-http"], "--no-http without a heartbeat URL there is nothing to do; give --heartbeat-url too"),
        (["--heartbeat-url", "x"], "--heartbeat-url expected a URL that begins with http:// or https:// and a host"),
        (["--heartbeat-url", "http://u:secret@[x"], "--heartbeat-url expected a URL such as http://host:port/path"),
        (["--heartbeat-url", "http://h:99999/"], "--heartbeat-url expected a URL such as http://host:port/path"),
        (["--heartbeat-url", "http:///x"], "--heartbeat-url expected a URL"),
        (["--report-host", "a b"], "--report-host 'a b': expected a host name or an IP address"),
        (["--heartbeat-interval", "0"], "--heartbeat-interval: expected number from 1 to 86400"),
        (["--heartbeat-initial-delay=-1"], "--heartbeat-initial-delay: expected number from 0 to 86400"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_options(arguments, {})
    assert str(refused.value).startswith(message)
    assert "secret" not in str(refused.value)


def test_no_http_is_on_off_or_from_the_environment() -> None:
    url = ["--heartbeat-url", "http://h/"]
    assert read_options([*url, "--no-http"], {}).no_http
    assert read_options(["--no-http", *url], {}).no_http
    assert read_options(url, {"LMCACHE_FRONTEND_NO_HTTP": "1"}).no_http
    assert not read_options(["--no-http=false"], {"LMCACHE_FRONTEND_NO_HTTP": "1"}).no_http
    assert not read_options([], {}).no_http
