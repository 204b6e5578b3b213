"""What a node can do: which endpoints it serves, found by asking with a method that changes nothing.

An endpoint that is there answers 405 to OPTIONS, one that is not 404: with our servers, with LMCache's (FastAPI) and
through further frontends alike. What was found holds for a while, and until the node is another one.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from aiohttp import web

from lmcache_frontend.pages.asking import Question
from lmcache_frontend.pages.gathering import whose
from lmcache_frontend.pages.tabs import Tab, View

MAX_NODES = 1000
"""So many are remembered, each for those who may ask it the same; those that were looked at last."""

KEPT_SECONDS = 60.0
PROBE_SECONDS = 3.0
AT_ONCE = 8

_NOT_THERE = frozenset({404, 501, 503})


@dataclass(frozen=True)
class _Known:
    node: object
    until: float
    lacks: frozenset[str]


class Abilities:
    """Remembers what nodes cannot do."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()

    async def tabs(self, view: View, tabs: Iterable[Tab]) -> list[Tab]:
        """The tabs that this node can fill; of one that does not answer those that it could when it last did."""
        all_tabs = list(tabs)
        key = (view.proxy, view.node.name, whose(view.request))  # a node that refuses one caller tells another one
        health = view.health
        is_node = (view.node.reach, health.version, health.role)
        known = self._known.get(key)
        fresh = known is not None and known.node == is_node and time.monotonic() < known.until
        if not fresh and health.answers:
            lacks = await self._probe(view, all_tabs)
            if lacks is not None:
                known = self._known[key] = _Known(is_node, time.monotonic() + KEPT_SECONDS, lacks)
                self._known.move_to_end(key)
                while len(self._known) > MAX_NODES:
                    self._known.popitem(last=False)
        if known is None:
            return [tab for tab in all_tabs if not (tab.serves or tab.answers)]
        return [
            tab
            for tab in all_tabs
            if not known.lacks.intersection((*tab.serves, f"GET {tab.answers}", f"setting {tab.setting}"))
        ]

    async def _probe(self, view: View, tabs: list[Tab]) -> frozenset[str] | None:
        """What it lacks; None when it does not answer."""
        served = {path for tab in tabs for path in tab.serves}
        answered = {tab.answers for tab in tabs if tab.answers}
        room = asyncio.Semaphore(AT_ONCE)

        async def ask(method: str, path: str) -> int:
            async with room:
                outcome = await view.ask(Question(method, path, seconds=PROBE_SECONDS))
                return 0 if outcome.kind in ("offline", "late") else outcome.status

        probes = [("OPTIONS", path) for path in sorted(served)] + [("GET", path) for path in sorted(answered)]
        statuses = await asyncio.gather(*(ask(*probe) for probe in probes))
        if 0 in statuses:
            return None
        settings = sorted({tab.setting for tab in tabs if tab.setting})
        told = await view.ask(Question("GET", f"/conf?names={','.join(settings)}", seconds=PROBE_SECONDS))
        off = {f"setting {name}" for name, value in told.object().items() if told.ok and value is False}
        lacks = off
        for (method, path), status in zip(probes, statuses, strict=True):
            if method == "OPTIONS" and status == 404:
                lacks.add(path)
            elif method == "GET" and status in _NOT_THERE:
                lacks.add(f"GET {path}")
        return frozenset(lacks)


ABILITIES: web.AppKey[Abilities] = web.AppKey("abilities", Abilities)
