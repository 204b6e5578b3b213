"""What happened lately: nodes that come, go, rise and fall, and what somebody changed through this frontend."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

Kind = Literal["up", "slow", "down", "unknown", "added", "removed", "version", "restarted", "setting", "operation"]

MAX_EVENTS = 1000
MAX_TEXT = 300
"""Characters of each text of an event."""

MAX_ALIKE = 20
"""Events of one kind that come together; the rest of them are one that counts them."""


@dataclass(frozen=True)
class Event:
    """`text` is one line that says it all; `who` is who changed something. `record` sets `number` and `time` (Unix)."""

    kind: Kind
    text: str
    proxy: str = ""
    node: str = ""
    who: str = ""
    detail: str = ""
    number: int = 0
    time: float = 0.0

    def as_json(self) -> dict[str, object]:
        return {
            "number": self.number,
            "time": round(self.time, 3),
            "kind": self.kind,
            "text": self.text,
            "proxy": self.proxy,
            "node": self.node,
            "who": self.who,
            "detail": self.detail,
        }


class Timeline:
    """The last `MAX_EVENTS` events, numbered from 1."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.revision = 0
        """The newest event's number."""
        self._now = now
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)

    def record(self, event: Event) -> Event:
        """Add an event; its texts are made short and printable."""
        self.revision += 1
        kept = Event(
            event.kind,
            shown(event.text),
            shown(event.proxy),
            shown(event.node),
            shown(event.who),
            shown(event.detail),
            number=self.revision,
            time=self._now(),
        )
        self._events.append(kept)
        return kept

    def record_all(self, events: Iterable[Event]) -> None:
        """Events that come together: of each kind a few, and one that counts the rest."""
        more: dict[Kind, list[Event]] = {}
        for event in events:
            more.setdefault(event.kind, []).append(event)
        for kind, alike in more.items():
            for event in alike[:MAX_ALIKE]:
                self.record(event)
            if len(alike) > MAX_ALIKE:
                self.record(Event(kind, f"and {len(alike) - MAX_ALIKE} more nodes: {kind}"))

    def newest(self, limit: int = 100, before: int | None = None) -> list[Event]:
        """The newest first; with `before` those with lower numbers alone."""
        older = (event for event in reversed(self._events) if before is None or event.number < before)
        return list(itertools.islice(older, limit))

    def since(self, number: int) -> list[Event]:
        """Those with higher numbers, the oldest first; what was dropped is not among them."""
        newer = itertools.takewhile(lambda event: event.number > number, reversed(self._events))
        return list(newer)[::-1]


def shown(text: str) -> str:
    """One short line that a page shows as it is."""
    line = text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text[: MAX_TEXT + 1])
    return line if len(line) <= MAX_TEXT else f"{line[:MAX_TEXT]}…"


TIMELINE: web.AppKey[Timeline] = web.AppKey("timeline", Timeline)
