"""What a node's exposition says of the wanted families, found without reading the rest.

Nodes send the same families in the same order again and again. The order is learned once for each node; after that one
search from family to family passes over the text, in C, and only the wanted lines are looked at. That takes 60 to 90
us for a text of 57 KB, where splitting it into lines alone takes 80 (`benchmarks/history.py`). What is no number, or is
not said clearly, is as if it were not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from lmcache_frontend.telemetry.history.series import HISTOGRAMS, SCALARS, STARTED

MAX_SAMPLES: Final = 2000
"""Lines of one family that are read; a node with more has none of it."""

MAX_BOUNDS: Final = 200
"""Of a histogram."""

FRONTENDS: Final = b"\nlmcache_frontend_"

_BUCKETS: Final = {f"{name}_bucket".encode(): name for name in HISTOGRAMS}
_SCALARS: Final = {name.encode(): name for name in (*SCALARS, STARTED)}
_WANTED: Final = (*_SCALARS, *_BUCKETS)
_BEHIND_NAME: Final = frozenset(b"{ \t")


class Buckets(NamedTuple):
    """A histogram: its upper bounds with `inf` at the end, and how much was observed up to each."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    samples: int


@dataclass(frozen=True)
class Reading:
    """What one answer says, at a moment of the monotonic clock.

    `scalars` are summed up; of those that are told by several samples `samples` says by how many. A dictionary of
    numbers costs the garbage collector nothing, an object for each number would cost it more than reading does.
    """

    moment: float
    scalars: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, Buckets] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """The wanted families that a text has, in its order; and its number of lines, which changes when one joins them."""

    names: tuple[bytes, ...]
    lines: int


def read(text: bytes, moment: float, order: Order | None) -> tuple[Reading, Order]:
    """The text's wanted families, and the order for this node's next text."""
    text = b"\n" + text
    lines = text.count(b"\n")
    if order is not None and order.lines == lines:
        reading = _read_in(text, moment, order)
        if reading is not None:
            return reading, order
    order = Order(tuple(_names_in(text)), lines)
    return _read_in(text, moment, order) or Reading(moment), order


def is_of_a_frontend(text: bytes) -> bool:
    """Whether other nodes' metrics are in it."""
    return FRONTENDS in text


def _names_in(text: bytes) -> list[bytes]:
    found = {name: _find(text, name, 0) for name in _WANTED}
    return sorted((name for name, at in found.items() if at >= 0), key=found.__getitem__)


def _find(text: bytes, name: bytes, start: int) -> int:
    """Where the first line begins, from `start` on, whose name is this and no longer one; -1 for none."""
    for _ in range(MAX_SAMPLES):
        at = text.find(b"\n" + name, start) + 1
        if at == 0:
            break
        start = at + len(name)
        if text[start : start + 1] and text[start] in _BEHIND_NAME:
            return at
    return -1


def _read_in(text: bytes, moment: float, order: Order) -> Reading | None:
    """None when the text has another order."""
    reading = Reading(moment)
    position = 0
    for name in order.names:
        at = _find(text, name, position)
        if at < 0:
            return None
        scalar = _SCALARS.get(name)
        if scalar is not None:
            total, samples, position = 0.0, 0, at - 1
            for line, end in _lines(text, name, at):
                total += _number(line, len(name))
                samples, position = samples + 1, end
            if samples <= MAX_SAMPLES and math.isfinite(total):
                reading.scalars[scalar] = total
                if samples > 1:
                    reading.samples[scalar] = samples
        else:
            buckets, position = _buckets(text, name, at)
            if buckets is not None:
                reading.histograms[_BUCKETS[name]] = buckets
    return reading


def _lines(text: bytes, name: bytes, at: int) -> Iterator[tuple[bytes, int]]:
    """The lines of a family that stand together, and where each ends; at most one more than `MAX_SAMPLES`."""
    length = len(name)
    for _ in range(MAX_SAMPLES + 1):
        end = text.find(b"\n", at)
        if end < 0:
            end = len(text)
        yield text[at:end], end
        at = end + 1
        behind = text[at + length : at + length + 1]
        if not text.startswith(name, at) or not behind or behind[0] not in _BEHIND_NAME:
            return


def _number(line: bytes, length: int) -> float:
    """A sample's number; a timestamp behind it is passed over. NaN for what is none."""
    rest = line[max(line.rfind(b"}") + 1, length) :]
    try:
        return float(rest)
    except ValueError:
        words = rest.split(None, 2)
    try:
        return float(words[0]) if words else math.nan
    except ValueError:
        return math.nan


def _buckets(text: bytes, name: bytes, at: int) -> tuple[Buckets | None, int]:
    """A histogram whose label sets all have the same bounds, and where its lines end."""
    counts: dict[float, float] = {}
    samples, position = 0, at - 1
    for line, end in _lines(text, name, at):
        bound = _bound(line)
        counts[bound] = counts.get(bound, 0.0) + _number(line, len(name))
        samples, position = samples + 1, end
    bounds = tuple(sorted(counts))
    values = tuple(counts[bound] for bound in bounds)
    is_clear = (
        samples <= MAX_SAMPLES
        and len(bounds) <= MAX_BOUNDS
        and samples % len(bounds) == 0
        and bounds[-1] == math.inf
        and not any(map(math.isnan, bounds))
        and all(map(math.isfinite, values))
    )
    return (Buckets(bounds, values, samples) if is_clear else None), position


def _bound(line: bytes) -> float:
    """The value of the label `le`; NaN where there is none. Quotes inside another label's value have a backslash."""
    at = line.find(b'{le="')
    if at < 0:
        at = line.find(b',le="')
    if at < 0:
        return math.nan
    try:
        return float(line[at + 5 : line.find(b'"', at + 5)])
    except ValueError:
        return math.nan
