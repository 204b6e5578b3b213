"""A store in this process's memory, and the parts of it that the SQLite store has too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from lmcache_frontend.nodes.stores import Change
from lmcache_frontend.nodes.stores.bounds import (
    MAX_RECORDS,
    growth,
    refuse_unkeepable,
    refuse_unkeepable_changes,
    too_many,
)


class MemoryStore:
    """Keeps records as long as the frontend runs: for tests, and for `--registry memory`."""

    description = "memory"
    is_shared = False

    def __init__(self) -> None:
        self._records: dict[str, str] = {}
        self._reports = Reports()
        self._news = News()

    async def open(self) -> None:
        """There is nothing to reach."""

    async def read(self) -> dict[str, str]:
        return dict(self._records)

    async def apply(self, changes: Sequence[Change]) -> bool:
        refuse_unkeepable_changes(self.description, changes)
        if any(self._records.get(change.key) != change.before for change in changes):
            return False
        if 0 < growth(changes) > MAX_RECORDS - len(self._records):
            raise too_many(self.description)
        for change in changes:
            if change.after is None:
                self._records.pop(change.key, None)
            else:
                self._records[change.key] = change.after
        if changes:
            self._news.tell()
        return True

    async def changed(self, seconds: float) -> bool:
        return await self._news.wait(seconds)

    async def report(self, key: str, value: str, *, keep_seconds: float, limit: int) -> bool:
        refuse_unkeepable(self.description, [(key, value)])
        return self._reports.keep(key, value, keep_seconds=keep_seconds, limit=limit)

    async def reports_mark(self) -> str:
        return str(self._reports.revision)

    async def reports(self) -> dict[str, str]:
        return self._reports.all()

    async def close(self) -> None:
        """There is nothing to leave."""


class Reports:
    """Heartbeats of one process, each until its time is over."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, float]] = {}
        self._earliest_end = float("inf")
        self.revision = 0
        """Another one whenever a report has come."""

    def keep(self, key: str, value: str, *, keep_seconds: float, limit: int) -> bool:
        """Keep it; false when `limit` other keys are kept already."""
        self._forget()
        if len(self._kept) - (key in self._kept) >= min(limit, MAX_RECORDS):
            return False
        end = time.monotonic() + keep_seconds
        self._kept[key] = (value, end)
        self.revision += 1
        self._earliest_end = min(self._earliest_end, end)
        return True

    def all(self) -> dict[str, str]:
        self._forget()
        return {key: value for key, (value, _) in self._kept.items()}

    def _forget(self) -> None:
        """Looks at every report only when one of them may be over."""
        now = time.monotonic()
        if now < self._earliest_end:
            return
        self._kept = {key: kept for key, kept in self._kept.items() if kept[1] > now}
        self._earliest_end = min((end for _, end in self._kept.values()), default=float("inf"))


class News:
    """Something has changed: told by many, waited for by one."""

    def __init__(self) -> None:
        self._fresh = False
        self._waiter: asyncio.Future[None] | None = None

    def tell(self) -> None:
        self._fresh = True
        if self._waiter is not None:
            _release(self._waiter)

    async def wait(self, seconds: float) -> bool:
        """Whether there is news since the last time that this said so; waits for it at most so long.

        Not `asyncio.wait_for`, which up to Python 3.11 forgets that it was cancelled when the news comes at that
        moment.
        """
        if not self._fresh:
            loop = asyncio.get_running_loop()
            waiter = self._waiter = loop.create_future()
            timer = loop.call_later(max(0.0, seconds), _release, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                self._waiter = None
        fresh, self._fresh = self._fresh, False
        return fresh


def _release(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
