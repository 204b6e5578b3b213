"""`/manage`: the list of nodes with the source of each; added, changed, removed, tried, imported and exported."""

from __future__ import annotations

import asyncio
import json
import re
from html import unescape
from pathlib import Path

import aiohttp
import pytest

from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_frontend.nodes.node import LOCAL_PROXY
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from tests.frontend.boards import settled
from tests.frontend.upstream import Upstream, serving

ADMIN = "an-admin-of-sixteen"


def plain(text: str) -> str:
    inside = text.partition("<main")[2].partition("</main>")[0]
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", inside)))


async def shown(frontend: RunningFrontend, path: str, status: int = 200) -> str:
    async with frontend.client.get(path, headers={"Accept": "text/html"}) as response:
        assert response.status == status
        return plain(await response.text())


async def sent(frontend: RunningFrontend, path: str, status: int = 200, **fields: str) -> str:
    async with frontend.client.post(path, data=fields, headers={"Accept": "text/html"}) as response:
        text = await response.text()
        assert response.status == status, text
        return plain(text)


def names(frontend: RunningFrontend) -> list[str]:
    return [node.name for node in frontend.server.cluster.registry.nodes()]


async def test_every_entry_with_its_source(
    api_server: StartApi, frontend_server: StartFrontend, tmp_path: Path
) -> None:
    worker = await api_server()
    file = tmp_path / "nodes.json"
    file.write_text(json.dumps([worker.node, {"name": "", "host": "a", "port": 1}]))
    near = {"name": "rack2", "host": "127.0.0.1", "port": free_port(), "nodes": []}
    frontend = await frontend_server(
        nodes=[{"name": "gone", "host": "127.0.0.1", "port": free_port()}, near], config=str(file)
    )
    await settled(frontend)
    text = await shown(frontend, "/manage")
    assert re.search(r"lmcache_worker0 \S+ file up 0\.1\.0-embedded [\d.]+ ms", text)
    assert re.search(r"gone 127\.0\.0\.1:\d+ nodes down Connection refused", text)
    assert "with a problem : file" in text.replace("problems", "problem")
    assert re.search(r"rack2 127\.0\.0\.1:\d+ nodes 0", text)
    assert "No node is like this" in await shown(frontend, "/manage?q=nobody")
    sources = await shown(frontend, "/manage/sources")
    assert f"{file} 1 problem" in sources
    assert "[1]" in sources
    assert "the file of --config" in await shown(frontend, f"/manage/entry?proxy={LOCAL_PROXY}&name=lmcache_worker0")
    for path in (
        "/manage/entry?proxy=no",
        f"/manage/entry?proxy={LOCAL_PROXY}",
        f"/manage/entry?proxy={LOCAL_PROXY}&name=no",
    ):
        await shown(frontend, path, 404)


async def test_a_node_is_tried_added_changed_and_removed(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(tcp=True)
    frontend = await frontend_server()
    port = str(worker.node["port"])
    form = {"kind": "node", "name": "w", "host": "127.0.0.1", "port": port}
    assert re.search(
        r"It answers in [\d.]+ ms with version 0\.1\.0-embedded", await sent(frontend, "/manage/test", **form)
    )
    text = await sent(frontend, "/manage/add", **form)
    assert "w at 127.0.0.1:" in text
    assert "It answers in" in text
    assert names(frontend) == [], "nothing is changed before it is confirmed"
    assert "w was added by hand" in await sent(frontend, "/manage/add", **form, confirmed="yes")
    assert names(frontend) == ["w"]
    assert "There is a node named w already" in await sent(frontend, "/manage/add", **form, confirmed="yes")
    entry = f"/manage/entry?proxy={LOCAL_PROXY}&name=w"
    assert "It answers in" in await shown(frontend, f"{entry}&test=yes")
    which = {"of_proxy": LOCAL_PROXY, "of_name": "w"}
    assert "Nothing is different" in await sent(frontend, "/manage/entry/change", **which, **form, confirmed="yes")
    other = {**form, "name": "v", "port": str(free_port())}
    text = await sent(frontend, "/manage/entry/change", **which, **other)
    assert "Name w v" in text
    assert "It does not answer: Connection refused" in text
    assert "was changed by hand" in await sent(frontend, "/manage/entry/change", **which, **other, confirmed="yes")
    assert names(frontend) == ["v"]
    which["of_name"] = "v"
    assert "gone for good" in await sent(frontend, "/manage/entry/remove", **which)
    await sent(frontend, "/manage/entry/remove", **which, confirmed="yes")
    assert names(frontend) == []
    async with frontend.client.get("/api/timeline") as response:
        texts = [event["text"] for event in (await response.json())["events"]]
    told = [text for text in texts if "by hand" in text]
    assert told == ["v was removed by hand", "w was changed by hand", "w was added by hand"]
    assert not any("POST /manage" in text for text in texts), "what was only planned is no event"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "", "host": "a", "port": "1"}, "length"),
        ({"name": "w", "host": "a", "port": "70000"}, "port"),
        ({"name": "w", "host": "a", "port": "x"}, "expected a port"),
        ({"name": "w", "host": "a", "port": "9" * 200}, "port"),
        ({"name": "w", "host": "a", "port": "1", "token": "with space"}, "token"),
        ({"name": "w", "host": "a", "port": "1", "proxy": "nobody"}, "There is no proxy nobody"),
    ],
)
async def test_what_is_no_node(frontend_server: StartFrontend, fields: dict[str, str], problem: str) -> None:
    frontend = await frontend_server()
    assert problem in await sent(frontend, "/manage/add", kind="node", **fields, confirmed="yes")
    assert names(frontend) == []


async def test_one_of_another_source_is_changed_over_it_and_restored(
    frontend_server: StartFrontend, tmp_path: Path
) -> None:
    file = tmp_path / "nodes.json"
    file.write_text(json.dumps([{"name": "w", "host": "127.0.0.1", "port": free_port()}]))
    frontend = await frontend_server(config=str(file))
    which = {"of_proxy": LOCAL_PROXY, "of_name": "w"}
    form = {"kind": "node", "name": "w", "host": "127.0.0.1", "port": str(free_port())}
    text = await sent(frontend, "/manage/entry/change", **which, **form)
    assert f"It comes from the file of --config, {file}. That is not changed" in text
    await sent(frontend, "/manage/entry/change", **which, **form, confirmed="yes")
    assert "changed by hand" in await shown(frontend, "/manage")
    assert "Restore" in await shown(frontend, f"/manage/entry?proxy={LOCAL_PROXY}&name=w")
    assert "w was restored" in await sent(frontend, "/manage/entry/restore", **which, confirmed="yes")
    assert "changed by hand" not in await shown(frontend, "/manage")
    assert "stays away until" in await sent(frontend, "/manage/entry/remove", **which)
    await sent(frontend, "/manage/entry/remove", **which, confirmed="yes")
    assert "Removed by hand" in await shown(frontend, "/manage")
    await sent(frontend, "/manage/entry/restore", **which, confirmed="yes")
    assert names(frontend) == ["w"]


async def test_a_proxy_is_tried_added_asked_and_removed(api_server: StartApi, frontend_server: StartFrontend) -> None:
    far = await frontend_server(nodes=[(await api_server()).node])
    frontend = await frontend_server()
    host, port = "127.0.0.1", str(far.server.address.port)
    form = {"kind": "proxy", "name": "far", "host": host, "port": port}
    assert "It answers and tells of 1 node." in await sent(frontend, "/manage/test", **form)
    itself = {**form, "port": str(frontend.server.address.port)}
    assert "it is this frontend itself" in await sent(frontend, "/manage/test", **itself)
    assert "far was added by hand" in await sent(frontend, "/manage/add", **form, confirmed="yes")
    assert "It has 1 nodes." in await sent(frontend, "/manage/entry/refresh", of_proxy="far")
    text = await shown(frontend, "/manage/entry?proxy=far&name=lmcache_worker0")
    assert "its proxy, which tells of it" in text
    assert "lmcache_worker0" not in (await exported(frontend, "")), "a proxy tells of it by itself"
    await sent(frontend, "/manage/entry/remove", of_proxy="far", confirmed="yes")
    assert names(frontend) == []


async def exported(frontend: RunningFrontend, query: str) -> str:
    async with frontend.client.get(f"/manage/nodes.json{query}") as response:
        assert "attachment" in response.headers["Content-Disposition"]
        return await response.text()


async def test_a_file_is_imported_whole_or_not_at_all(frontend_server: StartFrontend) -> None:
    same = {"name": "same", "host": "127.0.0.1", "port": 7000, "token": "a-secret-of-a-node"}
    frontend = await frontend_server(nodes=[same, {"name": "moves", "host": "127.0.0.1", "port": 7001}])
    bad = '[{"name": "a", "host": "h", "port": 1},\n\n {"name": "b", "host": "h", "port": 99999},\n{"name": "c"}]'
    text = await sent(frontend, "/manage/import", text=bad, confirmed="yes")
    assert "2 entries are wrong" in text
    assert re.search(r" 3 . wrong .* 99999", text)
    assert re.search(r" 4 . wrong ", text)
    assert re.search(r" 1 a new", text)
    assert names(frontend) == ["same", "moves"]
    good = [
        {"name": "same", "host": "127.0.0.1", "port": 7000},
        {"name": "moves", "host": "127.0.0.1", "port": 7002},
        {"name": "rack", "host": "10.9.9.9", "port": 1, "nodes": [{"name": "new", "host": "10.9.9.8", "port": 2}]},
    ]
    form = aiohttp.FormData()
    form.add_field("file", json.dumps(good), filename="nodes.json", content_type="application/json")
    async with frontend.client.post("/manage/import", data=form) as response:
        text = plain(await response.text())
    assert "It adds 2 and changes 1" in text
    assert names(frontend) == ["same", "moves"]
    assert "2 new, 1 changed" in await sent(frontend, "/manage/import", text=json.dumps(good), confirmed="yes")
    registry = frontend.server.cluster.registry
    assert str(registry.node(LOCAL_PROXY, "moves").address) == "127.0.0.1:7002"  # type: ignore[union-attr]
    assert registry.node(LOCAL_PROXY, "same").source == "nodes"  # type: ignore[union-attr]
    assert registry.node("rack", "new") is not None
    told = await exported(frontend, "")
    assert "a-secret" not in told
    assert {it["name"] for it in json.loads(told)} == {"same", "moves", "rack"}
    assert {it["name"] for it in json.loads(await exported(frontend, "?of=hand"))} == {"moves", "rack"}
    assert "Nothing to import" in await sent(frontend, "/manage/import", text=told)
    for text, problem in (("{", "no node file"), ("7", "no node file"), ("[]", "The file is empty")):
        assert problem in await sent(frontend, "/manage/import", text=text, confirmed="yes")


async def test_a_token_is_shown_nowhere_and_stays(frontend_server: StartFrontend) -> None:
    secret = "a-secret-of-a-node"
    frontend = await frontend_server(nodes=[{"name": "w", "host": "127.0.0.1", "port": 9, "token": secret}])
    which = {"of_proxy": LOCAL_PROXY, "of_name": "w"}
    form = {"kind": "node", "name": "w2", "host": "127.0.0.1", "port": "9"}
    for path in ("/manage", "/manage/sources", f"/manage/entry?proxy={LOCAL_PROXY}&name=w"):
        async with frontend.client.get(path) as response:
            assert secret not in await response.text()
    assert secret not in await sent(frontend, "/manage/entry/change", **which, **form, confirmed="yes")

    def token() -> str | None:
        node = frontend.server.cluster.registry.node(LOCAL_PROXY, "w2")
        assert node is not None
        return node.token

    assert token() == secret
    which["of_name"] = "w2"
    assert "Token one none" in await sent(frontend, "/manage/entry/change", **which, **form, no_token="yes")
    await sent(frontend, "/manage/entry/change", **which, **form, no_token="yes", confirmed="yes")
    assert token() is None


async def test_a_token_does_not_go_to_another_address(frontend_server: StartFrontend) -> None:
    secret = "a-secret-of-a-node"
    seen: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    nodes = [{"name": "w", "host": "127.0.0.1", "port": 9, "token": secret}]
    nodes.append({"name": "rack", "host": "127.0.0.1", "port": 9, "token": secret, "nodes": []})
    frontend = await frontend_server(nodes=nodes, no_history=True)
    async with serving(Upstream(talk=talk)) as upstream:
        for which in ({"of_proxy": LOCAL_PROXY, "of_name": "w"}, {"of_proxy": "rack"}):
            kind = "node" if "of_name" in which else "proxy"
            form = {"kind": kind, "name": "w", "host": "127.0.0.1", "port": str(upstream.node["port"]), **which}
            await sent(frontend, "/manage/test", **form)
            text = await sent(frontend, "/manage/entry/change", **form)
            assert "Token one none" in text, text
    assert seen
    assert not any(secret.encode() in head for head in seen)


async def test_viewers_look_and_operators_change(frontend_server: StartFrontend) -> None:
    nodes = [{"name": "w", "host": "127.0.0.1", "port": 9}]
    frontend = await frontend_server(nodes=nodes, no_trust_local=True, token=ADMIN)
    assert "You may look" in await shown(frontend, "/manage")
    form = {"kind": "node", "name": "v", "host": "127.0.0.1", "port": "10", "confirmed": "yes"}
    which = {"of_proxy": LOCAL_PROXY, "of_name": "w"}
    for path in ("add", "test", "entry/change", "entry/remove", "entry/restore", "entry/refresh", "import"):
        assert "You are not signed in" in await sent(frontend, f"/manage/{path}", 401, **which, **form)
    assert names(frontend) == ["w"]
