"""LMCache's controller manager behind our server, beside LMCache's own controller server on the same manager."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.lmcache.processes import (
    Controllers,
    ask,
    client_of,
    running_controllers,
    running_program,
    short_folder,
)

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(300)]

Client = aiohttp.ClientSession
TOKENS = list(range(600))


@pytest.fixture(scope="module")
def controllers(lmcache_python: str) -> Iterator[Controllers]:
    with short_folder() as folder, running_controllers(lmcache_python, folder) as running:
        yield running


@pytest_asyncio.fixture
async def theirs(controllers: Controllers) -> AsyncIterator[Client]:
    async with client_of(controllers.theirs) as client:
        yield client


@pytest_asyncio.fixture
async def ours(controllers: Controllers) -> AsyncIterator[Client]:
    async with client_of(controllers.ours) as client:
        yield client


@pytest_asyncio.fixture
async def stored(controllers: Controllers, ours: Client) -> None:
    """Two instances are registered, and the first holds 512 tokens."""
    deadline = time.monotonic() + 60
    while (await ask(ours, "GET", "/controller/key-stats")).json()["total_worker_count"] < 2:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    async with client_of(controllers.workers[0]) as worker:
        await ask(worker, "POST", "/cache/store", json={"tokens": TOKENS})
    while (await ask(ours, "GET", "/controller/key-stats")).json()["total_key_count"] < 2:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


ALIKE: list[tuple[str, str, Any]] = [
    ("GET", "/controller/key-stats", None),
    ("GET", "/controller/workers", None),
    ("GET", "/controller/workers?instance_id=one", None),
    ("GET", "/controller/workers?instance_id=two&worker_id=0", None),
    ("GET", "/controller/workers?instance_id=nope", None),
    ("GET", "/controller/workers?instance_id=one&worker_id=7", None),
    ("GET", "/controller/workers?worker_id=x", None),
    ("POST", "/lookup", {"tokens": TOKENS}),
    ("POST", "/lookup", {"tokens": [5, 6]}),
    ("POST", "/lookup", {"tokens": "x"}),
    ("POST", "/lookup", {}),
    ("POST", "/lookup", {"tokens": ["x"]}),
    ("POST", "/health", {"instance_id": "one"}),
    ("POST", "/health", {"instance_id": 7}),
    ("POST", "/query_worker_info", {"instance_id": "all"}),
    ("POST", "/query_worker_info", {"instance_id": "two", "worker_ids": [0, 9]}),
    ("POST", "/query_worker_info", {"instance_id": "nope"}),
    ("POST", "/pin", {"instance_id": "two", "location": "LocalCPUBackend", "tokens": TOKENS}),
    ("POST", "/compress", {"instance_id": "one", "location": "LocalCPUBackend", "method": "none", "tokens": []}),
    ("POST", "/decompress", {"instance_id": "one", "location": "LocalCPUBackend", "method": "none"}),
    ("POST", "/move", {"old_position": ["one"], "tokens": []}),
    ("GET", "/loglevel?logger_name=lmcache", None),
    ("GET", "/periodic-threads?level=bogus", None),
    ("GET", "/freeze/status", None),
    ("GET", "/nope", None),
]


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(("method", "path", "body"), ALIKE, ids=lambda value: str(value)[:60])
async def test_both_servers_answer_alike(theirs: Client, ours: Client, method: str, path: str, body: Any) -> None:
    how = {} if body is None else {"json": body}
    expected, answer = await ask(theirs, method, path, **how), await ask(ours, method, path, **how)
    if path == "/move":  # FastAPI tells more of a pair of the wrong length
        assert (answer.status, expected.status) == (422, 422)
        return
    assert answer.head == expected.head
    if answer.media_type == "application/json":
        assert _alike(answer.json()) == _alike(expected.json())
    else:
        assert answer.text == expected.text


def _alike(body: Any) -> Any:
    """Without what differs by call: each operation has an event of its own, workers report meanwhile."""
    if isinstance(body, dict):
        varying = ("event_id", "last_heartbeat_time")
        return {key: _alike(value) for key, value in body.items() if key not in varying}
    if isinstance(body, list):
        told = [_alike(value) for value in body]
        return sorted(told, key=str) if all(isinstance(value, dict) for value in told) else told
    return body


@pytest.mark.usefixtures("stored")
async def test_what_one_clears_is_gone_for_the_other(controllers: Controllers, theirs: Client, ours: Client) -> None:
    clear = {"instance_id": "one", "location": "LocalCPUBackend"}
    for clearing, asking in ((ours, theirs), (theirs, ours)):
        async with client_of(controllers.workers[0]) as worker:
            await ask(worker, "POST", "/cache/store", json={"tokens": TOKENS})
            await asyncio.sleep(0.5)  # LMCache writes to disk behind, and clears nothing that is being written
            cleared = await ask(clearing, "POST", "/clear", json=clear)
            assert cleared.status == 200
            assert cleared.json()["num_tokens"] == 512
            spans = (await ask(worker, "POST", "/cache/lookup", json={"tokens": TOKENS})).json()["spans"]
            assert all("LocalCPUBackend" not in span["locations"] for span in spans)
        assert (await ask(asking, "POST", "/health", json={"instance_id": "one"})).json()["error_codes"] == {"0": 0}


@pytest.mark.usefixtures("stored")
async def test_what_lmcache_fails_at_is_told(theirs: Client, ours: Client) -> None:
    """On purpose: LMCache's own server answers 500 to what the caller got wrong, and an unknown instance is well."""
    for path, body, status, their_status in (
        ("/clear", {"instance_id": "nope", "location": "LocalCPUBackend"}, 404, 500),
        ("/health", {"instance_id": "nope"}, 404, 200),
        ("/query_instance", {"event_id": "x", "ip": "192.0.2.77"}, 404, 500),
        ("/check_finish", {"event_id": "x"}, 501, 500),
        ("/move", {"old_position": ["nope", "x"], "new_position": ["one", "x"]}, 404, 500),
        ("/move", {"old_position": ["one", "x"], "new_position": ["nope", "x"]}, 404, 500),
    ):
        assert (await ask(theirs, "POST", path, json=body)).status == their_status
        answer = await ask(ours, "POST", path, json=body)
        assert answer.status == status
        assert answer.json()["detail"]


async def test_the_version_is_told(ours: Client) -> None:
    assert (await ask(ours, "GET", "/version")).json().startswith("0.5.6")
    assert "lmcache:cache_controller_registered_workers_count" in (await ask(ours, "GET", "/metrics")).text


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        ('{"pull": 0, "reply": 8400}', "controller_monitor_ports: pull: '0': expected a port from 1 to 65535"),
        ('{"pull": 8300, "reply": 70000}', "controller_monitor_ports: reply: '70000': expected a port"),
    ],
)
def test_ports_that_are_none_are_refused(lmcache_python: str, ports: str, message: str) -> None:
    with short_folder() as folder:
        options = ("--role", "controller", "--set", "controller_host=127.0.0.1", "--set")
        with running_program(lmcache_python, folder, *options, f"controller_monitor_ports={ports}") as program:
            assert program.process.wait(60) == 2
            assert message in program.log.read_text()
