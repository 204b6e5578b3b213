"""The last hour of a node in slots of 5 seconds, and its last day in minutes: bounded, four bytes a value.

Slots are numbered from the clock's zero, the same for every node, so that no ring keeps times. NaN is a gap. A series
takes no memory before its first value: a controller has no tokens, a worker has no keys. With 23 series, of which a
worker has 21, a node takes up to 185 KB.
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

    __slots__ = ("_coarse", "_coarse_end", "_fine", "_fine_end", "_observed", "_rows", "_series")

    def __init__(self, series: Sequence[Series]) -> None:
        self._series = series
        self._rows: list[int | None] = [None] * len(series)
        """Where each series is in both arrays. An array for each would be 40,000 objects to the garbage collector."""
        self._fine: array[float] = array("f")
        self._coarse: array[float] = array("f")
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
        if self._fine_end == _BEFORE_ALL:
            self._fine_end = slot
        first = max(slot - slots + 1, min(self._fine_end, slot), slot - FINE_POINTS + 1)
        while first <= slot:  # minute by minute
            last = min(slot, first - first % FINE_PER_COARSE + FINE_PER_COARSE - 1)
            self._write(first, last, values)
            for name, seen in observed.items():
                self._observed[name] = _as_one(self._observed.get(name, []), seen)
            first = last + 1

    def _write(self, first: int, last: int, values: Sequence[float]) -> None:
        """The values of some slots of one minute."""
        self._settle(first // FINE_PER_COARSE)
        missed = range(max(self._fine_end, first - FINE_POINTS + 1), first)
        for place, value in enumerate(values):
            row = self._rows[place]
            if row is None:
                if math.isnan(value):
                    continue
                row = self._new_row(place)
            zero = row * FINE_POINTS
            for gap in missed:
                self._fine[zero + gap % FINE_POINTS] = _NAN
            for slot in range(first, last + 1):
                self._fine[zero + slot % FINE_POINTS] = value
        self._fine_end = last + 1

    def _new_row(self, place: int) -> int:
        row = self._rows[place] = len(self._fine) // FINE_POINTS
        self._fine.extend(_NO_FINE)
        self._coarse.extend(_NO_COARSE)
        return row

    def fine(self, place: int, start: int, end: int) -> array[float]:
        """The slots from `start` to before `end`."""
        return _cut(self._fine, self._rows[place], start, end, FINE_POINTS, self._fine_end)

    def coarse(self, place: int, start: int, end: int) -> array[float]:
        """The minutes from `start` to before `end`; the newest one as far as it is known."""
        if self._fine_end == _BEFORE_ALL:
            return _cut(self._coarse, None, start, end, COARSE_POINTS, end)
        newest = (self._fine_end - 1) // FINE_PER_COARSE
        found = _cut(self._coarse, self._rows[place], start, end, COARSE_POINTS, self._coarse_end)
        if start <= newest < end and newest >= self._coarse_end:
            found[newest - start] = self._minute(place, newest)
        return found

    def _settle(self, minute: int) -> None:
        """Write the minute that is whole now that something of `minute` comes."""
        newest = (self._fine_end - 1) // FINE_PER_COARSE
        if self._fine_end == _BEFORE_ALL or newest >= minute:
            return
        missed = range(max(self._coarse_end, newest - COARSE_POINTS + 1, 0), newest)
        for place, row in enumerate(self._rows):
            if row is None:
                continue
            zero = row * COARSE_POINTS
            if self._coarse_end != _BEFORE_ALL:
                for gap in missed:
                    self._coarse[zero + gap % COARSE_POINTS] = _NAN
            self._coarse[zero + newest % COARSE_POINTS] = self._minute(place, newest)
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


def _cut(kept: array[float], row: int | None, start: int, end: int, size: int, kept_end: int) -> array[float]:
    """A part of a row of rings whose newest slot is before `kept_end`; gaps where it has nothing."""
    found = array("f", [_NAN]) * max(end - start, 0)
    first, behind = max(start, kept_end - size, 0), min(end, kept_end)
    if row is None or first >= behind:
        return found
    zero, at, length = row * size, first % size, behind - first
    piece = kept[zero + at : zero + min(at + length, size)]
    if len(piece) < length:
        piece += kept[zero : zero + length - len(piece)]
    found[first - start : behind - start] = piece
    return found
