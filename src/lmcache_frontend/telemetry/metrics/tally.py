"""Counts of what goes through the proxy, by target and label, and its seconds by kind; another process can add them.

To count is an addition in a dictionary, for it is done for every request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

import msgspec

SECONDS_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

T = TypeVar("T")


class Seconds(msgspec.Struct, array_like=True):
    """A histogram: how many there were in each bucket, the last one without an end, and their sum."""

    buckets: list[int]
    total: float = 0.0

    def added(self, other: Seconds) -> Seconds:
        buckets = [mine + theirs for mine, theirs in zip(self.buckets, other.buckets, strict=True)]
        return Seconds(buckets, self.total + other.total)


class Series(NamedTuple):
    """A counter's short name, and the value of its last label."""

    family: str
    last: str


class Counted(msgspec.Struct, array_like=True):
    """What a process has counted, as another one is told."""

    requests: int
    counts: list[tuple[tuple[str, ...], str, str, int]]
    """The target's labels, the series, how many."""
    seconds: dict[str, Seconds]


class Tally(Generic[T]):
    """Counts for targets of type `T`, hashable."""

    def __init__(self) -> None:
        self._counts: dict[T, dict[Series, int]] = {}
        self._seconds: dict[str, Seconds] = {}

    def of_target(self, target: T) -> dict[Series, int]:
        """The counts of a target, to be added to."""
        found = self._counts.get(target)
        if found is None:
            found = self._counts[target] = {}
        return found

    def observe(self, kind: str, seconds: float) -> None:
        found = self._seconds.get(kind)
        if found is None:
            found = self._seconds[kind] = Seconds([0] * (len(SECONDS_BUCKETS) + 1))
        found.buckets[bisect_left(SECONDS_BUCKETS, seconds)] += 1
        found.total += seconds

    def add_seconds(self, kind: str, seconds: Seconds) -> None:
        found = self._seconds.get(kind)
        self._seconds[kind] = seconds if found is None else found.added(seconds)

    def keep(self, known: Callable[[T], bool]) -> None:
        """Forget the counts of targets that are no longer known."""
        for target in [target for target in self._counts if not known(target)]:
            del self._counts[target]

    def counts(self) -> Iterator[tuple[T, Series, int]]:
        for target, of_target in self._counts.items():
            for series, amount in of_target.items():
                yield target, series, amount

    def seconds(self) -> dict[str, Seconds]:
        return self._seconds

    def taken(self) -> Tally[T]:
        """All that was counted until now; nothing of it stays here."""
        former = Tally[T]()
        former._counts, self._counts = self._counts, former._counts
        former._seconds, self._seconds = self._seconds, former._seconds
        return former

    def copy(self) -> Tally[T]:
        """The counts as they are now, for a thread that writes them down."""
        copied = Tally[T]()
        copied._counts = {target: dict(of_target) for target, of_target in self._counts.items()}
        copied._seconds = {kind: Seconds(list(one.buckets), one.total) for kind, one in self._seconds.items()}
        return copied

    def __bool__(self) -> bool:
        return bool(self._counts or self._seconds)
