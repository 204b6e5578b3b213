"""The latest values and the past of every node, and of the cluster as a whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lmcache_frontend.telemetry.health.states import State
from lmcache_frontend.telemetry.history.clock import Clock
from lmcache_frontend.telemetry.history.counting import Observed, Point, merged, quantile
from lmcache_frontend.telemetry.history.ring import (
    COARSE_POINTS,
    FINE_PER_COARSE,
    FINE_POINTS,
    Ring,
    largest,
    mean,
    thin,
)
from lmcache_frontend.telemetry.history.series import KEPT, KEPT_OF_CLUSTER, SERIES, Series

SLOT_SECONDS = 5.0

MAX_NODES = 2000
"""Nodes with a past, which is 370 MiB at most; of further ones the latest values are known, and they count in the
cluster's totals.
"""

FORGET_SECONDS = 3600.0
"""A node that has left the registry for so long is forgotten; one that is back before goes on."""

MAX_LEFT = 10_000
"""Nodes that have left and are not forgotten yet; those that left first go first."""

DIGITS = 7
"""What a float of four bytes has; more would be noise, and long."""

NodeKey = tuple[str, str]
"""The names of a proxy and of its node."""

_KEYS = tuple(series.key for series in KEPT)
_PLACES = {series.key: place for place, series in enumerate(KEPT_OF_CLUSTER)}


@dataclass(frozen=True)
class Latest:
    """What was last known of a node, or of the cluster.

    Attributes:
        time: when, in Unix time as it was then; `History.age` says how old it is now.
        moment: the same by the clock that never jumps.
        values: by series; `None` where nothing is known.
        problem: why the last attempt gave nothing. Then the values are of the attempt before.
        revision: of the history, when this was written.
        started: when the node's process began, in Unix time, where it tells.
    """

    time: float | None = None
    moment: float | None = None
    values: Mapping[str, float | None] = field(default_factory=dict)
    problem: str | None = None
    revision: int = 0
    started: float | None = None


@dataclass(frozen=True)
class Frame:
    """Some series over a time, in columns: `times` are where the steps begin, in Unix time; `None` is a gap."""

    start: float
    end: float
    step: float
    times: list[float]
    values: dict[str, list[float | None]]


class NoPast(LookupError):
    """A node of which nothing was ever recorded, or no past is kept."""


class _Node:
    def __init__(self) -> None:
        self.ring: Ring | None = None
        self.latest = Latest()
        self.left: float | None = None
        """The moment since which the registry has it no longer."""


class _Round:
    """What is summed up of all nodes while a round goes on."""

    def __init__(self) -> None:
        self.sums: list[float | None] = [None] * len(KEPT)
        self.observed: dict[str, Observed] = {}
        self.nodes = 0

    def add(self, point: Point) -> None:
        self.nodes += 1
        for place, value in enumerate(point.values):
            if not math.isnan(value):
                self.sums[place] = (self.sums[place] or 0.0) + value
        for name, seen in point.observed.items():
            before = self.observed.get(name)
            together = seen if before is None else merged((before, seen))
            if together is not None:
                self.observed[name] = together


class History:
    """Rings by node, and one for the cluster; in one event loop.

    Args:
        recording: whether anybody records anything.
        slot_seconds: the length of a slot.
        max_nodes: how many have a past.
    """

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        recording: bool = True,
        slot_seconds: float = SLOT_SECONDS,
        max_nodes: int = MAX_NODES,
    ) -> None:
        self.clock = clock or Clock()
        self.recording = recording
        self.slot_seconds = slot_seconds
        self.interval = slot_seconds
        """The seconds between two questions to a node."""
        self.problem: str | None = None
        """Why the interval is longer than a slot."""
        self.revision = 0
        """Another one whenever a latest value is."""
        self._max_nodes = max_nodes
        self._nodes: dict[NodeKey, _Node] = {}
        self._rings = 0
        self._cluster = Ring(KEPT_OF_CLUSTER)
        self._total = Latest()
        self._round = _Round()

    def slot(self) -> int:
        """The slot of now."""
        return int(self.clock.now() // self.slot_seconds)

    def record(self, key: NodeKey, point: Point, slot: int, slots: int = 1) -> None:
        """A node's answer in the round of `slot`, which stands for so many slots."""
        node = self._node(key)
        if node.ring is not None:
            node.ring.write(slot, point.values, point.observed, slots)
        node.latest = replace(self._latest(dict(zip(_KEYS, point.values, strict=True))), started=point.started)
        self._round.add(point)

    def note(self, key: NodeKey, problem: str) -> None:
        """A node has given nothing, and why."""
        node = self._node(key)
        if node.latest.problem != problem:
            self.revision += 1
            node.latest = replace(node.latest, problem=problem, revision=self.revision)

    def end_round(self, slot: int, slots: int, states: Mapping[State, int]) -> None:
        """The cluster's totals of the round of `slot`; `states` are how many nodes are in each."""
        ended, self._round = self._round, _Round()
        values = [_known(value) for value in ended.sums]
        for place, series in enumerate(KEPT):
            if series.kind == "quantile":
                seen = ended.observed.get(series.families[0])
                values[place] = math.nan if seen is None else quantile(seen, series.quantile)
        counts: dict[str, int] = {f"nodes_{state}": count for state, count in states.items()} | {
            "nodes_recorded": ended.nodes
        }
        values += [_known(counts.get(series.key)) for series in KEPT_OF_CLUSTER[len(KEPT) :]]
        self._cluster.write(slot, values, ended.observed, slots)
        self._total = self._latest(dict(zip((series.key for series in KEPT_OF_CLUSTER), values, strict=True)))

    def keep(self, known: Collection[NodeKey]) -> None:
        """Forget the nodes that are not known for long enough."""
        now = self.clock.now()
        for key, node in self._nodes.items():
            node.left = None if key in known else node.left if node.left is not None else now
        left = sorted((node.left, key) for key, node in self._nodes.items() if node.left is not None)
        surplus = len(left) - MAX_LEFT
        if self._rings >= self._max_nodes:  # those that are there come first
            surplus = max(surplus, sum(self._nodes[key].ring is None for key in known if key in self._nodes))
        for number, (since, key) in enumerate(left):
            if number < surplus or now - since >= FORGET_SECONDS:
                self._rings -= self._nodes.pop(key).ring is not None

    def latest(self, key: NodeKey | None) -> Latest | None:
        """What is last known of a node, or with `None` of the cluster; `None` when nothing ever was."""
        if key is None:
            return self._total if self._total.time is not None else None
        node = self._nodes.get(key)
        return None if node is None else node.latest

    def latest_all(self) -> Mapping[NodeKey, Latest]:
        """Of every node, also of those that have left and are not forgotten."""
        return {key: node.latest for key, node in self._nodes.items()}

    def changed_since(self, revision: int) -> list[NodeKey | None]:
        """The nodes whose latest values are newer than that revision; `None` stands for the cluster."""
        found: list[NodeKey | None] = [None] if self._total.revision > revision else []
        return found + [key for key, node in self._nodes.items() if node.latest.revision > revision]

    def age(self, latest: Latest) -> float | None:
        """The seconds since its values were told."""
        return None if latest.moment is None else max(self.clock.now() - latest.moment, 0.0)

    def row(self, key: NodeKey | None, series: Iterable[str]) -> dict[str, Any]:
        """The latest values of some series as JSON has them, with their age; also of a node that never told any."""
        latest = self.latest(key) or Latest()
        age = self.age(latest)
        return {
            "time": None if latest.time is None else round(latest.time, 3),
            "age": None if age is None else round(age, 1),
            "problem": latest.problem,
            "values": {name: None if (it := latest.values.get(name)) is None else rounded(it) for name in series},
        }

    def frame(self, key: NodeKey | None, series: Sequence[str], start: float, end: float, points: int = 300) -> Frame:
        """Some series of a node, or with `None` of the cluster, from one Unix time to another.

        Within the last hour a step is 5 seconds or a multiple, further back a minute or a multiple, such that there are
        at most so many points.

        Raises:
            KeyError: there is no such series.
            NoPast: nothing is kept of the node.
        """
        ring = self._ring(key)
        definitions = [_series(name, key) for name in series]
        newest = self.slot()
        first, last = (int(self.clock.moment(stamp) // self.slot_seconds) for stamp in (start, end))
        last = min(last, newest)
        # An hour back is a slot more than an hour has, and `newest` may be the next one already.
        is_fine = first >= newest - FINE_POINTS - 1
        unit, kept = (1, FINE_POINTS) if is_fine else (FINE_PER_COARSE, COARSE_POINTS)
        first, last = max(first // unit, newest // unit - kept + 1), last // unit
        step = max(-(-(last - first + 1) // points), 1)
        while last // step - first // step + 1 > points:
            step += 1
        first -= first % step
        cut = ring.fine if is_fine else ring.coarse

        def values_of(place: int) -> Sequence[float]:
            join = largest if KEPT_OF_CLUSTER[place].thinned == "max" else mean
            return thin(cut(place, first, last + 1), step, join)

        values = {definition.key: _told(_values(definition, values_of)) for definition in definitions}
        seconds = unit * self.slot_seconds
        zero = self.clock.stamp(first * seconds)
        times = [round(zero + i * seconds, 3) for i in range(0, max(last - first + 1, 0), step)]
        return Frame(zero, self.clock.stamp((last + 1) * seconds), step * seconds, times, values)

    def sparklines(self, series: str, keys: Iterable[NodeKey], points: int = 60) -> dict[NodeKey, list[float | None]]:
        """The newest slots of a series of many nodes, oldest first; of a node without a past nothing.

        Raises:
            KeyError: nodes have no such series.
        """
        end = self.slot() + 1
        start = end - min(points, FINE_POINTS)
        found = {}
        for key in keys:
            definition, node = _series(series, key), self._nodes.get(key)
            ring = None if node is None else node.ring
            if ring is not None:
                cut = functools.partial(ring.fine, start=start, end=end)
                found[key] = _told(_values(definition, cut))
        return found

    def _latest(self, values: dict[str, float]) -> Latest:
        self.revision += 1
        now = self.clock.now()
        told: dict[str, float | None] = {key: value if math.isfinite(value) else None for key, value in values.items()}
        for series in SERIES.values():
            if series.of is not None:
                part, whole = (told.get(key) for key in series.of)
                told[series.key] = part / whole if part is not None and whole else None
        return Latest(self.clock.stamp(now), now, told, None, self.revision)

    def _node(self, key: NodeKey) -> _Node:
        node = self._nodes.setdefault(key, _Node())
        if node.ring is None and self._rings < self._max_nodes:
            node.ring = Ring(KEPT)
            self._rings += 1
        return node

    def _ring(self, key: NodeKey | None) -> Ring:
        if key is None:
            return self._cluster
        node = self._nodes.get(key)
        if node is None:
            raise NoPast("nothing was recorded of it yet")
        if node.ring is None:
            raise NoPast(f"the past of {self._max_nodes} nodes is kept, and it is one more")
        return node.ring


def _series(name: str, key: NodeKey | None) -> Series:
    """Raises:
    KeyError: there is no such series, or none of a node.
    """
    series = SERIES[name]
    if series.is_of_cluster and key is not None:
        raise KeyError(name)
    return series


def _values(series: Series, values_of: Callable[[int], Sequence[float]]) -> Sequence[float]:
    """A series' values; a ratio is that of means, and so that of the sums: both series have the same gaps."""
    if series.of is None:
        return values_of(_PLACES[series.key])
    parts, wholes = (values_of(_PLACES[key]) for key in series.of)
    return [part / whole if whole else math.nan for part, whole in zip(parts, wholes, strict=True)]


def _told(values: Iterable[float]) -> list[float | None]:
    return [rounded(value) if math.isfinite(value) else None for value in values]


def rounded(value: float) -> float:
    """As exact as what is kept."""
    return float(f"{value:.{DIGITS}g}")


def _known(value: float | None) -> float:
    return math.nan if value is None else float(value)
