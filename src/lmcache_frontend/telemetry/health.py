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
from lmcache_frontend.proxy.transport import Target, Targets, reason

PROBE_SECONDS = 2.0
"""How long one node has to answer."""

BOARD_SECONDS = 4.0
"""How long all nodes together have; those not asked by then are told as unknown."""

FRESH_SECONDS = 2.0
"""How long an answer is used again, however many pages are open."""

PROBES_AT_ONCE = 64
MAX_ANSWER_BYTES = 64 << 10


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

    def __init__(self, registry: Registry, targets: Targets) -> None:
        self._registry = registry
        self._targets = targets
        self._round: asyncio.Task[list[NodeHealth]] | None = None
        self._round_ended = 0.0

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
        tasks = [asyncio.create_task(self._ask(node, gate), name=f"probe {node.name}") for node in nodes]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=BOARD_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
        self._round_ended = time.monotonic()
        late = "not asked within the time for all nodes"
        return [
            task.result() if task.done() and not task.cancelled() else NodeHealth(node, None, problem=late)
            for node, task in zip(nodes, tasks, strict=True)
        ]

    async def _ask(self, node: Node, gate: asyncio.Semaphore) -> NodeHealth:
        async with gate:
            try:
                return await asyncio.wait_for(_probe(node, await self._targets.get(node.address)), PROBE_SECONDS)
            except asyncio.TimeoutError:
                return NodeHealth(node, False, problem=f"no answer within {PROBE_SECONDS:g} seconds")
            except (aiohttp.ClientError, OSError, ValueError) as error:
                return NodeHealth(node, False, problem=_problem(error))


async def _probe(node: Node, target: Target) -> NodeHealth:
    clock = time.perf_counter()
    version = await _answer(target, "/version")
    milliseconds = (time.perf_counter() - clock) * 1000
    metadata = await _answer(target, "/meta?names=role")
    role = metadata.get("role") if isinstance(metadata, dict) else None
    return NodeHealth(node, True, _short(role), _short(version), milliseconds)


async def _answer(target: Target, path: str) -> object:
    """The JSON that the target answers, `None` where it has no such endpoint or answers something else.

    Raises:
        ValueError: it answers with an error of its own (5xx).
    """
    with target as session:
        async with session.get(target.url(path)) as response:
            body = await response.content.read(MAX_ANSWER_BYTES)
    if response.status >= 500:
        raise ValueError(f"answers {response.status}")
    try:
        return json.loads(body) if response.status == 200 else None
    except (ValueError, RecursionError):
        return None


def _short(value: object) -> str | None:
    return value[:100] if isinstance(value, str) and value else None


def _problem(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return os.strerror(error.errno) if error.errno else "cannot connect"
    return reason(error)
