"""`/lookup`, `/chunk_statistics` and a scheduler's `/cache/lookup`: the lookup client over its workers."""

import json
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.pytest_plugin import RunningApi, StartApi
from lmcache_shared.settings import Settings

PLAIN = "EmbeddedLookupClient"
COUNTING = f"ChunkStatisticsLookupClient({PLAIN})"
NO_CLIENT = {"error": "API unavailable", "message": "Lookup client not configured."}


async def ask(server: RunningApi, method: str, path: str, **more: Any) -> tuple[int, Any]:
    async with server.client.request(method, path, **more) as response:
        assert response.content_type == "application/json"
        text = await response.text()
        answer = json.loads(text, parse_constant=pytest.fail)
        if not path.startswith("/conf") and "detail" not in answer:
            assert text == json.dumps(answer, indent=2, ensure_ascii=False)
        return response.status, answer


def two(settings: Settings, index: int) -> EmbeddedComponent:
    """One of a deployment of two workers."""
    return EmbeddedComponent(settings, index, world_size=2)


@pytest.fixture
def place() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="lmc") as folder:
        yield {"internal_api_server_socket_path_prefix": f"{folder}/s", "chunk_size": 16, "component": two}


@pytest.fixture
async def scheduler(api_server: StartApi, place: dict[str, Any]) -> RunningApi:
    return await api_server(role="scheduler", **place)


async def test_workers_that_are_not_there_are_named(scheduler: RunningApi) -> None:
    for method in ("GET", "POST"):
        status, answer = await ask(scheduler, method, "/cache/lookup?tokens_mock=0,16")
        assert (status, answer["num_hit_tokens"]) == (200, 0)
        assert [worker["num_hit_tokens"] for worker in answer["workers"]] == [0, 0]
        assert all("No such file" in worker["error"] for worker in answer["workers"])
    for query, error in (("", "Missing parameters"), ("?tokens_mock=3", "Invalid tokens_mock format")):
        status, answer = await ask(scheduler, "POST", f"/cache/lookup{query}")
        assert (status, answer["error"]) == (400, error)


async def test_a_scheduler_tells_what_all_workers_know(
    api_server: StartApi, place: dict[str, Any], scheduler: RunningApi
) -> None:
    first = await api_server(worker_id=0, **place)
    status, answer = await ask(scheduler, "GET", "/cache/lookup?tokens_mock=0,48")
    assert (status, answer["num_hit_tokens"]) == (200, 0)
    assert [worker.keys() - {"worker_id", "num_hit_tokens"} for worker in answer["workers"]] == [set(), {"error"}]
    second = await api_server(worker_id=1, **place)
    await ask(first, "POST", "/cache/store?tokens_mock=0,48")
    await ask(second, "POST", "/cache/store?tokens_mock=0,32")
    expected = {
        "status": "success",
        "num_tokens": 48,
        "num_hit_tokens": 32,
        "workers": [{"worker_id": 0, "num_hit_tokens": 48}, {"worker_id": 1, "num_hit_tokens": 32}],
    }
    assert await ask(scheduler, "GET", "/cache/lookup?tokens_mock=0,48") == (200, expected)
    assert await ask(scheduler, "POST", "/cache/lookup", json={"tokens": list(range(48))}) == (200, expected)
    status, answer = await ask(scheduler, "POST", "/cache/lookup", json={"tokens": [9, 8]})
    assert (status, answer["num_hit_tokens"]) == (200, 0)


async def test_a_worker_that_refuses_is_named(
    api_server: StartApi, place: dict[str, Any], scheduler: RunningApi
) -> None:
    workers = [await api_server(worker_id=number, **place) for number in range(2)]
    assert (await ask(workers[1], "POST", "/conf", json={"internal_api_server_max_tokens": 10}))[0] == 200
    status, answer = await ask(scheduler, "POST", "/cache/lookup?tokens_mock=0,48")
    assert status == 200
    assert answer["workers"][0] == {"worker_id": 0, "num_hit_tokens": 0}
    assert answer["workers"][1]["error"].endswith("it answers 400")


async def test_the_lookup_client_is_closed_and_made_again(scheduler: RunningApi) -> None:
    assert await ask(scheduler, "GET", "/lookup/info") == (200, {"client": PLAIN, "server": "None"})
    role = {"role": "scheduler"}
    assert await ask(scheduler, "POST", "/lookup/create?dryrun=true") == (200, {"new": PLAIN, "dryrun": True, **role})
    await ask(scheduler, "POST", "/conf", json={"enable_chunk_statistics": True})
    assert await ask(scheduler, "GET", "/lookup/info") == (200, {"client": PLAIN, "server": "None"})
    assert (await ask(scheduler, "POST", "/lookup/create?dryrun=1"))[1]["new"] == COUNTING
    assert await ask(scheduler, "GET", "/lookup/info") == (200, {"client": PLAIN, "server": "None"})
    assert await ask(scheduler, "POST", "/lookup/recreate") == (200, {"old": PLAIN, "new": COUNTING, **role})
    assert await ask(scheduler, "GET", "/lookup/info") == (200, {"client": COUNTING, "server": "None"})
    assert await ask(scheduler, "POST", "/lookup/close") == (200, {"old": COUNTING, **role})
    assert await ask(scheduler, "POST", "/lookup/close") == (200, {"old": "None", **role})
    assert await ask(scheduler, "GET", "/lookup/info") == (200, {"client": "None", "server": "None"})
    error = {"error": "lookup client not available", **role}
    assert await ask(scheduler, "POST", "/lookup/recreate") == (400, error)
    status, answer = await ask(scheduler, "POST", "/cache/lookup?tokens_mock=0,16")
    assert (status, answer["message"]) == (503, "There is no lookup client; POST /lookup/create makes one.")
    assert await ask(scheduler, "POST", "/lookup/create?dryrun=off") == (200, {"new": COUNTING, **role})
    assert await ask(scheduler, "GET", "/lookup/info") == (200, {"client": COUNTING, "server": "None"})
    status, answer = await ask(scheduler, "POST", "/lookup/create?dryrun=maybe")
    assert (status, answer["detail"][0]["loc"]) == (422, ["query", "dryrun"])


async def test_a_worker_has_neither_client_nor_server(api_server: StartApi) -> None:
    worker = await api_server()
    role = {"role": "worker"}
    assert await ask(worker, "GET", "/lookup/info") == (200, {"client": "None", "server": "None"})
    assert await ask(worker, "POST", "/lookup/close") == (200, {"old": "None", **role})
    assert await ask(worker, "POST", "/lookup/recreate") == (400, {"error": "lookup server not available", **role})
    for query in ("", "?dryrun=true"):
        status, answer = await ask(worker, "POST", f"/lookup/create{query}")
        assert (status, answer["role"]) == (400, "worker")
        assert "answers lookups by its internal API" in answer["error"]


NO_STATISTICS = "Client does not support statistics. Set enable_chunk_statistics, then POST /lookup/recreate."
STATISTICS = [("POST", "start"), ("POST", "stop"), ("POST", "reset"), ("GET", "status")]


async def test_statistics_need_a_client_that_counts(api_server: StartApi, scheduler: RunningApi) -> None:
    worker = await api_server()
    for method, what in STATISTICS:
        path = f"/chunk_statistics/{what}"
        assert await ask(worker, method, path) == (503, NO_CLIENT)
        error = {"error": "Not available", "message": NO_STATISTICS}
        assert await ask(scheduler, method, path) == (400, error)
    await ask(scheduler, "POST", "/lookup/close")
    for method, what in STATISTICS:
        assert await ask(scheduler, method, f"/chunk_statistics/{what}") == (503, NO_CLIENT)


async def test_statistics_that_are_turned_on_while_it_runs(scheduler: RunningApi) -> None:
    async def counted() -> tuple[bool, int, int, int]:
        status, answer = await ask(scheduler, "GET", "/chunk_statistics/status")
        assert status == 200
        return answer["enabled"], answer["total_requests"], answer["total_chunks"], answer["unique_chunks"]

    def look_up(end: int) -> None:
        client = scheduler.component.lookup_client
        assert client is not None
        client.lookup(range(end))

    await ask(scheduler, "POST", "/conf", json={"enable_chunk_statistics": True})
    assert (await ask(scheduler, "GET", "/chunk_statistics/status"))[0] == 400  # not before it is made again
    await ask(scheduler, "POST", "/lookup/recreate")
    assert await counted() == (False, 0, 0, 0)
    look_up(32)
    assert await counted() == (False, 0, 0, 0)
    assert await ask(scheduler, "POST", "/chunk_statistics/start") == (200, {"status": "success", "message": "Started"})
    look_up(32)
    look_up(48)
    assert await counted() == (True, 2, 5, 3)
    assert (await ask(scheduler, "GET", "/cache/lookup?tokens_mock=0,16"))[0] == 200
    assert await counted() == (True, 2, 5, 3)  # asking by hand is no request
    assert await ask(scheduler, "POST", "/chunk_statistics/stop") == (200, {"status": "success", "message": "Stopped"})
    look_up(64)
    assert await counted() == (False, 2, 5, 3)
    assert await ask(scheduler, "POST", "/chunk_statistics/reset") == (200, {"status": "success", "message": "Reset"})
    assert await counted() == (False, 0, 0, 0)
    await ask(scheduler, "POST", "/lookup/close")
    assert await ask(scheduler, "GET", "/chunk_statistics/status") == (503, NO_CLIENT)


async def test_when_statistics_end_by_themselves_is_told(scheduler: RunningApi) -> None:
    async def told() -> tuple[Any, ...]:
        _, answer = await ask(scheduler, "GET", "/chunk_statistics/status")
        return tuple(answer[f"auto_exit_{name}"] for name in ("enabled", "timeout_hours", "target_unique_chunks"))

    await ask(scheduler, "POST", "/conf", json={"enable_chunk_statistics": True})
    await ask(scheduler, "POST", "/lookup/recreate")
    assert await told() == (False, 0.0, 0)
    for values, expected in (
        ({"chunk_statistics_auto_exit_timeout_hours": 1.5}, (True, 1.5, 0)),
        ({"chunk_statistics_auto_exit_timeout_hours": 0}, (False, 0.0, 0)),
        ({"chunk_statistics_auto_exit_target_unique_chunks": 2}, (True, 0.0, 2)),
    ):
        await ask(scheduler, "POST", "/conf", json=values)
        assert await told() == expected
    await ask(scheduler, "POST", "/conf", json={"chunk_statistics_auto_start_statistics": True})
    await ask(scheduler, "POST", "/lookup/recreate")
    client = scheduler.component.lookup_client
    assert client is not None
    client.lookup(range(48))
    _, answer = await ask(scheduler, "GET", "/chunk_statistics/status")
    assert (answer["enabled"], answer["total_chunks"]) == (False, 3)
    assert answer["timestamp"] > 1.7e9
