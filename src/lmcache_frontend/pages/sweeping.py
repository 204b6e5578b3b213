"""Many things that each take a while, some at a time, all within a time: how pages ask a thousand nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

Job = Callable[[], Awaitable[None]]


async def sweep(jobs: Iterable[Job], *, at_once: int, seconds: float) -> None:
    """Do the jobs in their order, so many at a time. After `seconds` none begins and those in flight are cancelled."""
    waiting = iter(jobs)

    async def work() -> None:
        for job in waiting:
            await job()

    workers = [asyncio.create_task(work(), name="sweep") for _ in range(at_once)]
    try:
        await asyncio.wait(workers, timeout=seconds)
    finally:
        for worker in workers:
            worker.cancel()
        ended = await asyncio.gather(*workers, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error


class Turns:
    """Lets others have their turn in a loop that is long: `await turns.next()` in each round.

    Args:
        seconds: how long the loop may keep everything else waiting.
    """

    def __init__(self, seconds: float = 0.005) -> None:
        self._seconds = seconds
        self._begun = time.monotonic()

    async def next(self) -> None:
        if time.monotonic() - self._begun > self._seconds:
            await asyncio.sleep(0)
            self._begun = time.monotonic()
