"""Asks every node that is up for its metrics, round after round, spread over the interval.

A round is a slot of the history. What a node answers in it is its value of the round, one that has not answered by the
round's end has a gap. Where there are more nodes than can be asked within an interval, the interval doubles, and
what is recorded stands for all the slots that it lasts.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from lmcache_frontend.nodes.node import Node
from lmcache_frontend.telemetry.client import Answer, NoAnswer, ask, request_bytes
from lmcache_frontend.telemetry.health.behind import from_the_way, not_reached
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_frontend.telemetry.health.states import NodeHealth
from lmcache_frontend.telemetry.history.counting import between
from lmcache_frontend.telemetry.history.history import History, NodeKey
from lmcache_frontend.telemetry.history.reading import Order, Reading, is_of_a_frontend, read
from lmcache_frontend.telemetry.history.timeline import Event, Timeline
from lmcache_frontend.telemetry.metrics.scrape import Room
from lmcache_frontend.telemetry.names import Names, NotAsked

logger = logging.getLogger(__name__)

SPREAD = 0.5
"""The part of a round in which questions begin."""

ANSWER = 0.4
"""The part of it that an answer may take, from the connection on."""

TICK_SECONDS = 0.05
"""Questions begin at multiples of this: most of what one costs is waking up for it."""

EARLY = 0.1
"""The part of a slot by which a round may begin before its time, or end behind it."""

AT_ONCE = 64
FAILING_AT_ONCE = 32
"""Nodes that gave nothing last time have a line of their own: when they hang they delay nobody."""

MAX_ANSWER_BYTES = 2 << 20
"""Of one node: forty times what a worker sends."""

MAX_HELD_BYTES = 64 << 20
"""Of all answers that are being read."""

MAX_PAUSE_ROUNDS = 12
"""After failures in a row, the rounds that a node is left in peace double up to this."""

MAX_INTERVAL_SLOTS = 16
"""An interval of 80 seconds: a node's readings are then still near enough to each other."""

CALM_ROUNDS = 60
"""So many rounds in a row in which nobody waited for a turn, and the interval is halved again."""

_ACCEPT = "text/plain;version=0.0.4;q=1,*/*;q=0.1"


class NoMetrics(NoAnswer):
    """The node answers something else; the text says what."""


@dataclass
class _Asked:
    """One node: how it is asked, and what it said last."""

    request: bytes
    node: Node
    order: Order | None = None
    reading: Reading | None = None
    failures: int = 0
    pause: int = 0
    """Rounds that it is still left in peace."""


class Recorder:
    """Fills a history with the nodes of a health board."""

    def __init__(self, health: HealthBoard, history: History, timeline: Timeline) -> None:
        self._health = health
        self._history = history
        self._timeline = timeline
        self._asked: dict[NodeKey, _Asked] = {}
        self._names = Names()
        self._room = Room(MAX_HELD_BYTES)
        self._lines = (asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(FAILING_AT_ONCE))
        self._questions: set[asyncio.Task[None]] = set()
        self._slots = 1
        """The length of a round."""
        self._calm = 0
        """Rounds in a row in which no node that answers waited for its turn."""
        self._is_crowded = False
        self._restarted: list[Event] = []
        """Of this round: whole racks are started anew, and must not fill the timeline."""

    async def run(self) -> None:
        """Until cancelled. Whatever goes wrong in a round costs that round alone."""
        try:
            while True:
                first, slots = self._first_slot(), self._slots
                end = self._history.slot_seconds * (first + slots)
                try:
                    await self._round(first + slots - 1, end)
                except Exception:
                    logger.exception("a round of the history failed")
                await asyncio.sleep(end - self._history.clock.now())
        finally:
            await self._end_questions()
            await self._names.close()

    def _first_slot(self) -> int:
        """The slot of now; when it is all but over, because a timer fired early, the next one."""
        seconds = self._history.slot_seconds
        return int((self._history.clock.now() + EARLY * seconds) // seconds)

    async def _round(self, slot: int, end: float) -> None:
        """Ask all nodes that are up, until `end` of the history's clock; `slot` is the last one of the round."""
        clock = self._history.clock
        due = self._due()
        began = clock.now()
        spread = (end - began) * SPREAD
        waiting: set[NodeKey] = set()
        self._is_crowded = False
        for number, (key, asked) in enumerate(due):
            wait = began + number * spread / len(due) - clock.now()
            if wait > 0:
                await asyncio.sleep(max(wait, TICK_SECONDS))
            waiting.add(key)
            question = asyncio.create_task(self._ask_in_turn(key, asked, slot, waiting), name="history")
            self._questions.add(question)
            question.add_done_callback(self._questions.discard)
        if self._questions:
            await asyncio.wait(self._questions, timeout=max(end - clock.now(), 0))
        is_late = any(not asked.failures for key, asked in due if key in waiting)
        for key in waiting:
            self._history.note(key, "not asked within the time for all nodes")
        await self._end_questions()
        self._timeline.record_all(self._restarted)
        self._restarted.clear()
        self._history.end_round(slot, self._slots, self._health.counts())
        self._adapt(is_late or clock.now() > end + EARLY * (end - began))

    def _due(self) -> list[tuple[NodeKey, _Asked]]:
        """The nodes to ask in this round; those that failed come last."""
        known: dict[NodeKey, _Asked] = {}
        due: list[tuple[NodeKey, _Asked]] = []
        for health in self._health.all():
            key = (health.proxy, health.node.name)
            asked = self._asked.get(key)
            if asked is None or (asked.node is not health.node and asked.node.reach != health.node.reach):
                asked = _Asked(_request(health), health.node)
            known[key] = asked
            if not health.answers:
                if health.state == "down" and health.problem:
                    self._history.note(key, health.problem)
            elif asked.pause:
                asked.pause -= 1
            else:
                due.append((key, asked))
        self._asked = known
        self._history.keep(known.keys())
        return sorted(due, key=lambda item: item[1].failures > 0)

    async def _ask_in_turn(self, key: NodeKey, asked: _Asked, slot: int, waiting: set[NodeKey]) -> None:
        line = self._lines[asked.failures > 0]
        self._is_crowded = self._is_crowded or (line.locked() and not asked.failures)
        async with line:
            waiting.discard(key)
            try:
                self._take(key, asked, await self._fetch(key, asked), slot)
            except NotAsked as problem:  # it lies on this side: the node is asked again in the next round
                self._history.note(key, from_the_way(str(problem), asked.node, key[0]))
            except NoMetrics as problem:
                self._failed(key, asked, str(problem))
            except NoAnswer as problem:
                self._failed(key, asked, from_the_way(str(problem), asked.node, key[0]))
            except asyncio.CancelledError:
                self._failed(key, asked, "no answer until the end of its round")
                raise
            except Exception as error:
                logger.debug("an answer could not be read", exc_info=True)
                self._failed(key, asked, f"could not be read: {type(error).__name__}")

    def _failed(self, key: NodeKey, asked: _Asked, problem: str) -> None:
        asked.failures += 1
        asked.pause = min(2 ** min(asked.failures - 1, 8) - 1, MAX_PAUSE_ROUNDS)
        self._history.note(key, problem)

    def _take(self, key: NodeKey, asked: _Asked, text: bytes, slot: int) -> None:
        reading, asked.order = read(text, self._history.clock.now(), asked.order)
        if not reading.scalars and not reading.histograms:
            raise NoMetrics("has none of LMCache's metrics")
        point = between(asked.reading, reading)
        asked.reading, asked.failures = reading, 0
        if point.restarted:
            self._restarted.append(Event("restarted", f"{key[1]} was started anew", *key))
        self._history.record(key, point, slot, self._slots)

    async def _fetch(self, key: NodeKey, asked: _Asked) -> bytes:
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            self._room.take(size)
            taken += size

        reach, seconds = asked.node.reach, ANSWER * self._slots * self._history.slot_seconds
        try:
            answer = await ask(
                reach.address, asked.request, self._names, seconds=seconds, most=MAX_ANSWER_BYTES, take=take
            )
        finally:
            self._room.give_back(taken)
        return _text_of(answer, asked.node, key[0])

    async def _end_questions(self) -> None:
        while self._questions:
            for question in self._questions:
                question.cancel()
            await asyncio.wait(self._questions, timeout=0.1)

    def _adapt(self, is_late: bool) -> None:
        """A longer interval when not all could be asked, a shorter one when that has been easy for long."""
        history = self._history
        self._calm = 0 if is_late or self._is_crowded else self._calm + 1
        if is_late and self._slots < MAX_INTERVAL_SLOTS:
            self._slots *= 2
        elif self._calm >= CALM_ROUNDS and self._slots > 1:
            self._slots, self._calm = self._slots // 2, 0
        interval = self._slots * history.slot_seconds
        if interval == history.interval:
            return
        history.interval = interval
        history.problem = (
            f"not all nodes can be asked within {history.slot_seconds:g} seconds; they are asked every {interval:g}"
            if self._slots > 1
            else None
        )
        logger.warning("history: %s", history.problem or f"nodes are asked every {interval:g} seconds again")


def _request(health: NodeHealth) -> bytes:
    reach = health.node.reach
    return request_bytes(reach.address, f"{reach.prefix}/metrics", accept=_ACCEPT, token=reach.token)


def _text_of(answer: Answer, node: Node, proxy: str) -> bytes:
    """Raises:
    NoMetrics: the answer is not the metrics of this node.
    """
    problem = not_reached(answer, node, proxy)
    if problem is not None or answer.status != 200:
        raise NoMetrics(problem or f"/metrics answers {answer.status}")
    if answer.body is None:
        raise NoMetrics(f"/metrics is larger than {MAX_ANSWER_BYTES >> 20} MiB")
    if answer.encoding not in ("", "identity"):
        raise NoMetrics(f"/metrics comes in the encoding {answer.encoding[:40]!r}, which was not asked for")
    if is_of_a_frontend(answer.body):
        raise NoMetrics("is a frontend; make it a proxy with its nodes")
    return answer.body
