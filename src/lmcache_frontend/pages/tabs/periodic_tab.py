"""The node's periodic threads: which of them are late or fail, when each ran last and how often it does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from lmcache_frontend.pages.asking import Outcome
from lmcache_frontend.pages.reading import listed, number, record, text
from lmcache_frontend.pages.tabs import Tab, View

MAX_THREADS = 500
LEVELS = ("critical", "high", "medium", "low")
_GRAVE = LEVELS[:2]
"""A thread of these levels that is late makes its component unhealthy."""

_ORDER = ("down", "slow", "up", "unknown")


@dataclass(frozen=True)
class Row:
    """A thread: `state` is one of the four that nodes have, `word` says what it means here."""

    name: str
    level: str
    state: str
    word: str
    told: Mapping[str, Any]

    @property
    def last(self) -> Mapping[str, Any]:
        """How its last run went."""
        return record(self.told.get("last_summary"))

    @property
    def ago(self) -> float | None:
        return number(self.told.get("last_run_ago"))

    @property
    def interval(self) -> float | None:
        return number(self.told.get("interval"))

    @property
    def seconds(self) -> float | None:
        """Of the last run."""
        milliseconds = number(self.last.get("duration_ms"))
        return None if milliseconds is None else milliseconds / 1000

    @property
    def runs(self) -> float | None:
        return number(self.told.get("total_runs"))

    @property
    def failures(self) -> float | None:
        return number(self.told.get("failed_runs"))

    @property
    def details(self) -> list[tuple[str, str]]:
        """What it tells of its last run beside that."""
        return [(str(name), text(value)) for name, value in record(self.last.get("extra_info")).items()]


def row_of(told: Mapping[str, Any]) -> Row:
    """A thread as the node tells it."""
    level = text(told.get("level"))
    last = told.get("last_summary")
    state, word = "up", "on time"
    if not told.get("is_running"):
        state, word = "unknown", "stopped"
    elif not told.get("is_active"):
        state, word = ("down" if level in _GRAVE else "slow"), "late"
    elif isinstance(last, dict) and last.get("success") is False:
        state, word = "slow", "last run failed"
    elif last is None:
        word = "has not run yet"
    return Row(text(told.get("name")), level, state, word, told)


async def show(view: View) -> Mapping[str, object]:
    wanted = view.query("thread")
    if wanted:
        outcome = await view.get(f"/periodic-threads/{quote(wanted, safe='')}")
        return {"outcome": outcome, "one": row_of(outcome.object()) if outcome.ok else None, "wanted": wanted}
    outcome, health = await asyncio.gather(view.get("/periodic-threads"), view.get("/periodic-threads-health"))
    return {"outcome": outcome, "one": None, **_list(view, outcome, health)}


def _list(view: View, outcome: Outcome, health: Outcome) -> dict[str, object]:
    everything = [row_of(record(it)) for it in listed(outcome.object().get("threads"))[:MAX_THREADS]]
    chosen, level = view.query("show"), view.query("level")
    rows = [
        row
        for row in everything
        if (not level or row.level == level) and (chosen != "problems" or row.state in ("down", "slow"))
    ]
    rows.sort(
        key=lambda row: (_ORDER.index(row.state), LEVELS.index(row.level) if row.level in LEVELS else 9, row.name)
    )
    told = health.object()
    return {
        "rows": rows,
        "total": len(everything),
        "summary": record(outcome.object().get("summary")),
        "healthy": told.get("healthy") if health.ok else None,
        "late": number(told.get("unhealthy_count")),
        "failures": sum(row.failures or 0 for row in everything),
        "levels": [level for level in LEVELS if any(row.level == level for row in everything)],
    }


TAB = Tab("periodic", "Periodic threads", 25, show, serves=("/periodic-threads",), refresh=5)
