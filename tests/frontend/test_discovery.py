"""This frontend as the discovery service of others, and the endpoints of the heartbeats that it sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from lmcache_frontend.api.discovery_api import MAX_OF_ONE
from lmcache_frontend.discovery import service as module
from lmcache_frontend.discovery.heartbeat import Heartbeat
from lmcache_frontend.discovery.service import DiscoveryService, Report, _report_of, _startup_time
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.nodes.stores import StoreAway
from lmcache_frontend.nodes.stores.memory import MemoryStore, Reports
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_frontend.telemetry.health.board import HealthBoard
from tests.frontend.discovery import discovery_service
from tests.frontend.upstream import Upstream, serving

BEAT = {"api_address": "http://127.0.0.1:1", "pid": "7", "version": "0.5.6", "other_info": '{"nodes_count": 2}'}


async def until(is_so: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def ask(frontend: RunningFrontend, path: str, **how: Any) -> tuple[int, Any]:
    method = how.pop("method", "GET")
    async with frontend.client.request(method, path, **how) as response:
        return response.status, await response.json()


async def beat(frontend: RunningFrontend, path: str = "/heartbeat", **changed: str) -> tuple[int, Any]:
    return await ask(frontend, path, params={**BEAT, **changed})


def shown(frontend: RunningFrontend, *, stale: bool = False) -> list[str]:
    return [proxy.name for proxy in frontend.server.cluster.registry.proxies() if proxy.stale == stale]


class Away(MemoryStore):
    """A store that is away when a test says so."""

    away = False

    async def report(self, key: str, value: str, *, keep_seconds: float, limit: int) -> bool:
        if self.away:
            raise StoreAway("the store is away")
        return await super().report(key, value, keep_seconds=keep_seconds, limit=limit)

    async def reports(self) -> dict[str, str]:
        if self.away:
            raise StoreAway("the store is away")
        return await super().reports()


@contextlib.asynccontextmanager
async def following(store: MemoryStore) -> AsyncIterator[tuple[DiscoveryService, Registry]]:
    """A discovery service that follows a store, as one frontend of several does."""
    registry = Registry(host="h", port=1, stale_seconds=60)
    service = DiscoveryService(registry, store)
    task = asyncio.create_task(service.run())
    try:
        yield service, registry
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def heads(registry: Registry) -> list[str]:
    return [proxy.name for proxy in registry.proxies() if not proxy.stale]


def a_beat(address: str = "http://127.0.0.1:1") -> module.Beat:
    return module.Beat(address, 1, "1", "{}")


@pytest.mark.parametrize("path", ["/heartbeat", "/lmcache_heartbeat"])
async def test_a_heartbeat_is_kept_and_told_on(path: str, frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    before = datetime.now().replace(microsecond=0)
    assert await beat(frontend, path) == (200, {"status": "success"})
    status, infos = await ask(frontend, "/lmcache_infos")
    assert (status, infos["processCount"], infos["versionCount"], infos["versions"]) == (200, 1, 1, None)
    (info,) = infos["processInfos"].values()
    (entity,) = info["lmCacheInfoEntities"]
    times = [datetime.strptime(entity.pop(name), "%Y-%m-%d %H:%M:%S") for name in ("startTime", "lastReportTime")]
    assert all(before <= at <= datetime.now() for at in times)
    assert list(infos["processInfos"]) == ["http://127.0.0.1:1"]
    assert (info["count"], entity) == (
        1,
        {
            "apiAddress": "http://127.0.0.1:1",
            "ipAddress": None,
            "pid": 7,
            "version": "0.5.6",
            "otherInfo": '{"nodes_count": 2}',
        },
    )


async def test_one_that_is_no_frontend_is_a_node_itself(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")) as upstream:
        frontend = await frontend_server()
        name = f"proxy_127.0.0.1_{upstream.port}"
        await beat(frontend, api_address=f"http://127.0.0.1:{upstream.port}")
        assert shown(frontend) == [name], "at once"
        _, answer = await ask(frontend, "/api/nodes")
        ((proxy, (child,)),) = [(proxy["name"], proxy["children"]) for proxy in answer["nodes"]]
        assert (proxy, child["name"], child["port"]) == (name, name, str(upstream.port))
        async with frontend.client.get(f"/proxy2/{name}/version") as response:
            assert response.status == 404
        assert any(head.startswith(b"GET /version ") for head in upstream.heads)


async def test_a_frontend_behind_which_nodes_are(frontend_server: StartFrontend) -> None:
    """One that answers as LMCache's."""
    child = {"name": "w", "host": "127.0.0.1", "port": 9}
    body = json.dumps({"nodes": [{"name": "local_proxy", "is_proxy": True, "children": [child]}]}).encode()
    answer = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with serving(Upstream(answer + body)) as upstream:
        frontend = await frontend_server()
        await beat(frontend, api_address=f"http://127.0.0.1:{upstream.port}")
        registry = frontend.server.cluster.registry
        await until(lambda: [node.name for node in registry.nodes()] == ["w"])


async def test_a_heartbeat_to_itself_shows_no_node(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(report_host="127.0.0.1")
    _, answer = await ask(
        frontend, "/api/heartbeat/start", method="POST", json={"heartbeat_url": f"{frontend.url}/heartbeat"}
    )
    assert answer == {"status": "success", "message": "Heartbeat service started"}
    await until(lambda: len(frontend.server.cluster.discovery.since()) == 1)
    await until(lambda: shown(frontend) == [])
    await asyncio.sleep(0.6)
    assert shown(frontend) == []


async def test_who_is_silent_becomes_stale_and_is_still_told_of(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALIVE_SECONDS", 0.5)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(module, "NEWS_SECONDS", 0.05)
    frontend = await frontend_server()
    await beat(frontend)
    assert shown(frontend) == ["proxy_127.0.0.1_1"]
    await until(lambda: shown(frontend, stale=True) == ["proxy_127.0.0.1_1"])
    _, infos = await ask(frontend, "/lmcache_infos?hour=1")
    assert infos["processCount"] == 1
    await beat(frontend)
    await until(lambda: shown(frontend) == ["proxy_127.0.0.1_1"])


async def test_those_of_the_last_hours_or_minutes(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    await asyncio.sleep(0.1)  # the store has been read, and is read again when there is news
    now = time.time()
    service = frontend.server.cluster.discovery
    for i, ago in enumerate([0, 90, 3500, 4000, 23 * 3600, 25 * 3600]):
        service._reports[f"http://h:{i + 1}"] = Report(None, str(i % 2), "{}", now, now - ago)
    for query, count in {
        "": 5, "?minute=1": 1, "?minute=2": 2, "?hour=1": 3, "?hour=2": 4, "?hour=1&minute=1": 3, "?hour=10": 4,
        f"?hour={10**18}": 5, "?minute=-5": 0, "?minute=0": 0,
    }.items():  # fmt: skip
        status, infos = await ask(frontend, f"/lmcache_infos{query}")
        assert (status, infos["processCount"], len(infos["processInfos"])) == (200, count, count), query
    status, answer = await ask(frontend, "/lmcache_infos?hour=x")
    assert (status, answer["detail"][0]["loc"]) == (422, ["query", "hour"])


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, (7, "0.5.6", '{"nodes_count": 2}')),
        ({"pid": "x"}, (None, "0.5.6", '{"nodes_count": 2}')),
        ({"pid": ""}, (None, "0.5.6", '{"nodes_count": 2}')),
        ({"pid": "9" * 30}, (None, "0.5.6", '{"nodes_count": 2}')),
        ({"pid": "٣"}, (None, "0.5.6", '{"nodes_count": 2}')),
        ({"other_info": ""}, (7, "0.5.6", "{}")),
        ({"other_info": '"ü"'}, (7, "0.5.6", '"ü"')),
    ],
)
async def test_what_is_kept(changed: dict[str, str], kept: tuple[Any, ...], frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    assert (await beat(frontend, **changed))[0] == 200
    (report,) = frontend.server.cluster.discovery.since().values()
    assert (report.pid, report.version, report.other_info) == kept


async def test_what_a_heartbeat_leaves_out(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    assert await ask(frontend, "/heartbeat") == (200, {"status": "success"})
    assert await ask(frontend, "/heartbeat?api_address=") == (200, {"status": "success"})
    assert frontend.server.cluster.discovery.since() == {}
    await ask(frontend, "/heartbeat?api_address=http://127.0.0.1:1&api_address=http://h:2")
    ((address, report),) = frontend.server.cluster.discovery.since().items()
    assert (address, report.pid, report.version, report.other_info) == ("http://127.0.0.1:1", None, "1.0.0", "{}")


@pytest.mark.parametrize(
    ("changed", "detail"),
    [
        ({"api_address": "h:1"}, "api_address 'h:1': expected http://host:port"),
        ({"api_address": "https://h:1"}, "api_address 'https://h:1': expected http://host:port"),
        ({"api_address": "http://h"}, "api_address 'http://h': expected http://host:port"),
        ({"api_address": "http://h:1/x"}, "api_address '1/x': expected a port from 1 to 65535"),
        ({"api_address": "http://0.0.0.0:1"}, "api_address 0.0.0.0:1: is no address of one machine"),
        ({"api_address": "http://<script>:1"}, "api_address '<script>': expected a host name or an IP address"),
        ({"api_address": "http://u:p@h:1"}, "api_address an address with @ is not taken"),
        ({"version": "x" * 101}, "version: expected at most 100 printable characters"),
        ({"version": "a\nb"}, "version: expected at most 100 printable characters"),
        ({"other_info": "{"}, "other_info: expected JSON of at most 4096 bytes"),
        ({"other_info": '"' + "x" * 4096 + '"'}, "other_info: expected JSON of at most 4096 bytes"),
        ({"other_info": "[" * 2000}, "other_info: expected JSON of at most 4096 bytes"),
    ],
)
async def test_what_is_refused(changed: dict[str, str], detail: str, frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    status, answer = await beat(frontend, **changed)
    assert status == 400
    assert answer["detail"].startswith(detail)
    assert frontend.server.cluster.discovery.since() == {}


async def test_bytes_that_are_no_text(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    for query in ("api_address=%ff%fe", "api_address=http://127.0.0.1:1&other_info=%22%ff%22&version=%ed%a0%80"):
        async with frontend.client.get(URL(f"{frontend.url}/heartbeat?{query}", encoded=True)) as response:
            assert response.status in (200, 400)
    assert (await ask(frontend, "/lmcache_infos"))[0] == 200


async def test_another_machines_loopback_is_not_ours(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    far = {"X-Forwarded-For": "10.0.0.1"}
    status, answer = await ask(frontend, "/heartbeat", params=BEAT, headers=far)
    assert (status, answer["detail"]) == (
        400,
        "api_address 127.0.0.1:1: is this machine and not yours; report another with --report-host",
    )


async def test_who_may_report_whom(frontend_server: StartFrontend) -> None:
    allowed = ["10.8.0.0/16:*", "*.pods.svc:8000", "one:8000"]
    frontend = await frontend_server(allow_target=allowed, token="the-token-of-an-admin")
    far = {"X-Forwarded-For": "10.0.0.1"}
    token = {"Authorization": "Bearer the-token-of-an-admin"}
    for address, headers, expected in (
        ("10.0.0.1:8000", far, 200),
        ("[::ffff:10.0.0.1]:8000", far, 200),
        ("10.8.1.1:8000", far, 200),
        ("a.pods.svc:8000", far, 200),
        ("one:8000", far, 200),
        ("10.0.0.2:8000", far, 403),
        ("10.0.0.2:8000", {**far, **token}, 200),
        ("10.0.0.2:8000", {}, 200),
        ("169.254.169.254:80", far, 403),
        ("metadata.google.internal:80", far, 403),
        ("2852039166:80", far, 403),
        ("0x0a000001:80", far, 403),
        ("evil.example:8000", far, 403),
        ("evil.example:8000", {}, 200),
    ):
        status, answer = await ask(
            frontend, "/heartbeat", params={**BEAT, "api_address": f"http://{address}"}, headers=headers
        )
        assert status == expected, (address, answer)
        assert expected == 200 or (f"--allow-target {address}" in answer["detail"] and "10.0.0.1" in answer["detail"])


async def test_a_name_of_the_sender_is_kept_as_its_address(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = {
        "me.example": ["10.0.0.1", "fd00::1"],
        "other.example": ["10.0.0.2"],
        "metadata.example": ["169.254.169.254"],
        "here.example": ["127.0.0.1"],
    }
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *args: Any, **more: Any) -> Any:
        if host not in zone:
            return real(host, port, *args, **more)
        return [found for number in zone[host] for found in real(number, port, *args, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    frontend = await frontend_server()
    for caller, name, expected in (
        ("10.0.0.1", "me.example", 200),
        ("fd00::1", "me.example", 200),
        ("10.0.0.1", "other.example", 403),
        ("10.0.0.1", "metadata.example", 403),
        ("127.0.0.1", "here.example", 403),
        ("unknown", "me.example", 403),
        ("10.0.0.1", "0x0a000001", 403),
    ):
        params = {**BEAT, "api_address": f"http://{name}:8000"}
        status, answer = await ask(frontend, "/heartbeat", params=params, headers={"X-Forwarded-For": caller})
        assert status == expected, (name, answer)
    zone["me.example"] = ["169.254.169.254"]
    assert set(frontend.server.cluster.discovery.since()) == {"http://10.0.0.1:8000", "http://[fd00::1]:8000"}


async def test_nobody_reports_through_another_frontend(frontend_server: StartFrontend) -> None:
    token = "the-token-of-an-admin"
    service = await frontend_server(no_trust_local=True, token=token)
    rack = {"name": "rack", "host": "127.0.0.1", "port": service.server.address.port, "nodes": [], "token": token}
    outer = await frontend_server(nodes=[rack])
    for headers in ({"X-Forwarded-For": "10.0.0.1"}, {}):
        for address in ("10.0.0.2:80", "10.0.0.1:80", "127.0.0.1:80"):
            status, answer = await ask(
                outer, "/proxy2/rack/heartbeat", params={"api_address": f"http://{address}"}, headers=headers
            )
            assert status in (400, 403), answer
    assert service.server.cluster.discovery.since() == {}


async def test_one_host_does_not_fill_the_room_of_all(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(allow_target=["10.8.0.0/16:*"])

    async def report(caller: str, address: str) -> int:
        params = {**BEAT, "api_address": f"http://{address}"}
        return (await ask(frontend, "/heartbeat", params=params, headers={"X-Forwarded-For": caller}))[0]

    for port in range(MAX_OF_ONE):
        assert await report("10.0.0.1", f"10.0.0.1:{8000 + port}") == 200
        assert await report(f"fd00::{port + 1:x}", f"[fd00::{port + 1:x}]:8000") == 200
        assert await report("10.8.0.1", f"10.8.0.1:{8000 + port}") == 200
    for caller, address, expected in (
        ("10.0.0.1", "10.0.0.1:9000", 403),
        ("10.0.0.1", "10.0.0.1:8000", 200),
        ("10.0.0.2", "10.0.0.2:9000", 200),
        ("fd00::9000", "[fd00::9000]:8000", 403),
        ("10.8.0.1", "10.8.0.1:9000", 200),
    ):
        assert await report(caller, address) == expected, address


async def test_no_page_of_another_site_makes_a_proxy_known(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    for headers in (
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
        {"Origin": "http://evil.example"},
    ):
        status, _ = await ask(frontend, "/heartbeat", params=BEAT, headers=headers)
        assert status == 403
    assert frontend.server.cluster.discovery.since() == {}
    status, _ = await ask(frontend, "/heartbeat", params=BEAT, headers={"Sec-Fetch-Site": "none"})
    assert status == 200, "typed by hand"
    async with frontend.client.head("/heartbeat", params=BEAT) as response:
        assert response.status == 405


async def test_so_many_are_kept_and_the_silent_make_room(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FOUND", 3)
    frontend = await frontend_server()
    service = frontend.server.cluster.discovery
    for port in (1, 2, 3):
        assert (await beat(frontend, api_address=f"http://h:{port}"))[0] == 200
    status, answer = await beat(frontend, api_address="http://h:4")
    assert (status, "send heartbeats here already" in answer["detail"]) == (503, True)
    assert (await beat(frontend, api_address="http://h:2"))[0] == 200, "those that are kept go on"
    old = service._reports["http://h:1"]
    service._reports["http://h:1"] = Report(old.pid, old.version, old.other_info, old.started, old.reported - 200)
    assert (await beat(frontend, api_address="http://h:4"))[0] == 200
    assert list(service.since()) == ["http://h:2", "http://h:3", "http://h:4"]
    assert (await beat(frontend, api_address="http://h:1"))[0] == 503


async def test_a_store_that_is_away(frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_frontend.cluster.open_store", lambda *_: Away())
    monkeypatch.setattr(module, "NEWS_SECONDS", 0.05)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    frontend = await frontend_server()
    await beat(frontend)
    monkeypatch.setattr(Away, "away", True)
    async with frontend.client.get("/heartbeat", params={**BEAT, "api_address": "http://127.0.0.1:2"}) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        assert (await response.json())["detail"] == "the heartbeat is not kept: the store is away"
    assert list(frontend.server.cluster.discovery.problems) == ["the store is away"]
    frontend.server.cluster.discovery.reload()
    await asyncio.sleep(0.2)
    assert (await ask(frontend, "/lmcache_infos"))[1]["processCount"] == 1
    assert shown(frontend) == ["proxy_127.0.0.1_1"]
    monkeypatch.setattr(Away, "away", False)
    assert (await beat(frontend, api_address="http://127.0.0.1:2"))[0] == 200
    frontend.server.cluster.discovery.reload()
    await until(lambda: list(frontend.server.cluster.discovery.problems) == [])


async def test_nobody_counts_as_silent_because_the_store_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"ALIVE_SECONDS": 0.3, "BACK_SECONDS": 0.8, "LOOK_SECONDS": 0.05, "NEWS_SECONDS": 0.05,
                          "READ_SECONDS": 0.1}.items():  # fmt: skip
        monkeypatch.setattr(module, name, seconds)
    store = Away()
    async with following(store) as (service, known):
        await service.keep(a_beat())
        store.away = True
        with pytest.raises(StoreAway):
            await service.keep(a_beat("http://127.0.0.1:2"))
        await asyncio.sleep(1.2)
        assert heads(known) == ["proxy_127.0.0.1_1"]
        store.away, store._reports = False, Reports()
        await asyncio.sleep(0.4)
        assert heads(known) == ["proxy_127.0.0.1_1"], "it may not have come to report again"
        await until(lambda: heads(known) == [], 2)


async def test_frontends_that_share_a_store_share_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEWS_SECONDS", 0.05)
    store = MemoryStore()
    async with following(store) as (first, _), following(store) as (second, known):
        await asyncio.sleep(0.1)
        await first.keep(a_beat())
        assert second.since() == {}
        await until(lambda: list(second.since()) == ["http://127.0.0.1:1"])
        assert heads(known) == ["proxy_127.0.0.1_1"]
        assert first.since() == second.since()
    async with following(store) as (third, known):
        await until(lambda: heads(known) == ["proxy_127.0.0.1_1"])
        assert len(third.since()) == 1, "kept over a restart, where the store is"


async def test_what_others_wrote_into_the_store(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    usable = '{"pid":1,"version":"1","other_info":"{}","started":1,"reported":%f}'
    for key, value in {
        "http://h:1": usable % time.time(),
        "http://H:2": usable % time.time(),
        "nonsense": usable % time.time(),
        "http://h:3": "[" * 10_000,
        "http://h:4": usable % 1e15,
        "http://h:5": '{"pid":1}',
        "http://h:6": usable % -1,
    }.items():
        await store.report(key, value, keep_seconds=60, limit=100)
    caplog.set_level(logging.WARNING)
    async with following(store) as (service, known):
        await until(lambda: heads(known) == ["proxy_h_1"])
        assert list(service.since()) == ["http://h:1"]
    assert caplog.records == []


@given(st.text(max_size=80))
def test_any_text_of_the_store_is_a_report_or_none(text: str) -> None:
    assert _report_of("http://h:1", text) is None


def test_when_a_frontend_started() -> None:
    at = datetime.now().astimezone() - timedelta(hours=3)
    for text in (at.isoformat(), at.replace(tzinfo=None).isoformat()):
        assert _startup_time(json.dumps({"startup_time": text})) == pytest.approx(at.timestamp(), abs=1)
    for other in (
        "",
        "{}",
        "[]",
        "1",
        '{"startup_time": 5}',
        '{"startup_time": "x"}',
        '{"startup_time": "0001-01-01"}',
    ):
        assert _startup_time(other) is None


async def test_the_time_of_start_stays_and_another_process_has_another() -> None:
    service = DiscoveryService(Registry(host="h", port=1), MemoryStore())
    await service.keep(a_beat())
    (first,) = service.since().values()
    await asyncio.sleep(0.02)
    await service.keep(a_beat())
    (second,) = service.since().values()
    assert second.started == first.started < second.reported
    await service.keep(module.Beat("http://127.0.0.1:1", 2, "1", "{}"))
    (third,) = service.since().values()
    assert third.started == third.reported


# The heartbeats that it sends


async def test_status_as_lmcaches_and_more(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    status, answer = await ask(frontend, "/api/heartbeat/status")
    assert status == 200
    assert list(answer)[:4] == ["running", "local_ip", "startup_time", "current_time"]
    assert (answer["running"], answer["heartbeat_url"], answer["interval"]) == (False, None, None)
    assert datetime.fromisoformat(answer["startup_time"]) <= datetime.fromisoformat(answer["current_time"])


async def test_start_and_stop(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()

    async def post(path: str, **how: Any) -> tuple[int, Any]:
        return await ask(frontend, f"/api/heartbeat/{path}", method="POST", **how)

    started = (200, {"status": "success", "message": "Heartbeat service started"})
    stopped = (200, {"status": "success", "message": "Heartbeat service stopped"})
    async with discovery_service() as service:
        url = service.url.replace("http://", "http://u:hidden@") + "?token=hidden"
        body = {"heartbeat_url": url, "initial_delay": 0, "interval": 60}
        assert await post("stop") == stopped, "none are sent"
        assert await post("start", json=body) == started
        (sent,) = await service.receive(1)
        assert (sent["token"], sent["api_address"]) == ("hidden", frontend.url)
        _, status = await ask(frontend, "/api/heartbeat/status")
        assert (status["running"], status["heartbeat_url"], status["interval"]) == (True, service.url, 60)
        assert await post("start", json=body) == started, "they are sent so already"
        for other in ({"interval": 61}, {"heartbeat_url": "http://other/"}):
            code, answer = await post("start", json={**body, **other})
            assert (code, answer["detail"]) == (
                409,
                f"heartbeats go to {service.url} already; end them first with POST /api/heartbeat/stop",
            )
        assert await post("stop") == stopped
        assert not (await ask(frontend, "/api/heartbeat/status"))[1]["running"]
        assert await post("start", data=json.dumps({"heartbeat_url": url, "interval": "2"})) == started
        await service.receive(2)
        assert await post("stop") == stopped


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "heartbeat_url is required"),
        (b"{", "heartbeat_url is required"),
        (b"[]", "heartbeat_url is required"),
        (b"[" * 10_000, "heartbeat_url is required"),
        (b"{}", "heartbeat_url is required"),
        (b'{"heartbeat_url": ""}', "heartbeat_url is required"),
        (b'{"heartbeat_url": null}', "heartbeat_url is required"),
        (b'{"heartbeat_url": 7}', "heartbeat_url: expected a URL of at most 4096 characters"),
        (b'{"heartbeat_url": "x"}', "heartbeat_url: expected a URL that begins with http:// or https:// and a host"),
        (b'{"heartbeat_url": "file:///etc/passwd"}', "heartbeat_url: expected a URL that begins with http://"),
        (b'{"heartbeat_url": "http://u:secret@[x"}', "heartbeat_url: expected a URL such as"),
        (b'{"heartbeat_url": "http://h/", "interval": 0}', "interval: expected number from 1 to 86400, found 0"),
        (b'{"heartbeat_url": "http://h/", "interval": null}', "interval: expected number"),
        (b'{"heartbeat_url": "http://h/", "interval": [1]}', "interval: expected number"),
        (b'{"heartbeat_url": "http://h/", "initial_delay": -1}', "initial_delay: expected number from 0 to 86400"),
        (b'{"heartbeat_url": "http://h/", "initial_delay": 1e999}', "initial_delay: expected number"),
    ],
)
async def test_a_start_that_cannot_be(body: bytes, detail: str, frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    status, answer = await ask(frontend, "/api/heartbeat/start", method="POST", data=body)
    assert status == 400
    assert answer["detail"].startswith(detail)
    assert "secret" not in answer["detail"]
    assert not frontend.server.heartbeat.status()["running"]


async def test_no_page_of_another_site_starts_them(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    body = {"heartbeat_url": "http://127.0.0.1:1/"}
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}):
        status, _ = await ask(frontend, "/api/heartbeat/start", method="POST", json=body, headers=headers)
        assert status == 403
    assert not frontend.server.heartbeat.status()["running"]


async def test_a_heartbeats_reason_tells_no_secret() -> None:
    """aiohttp's own text of broken HTTP repeats the URL with its query."""
    async with serving(Upstream(b"hello\r\n\r\n")) as upstream:
        registry = Registry(host="h", port=1)
        heartbeat = Heartbeat(registry, HealthBoard(registry), port=1)
        heartbeat.start(f"http://127.0.0.1:{upstream.port}/x?token=hidden", interval=60)
        await until(lambda: heartbeat.status()["problem"] is not None)
        assert "hidden" not in str(heartbeat.status())
        await heartbeat.stop()
