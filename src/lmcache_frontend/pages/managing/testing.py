"""Whether an entry can be reached, tried at this moment: as the health checks and the questions to proxies do it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timezone

from aiohttp import web

from lmcache_frontend.app import NEIGHBOURS
from lmcache_frontend.nodes.neighbours import NeighbourError
from lmcache_frontend.nodes.node import LOCAL_PROXY, Node, Proxy
from lmcache_frontend.telemetry.health.board import check, question
from lmcache_frontend.telemetry.health.states import NodeHealth, State, after
from lmcache_frontend.telemetry.names import Names


@dataclass(frozen=True)
class Tested:
    """What a try found; `text` is a sentence."""

    state: State
    text: str
    version: str | None = None
    milliseconds: float | None = None


async def test(app: web.Application, proxy: str, item: Node | Proxy) -> Tested:
    """Try to reach it; whatever comes of it is an outcome."""
    if isinstance(item, Proxy):
        try:
            told = await app[NEIGHBOURS].told_by(item)
        except NeighbourError as error:
            return Tested("down", f"It does not tell of its nodes: {error}")
        return Tested("up", f"It answers and tells of {told:,} node{'' if told == 1 else 's'}.")
    async with _names() as names:
        health = NodeHealth(item, proxy or LOCAL_PROXY)
        found = after(health, await check(health, question(item), names), datetime.now(timezone.utc))
    if not found.answers:
        return Tested(found.state, f"It does not answer: {found.problem}")
    version = f" with version {found.version}" if found.version else ", and tells of no version"
    return Tested(
        found.state, f"It answers in {found.milliseconds or 0:.1f} ms{version}.", found.version, found.milliseconds
    )


@contextlib.asynccontextmanager
async def _names() -> AsyncIterator[Names]:
    names = Names()
    try:
        yield names
    finally:
        await names.close()
