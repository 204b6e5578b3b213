"""Which nodes are up, what they are and which version they run: asked when somebody wants to know, not more often."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass

import aiohttp

from lmcache_frontend.nodes.node import Node
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.proxy.transport import Target, reason

PROBE_SECONDS = 2.0
"""How long one node has to answer."""

BOARD_SECONDS = 4.0
"""How long all nodes together have; those not asked by then are told as unknown."""

FRESH_SECONDS = 2.0
"""How long an answer is used again, however many pages are open."""

PROBES_AT_ONCE = 64
MAX_ANSWER_BYTES = 64 << 10
MAX_SHOWN_LENGTH = 60
"""Of a version or a role."""


@dataclass(frozen=True)
class NodeHealth:
    """What a node said. `up` is `None` when it was not asked in time; `problem` tells why it is not up."""

    node: Node
    up: bool | None
    role: str | None = None
    version: str | None = None
    milliseconds: float | None = None
    problem: str | None = None


class HealthBoard:
    """The health of all nodes, asked once for everybody who wants to know at the same time."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._round: asyncio.Task[list[NodeHealth]] | None = None
        self._round_ended = 0.0
        self._late: set[Node] = set()
        """Nodes that the last round did not get to; the next one asks them first."""

    async def read(self) -> list[NodeHealth]:
        """Every node's health, in the registry's order, not older than `FRESH_SECONDS`."""
        task = self._round
        if task is None or (task.done() and time.monotonic() - self._round_ended > FRESH_SECONDS):
            task = self._round = asyncio.create_task(self._ask_all(), name="health round")
        return await asyncio.shield(task)

    async def close(self) -> None:
        if self._round is not None:
            self._round.cancel()
            await asyncio.gather(self._round, return_exceptions=True)

    async def _ask_all(self) -> list[NodeHealth]:
        nodes = list(self._registry.nodes())
        gate = asyncio.Semaphore(PROBES_AT_ONCE)
        late_ones_first = sorted(nodes, key=lambda node: node not in self._late)
        tasks = {node: asyncio.create_task(self._ask(node, gate), name="probe") for node in late_ones_first}
        try:
            if tasks:
                await asyncio.wait(tasks.values(), timeout=BOARD_SECONDS)
        finally:
            for task in tasks.values():
                task.cancel()
        self._round_ended = time.monotonic()
        self._late = {node for node, task in tasks.items() if not task.done()}
        late = "not asked within the time for all nodes"
        return [NodeHealth(node, None, problem=late) if node in self._late else tasks[node].result() for node in nodes]

    async def _ask(self, node: Node, gate: asyncio.Semaphore) -> NodeHealth:
        async with gate:
            # A client of its own: a node whose pool is full of stuck calls is up, and 10,000 idle connections are none.
            target = Target(node.reach.address)
            try:
                clock = time.perf_counter()
                version = await asyncio.wait_for(_answer(target, f"{node.reach.prefix}/version"), PROBE_SECONDS)
                milliseconds = (time.perf_counter() - clock) * 1000
                return NodeHealth(node, True, await _role(node, target), _short(version), milliseconds)
            except asyncio.TimeoutError:
                return NodeHealth(node, False, problem=f"no answer within {PROBE_SECONDS:g} seconds")
            except (aiohttp.ClientError, OSError, ValueError) as error:
                return NodeHealth(node, False, problem=_problem(error))
            finally:
                await target.session.close()


async def _role(node: Node, target: Target) -> str | None:
    """What it says of its role; a node that has told its version is up whatever comes of this."""
    try:
        metadata = await asyncio.wait_for(_answer(target, f"{node.reach.prefix}/meta?names=role"), PROBE_SECONDS)
    except (aiohttp.ClientError, OSError, ValueError, asyncio.TimeoutError):
        return None
    return _short(metadata.get("role")) if isinstance(metadata, dict) else None


async def _answer(target: Target, path: str) -> object:
    """The JSON that the target answers, `None` where it has no such endpoint or answers something else.

    Raises:
        ValueError: it answers with an error of its own (5xx).
    """
    with target as session:
        async with session.get(target.url(path), allow_redirects=False) as response:
            body = await response.content.read(MAX_ANSWER_BYTES)
    if response.status >= 500:
        raise ValueError(f"answers {response.status}")
    try:
        return json.loads(body) if response.status == 200 else None
    except (ValueError, RecursionError):
        return None


def _short(value: object) -> str | None:
    return _printable(value[:MAX_SHOWN_LENGTH]) if isinstance(value, str) and value else None


def _printable(text: str) -> str:
    """JSON can hold half a character (a lone surrogate), which no page can."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _problem(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        # asyncio's own text names the address again; a name that cannot be resolved has a negative number
        number = error.errno or 0
        return os.strerror(number) if number > 0 else error.os_error.strerror or "cannot connect"
    if isinstance(error, aiohttp.ClientResponseError):
        return "answers something that is no HTTP"
    return _printable(reason(error))
