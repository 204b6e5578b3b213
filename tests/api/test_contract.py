"""Every recorded exchange, on the embedded component."""

import json
import os
import re
from pathlib import Path

import pytest

from lmcache_api.pytest_plugin import RunningApi, StartApi
from tests.contract.exchanges import Exchange, ask, difference, read

EXCHANGES = read("common.jsonl")
OF_THE_ENGINE = read("engine.jsonl")
VERSIONS = {f"GET {path}" for path in ("/version", "/lmc_version", "/commit_id")}
"""Answers that tell of LMCache itself; ours tell of the embedded component, in the same form."""


@pytest.fixture
async def worker(api_server: StartApi) -> RunningApi:
    return await api_server(role="worker")


@pytest.mark.parametrize("exchange", [e for e in EXCHANGES if str(e) not in VERSIONS], ids=str)
async def test_recorded(worker: RunningApi, exchange: Exchange) -> None:
    status, content_type, body = await ask(worker.client, exchange)
    assert (status, content_type) == (exchange.status, exchange.content_type.partition(";")[0])
    if exchange.path == "/threads?name=api-server":
        assert body.endswith("\n\n=== Thread Summary ===\nTotal threads: 0\n")  # a test has no such thread
    elif exchange.path == "/loglevel?logger_name=lmcache":
        assert body.startswith("lmcache: ")  # which level it has is the host's business
    else:
        assert difference(exchange.body, body) is None


@pytest.mark.parametrize("exchange", [e for e in EXCHANGES if str(e) in VERSIONS], ids=str)
async def test_recorded_versions(worker: RunningApi, exchange: Exchange) -> None:
    status, content_type, body = await ask(worker.client, exchange)
    assert (status, content_type) == (200, exchange.content_type)
    assert isinstance(body, str)


DIFFERENT: dict[str, tuple[int, object]] = {
    "GET /inference_version": (503, "there is no inference engine around an embedded component"),
    "DELETE /cache/clear": (200, 512),
    "POST /lookup/create?dryrun=true": (
        400,
        "an embedded worker answers lookups by its internal API (/cache/lookup) and has no lookup server",
    ),
}
"""Answers that differ on purpose: the status, and what tells why. Each has its row in docs/compatibility.md."""


async def test_every_recorded_exchange_of_the_engine_in_turn(api_server: StartApi, tmp_path: Path) -> None:
    worker = await api_server(
        role="worker", local_disk=f"file://{tmp_path}/", max_local_disk_size=1.0, max_local_cpu_size=1.0
    )
    differences: dict[str, object] = {}
    asked = set()
    for exchange in OF_THE_ENGINE:
        status, content_type, body = await ask(worker.client, exchange)
        name = str(exchange)
        asked.add(name)
        if name in DIFFERENT:
            assert status == DIFFERENT[name][0]
            assert DIFFERENT[name][1] in body.values()
        elif (status, content_type) != (exchange.status, exchange.content_type.partition(";")[0]):
            differences[name] = (status, content_type, body)
        elif "/cache/kvcache/check" in name and status == 200:
            differences |= {name: found} if (found := difference(shape(exchange.body), shape(body))) else {}
        elif found := difference(exchange.body, body):
            differences[name] = found
    assert differences == {}
    assert len(EXCHANGES) + len(OF_THE_ENGINE) == 72
    assert DIFFERENT.keys() <= asked


def shape(body: object) -> object:
    """With `md5` for a checksum: those of another engine's data are others."""
    if isinstance(body, dict):
        return {key: shape(value) for key, value in body.items()}
    if isinstance(body, list):
        return [shape(value) for value in body]
    return "md5" if isinstance(body, str) and re.fullmatch("[0-9a-f]{32}", body) else body


async def test_a_component_without_an_engine_says_so_in_lmcaches_words(api_server: StartApi) -> None:
    scheduler = await api_server(role="scheduler")
    expected = {
        "PUT /freeze/enable": "/freeze/enable API is unavailable",
        "GET /freeze/status": "/freeze/status API is unavailable",
        "PUT /hot_cache/disable": "hot_cache API is unavailable",
        "GET /backends": "/backends API is unavailable",
        "POST /backends/X/recreate": "/backends API is unavailable",
        "PUT /bypass/add": "Bypass API is unavailable",
        "POST /cache/store": "LMCache API is unavailable",
        "POST /cache/retrieve?tokens_mock=9,3": "LMCache API is unavailable",
        "DELETE /cache/clear": "LMCache API is unavailable",
    }
    for name, error in expected.items():
        method, path = name.split(" ")
        async with scheduler.client.request(method, path) as response:
            assert response.status == 503, name
            assert await response.json() == {"error": error, "message": "LMCache engine not configured."}, name
    async with scheduler.client.get("/cache/kvcache/info") as response:
        assert response.status == 404


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
