"""What somebody should look at first: nodes that are down or answer slowly, and those that stand out among their like.

A node stands out by the last minute, as the median of what it told, so that one odd interval is no alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from lmcache_frontend.pages.figures import Figures
from lmcache_frontend.pages.listing import Row, natural
from lmcache_frontend.pages.wording import count, share, span

MOST_OF_A_KIND = 3
"""So many are named of those that are down, that stand out, and that are slow; the others are counted."""

MINUTE_SLOTS = 12
LEAST_VALUES = 3
"""Of the last minute: fewer say nothing."""

MOST_LOOKED_AT = 16
"""Of a kind and a series: reading the past of every node would keep other pages waiting."""

LEAST_LIKE = 4
"""Nodes of a role and a model: among fewer none stands out."""

TIMES = 3.0
"""So many times the median of its like."""

LEAST_SECONDS = 0.05
"""What is faster is slow for nobody, however much faster the others are."""

LEAST_SHARE = 0.1
"""Where the others find less, little is nothing special."""


@dataclass(frozen=True)
class Attention:
    """A node and why; `chart` is the picture of its page that shows it."""

    row: Row
    why: str
    chart: str = ""
    times: float = 0.0


@dataclass(frozen=True)
class Found:
    """What is named, and how many more there are."""

    named: Sequence[Attention]
    more: int


def attention(rows: Sequence[Row], figures: Figures) -> Found:
    """What needs attention among these nodes."""
    down = _by_state(rows, lambda row: row.health.state == "down")
    slow = _by_state(rows, lambda row: row.health.state == "slow" or (row.health.answers and row.health.failures > 0))
    odd = standing_out([row for row in rows if row.health.answers], figures)
    named = [it for kind in (down, odd, slow) for it in kind[:MOST_OF_A_KIND]]
    known = {it.row.key for it in down + odd + slow}
    told: dict[tuple[str, str], Attention] = {}
    for it in named:
        told.setdefault(it.row.key, it)
    return Found(list(told.values()), len(known) - len(told))


def standing_out(rows: Sequence[Row], figures: Figures) -> list[Attention]:
    """Nodes that differ from most of their role and model, the farthest first."""
    found: dict[tuple[str, str], Attention] = {}
    for it in sorted(_all_odd(rows, figures), key=lambda it: (-it.times, natural(it.row.name))):
        found.setdefault(it.row.key, it)
    return list(found.values())


def _by_state(rows: Iterable[Row], takes: Callable[[Row], bool]) -> list[Attention]:
    chosen = sorted(filter(takes, rows), key=lambda row: natural(row.name))
    return [Attention(row, row.health.problem or row.health.state) for row in chosen]


def _all_odd(rows: Sequence[Row], figures: Figures) -> Iterable[Attention]:
    for series, title in (("retrieve_p95", "Retrieve p95"), ("store_p95", "Store p95")):
        chart = f"chart-{series[:-2]}50"
        for row, value, usual, like in _among_like(rows, figures, series, highest=True):
            if value >= LEAST_SECONDS and value >= TIMES * usual > 0:
                why = f"{title} {span(value)}: {value / usual:.0f} times the median of {like}"
                yield Attention(row, why, chart, value / usual)
    for row, value, usual, like in _among_like(rows, figures, "lookup_hit_rate", highest=False):
        if usual >= LEAST_SHARE and value * TIMES <= usual:
            why = f"Hit rate {share(value)}: the median of {like} is {share(usual)}"
            yield Attention(row, why, "chart-lookup_hit_rate", usual / value if value else 100.0)
    failing = [row for row in rows if row.value("failures")][:MOST_LOOKED_AT]
    for row, rate in _last_minute(failing, figures, "failures"):
        if rate:
            yield Attention(row, f"{count(rate)} failures a second", "chart-failures", TIMES)


def _among_like(
    rows: Sequence[Row], figures: Figures, series: str, *, highest: bool
) -> Iterable[tuple[Row, float, float, str]]:
    """The farthest nodes of each kind with their last minute, what is usual now, and among whom."""
    like: dict[tuple[str | None, str | None], list[tuple[float, Row]]] = {}
    for row in rows:
        value = row.value(series)
        if value is not None:
            like.setdefault((row.health.role, row.health.model), []).append((value, row))
    for (role, _), members in like.items():
        if len(members) >= LEAST_LIKE:
            usual = median(value for value, _ in members)
            members.sort(key=lambda it: it[0], reverse=highest)
            farthest = [row for _, row in members[:MOST_LOOKED_AT]]
            for row, value in _last_minute(farthest, figures, series):
                yield row, value, usual, f"{len(members)} {role or 'node'}s"


def _last_minute(rows: Sequence[Row], figures: Figures, series: str) -> Iterable[tuple[Row, float]]:
    """The median of what each node told in it, where that is enough."""
    past = figures.sparklines(series, [row.key for row in rows], MINUTE_SLOTS)
    for row in rows:
        known = [value for value in past.get(row.key, ()) if value is not None]
        if len(known) >= LEAST_VALUES:
            yield row, median(known)
