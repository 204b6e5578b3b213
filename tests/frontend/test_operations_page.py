"""`/operations`: planned by reading, confirmed, carried out node by node, and what came of it kept and exported."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import logging
import re
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import aiohttp
import pytest

from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_frontend.pages.operations import kinds, running
from lmcache_frontend.pages.operations.running import OPERATIONS
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_shared.errors import Refusal
from tests.frontend.boards import settled
from tests.frontend.upstream import Upstream, serving

ADMIN, OPERATOR, VIEWER = "an-admin-of-sixteen", "an-operator-of-16", "a-viewer-of-sixteen"


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[str]:
    import hashlib

    lines = [
        {"name": role, "role": role, "sha256": hashlib.sha256(token.encode()).hexdigest()}
        for role, token in (("admin", ADMIN), ("operator", OPERATOR), ("viewer", VIEWER))
    ]
    lines.append({"name": "second", "role": "operator", "sha256": hashlib.sha256(b"another-operator-16").hexdigest()})
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({"tokens": lines}))
    path.chmod(0o600)
    yield str(path)


async def told(frontend: RunningFrontend, number: str) -> dict[str, object]:
    async with frontend.client.get(f"/operations/{number}/results.json") as response:
        assert response.status == 200
        found: dict[str, object] = await response.json()
        return found


async def in_state(frontend: RunningFrontend, number: str, state: str) -> dict[str, object]:
    until = time.monotonic() + 20
    while (found := await told(frontend, number))["state"] != state:
        assert time.monotonic() < until, found
        await asyncio.sleep(0.02)
    return found


async def planned(frontend: RunningFrontend, *more: tuple[str, str], **fields: str) -> str:
    data = [("scope", "all"), *fields.items(), *more]
    async with frontend.client.post("/operations", data=dict(data) if not more else aiohttp.FormData(data)) as response:
        assert response.status == 200, await response.text()
        number = response.url.path.rpartition("/")[2]
    await in_state(frontend, number, "ready")
    return number


async def started(frontend: RunningFrontend, number: str, **fields: str) -> None:
    async with frontend.client.post(f"/operations/{number}/start", data=fields) as response:
        assert response.status == 200, await response.text()


async def shown(frontend: RunningFrontend, path: str) -> str:
    async with frontend.client.get(path, headers={"Accept": "text/html"}) as response:
        text = unescape(await response.text())
        return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text.partition("<main")[2]))


def statuses(found: dict[str, object]) -> dict[str, str]:
    return {row["node"]: row["status"] for row in found["nodes"]}  # type: ignore[attr-defined]


async def test_a_plan_changes_nothing_and_says_what_it_will_do_where(
    api_server: StartApi, frontend_server: StartFrontend
) -> None:
    scheduler = await api_server(role="scheduler")
    workers = [await api_server(worker_id=i) for i in range(2)]
    gone = {"name": "gone", "host": "127.0.0.1", "port": free_port()}
    frontend = await frontend_server(nodes=[scheduler.node, *(it.node for it in workers), gone])
    async with workers[1].client.put("/freeze/enable"):
        pass
    assert "All 4 nodes that fit" in await shown(frontend, "/operations?kind=freeze")
    number = await planned(frontend, kind="freeze", switch="enable")
    found = await told(frontend, number)
    expected = {
        "lmcache_scheduler": "unable",
        "lmcache_worker0": "changes",
        "lmcache_worker1": "same",
        "gone": "silent",
    }
    assert statuses(found) == expected
    async with workers[0].client.get("/freeze/status") as response:
        assert (await response.json())["freeze"] is False
    text = await shown(frontend, f"/operations/{number}")
    assert "It changes 1 of 4 nodes" in text
    assert "lmcache_worker0 off on will change" in text
    await started(frontend, number, also="silent")
    found = await in_state(frontend, number, "done")
    expected |= {"lmcache_scheduler": "left", "gone": "failed", "lmcache_worker0": "ok", "lmcache_worker1": "left"}
    assert statuses(found) == expected
    async with workers[0].client.get("/freeze/status") as response:
        assert (await response.json())["freeze"] is True
    assert "1 of 2 nodes failed" in await shown(frontend, f"/operations/{number}")
    async with frontend.client.get(f"/operations/{number}/results.csv") as response:
        assert "attachment" in response.headers["Content-Disposition"]
        rows = list(csv.DictReader(io.StringIO(await response.text())))
    assert [rows[2][name] for name in ("node", "status", "old", "wanted")] == ["lmcache_worker0", "ok", "off", "on"]
    async with frontend.client.post(f"/operations/{number}/again") as response:
        second = response.url.path.rpartition("/")[2]
    assert statuses(await in_state(frontend, second, "ready")) == {"gone": "silent"}
    async with frontend.client.get("/api/timeline") as response:
        texts = [it["text"] for it in (await response.json())["events"]]
    assert "Freeze: 1 done, 1 failed, 0 not begun" in texts
    assert "Freeze on 2 nodes: begun" in texts
    assert not any("PUT /freeze" in text for text in texts), "one event for all nodes"


CPU, MINIMUM = "LocalCPUBackend", "/conf?names=min_retrieve_tokens"


@pytest.mark.parametrize(
    ("fields", "old", "check", "expected"),
    [
        ("log-level logger=lmc.op level=ERROR", "NOTSET", "/loglevel?logger_name=lmc.op", "lmc.op: ERROR"),
        (f"bypass backend={CPU} switch=add", "in use", "/bypass/list", f'"bypassed_backends":["{CPU}"]'),
        ("hot-cache switch=disable", "on", "/hot_cache/status", '"hot_cache": false'),
        (f"clear places={CPU}", CPU, "/version", "0.1.0"),
        ("settings settings=min_retrieve_tokens:7", "min_retrieve_tokens = 0", MINIMUM, "7"),
        ('settings settings={"min_retrieve_tokens":8}', "min_retrieve_tokens = 0", MINIMUM, "8"),
        (f"recreate backend={CPU}", CPU, "/backends", CPU),
        ("reset-metrics", None, "/version", "0.1.0"),
    ],
)
async def test_each_kind(
    api_server: StartApi, frontend_server: StartFrontend, fields: str, old: str | None, check: str, expected: str
) -> None:
    kind, *given = fields.split()
    worker = await api_server()
    frontend = await frontend_server(nodes=[worker.node])
    number = await planned(frontend, **dict(it.split("=", 1) for it in given), kind=kind)
    row = (await told(frontend, number))["nodes"][0]  # type: ignore[index]
    assert (row["status"], row["old"]) == ("changes", old)
    await started(frontend, number)
    found = await in_state(frontend, number, "done")
    assert statuses(found) == {"lmcache_worker0": "ok"}, found
    async with worker.client.get(check) as response:
        assert expected in await response.text()
    logging.getLogger("lmc.op").setLevel(logging.NOTSET)


async def test_what_a_node_lacks_or_refuses_is_told(api_server: StartApi, frontend_server: StartFrontend) -> None:
    frontend = await frontend_server(nodes=[(await api_server()).node])
    number = await planned(frontend, kind="bypass", backend="NoSuchBackend", switch="add")
    assert (await told(frontend, number))["nodes"][0]["result"] == "no NoSuchBackend"  # type: ignore[index]
    async with frontend.client.post(f"/operations/{number}/start") as response:
        assert response.status == 409
    number = await planned(frontend, kind="settings", settings="chunk_size = 9\nno_such_setting: 1")
    await started(frontend, number)
    found = await in_state(frontend, number, "done")
    assert statuses(found) == {"lmcache_worker0": "failed"}
    assert "chunk_size" in found["nodes"][0]["result"]  # type: ignore[index]


async def test_a_node_that_hangs_stops_no_other_and_cancel_begins_no_more(
    api_server: StartApi, frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "AT_ONCE", 1)
    let_go = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"PUT "):
                await let_go.wait()
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"freeze":false}')

    async with serving(Upstream(talk=slow)) as upstream:
        nodes = [{**upstream.node, "name": "a"}, *[(await api_server(worker_id=i)).node for i in range(3)]]
        frontend = await frontend_server(nodes=nodes)
        number = await planned(frontend, kind="freeze", switch="enable")
        await started(frontend, number)
        until = time.monotonic() + 10
        while "doing" not in statuses(found := await told(frontend, number)).values():
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
        assert "0 of 4 nodes are done" in await shown(frontend, f"/operations/{number}")
        async with frontend.client.post(f"/operations/{number}/cancel") as response:
            assert response.status == 200
        let_go.set()
        found = await in_state(frontend, number, "cancelled")
        assert statuses(found) == {"a": "ok", **{f"lmcache_worker{i}": "cancelled" for i in range(3)}}
        assert "Cancelled after 1 of 4 nodes" in await shown(frontend, f"/operations/{number}")


async def test_a_hanging_node_ends_by_its_time(frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "READ_SECONDS", 0.2)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(Upstream(talk=hang)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        number = await planned(frontend, kind="freeze", switch="enable")
        row = (await told(frontend, number))["nodes"][0]  # type: ignore[index]
        assert (row["status"], row["result"]) == ("silent", "no whole answer within 0.2 seconds")


async def test_only_those_that_are_ticked_or_fit(api_server: StartApi, frontend_server: StartFrontend) -> None:
    nodes = [{**(await api_server(worker_id=i)).node, "name": name} for i, name in enumerate(("a/b", "c", "cc"))]
    frontend = await frontend_server(nodes=nodes)
    await settled(frontend)
    number = await planned(frontend, kind="freeze", switch="enable", scope="ticked", node="local_proxy/a%2Fb")
    assert statuses(await told(frontend, number)) == {"a/b": "changes"}
    number = await planned(frontend, kind="freeze", switch="enable", q="c")
    assert set(statuses(await told(frontend, number))) >= {"c", "cc"}
    async with frontend.client.post("/operations", data={"kind": "freeze", "scope": "ticked"}) as response:
        assert response.status == 400
        assert "no node is chosen" in await response.text()


async def test_whose_it_is(api_server: StartApi, frontend_server: StartFrontend, tokens: str, tmp_path: Path) -> None:
    log = tmp_path / "audit.log"
    worker = await api_server(internal_api_server_trust_local=True)
    frontend = await frontend_server(nodes=[worker.node], no_trust_local=True, token_file=tokens, audit_log=str(log))

    async def ask(method: str, path: str, token: str, **data: str) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}", "Accept": "text/html"}
        async with frontend.client.request(method, path, headers=headers, data=data or None) as response:
            return response.status, f"{response.url.path} {unescape(await response.text())}"

    plan = {"kind": "freeze", "switch": "enable", "scope": "all"}
    assert "you need the role <strong>operator" in (await ask("GET", "/operations", VIEWER))[1]
    assert (await ask("POST", "/operations", VIEWER, **plan))[0] == 403
    status, text = await ask("POST", "/operations", OPERATOR, **plan)
    assert status == 200
    path = text.partition(" ")[0]
    assert (await ask("GET", path, VIEWER))[0] == 403
    for _ in range(200):
        status, text = await ask("GET", path, "another-operator-16")
        if "will change" in text:
            break
        await asyncio.sleep(0.02)
    assert "operator planned this and can carry it out" in text
    assert (await ask("POST", f"{path}/start", "another-operator-16"))[0] == 403
    assert (await ask("POST", f"{path}/cancel", "another-operator-16"))[0] == 403
    assert (await ask("POST", f"{path}/start", OPERATOR))[0] == 200
    for _ in range(200):
        if "Done on the node" in (await ask("GET", path, OPERATOR))[1]:
            break
        await asyncio.sleep(0.02)
    lines: list[dict[str, object]] = []
    for _ in range(200):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        if any(line["path"] == "/freeze/enable" for line in lines):
            break
        await asyncio.sleep(0.02)
    of_node = [line for line in lines if line["path"] == "/freeze/enable"]
    assert [(line["who"], line["method"], line["status"]) for line in of_node] == [("operator", "PUT", 200)]
    assert of_node[0]["from"] == "127.0.0.1"


async def test_what_is_kept_is_bounded(
    api_server: StartApi, frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "MAX_KEPT", 2)
    frontend = await frontend_server(nodes=[(await api_server()).node])
    numbers = [await planned(frontend, kind="freeze", switch="enable") for _ in range(3)]
    async with frontend.client.get(f"/operations/{numbers[0]}") as response:
        assert response.status == 404
    await told(frontend, numbers[1])
    monkeypatch.setattr(running, "PLAN_AGE", 0.0)
    async with frontend.client.get(f"/operations/{numbers[2]}") as response:
        assert response.status == 404
    monkeypatch.setattr(running, "MAX_RUNNING", 0)
    async with frontend.client.post("/operations", data={"kind": "freeze", "scope": "all"}) as response:
        assert response.status == 503


async def test_the_frontend_ends_what_runs(frontend_server: StartFrontend) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(Upstream(talk=hang)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        async with frontend.client.post("/operations", data={"kind": "freeze", "scope": "all"}) as response:
            assert response.status == 200
        operation = next(iter(frontend.server._runner.app[OPERATIONS]._kept.values()))  # type: ignore[union-attr]
        await frontend.server.stop()
        assert operation.task is not None
        assert operation.task.done()


@pytest.mark.parametrize(
    ("kind", "fields", "problem"),
    [
        ("log-level", {"logger": "", "level": "INFO"}, "Logger is missing"),
        ("log-level", {"logger": "a", "level": "LOUD"}, "cannot be 'LOUD'"),
        ("settings", {"settings": "{"}, "no JSON object"),
        ("settings", {"settings": "what"}, "is no setting"),
        ("settings", {"settings": "{}"}, "there is no setting"),
        ("settings", {"settings": "x" * 5000}, "at most 4000"),
    ],
)
def test_forms_that_are_none(kind: str, fields: dict[str, str], problem: str) -> None:
    with pytest.raises(Refusal, match=re.escape(problem)):
        kinds.KINDS[kind].values(lambda name: fields.get(name, ""))


def test_secrets_are_not_shown_in_a_plan() -> None:
    values = {"settings": 'internal_api_server_token = "a-secret-of-sixteen"'}
    assert "a-secret" not in kinds.KINDS["settings"].new(values)


async def test_what_was_refused_is_not_under_way_for_ever(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server()
    frontend = await frontend_server(nodes=[worker.node])
    form = {"scope": "all", "kind": "freeze", "switch": "enable"}
    circle = {"Via": ", ".join(["1.1 lmcache-frontend"] * 64)}
    for _ in range(running.MAX_RUNNING):
        async with frontend.client.post("/operations", data=form, headers=circle) as response:
            assert response.status == 508
    for _ in range(running.MAX_RUNNING):
        number = await planned(frontend, **form)
        async with frontend.client.post(f"/operations/{number}/start", headers=circle) as response:
            assert response.status == 508
        assert statuses(await told(frontend, number)) == {"lmcache_worker0": "cancelled"}
    number = await planned(frontend, **form)
    await started(frontend, number)
    await in_state(frontend, number, "done")
