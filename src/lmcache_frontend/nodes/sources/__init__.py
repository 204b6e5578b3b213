"""Where the registry's nodes come from: each source is a task that publishes what it knows, and tells how it goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 5.0


class Source(Protocol):
    """A source of nodes.

    Attributes:
        name: under which it publishes, one of the registry's `SOURCES`.
        place: the file, URL or name that it reads, without passwords.
        problems: why it knows nothing new, or which of its entries cannot be used; one line each.
    """

    name: str
    place: str
    problems: Sequence[str]

    async def run(self) -> None:
        """Publish, again and again, until cancelled."""

    def reload(self) -> None:
        """Read again now, as SIGHUP asks for."""


class Sources:
    """Runs the sources side by side; the end of one is not the end of the others."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._tasks: list[asyncio.Task[None]] = []

    def __iter__(self) -> Iterator[Source]:
        return iter(self._sources)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(_keep_running(source), name=source.name) for source in self._sources]

    def reload(self) -> None:
        for source in self._sources:
            source.reload()

    async def close(self) -> None:
        await end(self._tasks)
        self._tasks = []


async def _keep_running(source: Source) -> None:
    while True:
        try:
            await source.run()
        except Exception:
            logger.exception("the source %s (%s) broke off; it begins again", source.name, source.place)
        await asyncio.sleep(AGAIN_SECONDS)


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait for their end."""
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()  # up to Python 3.11 `wait_for` forgets it when what it waits for ends at the same moment
        await asyncio.wait(waiting, timeout=0.2)
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


class Told:
    """Tells the log of problems when they are others than the last time, not at every reading."""

    def __init__(self, name: str, place: str) -> None:
        self._where = f"nodes of {name} ({place})"
        self._problems: Sequence[str] = ()

    def tell(self, problems: Sequence[str]) -> None:
        if list(problems) != list(self._problems):
            for problem in problems[:MAX_TOLD]:
                logger.warning("%s: %s", self._where, problem)
            if len(problems) > MAX_TOLD:
                logger.warning("%s: and %d problems more", self._where, len(problems) - MAX_TOLD)
            if not problems:
                logger.info("%s: all can be used again", self._where)
        self._problems = list(problems)


MAX_TOLD = 10
