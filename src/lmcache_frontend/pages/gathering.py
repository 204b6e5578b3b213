"""What many nodes say of themselves, asked for a caller and kept for a short while: settings, versions, environment.

Everything is bounded: how many nodes are asked, how many at a time, how long one and all of them may take, how much of
an answer is read and how much of all of them is held. Callers who may ask the same share what was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from aiohttp import web

from lmcache_frontend.nodes.node import Node
from lmcache_frontend.pages.asking import Asked, Outcome, Question
from lmcache_frontend.pages.sweeping import Turns, sweep
from lmcache_frontend.telemetry.health.states import NodeHealth
from lmcache_shared.access.caller import bearer_token, is_local_caller
from lmcache_shared.access.gate import caller_of
from lmcache_shared.errors import Refusal

logger = logging.getLogger(__name__)

MAX_NODES = 2000
"""So many are asked for one page; the others of a choice are told."""

AT_ONCE = 32
"""Nodes that are asked at the same time, for all pages together."""

MAX_ROUNDS = 16
"""Pages that have nodes asked at the same time; another one is refused."""

NODE_SECONDS = 5.0
ALL_SECONDS = 60.0
"""For all nodes of a choice. Those that were up last are asked first: who hangs delays nobody else."""

MAX_BYTES = 512 << 10
"""Of one answer."""

KEPT_SECONDS = 30.0
MAX_SHELVES = 6
"""Of what and for whom answers are kept, those that were looked at last; what is being asked stays beside them, or the
pages that wait for it would have it asked anew for ever."""

MAX_KEYS = 3000
"""Of one node."""

MAX_VALUE = 2000
"""Characters of one value; a longer one is cut, and a digest shows whether two are the same."""

MAX_DEPTH = 4
MAX_HELD = 16 << 20
"""Characters of all different names and values of a shelf."""

NodeKey = tuple[str, str]


@dataclass(frozen=True)
class Subject:
    """What nodes are asked for.

    Attributes:
        noun: one of what it compares.
        paths: what is asked; a node that does not answer the first has not answered.
        read: its names and values from the answers that there are; None when the first is not what it should be.
    """

    name: str
    title: str
    noun: str
    paths: tuple[str, ...]
    read: Callable[[Mapping[str, Outcome]], Mapping[str, object] | None]


def _object(path: str) -> Callable[[Mapping[str, Outcome]], Mapping[str, object] | None]:
    def read(told: Mapping[str, Outcome]) -> Mapping[str, object] | None:
        found = told[path].json()
        return found if isinstance(found, dict) else None

    return read


_VERSIONS = {"/version": "version", "/commit_id": "commit", "/inference_version": "inference engine"}


def _versions(told: Mapping[str, Outcome]) -> Mapping[str, object] | None:
    found: dict[str, object] = {}
    for path, name in _VERSIONS.items():
        if path in told:
            said = told[path].json()
            if isinstance(said, dict):
                found.update(said)
            else:
                found[name] = said if said is not None else told[path].text.strip().strip("'\"")
    return found


SUBJECTS: Mapping[str, Subject] = {
    it.name: it
    for it in (
        Subject("conf", "Configuration", "setting", ("/conf",), _object("/conf")),
        Subject("versions", "Versions", "version", tuple(_VERSIONS), _versions),
        Subject("meta", "Metadata", "field", ("/meta",), _object("/meta")),
        Subject("env", "Environment", "variable", ("/env",), _object("/env")),
    )
}


@dataclass(frozen=True)
class Told:
    """What a node said, or why it did not."""

    node: Node
    values: Mapping[str, str]
    kind: str = "ok"
    problem: str = ""
    when: float = field(default_factory=time.monotonic)


class _Shelf:
    """The answers to one question for one kind of caller."""

    def __init__(self) -> None:
        self.told: dict[NodeKey, Told] = {}
        self.pending: set[NodeKey] = set()
        self.asked = time.time()
        self.tasks: set[asyncio.Task[None]] = set()
        self._texts: dict[str, str] = {}
        self._held = 0

    def fresh(self, health: NodeHealth) -> bool:
        """Whether a node has been asked lately, or is being asked."""
        key = (health.proxy, health.node.name)
        told = self.told.get(key)
        if told is None:
            return key in self.pending
        return told.node.reach == health.node.reach and time.monotonic() - told.when < KEPT_SECONDS

    def clear(self) -> None:
        self.told.clear()
        self._texts.clear()
        self._held = 0

    def take(self, values: Iterable[tuple[str, str]]) -> dict[str, str] | None:
        """The values, each text held once however many nodes have it; None when there is no room for them."""
        taken = {}
        for name, value in values:
            if self._held > MAX_HELD:
                return None
            taken[self._text(name)] = self._text(value)
        return taken

    def _text(self, text: str) -> str:
        known = self._texts.get(text)
        if known is None:
            known = self._texts[text] = text
            self._held += len(text)
        return known


@dataclass(frozen=True)
class Gathered:
    """What is known now of the nodes that were chosen.

    Attributes:
        told: those that were asked and have answered or failed.
        waiting: how many have been asked, or will be, and have done neither.
        skipped: how many are more than what is asked for one page.
        asked: when, as Unix seconds.
    """

    told: Sequence[tuple[NodeHealth, Told]]
    waiting: int
    skipped: int
    asked: float

    @property
    def total(self) -> int:
        return len(self.told) + self.waiting


class Gatherer:
    """Asks nodes in the background, and remembers for a short while what they said."""

    def __init__(self) -> None:
        self._shelves: OrderedDict[Hashable, _Shelf] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(AT_ONCE)

    async def gather(
        self, request: web.Request, subject: Subject, nodes: Sequence[NodeHealth], seconds: float
    ) -> Gathered:
        """Ask those of the nodes that were not asked lately, and wait so many seconds at most for all of them.

        Raises:
            Refusal: 503, too many are asked already.
        """
        shelf = self._shelf(request, subject)
        chosen = nodes[:MAX_NODES]
        new = [health for health in chosen if not shelf.fresh(health)]
        if new:
            if len(self._tasks) >= MAX_ROUNDS:
                problem = f"{MAX_ROUNDS} comparisons are being made at this moment; try again in a few seconds"
                raise Refusal(503, problem, {"Retry-After": "5"})
            if len(new) == len(chosen) and not shelf.pending:
                shelf.clear()
                shelf.asked = time.time()
            new.sort(key=lambda health: not health.answers)
            for health in new:  # from now on nobody else asks them
                shelf.told.pop((health.proxy, health.node.name), None)
                shelf.pending.add((health.proxy, health.node.name))
            try:
                asked = await _questions(request, subject, new)
            except BaseException:
                shelf.pending.difference_update((health.proxy, health.node.name) for health in new)
                raise
            task = asyncio.create_task(self._ask(subject, shelf, asked), name=f"gather {subject.name}")
            for tasks in (self._tasks, shelf.tasks):
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        keys = [(health.proxy, health.node.name) for health in chosen]
        if shelf.tasks and not shelf.pending.isdisjoint(keys):
            await asyncio.wait(shelf.tasks, timeout=seconds)
        told = [(health, shelf.told[key]) for health, key in zip(chosen, keys, strict=True) if key in shelf.told]
        return Gathered(told, len(chosen) - len(told), len(nodes) - len(chosen), shelf.asked)

    def forget(self, request: web.Request, subject: Subject) -> None:
        """Ask anew the next time."""
        self._shelf(request, subject).clear()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _shelf(self, request: web.Request, subject: Subject) -> _Shelf:
        key = (subject.name, whose(request))
        shelf = self._shelves.setdefault(key, _Shelf())
        self._shelves.move_to_end(key)
        idle = [old for old, it in self._shelves.items() if not it.pending and old != key]
        for old in idle[: max(0, len(self._shelves) - MAX_SHELVES)]:
            del self._shelves[old]
        return shelf

    async def _ask(self, subject: Subject, shelf: _Shelf, asked: Sequence[tuple[NodeHealth, Sequence[Asked]]]) -> None:
        left = {(health.proxy, health.node.name): health.node for health, _ in asked}
        try:

            async def one(health: NodeHealth, questions: Sequence[Asked]) -> None:
                try:
                    async with self._room:
                        told = await _told(subject, shelf, health, questions)
                except Exception as error:
                    logger.error("a node's answer could not be read", exc_info=error)
                    told = Told(health.node, {}, "failed", f"could not be read: {type(error).__name__}")
                key = (health.proxy, health.node.name)
                del left[key]
                shelf.pending.discard(key)
                shelf.told[key] = told

            jobs = [functools.partial(one, *it) for it in asked]
            await sweep(jobs, at_once=AT_ONCE, seconds=ALL_SECONDS)
        finally:
            for key, node in left.items():
                shelf.pending.discard(key)
                problem = f"was not asked: the nodes before it took {ALL_SECONDS:g} seconds"
                shelf.told[key] = Told(node, {}, "late", problem)


async def _questions(
    request: web.Request, subject: Subject, nodes: Sequence[NodeHealth]
) -> list[tuple[NodeHealth, Sequence[Asked]]]:
    """What is to be asked, made while the caller is here."""
    questions = [Question("GET", path, seconds=NODE_SECONDS, most=MAX_BYTES) for path in subject.paths]
    asked: list[tuple[NodeHealth, Sequence[Asked]]] = []
    turns = Turns()
    for health in nodes:
        asked.append((health, [Asked(request, health.proxy, health.node, it) for it in questions]))
        await turns.next()
    return asked


async def _told(subject: Subject, shelf: _Shelf, health: NodeHealth, questions: Sequence[Asked]) -> Told:
    answers: dict[str, Outcome] = {}
    for path, question in zip(subject.paths, questions, strict=True):
        outcome = await question.outcome()
        if outcome.ok:
            answers[path] = outcome
        elif path == subject.paths[0]:
            return Told(health.node, {}, outcome.kind, outcome.problem)
    found = subject.read(answers)
    if found is None:
        return Told(health.node, {}, "failed", f"what it answers to {subject.paths[0]} is no JSON object")
    values = shelf.take(list(flat(found))[:MAX_KEYS])
    if values is None:
        return Told(health.node, {}, "too large", "the other nodes' answers fill what a page holds; choose fewer nodes")
    return Told(health.node, values)


def flat(values: Mapping[str, object], prefix: str = "", depth: int = 0) -> Iterable[tuple[str, str]]:
    """Names and texts of what may be nested, a name inside another one behind a dot."""
    for name, value in values.items():
        if isinstance(value, dict) and value and depth < MAX_DEPTH:
            yield from flat(value, f"{prefix}{name}.", depth + 1)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
            yield f"{prefix}{name}"[:MAX_VALUE], _short(text)


def _short(text: str) -> str:
    if len(text) <= MAX_VALUE:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
    return f"{text[:MAX_VALUE]}… ({len(text)} characters, sha256 {digest})"


def whose(request: web.Request) -> Hashable:
    """What decides what a node tells a caller: its role, whether it is here, and a token for the nodes themselves."""
    caller = caller_of(request)
    own = None if caller.by_token else bearer_token(request)
    digest = None if own is None else hashlib.sha256(own.encode("utf-8", "replace")).digest()
    return caller.role, is_local_caller(request, through_frontends=True), digest


GATHERER: web.AppKey[Gatherer] = web.AppKey("gatherer", Gatherer)


async def gatherer(app: web.Application) -> AsyncIterator[None]:
    """Ends with the application what it asks."""
    app[GATHERER] = Gatherer()
    yield
    with contextlib.suppress(asyncio.CancelledError):
        await app[GATHERER].close()
