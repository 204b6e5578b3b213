"""Work that may take time, kept off the event loop: few threads, a bounded queue, a deadline.

A thread cannot be stopped from outside. When the deadline passes, the caller gets its answer (504) and the call goes
on in its thread, or is never made when it still stood in line; its place is free again only when a thread is done with
it, so stuck calls fill the pool and further ones are refused (503) instead of piling up. The threads are daemons, which
those of `concurrent.futures` are not: a stuck call never keeps the process, least of all a host's, from ending.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lmcache_shared.errors import Refusal

T = TypeVar("T")

_MEANT_FOR_OTHERS = (
    asyncio.CancelledError, concurrent.futures.CancelledError, StopIteration, GeneratorExit, SystemExit,
    KeyboardInterrupt,
)  # fmt: skip
"""What a future or the loop would take for a word to itself; from a call it is a failure like others."""


class _Call:
    """A call in line, which either a thread makes or its caller gives up: whoever claims it first."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._unclaimed = [True]

    def claim(self) -> bool:
        try:
            return self._unclaimed.pop()
        except IndexError:
            return False


class BlockingPool:
    """At most `threads` calls at once and `waiting` more in line; threads start when they are needed."""

    def __init__(self, name: str, *, threads: int = 4, waiting: int = 64) -> None:
        self._name = name
        self._max_threads = threads
        self._max_calls = threads + waiting
        self._threads = 0
        self._calls = 0
        self._line: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()

    async def run(self, call: Callable[[], T], *, seconds: float, what: str) -> T:
        """The result of `call()`, made in a thread; what it raises is raised here.

        Raises:
            Refusal: 503 when the pool is full, 504 when `seconds` pass; the text names `what`.
        """
        if self._calls >= self._max_calls:
            raise Refusal(503, f"{what}: too many calls wait already; try again later", {"Retry-After": "1"})
        self._calls += 1
        if self._threads < min(self._calls, self._max_threads):
            self._threads += 1
            name = f"{self._name}-{self._threads}"
            threading.Thread(target=_work, args=(self._line,), name=name, daemon=True).start()
        waiting = _Call(call)
        work: asyncio.Future[T] = asyncio.wrap_future(waiting.future)
        work.add_done_callback(self._leave)
        self._line.put(waiting)
        try:
            done, _ = await asyncio.wait({work}, timeout=seconds)
        except asyncio.CancelledError:
            waiting.claim()  # the caller has left; what has not begun never does
            raise
        if not done:
            outcome = "it was not begun" if waiting.claim() else "it may still finish"
            raise Refusal(504, f"{what}: not done within {seconds:g} seconds; {outcome}")
        return work.result()

    def _leave(self, work: asyncio.Future[T]) -> None:
        self._calls -= 1
        if not work.cancelled():
            work.exception()  # looked at here, so that a late failure is not reported as never retrieved

    def close(self) -> None:
        """Let the threads end after the calls that they have; nothing is waited for."""
        for _ in range(self._threads):
            self._line.put(None)


def _work(line: queue.SimpleQueue[_Call | None]) -> None:
    while (call := line.get()) is not None:
        if not call.claim():
            call.future.cancel()
            continue
        try:
            result = call.function()
        except _MEANT_FOR_OTHERS as error:
            failure = RuntimeError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            call.future.set_exception(failure)
        except BaseException as error:
            call.future.set_exception(error)
        else:
            call.future.set_result(result)


def together(calls: Sequence[Callable[[], T]], *, at_once: int, seconds: float) -> list[T | BaseException | None]:
    """What each call returns or raises, made by at most `at_once` daemon threads; `None` for what is late.

    Late calls go on in their threads, and those that have not begun never do.
    """
    line = list(enumerate(calls))[::-1]
    results: list[T | BaseException | None] = [None] * len(calls)
    until = time.monotonic() + seconds

    def work() -> None:
        while time.monotonic() < until:
            try:
                number, call = line.pop()
            except IndexError:
                return
            try:
                results[number] = call()
            except BaseException as error:
                results[number] = error

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(calls)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return list(results)
