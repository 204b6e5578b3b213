"""Which nodes are up, what they are and which version they run: every node is asked again and again, in turns.

A check is one `GET /version` on a connection of its own. Each node has a timer; the first checks begin as soon as
possible, the second ones at moments that are spread evenly over the interval, so that 1,000 nodes are 100 small
questions a second and no burst. A node that fails is asked again sooner, so that it is soon known to be down, or back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone

from lmcache_frontend.nodes.node import Node, Proxy
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.telemetry.client import Answer, NoAnswer, ask, request_bytes
from lmcache_frontend.telemetry.health.behind import from_the_way, not_reached
from lmcache_frontend.telemetry.health.changes import ChangeLog
from lmcache_frontend.telemetry.health.states import FALL, RISE, STATES, Checked, NodeHealth, State, after
from lmcache_frontend.telemetry.names import Names, NotAsked

__all__ = ["HealthBoard", "NodeHealth"]

logger = logging.getLogger(__name__)

CHECKS_AT_ONCE = 96
"""Fewer than what fits into a server's line: many nodes may lie behind one frontend."""

FAILING_AT_ONCE = 192
"""Of nodes that failed last time, beside the others: when they hang they delay no check of a node that answers."""

TICK_SECONDS = 0.1
"""Checks begin at multiples of this: most of what one costs is waking up for it, and a few share that."""

LOOK_SECONDS = 1.0
"""How often the registry is looked at for nodes that came or went."""

FIRST_PAUSE_SECONDS = 1.0
"""After a failure; it doubles with each further one, up to the interval."""

JITTER = 0.1
"""An interval is up to so much shorter or longer."""

ROLE_SECONDS = 300.0
"""How often a node is asked for its role beside its coming up and its change of version."""

MAX_TEXT_LENGTH = 100
"""Of a version or a role."""

_GOLDEN = 0.6180339887498949
"""Its multiples, less their whole part, lie evenly between 0 and 1, however many there are."""

_VERSION = re.compile(r"v?[0-9][0-9A-Za-z.+!_-]*", re.ASCII)
"""A version that stands there as bare text."""


class HealthBoard:
    """The health of every node of the registry, in one event loop.

    Args:
        registry: whose nodes are checked; what comes and goes there is noticed within a second.
        interval: the seconds between two checks of a node.
        rise: so many checks in a row bring a node up that was down.
        fall: so many failures in a row take one down that was up.
    """

    def __init__(self, registry: Registry, *, interval: float = 10.0, rise: int = RISE, fall: int = FALL) -> None:
        self._registry = registry
        self._interval = interval
        self._rise = rise
        self._fall = fall
        self._watched: dict[tuple[str, str], _Watched] = {}
        self._seen: list[tuple[str, tuple[Node, ...]]] = []
        self._added = 0
        self._lanes = (_Lane(CHECKS_AT_ONCE), _Lane(FAILING_AT_ONCE))
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsettled: set[_Watched] = set()
        self._settled = asyncio.Event()
        self._names = Names()
        self._log = ChangeLog()
        self._look_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.revision = 0
        """Another one whenever anything on the board has changed."""

    def start(self) -> None:
        """Check from now on, in the running event loop."""
        self._look_again()

    async def close(self) -> None:
        """Check no more; what is in flight ends at once."""
        self._closed = True
        if self._look_timer is not None:
            self._look_timer.cancel()
        for watched in self._watched.values():
            watched.stop()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=0.1)  # again, should one have forgotten it
        await self._names.close()
        self._log.close()

    def of(self, proxy_name: str, node_name: str) -> NodeHealth:
        """The health of this node of this proxy.

        Raises:
            KeyError: the registry has no such node.
        """
        node = self._registry.node(proxy_name, node_name)
        if node is None:
            raise KeyError((proxy_name, node_name))
        return self._health_of(proxy_name, node)

    def all(self) -> list[NodeHealth]:
        """Every node's health, in the registry's order."""
        return [health for _, found in self.by_proxy() for health in found]

    def by_proxy(self) -> Iterator[tuple[Proxy, list[NodeHealth]]]:
        """The same, proxy by proxy."""
        for proxy in self._registry.proxies():
            yield proxy, [self._health_of(proxy.name, node) for node in proxy.nodes]

    def counts(self) -> dict[State, int]:
        """How many nodes are in each state."""
        found = Counter(health.state for health in self.all())
        return {state: found[state] for state in STATES}

    async def settled(self, seconds: float) -> bool:
        """Wait until every node has been checked once, so many seconds at most; whether it is so."""
        self._look()
        if self._unsettled:
            waiting = asyncio.ensure_future(self._settled.wait())
            try:
                await asyncio.wait({waiting}, timeout=seconds)
            finally:
                waiting.cancel()
        return not self._unsettled

    def _health_of(self, proxy_name: str, node: Node) -> NodeHealth:
        watched = self._watched.get((proxy_name, node.name))
        known = watched is not None and (watched.health.node is node or watched.health.node == node)
        return watched.health if watched is not None and known else NodeHealth(node, proxy_name)

    def _look_again(self) -> None:
        try:
            self._look()
        finally:  # whatever the registry did
            if not self._closed:
                self._look_timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look_again)

    def _look(self) -> None:
        """Notice what has changed in the registry; nothing has while its tuples of nodes are the same objects."""
        if self._closed:
            return
        seen = [(proxy.name, proxy.nodes) for proxy in self._registry.proxies()]
        if len(seen) == len(self._seen) and all(
            name == old_name and nodes is old_nodes
            for (name, nodes), (old_name, old_nodes) in zip(seen, self._seen, strict=True)
        ):
            return
        self._seen = seen
        self.revision += 1
        wanted = {(name, node.name): node for name, nodes in seen for node in nodes}
        for key in [key for key in self._watched if key not in wanted]:
            self._forget(key)
        for key, node in wanted.items():
            watched = self._watched.get(key)
            if watched is not None and watched.reach == node.reach:
                if watched.health.node != node:
                    watched.health = replace(watched.health, node=node)
                continue
            if watched is not None:
                self._forget(key)
            self._watch(key, node)

    def _watch(self, key: tuple[str, str], node: Node) -> None:
        self._added += 1
        watched = self._watched[key] = _Watched(NodeHealth(node, key[0]), phase=(self._added * _GOLDEN) % 1)
        self._unsettled.add(watched)
        self._settled.clear()
        self._due(watched)

    def _forget(self, key: tuple[str, str]) -> None:
        watched = self._watched.pop(key)
        watched.stop()
        self._settle(watched)

    def _settle(self, watched: _Watched) -> None:
        self._unsettled.discard(watched)
        if not self._unsettled:
            self._settled.set()

    def _due(self, watched: _Watched) -> None:
        watched.due = time.monotonic()
        self._lanes[watched.failing].waiting.append(watched)
        self._begin()

    def _begin(self) -> None:
        """Begin as many of the waiting checks as there is room for."""
        for failing, lane in enumerate(self._lanes):
            while lane.waiting and lane.running < lane.room:
                watched = lane.waiting.popleft()
                if watched.stopped:
                    continue
                lane.running += 1
                watched.task = task = asyncio.create_task(self._check(watched), name="health check")
                self._tasks.add(task)
                task.add_done_callback(lambda task, w=watched, f=failing: self._ended(w, f, task))  # type: ignore[misc]

    def _ended(self, watched: _Watched, failing: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._lanes[failing].running -= 1
        if self._closed:
            return
        if not watched.stopped:
            self._settle(watched)
            seconds = pause(self._interval, watched.health, watched.phase if watched.checks == 1 else None)
            now = time.monotonic()
            moment = math.ceil(max(now, watched.due + seconds) / TICK_SECONDS) * TICK_SECONDS
            watched.timer = asyncio.get_running_loop().call_later(moment - now, self._due, watched)
        self._begin()

    async def _check(self, watched: _Watched) -> None:
        """Ask one node. Whatever comes of it is an outcome, and the next check follows."""
        watched.checks += 1
        version = watched.health.version
        found = await check(watched.health, watched.request, self._names)
        came_up = not watched.health.answers
        self._publish(watched, after(watched.health, found, _now(), rise=self._rise, fall=self._fall))
        is_due = came_up or watched.health.version != version or time.monotonic() >= watched.role_due
        if is_due and watched.health.answers and found.problem is None:
            await self._ask_role(watched)

    async def _ask_role(self, watched: _Watched) -> None:
        """Its role, model and instance; one that does not tell has none, one that fails to tell keeps what it had."""
        watched.role_due = time.monotonic() + ROLE_SECONDS * random.uniform(1 - JITTER, 1)  # noqa: S311 - a spread
        try:
            told = await ask(watched.reach.address, watched.role_request, self._names)
            configured = await ask(watched.reach.address, watched.instance_request, self._names)
        except (NoAnswer, NotAsked):
            return
        health = watched.health
        if told.status < 500:
            metadata = _object(told)
            health = replace(health, role=text_of(metadata.get("role")), model=text_of(metadata.get("model_name")))
        if configured.status < 500:
            health = replace(health, instance=text_of(_object(configured).get("lmcache_instance_id")))
        self._publish(watched, health)

    def _publish(self, watched: _Watched, health: NodeHealth) -> None:
        if watched.stopped:
            return
        changed = health.state != watched.health.state
        watched.health = health
        self.revision += 1
        if changed:
            self._log.note(health)


class _Lane:
    """Checks that wait for their turn, and how many of their kind run."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.running = 0
        self.waiting: deque[_Watched] = deque()


class _Watched:
    """One node, its timer and its check in flight."""

    def __init__(self, health: NodeHealth, *, phase: float) -> None:
        self.health = health
        self.phase = phase
        self.reach = health.node.reach
        self.request = question(health.node)
        self.role_request = request_bytes(
            self.reach.address, f"{self.reach.prefix}/meta?names=role,model_name", token=self.reach.token
        )
        self.instance_request = request_bytes(
            self.reach.address, f"{self.reach.prefix}/conf?names=lmcache_instance_id", token=self.reach.token
        )
        self.role_due = 0.0
        self.due = 0.0
        self.checks = 0
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None
        self.stopped = False

    @property
    def failing(self) -> bool:
        """Whether it may well hang this time."""
        return self.health.failures > 0

    def stop(self) -> None:
        self.stopped = True
        if self.timer is not None:
            self.timer.cancel()
        if self.task is not None:
            self.task.cancel()


def pause(interval: float, health: NodeHealth, phase: float | None = None) -> float:
    """The seconds until the next check of a node.

    Args:
        interval: the seconds between two checks of a node that is well.
        health: as the last check found it.
        phase: after the first check of a node, its place in the interval, from 0 to 1.
    """
    if health.failures or health.state == "down":
        seconds = min(interval, FIRST_PAUSE_SECONDS * 2.0 ** min(max(health.failures - 1, 0), 16))
    elif phase is not None:
        return phase * interval
    else:
        seconds = interval
    return seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - spreads, keeps no secret


async def check(health: NodeHealth, request: bytes, names: Names) -> Checked:
    """Ask a node once. Whatever comes of it is an outcome."""
    node, proxy = health.node, health.proxy
    try:
        return _outcome(await ask(node.reach.address, request, names), health)
    except NoAnswer as error:
        return Checked(from_the_way(str(error), node, proxy))
    except NotAsked as error:
        return Checked(from_the_way(str(error), node, proxy), asked=False)
    except Exception as error:
        logger.debug("a check failed", exc_info=True)
        return Checked(f"could not be asked: {type(error).__name__}", asked=False)


def question(node: Node) -> bytes:
    """What a check asks of a node."""
    reach = node.reach
    return request_bytes(reach.address, f"{reach.prefix}/version", token=reach.token)


def _outcome(answer: Answer, health: NodeHealth) -> Checked:
    """An answer below 500 is a node that is up, unless a frontend on the way has given it."""
    problem = not_reached(answer, health.node, health.proxy)
    if problem is not None or answer.status >= 500:
        return Checked(problem or f"answers {answer.status}")
    version = version_of(answer.body) if answer.status == 200 and answer.body is not None else None
    note = (
        "answers 401: it asks for a token, or for another one, as token in its entry" if answer.status == 401 else None
    )
    return Checked(note=note, milliseconds=answer.milliseconds, version=version)


def version_of(body: bytes) -> str | None:
    """A version as LMCache's servers write it, in quotes of either kind, or as bare text; `None` for anything else."""
    try:
        return text_of(json.loads(body))
    except (ValueError, RecursionError):
        text = body[: MAX_TEXT_LENGTH * 2].decode("utf-8", "replace").strip().strip("'")
        return text_of(text) if _VERSION.fullmatch(text) else None


def text_of(value: object) -> str | None:
    """A text that is short and can be shown, or `None`."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT_LENGTH or not value.isprintable():
        return None
    return value


def _object(answer: Answer) -> dict[str, object]:
    try:
        found = json.loads(answer.body) if answer.status == 200 and answer.body is not None else None
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _now() -> datetime:
    return datetime.now(timezone.utc)
