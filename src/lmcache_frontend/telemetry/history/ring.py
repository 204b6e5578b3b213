"""The last hour of a node in slots of 5 seconds, and its last day in minutes: bounded, four bytes a value.

Slots are numbered from the clock's zero, the same for every node, so that no ring keeps times. NaN is a gap. A series
takes no memory before its first value: a controller has no tokens, a worker has no keys. With 21 series, of which a
worker has 19, a node takes up to 165 KB.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from typing import Final

from lmcache_frontend.telemetry.history.counting import Observed, merged, quantile
from lmcache_frontend.telemetry.history.series import Series

FINE_POINTS: Final = 720
COARSE_POINTS: Final = 1440
FINE_PER_COARSE: Final = 12
"""Slots of 5 seconds in a minute."""

_NAN: Final = math.nan
_NO_FINE: Final = array("f", [_NAN]) * FINE_POINTS
_NO_COARSE: Final = array("f", [_NAN]) * COARSE_POINTS

_BEFORE_ALL: Final = -1


class Ring:
    """The values of some series, by their place in `series`.

    Args:
        series: what is kept, in the order in which `write` is given the values.
    """

    __slots__ = ("_coarse", "_coarse_end", "_fine", "_fine_end", "_observed", "_series")

    def __init__(self, series: Sequence[Series]) -> None:
        self._series = series
        self._fine: list[array[float] | None] = [None] * len(series)
        self._coarse: list[array[float] | None] = [None] * len(series)
        self._fine_end = _BEFORE_ALL
        """The slot behind the newest one that was written."""
        self._coarse_end = _BEFORE_ALL
        """The minute behind the newest one that is whole; that with `_fine_end` in it is not."""
        self._observed: dict[str, list[Observed]] = {}
        """Of the minute that is not whole, by histogram."""

    def write(self, slot: int, values: Sequence[float], observed: dict[str, Observed], slots: int = 1) -> None:
        """The values of `slot`, and of those before it that belong to the same answer; others in between are gaps.

        Args:
            slot: not before the newest one that was written; the same is written over.
            observed: by histogram, for the quantiles of the minute.
            slots: how many belong to the answer.
        """
        self._settle(slot // FINE_PER_COARSE)
        if self._fine_end == _BEFORE_ALL:
            self._fine_end = slot
        first = max(slot - slots + 1, min(self._fine_end, slot), slot - FINE_POINTS + 1)
        missed = range(max(self._fine_end, slot - FINE_POINTS + 1), first)
        for place, value in enumerate(values):
            kept = self._fine[place]
            if kept is None:
                if math.isnan(value):
                    continue
                kept = self._fine[place] = _NO_FINE[:]
            for gap in missed:
                kept[gap % FINE_POINTS] = _NAN
            for filled in range(first, slot + 1):
                kept[filled % FINE_POINTS] = value
        self._fine_end = slot + 1
        for name, seen in observed.items():
            self._observed[name] = _as_one(self._observed.get(name, []), seen)

    def fine(self, place: int, start: int, end: int) -> array[float]:
        """The slots from `start` to before `end`."""
        kept = self._fine[place]
        return _cut(kept, start, end, FINE_POINTS, self._fine_end)

    def coarse(self, place: int, start: int, end: int) -> array[float]:
        """The minutes from `start` to before `end`; the newest one as far as it is known."""
        if self._fine_end == _BEFORE_ALL:
            return _cut(None, start, end, COARSE_POINTS, end)
        newest = (self._fine_end - 1) // FINE_PER_COARSE
        found = _cut(self._coarse[place], start, end, COARSE_POINTS, self._coarse_end)
        if start <= newest < end and newest >= self._coarse_end:
            found[newest - start] = self._minute(place, newest)
        return found

    def _settle(self, minute: int) -> None:
        """Write the minute that is whole now that something of `minute` comes."""
        newest = (self._fine_end - 1) // FINE_PER_COARSE
        if self._fine_end == _BEFORE_ALL or newest >= minute:
            return
        missed = range(max(self._coarse_end, newest - COARSE_POINTS + 1, 0), newest)
        for place in range(len(self._series)):
            if self._fine[place] is None:
                continue
            kept = self._coarse[place]
            if kept is None:
                kept = self._coarse[place] = _NO_COARSE[:]
            if self._coarse_end != _BEFORE_ALL:
                for gap in missed:
                    kept[gap % COARSE_POINTS] = _NAN
            kept[newest % COARSE_POINTS] = self._minute(place, newest)
        self._coarse_end = newest + 1
        self._observed.clear()

    def _minute(self, place: int, minute: int) -> float:
        """A minute's value: the mean of its slots, or the quantile of all that was observed in it."""
        series = self._series[place]
        if series.kind == "quantile":
            seen = merged(self._observed.get(series.families[0], ()))
            return _NAN if seen is None else quantile(seen, series.quantile)
        return mean(self.fine(place, minute * FINE_PER_COARSE, (minute + 1) * FINE_PER_COARSE))


def mean(values: Sequence[float]) -> float:
    """Of those that are known."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else _NAN


def largest(values: Sequence[float]) -> float:
    """Of those that are known."""
    return max((value for value in values if not math.isnan(value)), default=_NAN)


def thin(values: Sequence[float], step: int, join: Callable[[Sequence[float]], float]) -> Sequence[float]:
    """One value for each `step`."""
    return values if step == 1 else [join(values[i : i + step]) for i in range(0, len(values), step)]


def _as_one(before: list[Observed], seen: Observed) -> list[Observed]:
    one = merged([*before, seen])
    return [] if one is None else [one]


def _cut(kept: array[float] | None, start: int, end: int, size: int, kept_end: int) -> array[float]:
    """A part of a ring whose newest slot is before `kept_end`; gaps where it has nothing."""
    found = array("f", [_NAN]) * max(end - start, 0)
    first, behind = max(start, kept_end - size, 0), min(end, kept_end)
    if kept is None or first >= behind:
        return found
    at, length = first % size, behind - first
    piece = kept[at : at + length]
    if len(piece) < length:
        piece += kept[: length - len(piece)]
    found[first - start : behind - start] = piece
    return found
