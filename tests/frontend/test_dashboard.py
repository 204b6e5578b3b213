import asyncio

import aiohttp
import pytest

from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_frontend.app import HEALTH
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_frontend.telemetry import health
from tests.frontend.upstream import Upstream, serving


async def page(frontend: RunningFrontend) -> str:
    async with frontend.client.get("/") as response:
        assert response.status == 200
        assert response.content_type == "text/html"
        return await response.text()


async def test_each_node_with_role_version_and_state(api_server: StartApi, frontend_server: StartFrontend) -> None:
    scheduler, worker = await api_server(role="scheduler"), await api_server(role="worker", tcp=True)
    gone = {"name": "gone", "host": "127.0.0.1", "port": free_port()}
    frontend = await frontend_server(nodes=[scheduler.node, worker.node, gone])
    found = await frontend.server._runner.app[HEALTH].read()
    assert [(entry.node.name, entry.up, entry.role, entry.version) for entry in found] == [
        ("lmcache_scheduler", True, "scheduler", "0.1.0-embedded"),
        ("lmcache_worker0", True, "worker", "0.1.0-embedded"),
        ("gone", False, None, None),
    ]
    assert found[2].problem == "Connection refused"
    text = await page(frontend)
    for expected in ("2 up", "1 down", "LMCache: 2 of 3 nodes up", "lmcache_worker0", "Connection refused"):
        assert expected in text
    assert f"/proxy/localhost/{str(scheduler.address).replace('/', '%252F')}/metrics" in text


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
        text = await page(frontend)
        async with frontend.client.get("/") as response:
            assert "default-src 'none'; script-src 'self'" in response.headers["Content-Security-Policy"]
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<img src=http" not in text
    assert "//" not in text.replace("<!doctype", "").replace("http://x&gt;", "")


async def test_static_files_are_served_and_nothing_beside_them(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    for name in ("dashboard.css", "dashboard.js", "icon.svg", "vendor/htmx.min.js"):
        async with frontend.client.get(f"/static/{name}") as response:
            assert response.status == 200, name
    for name in ("", "../dashboard_page.py", "..%2fdashboard_page.py", "nope.js"):
        async with frontend.client.get(frontend.url + f"/static/{name}") as response:
            assert response.status in (403, 404), name


async def test_a_node_that_hangs_delays_the_page_by_its_deadline_and_no_more(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PROBE_SECONDS", 0.2)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async with serving(Upstream(talk=talk)) as hanging, serving(Upstream()) as fine:
        frontend = await frontend_server(nodes=[{**hanging.node, "name": "hanging"}, {**fine.node, "name": "fine"}])
        found = await asyncio.wait_for(frontend.server._runner.app[HEALTH].read(), 5)
    assert [(entry.up, entry.problem) for entry in found] == [(False, "no answer within 0.2 seconds"), (True, None)]


async def test_nodes_that_a_round_did_not_reach_come_first_in_the_next(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "BOARD_SECONDS", 0.3)
    monkeypatch.setattr(health, "FRESH_SECONDS", 0)
    monkeypatch.setattr(health, "PROBES_AT_ONCE", 1)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async with serving(Upstream(talk=talk)) as hanging, serving(Upstream()) as fine:
        frontend = await frontend_server(nodes=[{**hanging.node, "name": "a"}, {**fine.node, "name": "b"}])
        board = frontend.server._runner.app[HEALTH]
        assert [entry.up for entry in await board.read()] == [None, None]
        monkeypatch.setattr(health, "PROBE_SECONDS", 0.1)
        assert [entry.up for entry in await board.read()] == [False, True]
        board._late = {entry.node for entry in await board.read() if entry.node.name == "b"}
        monkeypatch.setattr(health, "PROBE_SECONDS", 30)
        assert [entry.up for entry in await board.read()] == [None, True]


async def test_too_many_slow_nodes_leave_some_unknown(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "BOARD_SECONDS", 0.3)
    monkeypatch.setattr(health, "PROBES_AT_ONCE", 1)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async with serving(Upstream(talk=talk)) as hanging:
        frontend = await frontend_server(nodes=[{**hanging.node, "name": f"n{i}"} for i in range(3)])
        found = await frontend.server._runner.app[HEALTH].read()
        assert [entry.up for entry in found] == [None, None, None]
        assert "unknown" in await page(frontend)


@pytest.mark.parametrize(
    ("answer", "up", "problem"),
    [
        (b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n", False, "answers 503"),
        (b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n", True, None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n[[[[[", True, None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]", True, None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"[" * 300000, True, None),
        (b"nonsense\r\n\r\n", False, "answers something that is no HTTP"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n["\\ud800"]', True, None),
        (b"HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", True, None),
    ],
)
async def test_odd_answers(frontend_server: StartFrontend, answer: bytes, up: bool, problem: str | None) -> None:
    async with serving(Upstream(answer)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        (found,) = await frontend.server._runner.app[HEALTH].read()
        assert found.up is up
        assert found.version is None
        if problem:
            assert found.problem == problem
        assert "\n" not in (found.problem or "")


async def test_half_a_character_in_a_version_does_not_break_the_page(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n"\\ud800"')) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        assert "1 up" in await page(frontend)
        async with frontend.client.get("/static/" + "x" * 5000) as response:
            assert response.status == 404


async def test_many_pages_ask_the_nodes_once(frontend_server: StartFrontend) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        async with aiohttp.ClientSession(frontend.url) as client:

            async def load() -> int:
                async with client.get("/") as response:
                    return response.status

            assert set(await asyncio.gather(*(load() for _ in range(20)))) == {200}
        assert len(upstream.heads) == 2  # one /version, one /meta
