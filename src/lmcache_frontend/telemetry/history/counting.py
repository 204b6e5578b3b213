"""What happened between two readings of a node: rates, and what its histograms observed.

A counter that fell, or that another number of samples tells, gives no rate for that interval: what was counted before
the fall cannot be known, and a worker that left a sum must not look like one that counted all of it anew. So a reset is
a gap of one interval, never a spike. A family that appears in a process that goes on began at zero: LMCache's
histograms and OpenTelemetry's counters are told from their first value on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lmcache_frontend.telemetry.history.reading import Buckets, Reading
from lmcache_frontend.telemetry.history.series import HISTOGRAMS, KEPT, STARTED, Series

NAN = math.nan

MAX_APART_SECONDS = 90.0
"""Readings further apart tell nothing of the last interval."""

Observed = tuple[tuple[float, ...], tuple[float, ...]]
"""Upper bounds, and how much was observed up to each within an interval."""


@dataclass(frozen=True)
class Point:
    """A node's values in the order of `KEPT`, and what each histogram observed, if that is known and not nothing.

    `started` is when its process began, in Unix time, where the node tells.
    """

    values: list[float]
    observed: dict[str, Observed] = field(default_factory=dict)
    restarted: bool = False
    started: float | None = None


def between(before: Reading | None, now: Reading) -> Point:
    """The point of `now`; without a reading `before` it has its gauges alone."""
    restarted = before is not None and _has_restarted(before, now)
    if before is not None and (restarted or not 0 < now.moment - before.moment <= MAX_APART_SECONDS):
        before = None
    observed = {}
    if before is not None:
        for name in HISTOGRAMS:
            found = _observed(name, before, now)
            if found is not None:
                observed[name] = found
    values = [_value(series, before, now, observed) for series in KEPT]
    started = now.scalars.get(STARTED) if now.samples.get(STARTED, 1) == 1 else None
    return Point(values, observed, restarted, started)


def quantile(observed: Observed, share: float) -> float:
    """As Prometheus' `histogram_quantile`: linear within a bucket; above the last bound it is that bound."""
    bounds, counts = observed
    total = counts[-1]
    if total <= 0:
        return NAN
    rank = share * total
    number = next(i for i, count in enumerate(counts) if count >= rank)
    upper = bounds[number]
    if upper == math.inf:
        return bounds[number - 1] if number else NAN
    lower, below = (bounds[number - 1], counts[number - 1]) if number else (min(0.0, upper), 0.0)
    inside = counts[number] - below
    return min(lower + (upper - lower) * (rank - below) / inside, upper) if inside > 0 else upper  # rounding exceeds it


def merged(all_observed: Iterable[Observed]) -> Observed | None:
    """What several nodes or intervals observed together; with different bounds, at those that all have."""
    by_bounds: dict[tuple[float, ...], list[float]] = {}
    for bounds, counts in all_observed:
        sums = by_bounds.get(bounds)
        if sums is None:
            by_bounds[bounds] = list(counts)
        else:
            for i, count in enumerate(counts):
                sums[i] += count
    if not by_bounds:
        return None
    if len(by_bounds) == 1:
        ((bounds, sums),) = by_bounds.items()
        return bounds, tuple(sums)
    common = tuple(sorted(set.intersection(*(set(bounds) for bounds in by_bounds))))
    parts = [dict(zip(bounds, sums, strict=True)) for bounds, sums in by_bounds.items()]
    return common, tuple(sum(part[bound] for part in parts) for bound in common)


def _has_restarted(before: Reading, now: Reading) -> bool:
    began, begins = before.scalars.get(STARTED), now.scalars.get(STARTED)
    return began is not None and begins is not None and began != begins


def _value(series: Series, before: Reading | None, now: Reading, observed: dict[str, Observed]) -> float:
    if series.kind == "quantile":
        found = observed.get(series.families[0])
        return NAN if found is None else quantile(found, series.quantile)
    if series.kind == "gauge":
        told = [now.scalars[name] for name in series.families if name in now.scalars]
        return sum(told) if told else NAN
    return NAN if before is None else _rate(series.families, before, now)


def _rate(families: Sequence[str], before: Reading, now: Reading) -> float:
    counted, is_told = 0.0, False
    for name in families:
        told = now.scalars.get(name)
        if told is None:
            continue
        earlier = before.scalars.get(name)
        is_told = True
        if earlier is None:
            if STARTED not in now.scalars:
                return NAN  # it may be another process
            counted += told
        elif told < earlier or now.samples.get(name) != before.samples.get(name):
            return NAN
        else:
            counted += told - earlier
    return counted / (now.moment - before.moment) if is_told else NAN


def _observed(name: str, before: Reading, now: Reading) -> Observed | None:
    told, earlier = now.histograms.get(name), before.histograms.get(name)
    if told is None:
        return None
    if earlier is None:
        if STARTED not in now.scalars:
            return None
        earlier = Buckets(told.bounds, (0.0,) * len(told.bounds), told.samples)
    if told.counts == earlier.counts or told.bounds != earlier.bounds or told.samples != earlier.samples:
        return None
    counts, most = [], 0.0
    for count, less in zip(told.counts, earlier.counts, strict=True):
        if count < less:
            return None
        most = max(most, count - less)  # so that what is odd is at least in order
        counts.append(most)
    return told.bounds, tuple(counts)
