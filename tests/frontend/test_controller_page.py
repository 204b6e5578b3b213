"""A controller's page, before a real embedded controller and its workers, and before answers of LMCache's own."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

from lmcache_api.pytest_plugin import RunningApi, StartApi
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from tests.frontend.boards import settled
from tests.frontend.node_pages import act, changes, page, problem, tab, telling
from tests.frontend.upstream import Upstream, serving

CONTROLLER = tab("lmcache_controller", "controller")


async def started(
    api_server: StartApi, frontend_server: StartFrontend, tmp_path: Path
) -> tuple[list[RunningApi], RunningFrontend]:
    """A controller and two workers that have registered."""
    place = {"internal_api_server_socket_path_prefix": f"{tmp_path}/s", "controller_worker_seconds": 1.0}
    controller = await api_server(role="controller", **place)
    workers = [await api_server(worker_id=i, enable_controller=True, **place) for i in range(2)]
    frontend = await frontend_server(nodes=[it.node for it in (controller, *workers)])
    await settled(frontend)
    until = time.monotonic() + 10
    while True:
        async with controller.client.get("/controller/workers") as response:
            if (await response.json())["total_count"] == 2:
                return workers, frontend
        assert time.monotonic() < until
        await asyncio.sleep(0.02)


def words(text: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


async def test_instances_workers_keys_and_how_they_are(
    api_server: StartApi, frontend_server: StartFrontend, tmp_path: Path
) -> None:
    workers, frontend = await started(api_server, frontend_server, tmp_path)
    for worker in workers:
        async with worker.client.post("/cache/store?tokens_mock=0,512"):
            pass
    text = await page(frontend, f"{CONTROLLER}?instance=lmcache&start=0&end=600")
    assert f'href="{tab("lmcache_worker0", "")}"' in text, "a worker that is a node has its page"
    assert "worker 0 well" in text
    assert "worker 1 well" in text
    assert re.search(r"lmcache LocalCPUBackend 512", words(text))
    assert 'aria-label="512 of 600"' in text
    assert "No worker is like this" in await page(frontend, f"{CONTROLLER}?q=nobody")
    assert "embedded ones" in text
    assert "/controller/pin" not in text
    assert "No instance knows the tokens 5,000 to 6,000" in await page(frontend, f"{CONTROLLER}?start=5000&end=6000")
    assert "100,000 at most" in problem(await page(frontend, f"{CONTROLLER}?start=0&end=100001"))
    assert "no event nope" in await page(frontend, f"{CONTROLLER}?event=nope")


async def test_an_instance_is_cleared_on_all_workers(
    api_server: StartApi, frontend_server: StartFrontend, tmp_path: Path
) -> None:
    workers, frontend = await started(api_server, frontend_server, tmp_path)
    for worker in workers:
        async with worker.client.post("/cache/store?tokens_mock=0,512"):
            pass
    asked = {"instance": "lmcache", "location": "LocalCPUBackend"}
    plan = await act(frontend, f"{CONTROLLER}/clear", **asked)
    assert changes(plan)[0][0::2] == ("LocalCPUBackend of lmcache", "nothing")
    assert 'class="danger"' in plan
    done = await act(frontend, f"{CONTROLLER}/clear", True, **asked)
    assert "512 tokens cleared" in done
    for worker in workers:
        async with worker.client.get("/cache/lookup?tokens_mock=0,512") as response:
            assert (await response.json())["num_hit_tokens"] == 0
    text = await act(frontend, f"{CONTROLLER}/clear", True, instance="<b>", location="x")
    assert problem(text) == "The controller knows no instance '<b>' now."
    assert "Name an instance" in problem(await act(frontend, f"{CONTROLLER}/clear", True))
    assert "not possible" in await act(frontend, f"{CONTROLLER}/pin", True, **asked)


async def test_a_controller_without_workers_says_so(api_server: StartApi, frontend_server: StartFrontend) -> None:
    controller, worker = await api_server(role="controller"), await api_server()
    frontend = await frontend_server(nodes=[controller.node, worker.node])
    await settled(frontend)
    assert "No workers yet" in await page(frontend, CONTROLLER)
    assert f'href="{tab("lmcache_worker0", "controller")}"' not in await page(
        frontend, tab("lmcache_worker0", "overview")
    ), "a worker is none"


async def test_operations_of_lmcaches_own_controller(frontend_server: StartFrontend) -> None:
    worker = {"instance_id": "one", "worker_id": 0, "ip": "192.0.2.2", "port": 45685, "last_heartbeat_time": 1e9}
    asked: list[str] = []
    found = {
        "GET /version": '"0.5.6"',
        "GET /controller/workers": json.dumps({"workers": [worker, 3, {"port": "x"}], "total_count": 3}),
        "GET /controller/key-stats": "[]",
        "POST /pin": '{"event_id": "e", "num_tokens": 256}',
        "POST /move": '{"event_id": "e", "num_tokens": 256}',
        "POST /compress": '{"event_id": "e", "num_tokens": 0, "workers": [{"status": "error"}, {"status": "pending"}]}',
    }
    async with serving(Upstream(talk=telling(found, asked))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_history=True)
        await settled(frontend)
        path = tab("upstream", "controller")
        text = await page(frontend, path)
        assert "192.0.2.2:45685" in text
        assert "silent" in text
        tokens = {"start": "0", "end": "3"}
        one, two = {"instance": "one", "location": "A"}, {"new_instance": "two", "new_location": "B"}
        assert "256 tokens pinned" in await act(frontend, f"{path}/pin", True, **one, **tokens)
        old = {"old_instance": "one", "old_location": "A"}
        plan = await act(frontend, f"{path}/move", **old, **two, **tokens)
        assert changes(plan) == [("Where they are", "A in one", "B in two")]
        assert "256 tokens moved" in await act(frontend, f"{path}/move", True, copy="yes", **old, **two, **tokens)
        same = {"new_instance": "one", "new_location": "A"}
        assert "the same" in problem(await act(frontend, f"{path}/move", True, **old, **same, **tokens))
        text = await act(frontend, f"{path}/compress", True, **one, **tokens, method="cachegen")
        assert problem(text) == "1 of 2 workers failed."
    posts = [json.loads(it.partition(" {")[2].join(["{", ""])) for it in asked if it.startswith("POST")]
    assert posts[:2] == [
        {"instance_id": "one", "location": "A", "tokens": [0, 1, 2]},
        {"old_position": ["one", "A"], "new_position": ["two", "B"], "tokens": [0, 1, 2], "should_copy": True},
    ]
