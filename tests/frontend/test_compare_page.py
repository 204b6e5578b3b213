"""`/compare`: what differs between nodes comes first, what differs by nature last, and who did not answer is told."""

from __future__ import annotations

import asyncio
import json
import re
from html import unescape

import pytest

from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_frontend.pages import compare_page, gathering
from lmcache_frontend.pages.comparing import Member, compare
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from tests.frontend.boards import settled
from tests.frontend.upstream import Upstream, serving


async def shown(frontend: RunningFrontend, path: str, status: int = 200, **headers: str) -> str:
    async with frontend.client.get(path, headers={"Accept": "text/html", **headers}) as response:
        text = unescape(await response.text())
        assert response.status == status, text
        return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text.partition("<main")[2] or text))


def members(values: list[dict[str, str]], roles: str = "") -> list[Member]:
    return [Member(f"n{i}", f"/n{i}", roles[i : i + 1] or "w", it) for i, it in enumerate(values)]


def answering(values: object) -> bytes:
    body = json.dumps(values).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def test_the_differences_come_first_and_what_differs_by_nature_last(
    api_server: StartApi, frontend_server: StartFrontend
) -> None:
    nodes = [
        (await api_server(worker_id=i, tcp=True, chunk_size=512 if i == 2 else 256, lmcache_instance_id="one")).node
        for i in range(5)
    ]
    frontend = await frontend_server(nodes=nodes)
    await settled(frontend)
    text = await settled_page(frontend, "/compare")
    assert "1 setting differs over 5 nodes" in text
    assert re.search(r"chunk_size 2 values 1 odd one out 256 4 of 5 most .* 512 1 of 5 odd one out one_worker2", text)
    own = text.index("Each its own")
    assert text.index("chunk_size") < own < text.index("internal_api_server_port_start") < text.index("The same every")
    for words, expected in (("512", "1 setting differs"), ("no-such-setting", "Nothing found")):
        assert expected in await settled_page(frontend, f"/compare?key={words}")
    assert "One node is nothing to compare" in await settled_page(frontend, "/compare?q=worker3")
    assert "No node is like this" in await settled_page(frontend, "/compare?q=nobody")
    assert "0.1.0-embedded" in await settled_page(frontend, "/compare?what=versions")
    assert "PATH" in await settled_page(frontend, "/compare?what=env&key=PATH")


async def test_nodes_that_do_not_answer_are_told_and_delay_nobody(
    api_server: StartApi, frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "NODE_SECONDS", 1.0)
    monkeypatch.setattr(compare_page, "FIRST_SECONDS", 0.3)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(Upstream(talk=hang)) as hung, serving(Upstream(answering(["no", "object"]))) as odd:
        nodes = [(await api_server(worker_id=i)).node for i in range(2)]
        nodes += [{**hung.node, "name": "hung"}, {**odd.node, "name": "odd"}]
        nodes.append({"name": "gone", "host": "127.0.0.1", "port": free_port()})
        frontend = await frontend_server(nodes=nodes)
        text = await shown(frontend, "/compare")
        assert "of 5 nodes have been asked" in text
        assert "All alike" not in text
        for _ in range(100):
            part = await shown(frontend, "/compare", **{"HX-Request": "true"})
            if "have been asked" not in part:
                break
            await asyncio.sleep(0.05)
        for expected in (
            "over 2 nodes", "3 nodes did not answer", "no whole answer within 1 seconds: hung",
            "what it answers to /conf is no JSON object: odd", ": gone",
        ):  # fmt: skip
            assert expected in part
        async with frontend.client.get("/compare", headers={"HX-Request": "true"}) as response:
            assert "data-settled" in await response.text()


async def test_what_was_answered_is_kept_until_somebody_asks_again(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(answering({"a": "1", "secret.thing": {"b": 2}}))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node, {**upstream.node, "name": "other"}])
        await settled(frontend)

        def asked() -> int:
            return sum(head.startswith(b"GET /conf ") for head in upstream.heads)

        for _ in range(3):
            assert "No drift over 2 nodes" in await settled_page(frontend, "/compare")
        assert asked() == 2
        async with frontend.client.post("/compare", data={"what": "conf", "back": "?q=up"}) as response:
            assert (response.status, response.url.path_qs) == (200, "/compare?q=up")
        assert asked() == 3  # one of the two is chosen
        async with frontend.client.post("/compare", data={"back": "//evil.example"}, allow_redirects=False) as response:
            assert response.headers["Location"] == "/compare"


async def test_the_environment_is_for_admins_and_nobody_is_asked_for_others(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(answering({"HOME": "/root"}))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_trust_local=True, token="an-admin-of-sixteen")
        text = await settled_page(frontend, "/compare?what=env")
        assert "you need the role admin" in text
        assert "HOME" not in text
        admin = {"Authorization": "Bearer an-admin-of-sixteen"}
        assert "One node is nothing to compare" in await shown(frontend, "/compare?what=env", **admin)
        assert "you need the role admin" in await settled_page(frontend, "/compare?what=env"), (
            "it is kept for its own role"
        )
        assert sum(head.startswith(b"GET /env ") for head in upstream.heads) == 1


async def test_more_than_a_page_holds_is_told(frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "MAX_NODES", 2)
    monkeypatch.setattr(gathering, "MAX_BYTES", 100)
    async with serving(Upstream(answering({"a": "1"}))) as small, serving(Upstream(answering({"a": "1" * 200}))) as big:
        nodes = [{**small.node, "name": "a"}, {**big.node, "name": "b"}, {**small.node, "name": "c"}]
        text = await settled_page(await frontend_server(nodes=nodes), "/compare")
        assert "1 more nodes fit the choice and were not asked" in text
        assert "the answer is larger than the 100 B that a page holds: b" in text


async def test_too_many_comparisons_at_once_are_refused(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "MAX_ROUNDS", 0)
    frontend = await frontend_server(nodes=[{"name": "gone", "host": "127.0.0.1", "port": free_port()}])
    assert "0 comparisons are being made" in await shown(frontend, "/compare", 503)


async def settled_page(frontend: RunningFrontend, path: str) -> str:
    """The page once every node has been asked."""
    while "have been asked" in (text := await shown(frontend, path)):
        await asyncio.sleep(0.02)
    return text


async def test_kinds_of_differences() -> None:
    nodes = [
        {"chunk_size": "256", "port": str(i), "run": f"job-{i}-of-8", "same": "x", "split": "ab"[i % 2]}
        for i in range(8)
    ]
    nodes[3] |= {"chunk_size": "512"}
    nodes[4] |= {"only_here": "1"}
    found = await compare(members(nodes))
    kinds = {kind: [line.name for line in lines] for kind, lines in found.items()}
    assert kinds == {
        "drift": ["chunk_size", "only_here", "split"],
        "role": [],
        "nature": ["port", "run"],
        "equal": ["same"],
    }
    only = found["drift"][1]
    assert [(value.text, len(value.members), value.is_odd) for value in only.values] == [
        (None, 7, False),
        ("1", 1, True),
    ]
    assert not any(value.is_odd for value in found["drift"][2].values), "of two halves none is odd"


async def test_one_port_that_differs_is_no_nature() -> None:
    found = await compare(members([{"port": "1"}] * 9 + [{"port": "2"}]))
    assert [line.name for line in found["drift"]] == ["port"]


async def test_roles_that_differ_are_told_apart_from_drift() -> None:
    nodes = [{"lookup": "client"}, {"lookup": "server"}, {"lookup": "server"}]
    assert [line.name for line in (await compare(members(nodes, "sww")))["role"]] == ["lookup"]
    nodes[1] = {"lookup": "client"}
    assert [line.name for line in (await compare(members(nodes, "sww")))["drift"]] == ["lookup"]


async def test_a_thousand_nodes_let_others_have_their_turn() -> None:
    nodes = members([{f"key{j}": str(i * j % 7) for j in range(200)} for i in range(1000)])
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(others())
    found = await compare(nodes)
    task.cancel()
    assert turns > 5
    line = found["drift"][0]
    assert sum(len(value.members) for value in line.values) == 1000
    assert len(line.values[0].others) < 200


def test_long_and_nested_values() -> None:
    found = dict(gathering.flat({"a": {"b": {"c": [1, 2]}}, "long": "x" * 5000, "none": None, "empty": {}}))
    assert found["a.b.c"] == "[1, 2]"
    assert (found["none"], found["empty"]) == ("null", "{}")
    assert len(found["long"]) < 2100
    assert "5000 characters, sha256" in found["long"]


async def test_what_is_being_asked_is_not_forgotten_for_another_question(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "MAX_SHELVES", 1)
    monkeypatch.setattr(compare_page, "FIRST_SECONDS", 0.1)
    asked: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            asked.append(head.partition(b" HTTP/")[0])
            if head.startswith((b"GET /conf", b"GET /meta")):
                await reader.read()  # it never answers
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            await writer.drain()

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_history=True)
        for what in ("conf", "meta", "conf", "meta"):
            async with frontend.client.get(f"/compare?what={what}") as response:
                assert response.status == 200
        assert sorted(it for it in asked if it in (b"GET /conf", b"GET /meta")) == [b"GET /conf", b"GET /meta"]
