"""Tells the log of changes of state: each once, and of a whole fleet's no more than somebody reads."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from lmcache_frontend.telemetry.health.states import NodeHealth

logger = logging.getLogger(__name__)

LINES_PER_SECOND = 10
MAX_SHOWN = 200
"""Characters of a name or a reason."""


class ChangeLog:
    """At most `LINES_PER_SECOND` lines, then how many more changes there were; in one event loop."""

    def __init__(self) -> None:
        self._lines = 0
        self._more: Counter[str] = Counter()
        self._level = logging.INFO
        self._timer: asyncio.TimerHandle | None = None

    def note(self, health: NodeHealth) -> None:
        """Its state is another one than before."""
        level = logging.INFO if health.state == "up" else logging.WARNING
        if not logger.isEnabledFor(level):
            return
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(1, self._second_over)
        if self._lines >= LINES_PER_SECOND:
            self._more[health.state] += 1
            self._level = max(self._level, level)
            return
        self._lines += 1
        reason = f": {_shown(health.problem)}" if health.problem else ""
        logger.log(level, "%s of %s is %s%s", _shown(health.node.name), _shown(health.proxy), health.state, reason)

    def close(self) -> None:
        """Tell the rest now."""
        if self._timer is not None:
            self._timer.cancel()
            self._second_over()

    def _second_over(self) -> None:
        self._timer = None
        if self._more:
            counts = ", ".join(f"{count} {state}" for state, count in self._more.items())
            logger.log(self._level, "and %d more nodes changed their state: %s", self._more.total(), counts)
        self._lines, self._level = 0, logging.INFO
        self._more.clear()


def _shown(text: str) -> str:
    """One line that a terminal shows as it is."""
    shown = text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"
