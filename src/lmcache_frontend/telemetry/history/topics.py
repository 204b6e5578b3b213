"""What a page can be told of as it changes, as server-sent events. Each reader is told what it does not know yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_frontend.telemetry.health.states import STATES, NodeHealth
from lmcache_frontend.telemetry.history.history import History, NodeKey
from lmcache_frontend.telemetry.history.series import SERIES
from lmcache_frontend.telemetry.history.timeline import Timeline
from lmcache_shared.responses import json_text

NODES_AT_ONCE = 100
"""Of one event: what it takes to write it is what others wait."""


class Reader:
    """Who reads a stream.

    Args:
        key: the node of the topic `node`.
        series: those of the topics `node` and `nodes`.
        number: of the newest event of the timeline that the reader has seen; `None`: all that there were.
    """

    def __init__(
        self,
        history: History,
        timeline: Timeline,
        health: HealthBoard,
        registry: Registry,
        *,
        key: NodeKey | None,
        series: Sequence[str],
        number: int | None,
    ) -> None:
        self._history = history
        self._timeline = timeline
        self._health = health
        self._registry = registry
        self._key = key
        self._series = series
        self._number = timeline.revision if number is None else min(number, timeline.revision)
        self._known: dict[str, int] = {}
        self._states: dict[NodeKey, NodeHealth] = {}

    def news(self, topic: str) -> Iterator[str]:
        """The events of a topic since the last time, of which there may be none."""
        return TOPICS[topic](self)

    def _is_new(self, topic: str, revision: int) -> bool:
        is_new = self._known.get(topic) != revision
        self._known[topic] = revision
        return is_new

    def _totals(self) -> Iterator[str]:
        latest = self._history.latest(None)
        if self._is_new("totals", 0 if latest is None else latest.revision):
            more = {"interval": self._history.interval, "problem": self._history.problem}
            yield _event("totals", {**self._history.row(None, SERIES), **more})

    def _node(self) -> Iterator[str]:
        latest = self._history.latest(self._key)
        if self._key is not None and self._is_new("node", 0 if latest is None else latest.revision):
            row = self._history.row(self._key, self._series)
            yield _event("node", {"proxy": self._key[0], "node": self._key[1], **row})

    def _nodes(self) -> Iterator[str]:
        before = self._known.get("nodes", -1)
        if not self._is_new("nodes", self._history.revision):
            return
        changed = [key for key in self._history.changed_since(before) if key is not None]
        there = [key for key in changed if self._registry.node(*key) is not None]
        for start in range(0, len(there), NODES_AT_ONCE):
            yield _event("nodes", [self._row(key) for key in there[start : start + NODES_AT_ONCE]])

    def _row(self, key: NodeKey) -> list[object]:
        row = self._history.row(key, self._series)
        return [*key, row["age"], list(row["values"].values()), row["problem"]]

    def _events(self) -> Iterator[str]:
        newer = self._timeline.since(self._number)
        if newer:
            self._number = newer[-1].number
            yield f"id: {self._number}\n" + _event("timeline", [event.as_json() for event in newer])

    def _health_changes(self) -> Iterator[str]:
        if not self._is_new("health", self._health.revision):
            return
        is_first = not self._states
        now = {(health.proxy, health.node.name): health for health in self._health.all()}
        changed = [health for key, health in now.items() if not _is_same(self._states.get(key), health)]
        gone = sorted(self._states.keys() - now.keys())
        self._states = now
        if is_first or changed or gone:
            counts = Counter(health.state for health in now.values())
            nodes = [[it.proxy, it.node.name, it.state, it.problem] for it in changed]
            states = {state: counts[state] for state in STATES}
            yield _event("health", {"states": states, "nodes": nodes, "gone": gone})


TOPICS: Mapping[str, Callable[[Reader], Iterator[str]]] = {
    "totals": Reader._totals,
    "nodes": Reader._nodes,
    "node": Reader._node,
    "timeline": Reader._events,
    "health": Reader._health_changes,
}


def _event(name: str, data: object) -> str:
    return f"event: {name}\ndata: {json_text(data)}\n\n"


def _is_same(before: NodeHealth | None, now: NodeHealth) -> bool:
    return before is not None and (before.state, before.problem) == (now.state, now.problem)
