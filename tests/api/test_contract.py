"""Every recorded exchange of the common category, on the embedded component."""

import json
import os

import pytest

from lmcache_api.pytest_plugin import RunningApi, StartApi
from tests.contract.exchanges import Exchange, ask, difference, read

EXCHANGES = read("common.jsonl")
OF_AN_ENGINE = {f"GET {path}" for path in ("/version", "/lmc_version", "/commit_id", "/meta")}
OF_AN_ENGINE.add("GET /meta?names=worker_id,model_name")
"""Answers that tell of LMCache itself; ours tell of the embedded component, in the same form."""


@pytest.fixture
async def worker(api_server: StartApi) -> RunningApi:
    return await api_server(role="worker")


@pytest.mark.parametrize("exchange", [e for e in EXCHANGES if str(e) not in OF_AN_ENGINE], ids=str)
async def test_recorded(worker: RunningApi, exchange: Exchange) -> None:
    path = exchange.path
    if path == "/periodic-threads/PinMonitor-thread":
        path = "/periodic-threads/health-monitor-thread"
    status, content_type, body = await ask(worker.client, exchange, path)
    assert (status, content_type) == (exchange.status, exchange.content_type.partition(";")[0])
    if exchange.path == "/threads?name=api-server":
        assert body.endswith("\n\n=== Thread Summary ===\nTotal threads: 0\n")  # a test has no such thread
    elif exchange.path == "/loglevel?logger_name=lmcache":
        assert body.startswith("lmcache: ")  # which level it has is the host's business
    else:
        assert difference(exchange.body, body) is None


@pytest.mark.parametrize("exchange", [e for e in EXCHANGES if str(e) in OF_AN_ENGINE], ids=str)
async def test_recorded_of_an_engine(worker: RunningApi, exchange: Exchange) -> None:
    status, content_type, body = await ask(worker.client, exchange)
    assert (status, content_type) == (200, exchange.content_type.partition(";")[0])
    assert type(body) is type(exchange.body)
    if isinstance(body, dict):
        assert body.keys() <= exchange.body.keys()
        assert body["worker_id"] == 0
    if exchange.path == "/meta?names=worker_id,model_name":
        assert body.keys() == exchange.body.keys()


async def test_the_comparison_sees_differences() -> None:
    recorded = {"summary": {"total_count": 1}, "threads": [{"name": "a", "is_active": True, "x": 1}]}
    assert difference(recorded, {"summary": {"total_count": 9}, "threads": []}) is None
    assert difference(recorded, {"summary": {"total_count": "9"}, "threads": []})
    assert difference(recorded, {"summary": {}, "threads": []})
    assert difference(recorded, {"summary": {"total_count": 9}, "threads": [{"name": "b", "is_active": 1, "x": 1}]})
    assert difference(recorded, {"summary": {"total_count": 9}, "threads": [{"name": "b", "is_active": True, "x": 2}]})
    assert difference("a", "b")


async def test_env_is_sorted_json_as_plain_text(worker: RunningApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZZ_PLAIN", "shown")
    monkeypatch.setenv("ZZ_TOKEN", "hidden")
    async with worker.client.get("/env") as response:
        text = await response.text()
        assert (response.status, response.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    body = json.loads(text)
    assert text == json.dumps(body, indent=2, sort_keys=True)
    assert body.keys() == dict(os.environ).keys()
    assert (body["ZZ_PLAIN"], body["ZZ_TOKEN"]) == ("shown", "***")


async def test_env_masks_what_the_settings_name(api_server: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZZ_BADGE", "hidden")
    worker = await api_server(internal_api_server_env_mask=["ZZ_B*"])
    async with worker.client.get("/env") as response:
        assert json.loads(await response.text())["ZZ_BADGE"] == "***"


async def test_head_and_unicode_paths(worker: RunningApi) -> None:
    async with worker.client.head("/version") as response:
        assert response.status == 200
    async with worker.client.get("/periodic-threads/%F0%9F%90%8D%ff") as response:
        assert response.status == 404
        assert (await response.json())["error"].startswith("Thread not found: ")
