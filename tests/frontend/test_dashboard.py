import asyncio
import re
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_frontend.app import READY, create_app
from lmcache_frontend.nodes.node import LOCAL_PROXY, Node, Proxy
from lmcache_frontend.nodes.stores import StoreAway
from lmcache_frontend.options import Options
from lmcache_frontend.pages import paths
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_frontend.telemetry.health.board import HealthBoard, NodeHealth
from lmcache_frontend.telemetry.health.states import Checked, after
from lmcache_shared.address import TcpAddress
from tests.frontend.boards import settled
from tests.frontend.upstream import Upstream, serving


async def page(frontend: RunningFrontend, path: str = "/") -> str:
    async with frontend.client.get(path) as response:
        assert response.status == 200
        assert response.content_type == "text/html"
        return await response.text()


async def page_with(frontend: RunningFrontend, text: str) -> str:
    """The page, once it has this text: it is not made anew at once after it was made."""
    until = time.monotonic() + 5
    while text not in (found := await page(frontend)):
        assert time.monotonic() < until, found
        await asyncio.sleep(0.02)
    return found


async def test_each_node_with_role_version_and_state(api_server: StartApi, frontend_server: StartFrontend) -> None:
    scheduler, worker = await api_server(role="scheduler"), await api_server(role="worker", tcp=True)
    gone = {"name": "gone", "host": "127.0.0.1", "port": free_port()}
    frontend = await frontend_server(nodes=[scheduler.node, worker.node, gone])
    found = await settled(frontend)
    assert [(entry.node.name, entry.state, entry.role, entry.version) for entry in found] == [
        ("lmcache_scheduler", "up", "scheduler", "0.1.0-embedded"),
        ("lmcache_worker0", "up", "worker", "0.1.0-embedded"),
        ("gone", "down", None, None),
    ]
    assert found[2].problem == "Connection refused"
    text = await page(frontend)
    for expected in ("2 up", "1 down", "LMCache: 2 of 3 nodes up", "lmcache_worker0", "Connection refused"):
        assert expected in text
    assert 'href="/nodes/local_proxy/lmcache_worker0"' in text


async def test_no_nodes_says_how_to_add_some(frontend_server: StartFrontend) -> None:
    text = await page(await frontend_server())
    assert "No nodes yet" in text
    assert "--nodes" in text


async def test_a_node_cannot_put_markup_or_an_outside_url_into_the_page(frontend_server: StartFrontend) -> None:
    body = b'"<script>alert(1)</script>"'
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with serving(Upstream(answer)) as upstream:
        name = "<img src=http://x>\"'"
        frontend = await frontend_server(nodes=[{**upstream.node, "name": name}])
        text = "".join([await page(frontend, path) for path in ("/", "/nodes", paths.node_path(LOCAL_PROXY, name))])
        async with frontend.client.get("/") as response:
            assert "default-src 'none'; script-src 'self'" in response.headers["Content-Security-Policy"]
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<img src=http" not in text
    assert "//" not in text.replace("http://x&gt;", "").replace("http%3A//", "")


async def test_static_files_are_served_and_nothing_beside_them(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    for name in ("css/base.css", "js/live.js", "icon.svg", "vendor/htmx.min.js", "vendor/uPlot.iife.min.js"):
        async with frontend.client.get(f"/static/{name}") as response:
            assert response.status == 200, name
    for name in ("", "../overview_page.py", "..%2foverview_page.py", "nope.js"):
        async with frontend.client.get(frontend.url + f"/static/{name}") as response:
            assert response.status in (403, 404), name


async def test_what_is_down_comes_first_then_unknown_slow_and_up(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"name": name, "host": "127.0.0.1", "port": 1} for name in ("n-up", "n-slow", "n-unknown", "n-down")]
    frontend = await frontend_server(nodes=nodes)
    await settled(frontend)
    found = {
        "n-up": Checked(milliseconds=3.25, version="1"),
        "n-slow": Checked(milliseconds=1500.0),
        "n-unknown": Checked("could not be asked: Too many open files", asked=False),
        "n-down": Checked("answers 503"),
    }
    board = frontend.server.cluster.health
    long_ago = datetime(2020, 2, 3, 12, 0, tzinfo=timezone.utc)
    for watched in board._watched.values():
        watched.health = after(
            NodeHealth(watched.health.node, watched.health.proxy), found[watched.health.node.name], long_ago
        )
        watched.stop()
    board.revision += 1
    assert board.counts() == {"down": 1, "unknown": 1, "slow": 1, "up": 1}
    text = await page(frontend)
    assert re.findall(r'title="(n-\w+)"', text) == ["n-down", "n-unknown", "n-slow", "n-up"]
    assert re.findall(r"</svg>(\d \w+)</span></a>", text) == ["1 up", "1 slow", "1 unknown", "1 down"]
    assert re.findall(r'class="sr">(\w+)</span></span><a', text) == ["down", "unknown", "slow", "up"]
    for expected in ("answers 503", "Too many open files", "answered after 1.5 seconds", "3.25 ms", "since 2020-02-03"):
        assert expected in text
    assert "2 of 4 nodes up" in text, "a slow node answers"


async def test_a_failed_check_of_a_node_that_still_counts_as_up_is_told_as_such(frontend_server: StartFrontend) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        await settled(frontend)
        (watched,) = frontend.server.cluster.health._watched.values()
        watched.health = after(watched.health, Checked("Connection refused"), datetime.now(timezone.utc))
        frontend.server.cluster.health.revision += 1
        text = await page(frontend)
    assert re.findall(r'class="tile-problem">([^<]+)<', text) == ["last check failed: Connection refused"]
    assert "1 up" in text


async def test_what_nobody_reports_any_longer_is_told_as_stale(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(stale_seconds=3600.0)
    registry = frontend.server.cluster.registry
    here = TcpAddress("127.0.0.1", free_port())
    known = [Node(name, here.host, here.port, here) for name in ("n1", "n2", "n3")]
    found = Proxy("far", here.host, here.port, here, tuple(known[1:]))
    registry.publish("dns", [known[0], found], lasting=True)
    assert "stale" not in await page(frontend)
    registry.publish("dns", [replace(found, nodes=(known[2],))], lasting=True)
    text = await page_with(frontend, "2 stale")
    assert re.findall(r'class="badge stale"[^>]*>([^<]+)<', text) == ["2 stale", "stale", "stale"]
    registry.publish("dns", [], lasting=True)
    text = await page_with(frontend, "3 stale")
    head = re.search(
        r"<h2><a [^>]*>far</a> <code>([^<]+)</code> <span[^>]*>([^<]+)</span></h2>", " ".join(text.split())
    )
    assert head
    assert head.groups() == (str(here), "stale")
    assert "no longer reported by dns" in text


async def test_a_proxy_that_is_away_and_one_without_nodes_are_told(frontend_server: StartFrontend) -> None:
    empty = await frontend_server()
    away = {"name": "away", "host": "127.0.0.1", "port": free_port(), "nodes": []}
    there = {"name": "there", "host": "127.0.0.1", "port": empty.server.address.port, "nodes": []}
    frontend = await frontend_server(nodes=[away, there])
    assert "No nodes yet" not in await page(frontend)
    text = await page_with(frontend, "It does not tell of its nodes: ")
    assert f"away</a> <code>127.0.0.1:{away['port']}</code>" in " ".join(text.split())
    assert "1 proxy with a problem" in text
    assert "It has told of no nodes." in text


async def test_a_source_that_cannot_be_read_is_a_notice(frontend_server: StartFrontend, tmp_path: Path) -> None:
    file = tmp_path / "nodes.json"
    file.write_text('[{"name": "a", "host": "h", "port": 0}, {"name": "<b>"}]')
    frontend = await frontend_server(config=str(file))
    text = await page(frontend)
    assert f"<strong>file</strong> <code>{file}</code>: {file}: [0]:" in text
    assert ", and 1 more" in text
    assert '<a href="/api/sources">' in text
    frontend.server.cluster.by_hand.note(StoreAway("the disk is full"))
    await page_with(frontend, "the disk is full")
    file.write_text("7")
    frontend.server.cluster.sources.reload()
    await page_with(frontend, "expected a JSON list")


async def test_a_page_of_thousands_of_nodes_lets_others_have_their_turn(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HealthBoard, "_look", lambda board: None)  # nobody is asked: all are unknown
    nodes = [{"name": f"n{i}", "host": "127.0.0.1", "port": 1 + i} for i in range(3000)]
    frontend = await frontend_server(nodes=nodes)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(others())
    text = await page(frontend)
    task.cancel()
    assert "3,000 unknown" in text
    assert turns > 10
    frontend.server.cluster.health.revision += 1
    assert await page(frontend) == text, "made too short a time ago to be made again"


async def test_half_a_character_in_a_version_does_not_break_the_page(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n"\\ud800"')) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        assert "1 up" in await page(frontend)
        async with frontend.client.get("/static/" + "x" * 5000) as response:
            assert response.status == 404


async def test_many_pages_ask_no_node(frontend_server: StartFrontend) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], health_interval=60.0)
        async with aiohttp.ClientSession(frontend.url) as client:

            async def load() -> int:
                async with client.get("/") as response:
                    return response.status

            assert set(await asyncio.gather(*(load() for _ in range(20)))) == {200}
        assert len(upstream.heads) == 3  # one /version, one /meta, one /conf: the first check


async def test_ready_is_told_apart_from_healthy(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(nodes=[{"name": "gone", "host": "127.0.0.1", "port": free_port()}])
    async with frontend.client.get("/ready") as response:
        assert (response.status, await response.text()) == (200, '{"status":"ready"}')

    def loading() -> str | None:
        return "the nodes are not loaded yet"

    app = create_app(Options(), frontend.server.cluster)
    app[READY] = loading
    async with TestClient(TestServer(app)) as client:
        async with client.get("/ready") as response:
            assert response.status == 503
            assert await response.json() == {"status": "not ready", "reason": "the nodes are not loaded yet"}
        async with client.get("/health") as response:
            assert (response.status, await response.text()) == (
                200,
                '{"status":"healthy","service":"lmcache-monitor"}',
            )
