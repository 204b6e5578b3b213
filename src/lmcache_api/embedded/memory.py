"""Chunks in memory: a byte budget, the least recently used leave first, pinned ones stay."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

NAME = "LocalCPUBackend"


Count = Callable[[str, float], None]
"""Adds to a counter of the engine's metrics."""


class LocalCPUBackend:
    """At most `max_bytes` of chunks; each costs some 200 bytes beside its own.

    `count` is told of those that leave, and of those that find no room: larger than the budget, or all is pinned.
    While `hot` is false nothing is admitted.
    """

    def __init__(self, max_bytes: int, token_bytes: int, count: Count, *, hot: bool = True) -> None:
        self._max_bytes = max_bytes
        self._token_bytes = token_bytes
        self._count = count
        self._hot = hot
        self._frozen = False
        self._lock = threading.Lock()
        self._chunks: OrderedDict[bytes, bytes] = OrderedDict()  # the least recently used first
        self._pinned: dict[bytes, bytes] = {}
        self._pins: dict[bytes, int] = {}
        self._used = 0
        self._pinned_bytes = 0

    @property
    def hot(self) -> bool:
        return self._hot

    def set_hot(self, hot: bool) -> None:
        """Keep chunks, or keep none and forget those that are there."""
        with self._lock:
            self._hot = hot
            if not hot:
                self._clear()

    def set_frozen(self, frozen: bool) -> None:
        """Frozen, it admits nothing."""
        with self._lock:
            self._frozen = frozen

    def put(self, key: bytes, data: bytes) -> bool:
        """Keep a chunk; whether it is here now."""
        with self._lock:
            if key in self._chunks or key in self._pinned:
                return True
            if not self._hot or self._frozen or not self._make_room(len(data)):
                return False
            self._chunks[key] = data
            self._used += len(data)
            return True

    def get(self, key: bytes, *, touch: bool = True) -> bytes | None:
        """A chunk's bytes; `touch` makes it the most recently used."""
        with self._lock:
            data = self._chunks.get(key)
            if data is None:
                return self._pinned.get(key)
            if touch:
                self._chunks.move_to_end(key)
            return data

    def __contains__(self, key: bytes) -> bool:
        with self._lock:  # pinning moves a chunk from one to the other
            return key in self._chunks or key in self._pinned

    def pin(self, key: bytes) -> bool:
        """Keep a chunk from leaving until it is unpinned as often; whether it is here."""
        with self._lock:
            if key in self._chunks:
                self._pinned[key] = self._chunks.pop(key)
                self._pinned_bytes += len(self._pinned[key])
            elif key not in self._pinned:
                return False
            self._pins[key] = self._pins.get(key, 0) + 1
            return True

    def unpin(self, key: bytes) -> None:
        """Let a chunk leave again; it does at once when none are kept by now."""
        with self._lock:
            count = self._pins.get(key, 0)
            if count > 1:
                self._pins[key] = count - 1
            elif count:
                del self._pins[key]
                data = self._pinned.pop(key)
                self._pinned_bytes -= len(data)
                if self._hot:
                    self._chunks[key] = data
                else:
                    self._used -= len(data)

    def clear(self) -> int:
        """Forget every chunk that is not pinned; how many tokens those had."""
        with self._lock:
            return self._clear()

    def close(self) -> None:
        """Forget everything and admit nothing more."""
        with self._lock:
            self._hot = False
            self._clear()
            self._pinned.clear()
            self._pins.clear()
            self._used = self._pinned_bytes = 0

    @property
    def chunks(self) -> int:
        return len(self._chunks) + len(self._pinned)

    @property
    def pinned(self) -> int:
        return len(self._pinned)

    @property
    def used_bytes(self) -> int:
        return self._used

    def _clear(self) -> int:
        freed = sum(map(len, self._chunks.values()))
        self._chunks.clear()
        self._used -= freed
        return freed // self._token_bytes

    def _make_room(self, size: int) -> bool:
        """Let chunks leave until `size` more bytes fit, if that can be."""
        if self._pinned_bytes + size > self._max_bytes:
            self._count("local_cpu_evict_failed_count", 1)
            return False
        left = 0
        while self._used + size > self._max_bytes:
            _, data = self._chunks.popitem(last=False)
            self._used -= len(data)
            left += 1
        if left:
            self._count("local_cpu_evict_count", 1)
            self._count("local_cpu_evict_keys_count", left)
        return True
