"""The recorder, with real workers and with nodes that hang, lie or go; and the board's changes on the timeline."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.nodes.node import Node, Proxy
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_frontend.telemetry.history import recorder as recorder_module
from lmcache_frontend.telemetry.history.history import History
from lmcache_frontend.telemetry.history.recorder import Recorder
from lmcache_frontend.telemetry.history.series import KEPT
from lmcache_frontend.telemetry.history.timeline import MAX_ALIKE, Timeline
from lmcache_frontend.telemetry.history.watching import Watch
from lmcache_shared.address import from_node
from tests.frontend.upstream import Upstream, serving

SLOT = 0.3
STARTED = b"process_start_time_seconds 1\n"
VERSION = b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"0.5.6"'


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def node(port: int | str, name: str = "n") -> Node:
    return Node(name, "127.0.0.1", port, from_node("127.0.0.1", port))


class Recording:
    """A registry, its board, and a recorder of short slots."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.registry = Registry(host="h", port=1)
        self.registry.publish("nodes", nodes)
        self.health = HealthBoard(self.registry, interval=0.2)
        self.history = History(slot_seconds=SLOT)
        self.timeline = Timeline()
        self.recorder = Recorder(self.health, self.history, self.timeline)

    def value(self, name: str, series: str) -> float | None:
        latest = self.history.latest(("local_proxy", name))
        return None if latest is None else latest.values.get(series)

    def problem(self, name: str = "n") -> str | None:
        latest = self.history.latest(("local_proxy", name))
        return None if latest is None else latest.problem


@contextlib.asynccontextmanager
async def recording(*nodes: Node) -> AsyncIterator[Recording]:
    it = Recording(nodes)
    it.health.start()
    task = asyncio.create_task(it.recorder.run())
    try:
        yield it
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=2)
        assert task.done()
        await it.health.close()
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "history"]


def answering(metrics: Callable[[], bytes | None]) -> Upstream:
    """`/version` answers; `/metrics` as told, with `None` never."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/metrics HTTP/1.1" not in head:
            writer.write(VERSION)
        elif (body := metrics()) is None:
            await reader.read()
        elif body.startswith(b"HTTP/"):
            writer.write(body)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()

    return Upstream(talk=talk)


def tokens(count: float) -> bytes:
    return STARTED + b"lmcache:num_hit_tokens_total %f\n" % count


async def test_what_real_workers_do_is_recorded(api_server: StartApi) -> None:
    worker, scheduler = await api_server(role="worker"), await api_server(role="scheduler")
    nodes = [node(server.node["port"], name) for name, server in (("w", worker), ("s", scheduler))]
    async with recording(*nodes) as it:
        await until(lambda: it.value("w", "stored_tokens") is not None)
        body = {"tokens": list(range(512))}
        for path in ("store", "retrieve"):
            async with worker.client.post(f"/cache/{path}", json=body) as response:
                assert response.status == 200, await response.text()
        wall = it.history.clock.wall()

        def seen(series: str) -> float:
            frame = it.history.frame(("local_proxy", "w"), [series], wall - 60, wall + 60, 500)
            return max((value for value in frame.values[series] if value is not None), default=0.0)

        await until(lambda: seen("stores") and seen("retrieves"))
        assert seen("stored_tokens") > 0
        assert seen("requested_tokens") > 0
        assert 0 < seen("retrieve_p99") <= 10
        assert 0 < seen("store_p50") <= 10
        assert seen("load") > 0
        assert it.value("w", "cpu_bytes")
        assert it.value("s", "unfinished") is not None
        total = it.history.latest(None)
        await until(lambda: it.history.latest(None) not in (None, total))
        total = it.history.latest(None)
        assert total is not None
        assert total.values["nodes_up"] == 2


async def test_rates_gaps_resets_and_restarts() -> None:
    began, state = time.monotonic(), {"down": False, "begin": 0.0, "started": 1}

    def metrics() -> bytes | None:
        if state["down"]:
            return b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n"
        count = 1e6 - state["begin"] + 1000 * (time.monotonic() - began)
        return tokens(count).replace(b"seconds 1", b"seconds %d" % state["started"])

    async with serving(answering(metrics)) as upstream, recording(node(upstream.port)) as it:
        await until(lambda: it.value("n", "hit_tokens") is not None)
        assert 100 < (it.value("n", "hit_tokens") or 0) < 10_000
        state["begin"] = 9e5  # a reset
        revision = it.history.revision
        await until(lambda: it.value("n", "hit_tokens") is None)
        await until(lambda: it.value("n", "hit_tokens") is not None)
        assert it.history.revision > revision
        state["down"] = True
        await until(lambda: it.problem() == "/metrics answers 500")
        assert it.value("n", "hit_tokens") is not None  # old, with its age
        await asyncio.sleep(SLOT)
        state["down"] = False
        await until(lambda: it.problem() is None)
        state["started"] = 2
        await until(lambda: any(event.kind == "restarted" for event in it.timeline.newest()))
        await until(lambda: it.value("n", "hit_tokens") is not None)
        wall = it.history.clock.wall()
        found = it.history.frame(("local_proxy", "n"), ["hit_tokens"], wall - 30, wall, 500).values["hit_tokens"]
        known = [value for value in found if value is not None]
        assert max(known) < 50_000  # a million tokens were never counted within a slot
        assert None in found[found.index(known[0]) :]


async def test_a_node_that_hangs_costs_nobody_else() -> None:
    slow, fine = answering(lambda: None), answering(lambda: tokens(1))
    async with serving(slow) as bad, serving(fine) as good:
        hanging = [node(bad.port, f"bad{i}") for i in range(recorder_module.AT_ONCE // 2)]
        async with recording(*hanging, node(good.port, "good")) as it:
            await until(lambda: it.problem("bad0") and it.value("good", "hit_tokens") is not None)
            assert "no answer within 0.12 seconds" in str(it.problem("bad0"))
            await until(lambda: it.recorder._asked["local_proxy", "bad0"].failures >= 3)
            assert it.recorder._asked["local_proxy", "bad0"].pause > 0
            first = it.history.latest(("local_proxy", "good"))
            await until(lambda: it.history.latest(("local_proxy", "good")) is not first)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n", "/metrics answers 404"),
        (STARTED + b"lmcache_frontend_nodes 1\n", "is a frontend; make it a proxy with its nodes"),
        (b"hello\n", "has none of LMCache's metrics"),
        (b"HTTP/1.1 200 X\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\nx", "which was not asked for"),
        (b"x" * (recorder_module.MAX_ANSWER_BYTES + 1), "/metrics is larger than 2 MiB"),
        (b"HTTP/1.1 200 X\r\nContent-Length: 9\r\n\r\nx", "breaks off in the middle of its answer"),
    ],
    ids=["404", "frontend", "other", "encoded", "large", "half"],
)
async def test_what_is_no_answer(answer: bytes, problem: str) -> None:
    async with serving(answering(lambda: answer)) as upstream, recording(node(upstream.port)) as it:
        await until(it.problem)
        assert problem in str(it.problem())
        assert it.value("n", "hit_tokens") is None


async def test_a_node_that_is_down_is_not_asked_and_says_why() -> None:
    async with serving(answering(lambda: tokens(1))) as upstream:
        port = upstream.port
    async with recording(node(port)) as it:
        await until(it.problem)
        assert it.problem() == it.health.of("local_proxy", "n").problem


async def test_a_node_behind_a_proxy_is_asked_through_it() -> None:
    heads: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        body = STARTED if b"/metrics" in heads[-1] else b'"1"'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()

    async with serving(Upstream(talk=talk)) as upstream:
        proxy = Proxy("rack2", "127.0.0.1", upstream.port, from_node("127.0.0.1", upstream.port), token="secret")
        async with recording() as it:
            it.registry.publish("nodes", [proxy])
            behind = Node("n", "10.0.0.9", 7000, from_node("10.0.0.9", 7000), path="/proxy2/n")
            it.registry.publish_neighbours("rack2", [behind])
            await until(lambda: it.history.latest(("rack2", "n")))
        [head, *_] = [head for head in heads if b"/metrics" in head]
        assert head.startswith(b"GET /proxy2/n/metrics HTTP/1.1\r\n")
        assert b"Authorization: Bearer secret\r\n" in head


async def test_the_interval_doubles_when_not_all_can_be_asked() -> None:
    it = Recording([])
    it.recorder._adapt(is_late=True)
    assert (it.history.interval, it.recorder._slots) == (2 * SLOT, 2)
    assert "asked every 0.6" in str(it.history.problem)
    for _ in range(20):
        it.recorder._adapt(is_late=True)
    assert it.recorder._slots == recorder_module.MAX_INTERVAL_SLOTS
    for _ in range(recorder_module.CALM_ROUNDS * 4):
        it.recorder._adapt(is_late=False)
    assert (it.history.interval, it.history.problem) == (SLOT, None)
    await it.health.close()


async def test_a_round_in_which_nodes_wait_for_their_turn_is_late() -> None:
    async with serving(answering(lambda: None)) as upstream:
        it = Recording([node(upstream.port, f"n{i}") for i in range(4)])
        it.recorder._lines = (asyncio.Semaphore(1), asyncio.Semaphore(1))
        it.health.start()
        assert await it.health.settled(5)
        clock, slots = it.history.clock, 4
        await it.recorder._round(it.history.slot(), clock.now() + slots * 0.05)
        assert it.recorder._slots == 2
        told = [it.problem(f"n{i}") for i in range(4)]
        assert "not asked within the time for all nodes" in told
        await it.health.close()


async def test_values_of_a_long_round_stand_for_all_its_slots() -> None:
    async with serving(answering(lambda: tokens(time.monotonic()))) as upstream:
        it = Recording([node(upstream.port)])
        it.health.start()
        assert await it.health.settled(5)
        it.recorder._slots = 2
        for slot in (101, 103):
            await it.recorder._round(slot, it.history.clock.now() + 5)
        ring = it.history._nodes["local_proxy", "n"].ring
        assert ring is not None
        place = [series.key for series in KEPT].index("hit_tokens")
        second_last, last = ring.fine(place, 102, 104)
        assert second_last == last > 0
        assert all(map(math.isnan, ring.fine(place, 100, 102)))
        await it.health.close()


async def test_a_failure_of_our_own_costs_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(recorder_module, "read", broken)
    async with serving(answering(lambda: tokens(1))) as upstream, recording(node(upstream.port)) as it:
        await until(lambda: it.problem() == "could not be read: RuntimeError")


async def test_changes_of_the_board_are_events() -> None:
    async with serving(answering(lambda: tokens(1))) as upstream:
        it = Recording([node(upstream.port)])
        watch = Watch(it.health, it.timeline)
        it.health.start()
        assert await it.health.settled(5)
        watch.look(starting=True)
        assert it.timeline.revision == 0
        it.registry.publish("nodes", [node(upstream.port), node(upstream.port, "second")])
        await until(lambda: it.health.of("local_proxy", "second").state == "up")
        watch.look()
        assert [(event.kind, event.node) for event in it.timeline.since(0)] == [("added", "second")]
    await until(lambda: it.health.of("local_proxy", "n").state == "down")
    watch.look()
    it.registry.publish("nodes", [node(upstream.port)])
    it.health._look()
    watch.look()
    told = [(event.kind, event.node) for event in it.timeline.since(1)]
    assert ("down", "n") in told
    assert ("removed", "second") in told
    await it.health.close()


async def test_many_that_are_started_anew_are_few_events() -> None:
    started = [1]
    upstream = answering(lambda: b"process_start_time_seconds %d\nlmcache:num_hit_tokens_total 1\n" % started[0])
    async with serving(upstream), recording(*(node(upstream.port, f"n{i}") for i in range(60))) as it:
        await until(lambda: all(it.value(f"n{i}", "hit_tokens") is not None for i in range(60)))
        started[0] = 2
        await until(lambda: any(event.kind == "restarted" for event in it.timeline.newest()))
        await until(lambda: any(event.text.startswith("and ") for event in it.timeline.newest()))
        alike = [event for event in it.timeline.newest(1000) if event.kind == "restarted"]
        assert len(alike) <= 2 * (MAX_ALIKE + 1)
