"""LMCache's controller manager as `--role controller --engine lmcache` starts it, and a real engine that registers."""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.lmcache.processes import (
    Answer,
    Child,
    Engine,
    ask,
    client_of,
    free_ports,
    running_program,
    short_folder,
    starting_worker,
)

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(300)]

Client = aiohttp.ClientSession
TOKENS = list(range(600))
CPU = "LocalCPUBackend"
ANSWER_SECONDS = 1.0
OPERATION_SECONDS = 3.0
SLACK = 2.0


@dataclass
class Cluster:
    """A controller started by hand, and one engine, instance `one`."""

    python: str
    folder: Path
    stack: ExitStack
    ports: list[int] = field(default_factory=lambda: free_ports(3))
    engines: list[Engine] = field(default_factory=list)

    def start_controller(self) -> Child:
        pull, reply, _ = self.ports
        options = [
            "controller_host=127.0.0.1",
            f'controller_monitor_ports={{"pull": {pull}, "reply": {reply}}}',
            f"controller_answer_seconds={ANSWER_SECONDS}",
            f"controller_operation_seconds={OPERATION_SECONDS}",
        ]
        words = [word for option in options for word in ("--set", option)]
        program = running_program(self.python, self.folder, "--role", "controller", *words)
        child = self.stack.enter_context(program)
        child.wait_until(lambda: " serves on " in child.log.read_text(), seconds=120, what="the controller")
        return child

    def start_worker(self) -> Engine:
        below = self.folder / str(len(self.engines))
        below.mkdir()
        engine = self.stack.enter_context(starting_worker(self.python, below, "one", *self.ports))
        self.engines.append(engine)
        engine.wait_until(engine.socket.is_socket, seconds=120, what="the engine")
        return engine

    def push(self, what: str) -> subprocess.Popen[str]:
        script = str(Path(__file__).with_name("pusher.py"))
        command = [self.python, script, str(self.ports[0]), what]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def cluster(lmcache_python: str) -> Iterator[Cluster]:
    with short_folder() as folder, ExitStack() as stack:
        yield Cluster(lmcache_python, folder, stack)


@pytest.fixture(scope="module")
def controller(cluster: Cluster) -> Child:
    return cluster.start_controller()


@pytest.fixture(scope="module")
def worker(cluster: Cluster, controller: Child) -> Engine:
    assert controller.process.poll() is None
    return cluster.start_worker()


@pytest_asyncio.fixture
async def client(cluster: Cluster, controller: Child) -> AsyncIterator[Client]:
    assert controller.process.poll() is None
    async with client_of(cluster.folder / "lm_9000") as client:
        yield client


async def until(client: Client, path: str, holds: Callable[[Any], bool], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not holds(told := (await ask(client, "GET", path)).json()):
        assert time.monotonic() < deadline, told
        await asyncio.sleep(0.1)
    return told


async def pushed(client: Client) -> int:
    """The messages that the controller has taken."""
    text = (await ask(client, "GET", "/metrics")).text
    found = re.search(r"pull_socket_message_count\{[^}]*\} (\S+)", text)
    assert found, text
    return int(float(found[1]))


async def health(client: Client) -> tuple[Answer, float]:
    began = time.monotonic()
    answer = await ask(client, "POST", "/health", json={"instance_id": "one"})
    return answer, time.monotonic() - began


async def test_an_engine_registers_and_is_asked(client: Client, worker: Engine) -> None:
    await until(client, "/controller/key-stats", lambda told: told["total_worker_count"] == 1)
    async with client_of(worker.socket) as engine:
        await ask(engine, "POST", "/cache/store", json={"tokens": TOKENS})
    await until(client, "/controller/key-stats", lambda told: told["total_key_count"] >= 2)
    known = (await ask(client, "GET", "/controller/workers")).json()
    assert [(told["instance_id"], told["worker_id"]) for told in known["workers"]] == [("one", 0)]
    found = (await ask(client, "POST", "/lookup", json={"tokens": TOKENS})).json()["layout_info"]
    assert found["one"][1] == 512
    told = await asyncio.gather(*(health(client) for _ in range(5)))  # one after the other: LMCache takes one at a time
    assert [answer.json()["error_codes"] for answer, _ in told] == [{"0": 0}] * 5
    cleared = await ask(client, "POST", "/clear", json={"instance_id": "one", "location": CPU})
    assert (cleared.status, cleared.json()["num_tokens"]) == (200, 512)
    conf = (await ask(client, "GET", "/conf")).json()
    assert (conf["health_check_interval"], conf["controller_answer_seconds"]) == (-1, ANSWER_SECONDS)
    assert (await ask(client, "POST", "/conf", json={"health_check_interval": 1})).status == 400
    metrics = (await ask(client, "GET", "/metrics")).text
    assert re.search(r"registered_workers_count\{[^}]*\} 1\.0", metrics)
    address = known["workers"][0]["ip"]
    answer = await ask(client, "POST", "/query_instance", json={"event_id": "x", "ip": address})
    assert answer.json()["res"] == "one"
    answer = await ask(client, "POST", "/query_instance", json={"event_id": "x", "ip": "192.0.2.7"})
    assert answer.json()["detail"].startswith("no instance is registered at 192.0.2.7; GET /controller/workers")


async def test_who_scrapes_loses_no_message(cluster: Cluster, client: Client) -> None:
    """LMCache's gauges look at its sockets, which must happen where they live."""
    before = await pushed(client)
    pusher = cluster.push("6")
    while pusher.poll() is None:
        await asyncio.gather(*(pushed(client) for _ in range(4)))
    sent = int(pusher.communicate()[0])
    assert sent > 1000
    deadline = time.monotonic() + 5
    while await pushed(client) < before + sent and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert await pushed(client) >= before + sent


async def test_what_is_no_message_ends_nothing(cluster: Cluster, controller: Child, client: Client) -> None:
    assert cluster.push("broken").communicate(timeout=60)[0] == "0\n"
    before = await pushed(client)
    pusher = cluster.push("0.2")
    sent = int(pusher.communicate(timeout=60)[0])
    deadline = time.monotonic() + 10
    while await pushed(client) < before + sent:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert "what came at its pull port cannot be used, and it goes on: DecodeError" in controller.log.read_text()


async def test_a_worker_that_is_gone_is_named_and_found_again(cluster: Cluster, client: Client, worker: Engine) -> None:
    await until(client, "/controller/key-stats", lambda told: told["total_worker_count"] == 1)
    worker.kill()
    answer, took = await health(client)
    assert ANSWER_SECONDS <= took < ANSWER_SECONDS + SLACK
    detail = r"health: one: worker 0 at [\d.]+:\d+: no answer within 1 seconds; it may still finish"
    assert (answer.status, re.fullmatch(detail, answer.json()["detail"]) is not None) == (504, True), answer.text
    answer, took = await health(client)
    assert took < ANSWER_SECONDS + SLACK
    assert answer.status == 503
    assert re.match(r"one: worker 0 at [\d.]+:\d+: no answer to an earlier operation", answer.json()["detail"])
    cluster.start_worker()
    deadline = time.monotonic() + 90
    while (answer := (await health(client))[0]).status != 200:
        assert time.monotonic() < deadline, answer.text
        await asyncio.sleep(0.2)
    assert answer.json()["error_codes"] == {"0": 0}


async def test_a_worker_that_ends_says_so_and_nothing_else(cluster: Cluster, client: Client) -> None:
    for _ in range(2):
        worker = cluster.engines[-1]
        await until(client, "/controller/workers", lambda told: told["total_count"] == 1)
        worker.process.terminate()
        assert worker.process.wait(30) == 0
        await until(client, "/controller/workers", lambda told: told["total_count"] == 0, 5)
        body = {"instance_id": "all"}
        assert (await ask(client, "POST", "/query_worker_info", json=body)).json()["worker_infos"] == []
        said = worker.log.read_text()
        assert "Task was destroyed" not in said
        assert "Traceback" not in said
        cluster.start_worker()


async def test_it_ends_at_once_although_a_worker_owes_an_answer(lmcache_python: str) -> None:
    with short_folder() as folder, ExitStack() as stack:
        cluster = Cluster(lmcache_python, folder, stack)
        controller = cluster.start_controller()
        worker = cluster.start_worker()
        async with client_of(folder / "lm_9000") as client:
            await until(client, "/controller/key-stats", lambda told: told["total_worker_count"] == 1)
            worker.kill()
            assert (await health(client))[0].status == 504
        began = time.monotonic()
        controller.process.terminate()
        assert controller.process.wait(20) == 0
        assert time.monotonic() - began < 3
        assert "did not end" not in controller.log.read_text()
        assert "Traceback" not in controller.log.read_text()
        assert "Task was destroyed" not in controller.log.read_text()
