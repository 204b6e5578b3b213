"""The embedded controller and four workers, each a process of its own: what they know of each other, come what may."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lmcache_api.pytest_plugin import client_for
from lmcache_shared.address import parse
from tests.e2e.processes import read_until, running

WORKER_SECONDS, ANSWER_SECONDS, OPERATION_SECONDS = 1.5, 0.7, 4.0
INTERVAL = WORKER_SECONDS / 3
SLACK = 1.0
"""What a busy machine adds."""

WORKERS = 4
TOKENS = list(range(512))
CPU = "LocalCPUBackend"


@dataclass
class Cluster:
    """The processes; `ask` asks the controller, or worker n."""

    settings: list[str]
    stack: contextlib.ExitStack
    clients: contextlib.AsyncExitStack
    processes: dict[int | None, subprocess.Popen[str]] = field(default_factory=dict)
    addresses: dict[int | None, str] = field(default_factory=dict)
    sessions: dict[int | None, aiohttp.ClientSession] = field(default_factory=dict)

    def begin(self, number: int | None) -> None:
        """The controller (`None`) or a worker; `ready` waits until it serves."""
        role = ["controller"] if number is None else ["worker", "--worker-id", str(number), "--workers", str(WORKERS)]
        options = [f"--set={setting}" for setting in self.settings]
        command = ["-m", "lmcache_api", "--role", *role, *options]
        self.processes[number] = self.stack.enter_context(running(*command))

    async def ready(self, number: int | None) -> None:
        text = read_until(self.processes[number], "serves on")
        self.addresses[number] = text.split()[-1]
        session = client_for(parse(self.addresses[number]))
        self.sessions[number] = await self.clients.enter_async_context(session)

    async def ask(self, number: int | None, method: str, path: str, body: object = None) -> Any:
        async with self.sessions[number].request(method, path, json=body) as response:
            answer = json.loads(await response.text())
            assert response.status == 200, (path, answer)
            return answer

    async def operate(self, name: str, **fields: object) -> tuple[Any, float]:
        """The controller's answer and how long it took."""
        began = time.monotonic()
        answer = await self.ask(None, "POST", f"/{name}", fields)
        return answer, time.monotonic() - began

    async def present(self) -> dict[int, dict[str, Any]]:
        workers = (await self.ask(None, "GET", "/controller/workers"))["workers"]
        assert all(worker["instance_id"] == "lmcache" for worker in workers)
        return {worker["worker_id"]: worker for worker in workers}

    def name(self, number: int) -> str:
        return f"lmcache worker {number} at {self.addresses[number]}"

    def signal(self, number: int | None, what: signal.Signals) -> None:
        os.kill(self.processes[number].pid, what)

    async def until(self, is_so: Callable[[dict[int, dict[str, Any]]], bool], seconds: float) -> float:
        """Wait until the workers that the controller knows are so; the seconds that it took."""
        began = time.monotonic()
        while not is_so(found := await self.present()):
            assert time.monotonic() - began < seconds, found
            await asyncio.sleep(0.02)
        return time.monotonic() - began


@pytest.fixture(params=["sockets", "ports"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    settings = [
        f"controller_worker_seconds={WORKER_SECONDS}",
        f"controller_answer_seconds={ANSWER_SECONDS}",
        f"controller_operation_seconds={OPERATION_SECONDS}",
        "enable_controller=true",
    ]
    if request.param == "sockets":
        settings.append(f"internal_api_server_socket_path_prefix={tmp_path}/s")
    else:
        start = free_range(WORKERS + 2)
        settings += [f"internal_api_server_port_start={start}", f"controller_port={start + WORKERS + 1}"]
    with contextlib.ExitStack() as stack:
        async with contextlib.AsyncExitStack() as clients:
            made = Cluster(settings, stack, clients)
            made.begin(None)
            await made.ready(None)
            for number in range(WORKERS):
                made.begin(number)
            for number in range(WORKERS):
                await made.ready(number)
            await made.until(lambda present: set(present) == set(range(WORKERS)), 20)
            yield made


def free_range(count: int) -> int:
    """The first of so many ports in a row that nobody listens on now."""
    for start in range(20_000 + os.getpid() % 10_000, 32_000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(start, start + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return start
    raise AssertionError("no ports are free")


def of_workers(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {worker["worker"]: worker for worker in answer["workers"]}


async def test_four_workers_are_known_with_their_keys_and_asked_together(cluster: Cluster) -> None:
    present = await cluster.present()
    for number, worker in present.items():
        address = parse(cluster.addresses[number])
        assert (worker["ip"], worker["port"]) == (getattr(address, "host", "localhost"), getattr(address, "port", 0))
        assert worker["key_count"] == 0
    await cluster.ask(2, "POST", "/cache/store", {"tokens": TOKENS})
    assert await cluster.until(lambda present: present[2]["key_count"] == 2, 20) < INTERVAL + SLACK
    stats = await cluster.ask(None, "GET", "/controller/key-stats")
    assert stats == {
        "total_key_count": 2, "total_instance_count": 1, "total_worker_count": 4,
        "instances": [{"instance_id": "lmcache", "key_count": 2, "worker_count": 4}],
    }  # fmt: skip

    answer, _ = await cluster.operate("lookup", tokens=TOKENS)
    assert answer["layout_info"] == {}  # a request needs it from every worker
    expected = {
        cluster.name(number): {
            "worker": cluster.name(number), "status": "success",
            "num_hit_tokens": 512 * (number == 2), "location": CPU * (number == 2),
        }
        for number in range(WORKERS)
    }  # fmt: skip
    assert of_workers(answer) == expected
    for number in range(WORKERS):
        await cluster.ask(number, "POST", "/cache/store", {"tokens": TOKENS})
    answer, _ = await cluster.operate("lookup", tokens=[*TOKENS, 1, 2, 3])
    assert answer["layout_info"] == {"lmcache": [CPU, 512]}
    finished = await cluster.ask(None, "POST", "/check_finish", {"event_id": answer["event_id"]})
    assert finished == {"status": "finished", "workers": answer["workers"]}

    answer, _ = await cluster.operate("clear", instance_id="lmcache", location="LocalDiskBackend")
    assert answer["num_tokens"] == 0
    answer, _ = await cluster.operate("clear", instance_id="lmcache", location=CPU)
    assert answer["num_tokens"] == 512
    assert [worker["num_tokens"] for worker in answer["workers"]] == [512] * WORKERS
    answer, _ = await cluster.operate("lookup", tokens=TOKENS)
    assert [worker["num_hit_tokens"] for worker in answer["workers"]] == [0] * WORKERS
    await cluster.until(lambda present: not any(worker["key_count"] for worker in present.values()), 20)
    answer, _ = await cluster.operate("health", instance_id="lmcache")
    assert answer["error_codes"] == {str(number): 0 for number in range(WORKERS)}


async def test_one_that_is_killed_is_gone_within_its_timeout_and_the_others_stay(cluster: Cluster) -> None:
    cluster.signal(1, signal.SIGKILL)
    cluster.processes[1].wait()
    answer, took = await cluster.operate("health", instance_id="lmcache")
    assert took < ANSWER_SECONDS + SLACK
    assert answer["error_codes"] == {"0": 0, "1": 2, "2": 0, "3": 0}
    assert of_workers(answer)[cluster.name(1)]["status"] == "error"  # nobody is there: it is told at once

    def is_gone(present: dict[int, dict[str, Any]]) -> bool:
        assert {0, 2, 3} <= set(present)
        return 1 not in present

    took += await cluster.until(is_gone, 20)
    assert WORKER_SECONDS - INTERVAL - 0.2 < took < WORKER_SECONDS + SLACK
    answer, _ = await cluster.operate("query_worker_info", instance_id="lmcache")
    assert [worker["worker_id"] for worker in answer["worker_infos"]] == [0, 2, 3]
    answer, _ = await cluster.operate("health", instance_id="lmcache")
    assert answer["error_codes"] == {"0": 0, "2": 0, "3": 0}
    deadline = time.monotonic() + 2 * WORKER_SECONDS
    while time.monotonic() < deadline:  # none of the others is ever late
        assert set(await cluster.present()) == {0, 2, 3}
        await asyncio.sleep(0.05)


async def test_one_that_hangs_delays_nobody_and_is_named(cluster: Cluster) -> None:
    for number in range(WORKERS):
        await cluster.ask(number, "POST", "/cache/store", {"tokens": TOKENS})
    cluster.signal(3, signal.SIGSTOP)
    pending = {"worker": cluster.name(3), "status": "pending"}
    answers = await asyncio.gather(  # in the time that it is still known
        cluster.operate("lookup", tokens=TOKENS),
        cluster.operate("health", instance_id="lmcache"),
        cluster.operate("clear", instance_id="lmcache", location=CPU),
        cluster.ask(None, "GET", "/controller/key-stats"),
    )
    for answer, took in answers[:3]:
        assert ANSWER_SECONDS <= took < ANSWER_SECONDS + SLACK
        told = of_workers(answer)
        assert told.pop(cluster.name(3)) == pending
        assert [worker["status"] for worker in told.values()] == ["success"] * 3
    (lookup, _), (health, _), (clear, _), stats = answers
    assert lookup["layout_info"] == {}
    assert health["error_codes"] == {"0": 0, "1": 0, "2": 0, "3": 2}
    assert clear["num_tokens"] == 512
    assert stats["total_worker_count"] == WORKERS
    running_still = await cluster.ask(None, "POST", "/check_finish", {"event_id": clear["event_id"]})
    assert (running_still["status"], running_still["workers"][-1]) == ("running", pending)

    cluster.signal(3, signal.SIGCONT)
    deadline = time.monotonic() + OPERATION_SECONDS + SLACK
    finished: dict[str, Any] = {"status": "running"}
    while finished["status"] == "running":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
        finished = await cluster.ask(None, "POST", "/check_finish", {"event_id": clear["event_id"]})
    assert of_workers(finished)[cluster.name(3)] == {
        "worker": cluster.name(3), "status": "success", "num_tokens": 512,
    }  # fmt: skip
    assert finished["status"] == "finished"
    await cluster.until(lambda present: set(present) == set(range(WORKERS)), INTERVAL + SLACK)


async def test_one_that_hangs_for_good_is_an_error_in_the_end(cluster: Cluster) -> None:
    cluster.signal(0, signal.SIGSTOP)
    began = time.monotonic()
    answer, _ = await cluster.operate("health", instance_id="lmcache")
    finished: dict[str, Any] = {"status": "running"}
    while finished["status"] == "running":
        assert time.monotonic() - began < OPERATION_SECONDS + SLACK
        await asyncio.sleep(0.02)
        finished = await cluster.ask(None, "POST", "/check_finish", {"event_id": answer["event_id"]})
    assert time.monotonic() - began >= OPERATION_SECONDS
    assert of_workers(finished)[cluster.name(0)] == {
        "worker": cluster.name(0), "status": "error", "error": f"no answer within {OPERATION_SECONDS:g} seconds",
    }  # fmt: skip
    assert set(await cluster.present()) == {1, 2, 3}
    cluster.signal(0, signal.SIGCONT)
    await cluster.until(lambda present: set(present) == set(range(WORKERS)), INTERVAL + SLACK)


async def test_one_that_ends_says_so_at_once_and_comes_back(cluster: Cluster) -> None:
    before = (await cluster.present())[2]["registration_time"]
    cluster.signal(2, signal.SIGTERM)
    assert cluster.processes[2].wait(10) == 0
    assert set(await cluster.present()) == {0, 1, 3}
    cluster.begin(2)
    await cluster.ready(2)
    await cluster.until(lambda present: set(present) == set(range(WORKERS)), INTERVAL + SLACK)
    assert (await cluster.present())[2]["registration_time"] > before


async def test_when_the_controller_comes_back_so_do_the_workers(cluster: Cluster) -> None:
    cluster.signal(None, signal.SIGKILL)
    cluster.processes[None].wait()
    time.sleep(3 * INTERVAL)  # several reports fail meanwhile
    cluster.begin(None)
    await cluster.ready(None)
    assert await cluster.until(lambda present: len(present) == WORKERS, 20) < INTERVAL + SLACK
    for number in range(WORKERS):
        cluster.signal(number, signal.SIGTERM)
    for number in range(WORKERS):
        out, err = cluster.processes[number].communicate(timeout=10)
        assert "stopping" in out
        assert err.count(f"worker {number}: cannot report to the controller at {cluster.addresses[None]}: ") == 1, err
        assert err.count(f"worker {number}: the controller at {cluster.addresses[None]} is there") == 1, err
        assert "Traceback" not in err
    assert await cluster.present() == {}
