"""Chunk statistics of a lookup client: how many chunks its requests have, and how many of them are new.

Which chunks were seen is kept in a Bloom filter: its size is fixed by how many are expected, and it may take a new
chunk for a known one as often as it is allowed to. The fields are LMCache's.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from lmcache_shared.settings import Settings

logger = logging.getLogger(__name__)

_MASK = (1 << 64) - 1

NO_STATISTICS: Mapping[str, float] = dict.fromkeys(
    (
        "chunk_statistics_enabled",
        "chunk_statistics_total_requests",
        "chunk_statistics_total_chunks",
        "chunk_statistics_unique_chunks",
        "chunk_statistics_reuse_rate",
        "chunk_statistics_bloom_filter_size_mb",
        "chunk_statistics_bloom_filter_fill_rate",
    ),
    0.0,
)
"""The gauges of a client without them, so that none tells of one that was closed."""


class BloomFilter:
    """Remembers keys in `bits` bits; a key that was never added is taken for known with a small probability."""

    def __init__(self, expected: int, false_positives: float) -> None:
        self.expected = expected
        self.false_positives = false_positives
        self.bits = max(64, math.ceil(-expected * math.log(false_positives) / math.log(2) ** 2))
        self.hashes = max(1, round(self.bits / expected * math.log(2)))
        self.items = 0
        self.bits_set = 0
        self._field = bytearray(-(-self.bits // 8))

    @property
    def megabytes(self) -> float:
        return len(self._field) / (1 << 20)

    def add(self, key: bytes) -> bool:
        """Remember a key, sixteen random bytes; whether it is new."""
        first = int.from_bytes(key[:8], "little")
        step = int.from_bytes(key[8:16], "little") | 1
        new = False
        for number in range(self.hashes):
            bit = ((first + number * step) & _MASK) % self.bits
            byte, mask = bit >> 3, 1 << (bit & 7)
            if not self._field[byte] & mask:
                self._field[byte] |= mask
                self.bits_set += 1
                new = True
        self.items += new
        return new


class EmbeddedChunkStatistics:
    """Counts the chunks of requests between `start` and `stop`."""

    def __init__(self, settings: Settings) -> None:
        self._lock = threading.Lock()
        self._size = (
            settings.chunk_statistics_mem_bf_expected_chunks,
            settings.chunk_statistics_mem_bf_false_positive_rate,
        )
        self._hours = settings.chunk_statistics_auto_exit_timeout_hours
        self._target = settings.chunk_statistics_auto_exit_target_unique_chunks
        self._enabled = False
        self._started_at = 0.0
        self._zero()
        if settings.chunk_statistics_auto_start_statistics:
            self.start()

    def start(self) -> None:
        with self._lock:
            self._enabled = True
            self._started_at = time.monotonic()

    def stop(self) -> None:
        with self._lock:
            self._enabled = False

    def reset(self) -> None:
        with self._lock:
            self._zero()

    def record(self, keys: Iterable[bytes], lookup_seconds: float) -> None:
        """A request was looked up: its chunks, and how long the lookup took."""
        began = time.perf_counter()
        with self._lock:
            self._lookup_seconds += lookup_seconds
            if not self._enabled:
                return
            self._requests += 1
            for key in keys:
                self._chunks += 1
                self._unique += self._filter.add(key)
            self._record_seconds += time.perf_counter() - began
            self._check_exit()

    def status(self) -> dict[str, Any]:
        with self._lock:
            total = self._lookup_seconds + self._record_seconds
            duplicates = self._chunks - self._unique
            return {
                "enabled": self._enabled,
                "total_requests": self._requests,
                "timing": {
                    "lookup_time_seconds": self._lookup_seconds,
                    "record_statistics_time_seconds": self._record_seconds,
                    "check_exit_conditions_time_seconds": 0.0,
                    "total_time_seconds": total,
                    "overhead_time_seconds": self._record_seconds,
                    "overhead_percentage": self._record_seconds / total * 100 if total else 0.0,
                },
                "total_chunks": self._chunks,
                "unique_chunks": self._unique,
                "duplicate_chunks": duplicates,
                "reuse_rate": duplicates / self._chunks if self._chunks else 0.0,
                "bloom_filter": {
                    "size_mb": self._filter.megabytes,
                    "hash_count": self._filter.hashes,
                    "item_count": self._filter.items,
                    "bits_set": self._filter.bits_set,
                    "fill_rate": self._filter.bits_set / self._filter.bits,
                    "expected_elements": self._filter.expected,
                    "false_positive_rate": self._filter.false_positives,
                },
            }

    def gauges(self) -> dict[str, float]:
        """The present, by the names of LMCache's gauges."""
        with self._lock:
            return {
                "chunk_statistics_enabled": self._enabled,
                "chunk_statistics_total_requests": self._requests,
                "chunk_statistics_total_chunks": self._chunks,
                "chunk_statistics_unique_chunks": self._unique,
                "chunk_statistics_reuse_rate": (self._chunks - self._unique) / self._chunks if self._chunks else 0.0,
                "chunk_statistics_bloom_filter_size_mb": self._filter.megabytes,
                "chunk_statistics_bloom_filter_fill_rate": self._filter.bits_set / self._filter.bits,
            }

    def _zero(self) -> None:
        self._filter = BloomFilter(*self._size)
        self._requests = self._chunks = self._unique = 0
        self._lookup_seconds = self._record_seconds = 0.0

    def _check_exit(self) -> None:
        hours = (time.monotonic() - self._started_at) / 3600
        if self._hours and hours >= self._hours:
            reason = f"{hours:.2f} hours, chunk_statistics_auto_exit_timeout_hours is {self._hours:g}"
        elif self._target and self._unique >= self._target:
            reason = f"{self._unique} chunks, chunk_statistics_auto_exit_target_unique_chunks is {self._target}"
        else:
            return
        self._enabled = False
        logger.warning("chunk statistics stop by themselves: %s", reason)
