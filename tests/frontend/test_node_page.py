"""A node's page without a browser: what it asks, for whom, and how each end of that is shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from yarl import URL

from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_frontend.pages import asking, paths
from lmcache_frontend.pages.tabs import threads_tab
from lmcache_frontend.pages.tabs.metrics_tab import families
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from tests.frontend.boards import settled
from tests.frontend.upstream import Upstream, serving

TOKEN = "a-token-of-sixteen"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


async def page(
    frontend: RunningFrontend, path: str, headers: Mapping[str, str] | None = None, status: int = 200
) -> str:
    async with frontend.client.get(path, headers=headers) as response:
        text = await response.text()
        assert response.status == status, text
        return text


def upstream_page(tab: str = "") -> str:
    return paths.node_path("local_proxy", "upstream", tab)


@pytest.mark.parametrize("name", [".", "..", "~", "~.", "a/b", "a%2Fb", "?#&", "ü ", "-"])
async def test_any_name_has_a_page(frontend_server: StartFrontend, name: str) -> None:
    frontend = await frontend_server(nodes=[{"name": name, "host": "127.0.0.1", "port": free_port()}])
    path = paths.node_path("local_proxy", name)
    assert path.count("/") == 3
    async with frontend.client.get(URL(frontend.url + path, encoded=True)) as response:
        assert response.status == 200
        assert response.url.raw_path == path, "no browser would take it for a step in the path"


async def test_a_node_that_refuses_one_caller_shows_its_tabs_to_another(frontend_server: StartFrontend) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            known = b"Bearer the-nodes-own-token" in head
            status = b"404 No" if known and not head.startswith((b"OPTIONS /metrics ", b"GET / ")) else b"405 No"
            writer.write(b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % (status if known else b"401 No"))
            await writer.drain()

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_history=True)
        await settled(frontend)
        path = f"{frontend.url}/nodes/local_proxy/upstream"
        seen = []
        for headers in ({}, {"Authorization": "Bearer the-nodes-own-token"}):
            async with frontend.client.get(path, headers=headers) as response:
                seen.append("/threads" in (await response.text()).partition('class="tabs"')[2].partition("</nav>")[0])
        assert seen == [True, False]


async def test_tabs_that_a_node_cannot_fill_are_not_shown(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(role="worker")
    async with serving(Upstream(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")) as upstream:
        frontend = await frontend_server(nodes=[worker.node, upstream.node])
        await settled(frontend)
        assert '/metrics"' in await page(frontend, paths.node_path("local_proxy", str(worker.node["name"])))
        text = await page(frontend, upstream_page())
        assert f'href="{upstream_page("metrics")}"' not in text
        assert f'href="{upstream_page("overview")}"' in text
        asked = [head.split(b" ")[:2] for head in upstream.heads]
        before = len(asked)
        assert [b"OPTIONS", b"/threads"] in asked
        await page(frontend, upstream_page())
        assert len(upstream.heads) == before, "known for a while"


async def test_each_end_of_a_question_has_its_form(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "MOST_BYTES", 1000)
    answers = {
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n": "does not serve this",
        b'HTTP/1.1 503 No\r\nContent-Length: 31\r\n\r\n{"error":"a","message":"no <b>"}'[:-1] + b"}": "no &lt;b&gt;",
        b"HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\nboom": "boom",
        b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n": "The node refused",
        b"nonsense\r\n\r\n": "cannot be reached",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe": "No threads",
    }
    for answer, expected in answers.items():
        async with serving(Upstream(answer)) as upstream:
            frontend = await frontend_server(nodes=[upstream.node], no_history=True)
            text = await page(frontend, upstream_page("threads"))
            assert expected in text, answer

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await writer.drain()

    async with serving(Upstream(talk=half)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        assert "broke off" in await page(frontend, upstream_page("threads"))


async def test_a_node_that_hangs_is_late_and_one_that_floods_is_cut_off(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/threads" not in head:
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n")
            await writer.drain()

    async with serving(Upstream(talk=flood)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        assert "Too large to show" in await page(frontend, upstream_page("threads"))

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    question = asking.Question
    monkeypatch.setattr(threads_tab, "Question", lambda method, path: question(method, path, seconds=0.1))
    async with serving(Upstream(talk=hang)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        assert "has not answered in time" in await page(frontend, upstream_page("threads"))


async def test_a_page_asks_in_the_name_of_its_caller(frontend_server: StartFrontend, tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    async with serving(Upstream(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as upstream:
        node = {**upstream.node, "token": "the-token-of-the-node"}
        frontend = await frontend_server(nodes=[node], no_trust_local=True, token=TOKEN, audit_log=str(audit))
        text = await page(frontend, upstream_page("threads"))
        assert "<strong>operator</strong>" in text
        assert 'href="/sign-in"' in text
        assert not [head for head in upstream.heads if b"GET /threads" in head]
        await page(frontend, upstream_page("threads"), BEARER)
        (head,) = [head for head in upstream.heads if b"GET /threads" in head]
        assert b"Authorization: Bearer the-token-of-the-node\r\n" in head
        assert TOKEN.encode() not in head
        assert b"\r\nCookie" not in head
    await frontend.server.stop()
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("GET", "/threads", 401),
        ("GET", "/threads", 200),
    ]


async def test_an_action_says_what_it_will_do_before_it_does_it(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        reset = upstream_page("metrics") + "/reset"
        async with frontend.client.post(reset, data={"note": '"><b>'}) as response:
            text = await response.text()
            assert response.status == 200
        assert "Reset the metrics" in text
        assert 'name="note" value="&#34;&gt;&lt;b&gt;"' in text
        assert not [head for head in upstream.heads if head.startswith(b"POST")]
        async with frontend.client.post(reset, data={"confirmed": "yes"}) as response:
            assert "at zero" in await response.text()
        assert [head.split(b"\r\n")[0] for head in upstream.heads if head.startswith(b"POST")] == [
            b"POST /metrics/reset HTTP/1.1"
        ]
        (event,) = frontend.server.cluster.timeline.newest(1)
        assert (event.kind, event.node, event.who) == ("operation", "upstream", "local")
        async with frontend.client.post(
            reset, data={"confirmed": "yes"}, headers={"Origin": "http://evil"}
        ) as response:
            assert response.status == 403


async def test_a_caller_without_the_role_changes_nothing(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_trust_local=True, token=TOKEN)
        reset = upstream_page("metrics") + "/reset"
        async with frontend.client.post(reset, data={"confirmed": "yes"}) as response:
            assert "<strong>operator</strong>" in await response.text()
        assert not [head for head in upstream.heads if head.startswith(b"POST")]


async def test_what_is_not_there_is_a_page_for_browsers_and_json_for_programs(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    for path in ("/nodes/local_proxy/nope", "/nodes/a/b/c"):
        assert "There is nothing here" in await page(frontend, path, {"Accept": "text/html"}, 404)
        assert json.loads(await page(frontend, path, status=404)).keys() == {"detail"}


def test_metrics_are_families_and_threads_are_stacks() -> None:
    told = '# HELP a_total An a\n# TYPE a_total counter\na_total{b="c"} 3\na_created 1e9\n# TYPE g gauge\ng 1.5\n'
    found = families(told)
    assert [(family.written, family.kind, family.value) for family in found] == [
        ("a_total", "counter", "3"),
        ("g", "gauge", "1.5"),
    ]
    head = "Thread: <Thread({}, started daemon 1)>\nStack trace:\n"
    stack = '  File "/a/b.py", line 7, in run\n    wait()\n'
    text = head.format("one") + stack + "\n\n" + head.format("two") + stack + "\n\nTask: t\nStack trace:\n  other\n"
    first, second = threads_tab.stacks(text)
    assert (first.threads, first.top) == (["one", "two"], "run (b.py:7)")
    assert (second.threads, second.top) == (["t"], "no Python frame")
