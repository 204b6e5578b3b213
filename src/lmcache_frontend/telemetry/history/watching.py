"""What changes on the health board, as events."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_frontend.telemetry.health.states import NodeHealth
from lmcache_frontend.telemetry.history.timeline import Event, Timeline

LOOK_SECONDS = 1.0

START_SECONDS = 10.0
"""What is there until then was there before, and is no event: the sources tell of their nodes one after the other."""


class Watch:
    """Looks at the board again and again, and records what is different from before."""

    def __init__(self, health: HealthBoard, timeline: Timeline) -> None:
        self._health = health
        self._timeline = timeline
        self._seen: dict[tuple[str, str], NodeHealth] = {}
        self._revision = -1

    async def run(self) -> None:
        """Until cancelled."""
        until = asyncio.get_running_loop().time() + START_SECONDS
        while True:
            self.look(starting=asyncio.get_running_loop().time() < until)
            await asyncio.sleep(LOOK_SECONDS)

    def look(self, *, starting: bool = False) -> None:
        """Record what has changed since the last look; `starting`: a node that is new was there before."""
        if self._health.revision == self._revision:
            return
        self._revision = self._health.revision
        seen = {(health.proxy, health.node.name): health for health in self._health.all()}
        self._timeline.record_all(_changes(self._seen, seen, starting))
        self._seen = seen


def _changes(
    before: dict[tuple[str, str], NodeHealth], now: dict[tuple[str, str], NodeHealth], starting: bool
) -> Iterator[Event]:
    for (proxy, name), health in now.items():
        earlier = before.get((proxy, name))
        if earlier is health:
            continue
        if earlier is None and not starting:
            yield Event("added", f"{name} was added", proxy, name, detail=str(health.node.address))
        # A node that is found to be up when it is asked for the first time is what everybody expects.
        is_news = earlier is not None and earlier.state != health.state and earlier.checked is not None
        if is_news or (health.state == "down" and (earlier is None or earlier.state != "down")):
            yield Event(health.state, f"{name} is {health.state}", proxy, name, detail=health.problem or "")
        if earlier is not None and earlier.version and health.version and earlier.version != health.version:
            text = f"{name} runs version {health.version}, before {earlier.version}"
            yield Event("version", text, proxy, name)
    for proxy, name in before.keys() - now.keys():
        yield Event("removed", f"{name} was removed", proxy, name)
