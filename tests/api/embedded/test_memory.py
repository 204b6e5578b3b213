import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmcache_api.embedded.memory import LocalCPUBackend
from tests.api.embedded.making import key_of

KEYS = st.integers(0, 9).map(key_of)


def backend(max_bytes: int, *, hot: bool = True) -> tuple[LocalCPUBackend, Counter[str]]:
    counts: Counter[str] = Counter()
    return LocalCPUBackend(max_bytes, 1, lambda name, amount: counts.update({name: int(amount)}), hot=hot), counts


class MemoryMachine(RuleBasedStateMachine):
    """Against a list of chunks, the least recently used first, with how often each is pinned."""

    @initialize(budget=st.integers(0, 40), hot=st.booleans())
    def begin(self, budget: int, hot: bool) -> None:
        self.budget, self.hot = budget, hot
        self.backend, self.counts = backend(budget, hot=hot)
        self.chunks: list[tuple[bytes, bytes]] = []
        self.pins: Counter[bytes] = Counter()
        self.evicted = 0

    def find(self, key: bytes) -> bytes | None:
        return next((data for its, data in self.chunks if its == key), None)

    def forget(self, key: bytes) -> None:
        self.chunks = [chunk for chunk in self.chunks if chunk[0] != key]

    @rule(key=KEYS, size=st.integers(1, 20))
    def put(self, key: bytes, size: int) -> None:
        data = bytes([size]) * size
        expected = self.find(key) is not None
        pinned = sum(len(data) for its, data in self.chunks if self.pins[its])
        if not expected and self.hot and pinned + size <= self.budget:
            while sum(len(data) for _, data in self.chunks) + size > self.budget:
                self.forget(next(its for its, _ in self.chunks if not self.pins[its]))
                self.evicted += 1
            self.chunks.append((key, data))
            expected = True
        assert self.backend.put(key, data) == expected

    @rule(key=KEYS, touch=st.booleans())
    def get(self, key: bytes, touch: bool) -> None:
        data = self.find(key)
        assert self.backend.get(key, touch=touch) == data
        if touch and data is not None:
            self.forget(key)
            self.chunks.append((key, data))

    @rule(key=KEYS)
    def pin(self, key: bytes) -> None:
        here = self.find(key) is not None
        assert self.backend.pin(key) == here
        self.pins[key] += here

    @rule(key=KEYS)
    def unpin(self, key: bytes) -> None:
        self.backend.unpin(key)
        if self.pins[key] == 1:  # it is the most recently used then
            data = self.find(key)
            assert data is not None
            self.forget(key)
            if self.hot:
                self.chunks.append((key, data))
        self.pins[key] -= self.pins[key] > 0

    def drop_unpinned(self) -> int:
        freed = sum(len(data) for its, data in self.chunks if not self.pins[its])
        self.chunks = [chunk for chunk in self.chunks if self.pins[chunk[0]]]
        return freed

    @rule()
    def clear(self) -> None:
        assert self.backend.clear() == self.drop_unpinned()

    @rule(hot=st.booleans())
    def set_hot(self, hot: bool) -> None:
        self.backend.set_hot(hot)
        self.hot = hot
        if not hot:
            self.drop_unpinned()

    @invariant()
    def is_the_model(self) -> None:
        used = sum(len(data) for _, data in self.chunks)
        assert self.backend.used_bytes == used <= self.budget
        assert self.backend.hot == self.hot
        assert self.backend.chunks == len(self.chunks)
        assert self.backend.pinned == sum(self.pins[its] > 0 for its, _ in self.chunks)
        assert {key for key in map(key_of, range(10)) if key in self.backend} == {key for key, _ in self.chunks}
        assert self.counts["local_cpu_evict_keys_count"] == self.evicted


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_leaves_first() -> None:
    memory, counts = backend(3)
    for name in (b"a", b"b", b"c"):
        assert memory.put(name, b"x")
    assert memory.get(b"a") == b"x"
    assert memory.get(b"b", touch=False) == b"x"  # looked at, not used
    assert memory.put(b"d", b"x")
    assert [name in memory for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert counts == {"local_cpu_evict_count": 1, "local_cpu_evict_keys_count": 1}


def test_what_does_not_fit_makes_nothing_leave() -> None:
    memory, counts = backend(3)
    assert memory.put(b"a", b"x")
    assert not memory.put(b"b", b"xxxx")
    assert memory.put(b"c", b"xx")
    assert memory.pin(b"a")
    assert memory.pin(b"c")
    assert not memory.put(b"d", b"x")
    assert counts == {"local_cpu_evict_failed_count": 2}
    assert memory.clear() == 0
    assert (memory.chunks, memory.pinned, memory.used_bytes) == (2, 2, 3)


def test_pinned_twice_it_is_unpinned_twice() -> None:
    memory, _ = backend(1)
    memory.put(b"a", b"x")
    assert memory.pin(b"a")
    assert memory.pin(b"a")
    memory.unpin(b"a")
    assert not memory.put(b"b", b"x")
    memory.unpin(b"a")
    assert memory.put(b"b", b"x")
    assert b"a" not in memory


def test_a_pinned_chunk_outlives_hot_off_by_its_pin() -> None:
    memory, _ = backend(10)
    memory.put(b"a", b"x")
    memory.pin(b"a")
    memory.set_hot(False)
    assert memory.get(b"a") == b"x"
    memory.unpin(b"a")
    assert memory.get(b"a") is None
    assert (memory.chunks, memory.used_bytes) == (0, 0)


def test_closed_it_holds_and_admits_nothing() -> None:
    memory, _ = backend(10)
    for name in (b"a", b"b"):
        memory.put(name, b"x")
    memory.pin(b"a")
    memory.close()
    assert (memory.chunks, memory.pinned, memory.used_bytes) == (0, 0, 0)
    memory.unpin(b"a")
    assert not memory.pin(b"a")
    assert not memory.put(b"c", b"x")
    assert (memory.chunks, memory.used_bytes) == (0, 0)


def in_parallel(*works: Callable[[], None]) -> None:
    """All at once, the interpreter changing between them as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            for future in [pool.submit(work) for work in works]:
                future.result()
    finally:
        sys.setswitchinterval(interval)


def test_in_parallel_the_budget_holds_and_nothing_is_left_over() -> None:
    memory, _ = backend(100)

    def churn(first: int) -> None:
        for turn in range(1500):
            key = key_of((turn * 4 + first) % 150)
            memory.put(key, b"y" * (1 + turn % 5))
            if memory.pin(key):
                memory.unpin(key)
            if turn % 500 == 0:
                memory.clear()
            assert 0 <= memory.used_bytes <= 100

    in_parallel(*(functools.partial(churn, first) for first in range(4)))
    assert memory.chunks > 0
    memory.clear()
    assert (memory.chunks, memory.pinned, memory.used_bytes) == (0, 0, 0)


def test_a_chunk_is_found_at_every_moment_of_being_pinned_and_unpinned() -> None:
    memory, _ = backend(10)
    memory.put(b"held", b"x")
    done = threading.Event()

    def pin() -> None:
        for _ in range(40_000):
            memory.pin(b"held")
            memory.unpin(b"held")
        done.set()

    def look() -> None:
        while not done.is_set():
            assert all(b"held" in memory for _ in range(100))

    def get() -> None:
        while not done.is_set():
            assert memory.get(b"held") == b"x"

    in_parallel(pin, look, get)
