"""The values that pages show of nodes and of the cluster. What was never recorded is a gap, and no number."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from aiohttp import web

from lmcache_frontend.app import HISTORY
from lmcache_frontend.telemetry.history.history import Frame, NodeKey, NoPast
from lmcache_frontend.telemetry.history.ranges import RANGES
from lmcache_frontend.telemetry.history.series import SERIES
from lmcache_frontend.telemetry.history.timeline import TIMELINE, Event

Values = Mapping[str, float | None]

HIT_RATES = ("lookup_hit_rate", "hit_rate")
"""The first that is known is shown: of what vLLM retrieves nearly all is there, whatever the cache has."""

HIT_RATE_PARTS = tuple(of for name in HIT_RATES if (of := SERIES[name].of) is not None)
"""Of what each is the ratio."""

TREND_POINTS = 90
"""Of a small picture: more would not be seen."""

SPARK_POINTS = 60
"""Five minutes."""

EVENTS = 50

OLD_ROUNDS = 3
"""Values that are older than so many intervals say how old they are."""

DEFAULT_RANGE = "1h"


def hit_rate_of(values: Values) -> float | None:
    """The hit rate that says most."""
    return next((value for name in HIT_RATES if (value := values.get(name)) is not None), None)


class Figures:
    """What is known at this moment."""

    def __init__(self, app: web.Application, span: str = DEFAULT_RANGE) -> None:
        self._history = app[HISTORY]
        self._timeline = app[TIMELINE]
        self._latest = self._history.latest_all()
        self.span = span if span in RANGES else DEFAULT_RANGE

    @property
    def revision(self) -> object:
        """Another one whenever there is something new."""
        return self._history.revision, self._timeline.revision

    @property
    def recording(self) -> bool:
        return self._history.recording

    @property
    def problem(self) -> str | None:
        """Why values come more seldom than usual."""
        return self._history.problem

    def of(self, proxy: str, node: str) -> tuple[Values, float | None]:
        """A node's newest values by series, and how many seconds old they are where they are old."""
        latest = self._latest.get((proxy, node))
        if latest is None:
            return {}, None
        age = self._history.age(latest)
        return latest.values, age if age is not None and age > OLD_ROUNDS * self._history.interval else None

    def started(self, proxy: str, node: str) -> float | None:
        """When a node's process began, where its metrics tell."""
        latest = self._latest.get((proxy, node))
        return None if latest is None or not latest.started else latest.started

    def total(self) -> Values:
        """The cluster's."""
        latest = self._history.latest(None)
        return {} if latest is None else latest.values

    def sparklines(
        self, series: str, keys: Iterable[NodeKey], points: int = SPARK_POINTS
    ) -> Mapping[NodeKey, Sequence[float | None]]:
        """The newest slots of a series for each of these nodes."""
        return self._history.sparklines(series, keys, points)

    def frame(self, series: Sequence[str], key: NodeKey | None = None, points: int = TREND_POINTS) -> Frame | None:
        """The chosen time of a node, or of the cluster; `None` where nothing is kept of it."""
        now = time.time()
        try:
            return self._history.frame(key, series, now - RANGES[self.span], now, points)
        except NoPast:
            return None

    def trends(self) -> Mapping[str, list[float | None]]:
        """The chosen time of the cluster's series."""
        frame = self.frame([series for series in SERIES if not SERIES[series].is_of_cluster])
        return {} if frame is None else frame.values

    def events(self) -> list[Event]:
        """What changed lately, the newest first."""
        return self._timeline.newest(EVENTS)
