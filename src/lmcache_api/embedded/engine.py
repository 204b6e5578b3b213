"""The embedded cache engine: chunks of real bytes, kept in memory and on disk, found by the longest known prefix."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lmcache_api.checksums import ranges_of
from lmcache_api.component import LoadedChunks, LoadError, Span
from lmcache_api.embedded import disk
from lmcache_api.embedded.backends import Backend, StorageBackends, folder_name
from lmcache_api.embedded.keys import Chunk, ChunkKeys
from lmcache_api.embedded.layout import KVLayout, PagedKVCache, pattern
from lmcache_api.embedded.memory import LocalCPUBackend
from lmcache_api.embedded.metrics import EmbeddedMetrics
from lmcache_shared.config import read_yaml
from lmcache_shared.errors import ConfigError
from lmcache_shared.settings import Settings

logger = logging.getLogger(__name__)

MAX_PINNING_LOOKUPS = 1024
"""Lookups that may hold chunks at once; further ones hold none."""

UNUSABLE = "no plain file of YAML with keys at the top, or too large"

_FILE_SYSTEM = "fs://"


class EmbeddedEngine:
    """One worker's engine. Every method may be called from any thread.

    Args:
        settings: tells the settings of now.
        metrics: where it counts.
        owner: the name of the worker.
        worker_id: which worker it is.
        world_size: among how many.

    Raises:
        ConfigError: the settings ask for a KV cache that cannot be made.
        DiskError: the folder for chunks cannot be used.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        metrics: EmbeddedMetrics,
        *,
        owner: str,
        worker_id: int,
        world_size: int,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._owner = owner
        self.layout = KVLayout.of(settings())
        self.kv_caches = PagedKVCache(self.layout)
        self._keys = ChunkKeys(settings(), self.layout, worker_id=worker_id, world_size=world_size)
        self.backends = StorageBackends(
            settings, self.layout.token_bytes, metrics.add, owner=owner, worker_id=worker_id
        )
        self._records_slots = False
        self._pins_lock = threading.Lock()
        self._pins: dict[str, tuple[float, LocalCPUBackend, list[bytes]]] = {}

    @property
    def settings(self) -> Settings:
        """Those of now."""
        return self._settings()

    def store(self, tokens: Sequence[int], *, known: int = 0) -> None:
        """Compute the KV of the tokens into the paged KV cache, and keep its chunks.

        `known` tokens at the beginning were retrieved and are neither computed nor kept again. Frozen, nothing is
        done.
        """
        self._log_slots("Store", len(tokens))
        if self.backends.frozen:
            return
        clock = _Clock()
        stored = 0
        only = self._settings().store_location
        with clock.part("process_tokens"):
            chunks = list(self._keys.of(tokens))
        for chunk in chunks:
            if chunk.end <= known:
                continue
            if self.is_frozen():  # since this store began
                break
            with clock.part("from_gpu"):
                data = pattern(chunk.key, (chunk.end - chunk.start) * self.layout.token_bytes)
                self.kv_caches.write(chunk.start, data)
            with clock.part("put"):
                kept = [backend.put(chunk.key, data) for _, backend in self.backends.active([only] if only else None)]
            if any(kept):
                stored += chunk.end - chunk.start
        self._metrics.add("num_store_requests")
        self._metrics.add("num_stored_tokens", stored)
        self._tell("store", stored, clock)

    def retrieve(self, tokens: Sequence[int]) -> int:
        clock = _Clock()
        only = self._settings().retrieve_locations
        hit = 0
        for chunk in self._keys.of(tokens):
            with clock.part("process_tokens"):
                data = self._fetch(chunk, only)
            if data is None:
                break
            with clock.part("to_gpu"):
                self.kv_caches.write(chunk.start, data)
            hit = chunk.end
        self._metrics.add("num_retrieve_requests")
        self._metrics.add("num_requested_tokens", len(tokens))
        self._metrics.add("num_hit_tokens", hit)
        self._tell("retrieve", hit, clock)
        self._log_slots("Retrieve", hit)
        return hit

    def lookup(self, tokens: Sequence[int]) -> Sequence[Span]:
        clock = _Clock()
        spans = self._spans(tokens)
        hit = _hit(spans)
        self._metrics.add("num_lookup_requests")
        self._metrics.add("num_lookup_tokens", len(tokens))
        self._metrics.add("num_lookup_hits", hit)
        self._metrics.observe("time_to_lookup", clock.seconds)
        if hit:
            self._metrics.observe("request_cache_hit_rate", hit / len(tokens))
        else:
            self._metrics.add("lookup_0_hit_requests")
        return spans

    def hit_tokens(self, tokens: Sequence[int]) -> int:
        """The tokens of the longest known prefix."""
        return _hit(self.lookup(tokens))

    def pin(self, tokens: Sequence[int], lookup_id: str) -> int:
        """The chunks of the longest known prefix that are in memory stay there until `unpin(lookup_id)`; its tokens.

        A lookup that is not unpinned is when it is older than `pin_timeout_sec` (`unpin_expired`).
        """
        hit = _hit(self._spans(tokens))
        cpu = self.backends.cpu
        with self._pins_lock:
            if cpu is None or lookup_id in self._pins or len(self._pins) >= MAX_PINNING_LOOKUPS:
                return hit
            keys = [chunk.key for chunk in self._keys.of(tokens[:hit]) if cpu.pin(chunk.key)]
            self._pins[lookup_id] = (time.monotonic(), cpu, keys)
        return hit

    def unpin(self, lookup_id: str) -> None:
        with self._pins_lock:
            held = self._pins.pop(lookup_id, None)
            if held is not None:
                _, cpu, keys = held  # the backend that pinned them: another may have been made since
                for key in keys:
                    cpu.unpin(key)

    def unpin_expired(self) -> int:
        """Unpin what lookups have held for longer than `pin_timeout_sec`; how many chunks those were."""
        oldest = time.monotonic() - self._settings().pin_timeout_sec
        with self._pins_lock:
            expired = {lookup_id: len(keys) for lookup_id, (since, _, keys) in self._pins.items() if since < oldest}
        for lookup_id in expired:
            self.unpin(lookup_id)
        forced = sum(expired.values())
        self._metrics.add("forced_unpin_count", forced)
        return forced

    def clear(self, locations: Sequence[str] | None) -> int:
        """Pinned chunks stay, as in LMCache."""
        names = self.backends.classes()
        found = [self.backends.get(name) for name in names if locations is None or name in locations]
        return sum(backend.clear() for backend in found if backend is not None)

    def freeze(self, frozen: bool) -> None:
        self.backends.freeze(frozen)

    def is_frozen(self) -> bool:
        return self.backends.frozen

    def set_hot_cache(self, enabled: bool) -> None:
        cpu = self.backends.cpu
        if cpu is not None:
            cpu.set_hot(enabled)

    def is_hot_cache_enabled(self) -> bool:
        cpu = self.backends.cpu
        return cpu is not None and cpu.hot

    def records_slots(self) -> bool:
        return self._records_slots

    def record_slots(self, enabled: bool) -> None:
        self._records_slots = enabled

    def load_chunks(self, config_path: str, max_chunks: int | None, max_failed_keys: int) -> LoadedChunks:
        """The files are this engine's own (`LocalDiskBackend`), in the folder that the configuration's `remote_url`
        (`fs://…/FOLDER`) names, or in this worker's below `local_disk`."""
        cpu = self.backends.cpu
        files = _chunk_files(config_path, self._owner)
        failed: list[str] = []
        loaded = 0
        for key, path in files[:max_chunks]:
            try:
                tokens, data = disk.read_chunk(path, key, self.layout.chunk_size * self.layout.token_bytes)
                whole = len(data) == tokens * self.layout.token_bytes
            except (OSError, ValueError) as error:
                logger.warning("chunk %s is not loaded: %s", path, error)
                whole = False
            if whole and cpu is not None and not self.backends.frozen and cpu.put(key, data):
                loaded += 1
            elif len(failed) < max_failed_keys:
                failed.append(key.hex())
        return LoadedChunks(loaded, len(files), failed)

    def close(self) -> None:
        self.backends.close_all()

    @property
    def chunks(self) -> int:
        """How many it holds, each backend's counted."""
        backends = (self.backends.cpu, self.backends.disk)
        return sum(backend.chunks for backend in backends if backend is not None)

    def gauges(self) -> dict[str, float]:
        """The present, by the names of LMCache's gauges."""
        cpu, files = self.backends.cpu, self.backends.disk
        return {
            "retrieve_hit_rate": self._metrics.share("num_hit_tokens", "num_requested_tokens"),
            "lookup_hit_rate": self._metrics.share("num_lookup_hits", "num_lookup_tokens"),
            "local_cache_usage": cpu.used_bytes if cpu else 0,
            "local_storage_usage": files.used_bytes if files else 0,
            "active_memory_objs_count": cpu.chunks if cpu else 0,
            "local_cpu_hot_cache_count": cpu.chunks if cpu else 0,
            "pinned_memory_objs_count": cpu.pinned if cpu else 0,
            "pin_monitor_pinned_objects_count": cpu.pinned if cpu else 0,
            "local_cpu_keys_in_request_count": sum(len(keys) for *_, keys in list(self._pins.values())),
            "get_blocking_failed_count": files.damaged if files else 0,
            "put_failed_count": files.failed_puts if files else 0,
            "connector_kv_caches_count": self.layout.layers,
        }

    def _tell(self, operation: str, tokens: int, clock: _Clock) -> None:
        seconds = clock.seconds
        self._metrics.observe(f"time_to_{operation}", seconds)
        for part, spent in clock.parts.items():
            self._metrics.observe(f"{operation}_{part}_time", spent)
        if tokens:
            self._metrics.observe(f"{operation}_speed", tokens / max(seconds, 1e-9))

    def _spans(self, tokens: Sequence[int]) -> list[Span]:
        only = self._settings().retrieve_locations
        spans: list[Span] = []
        for chunk in self._keys.of(tokens):
            where = tuple(name for name, backend in self.backends.active(only) if chunk.key in backend)
            if not where:
                break
            last = spans[-1] if spans else None
            if last is not None and last.locations == where:
                spans[-1] = Span(last.start, chunk.end, last.chunks + 1, where)
            else:
                spans.append(Span(chunk.start, chunk.end, 1, where))
        return spans

    def _fetch(self, chunk: Chunk, only: Sequence[str] | None) -> bytes | None:
        """A chunk's bytes from the first backend that has it; from disk into memory too, unless that is frozen."""
        frozen = self.backends.frozen
        for _, backend in self.backends.active(only):
            data = backend.get(chunk.key, touch=not frozen)
            if data is not None:
                self._promote(chunk, data, backend)
                return data
        return None

    def _promote(self, chunk: Chunk, data: bytes, source: Backend) -> None:
        cpu = self.backends.cpu
        active = (backend for _, backend in self.backends.active(None))
        if source is not cpu and cpu is not None and not self.backends.frozen and cpu in active:
            cpu.put(chunk.key, data)

    def _log_slots(self, operation: str, tokens: int) -> None:
        if self._records_slots:
            slots = ranges_of(range(min(tokens, self.layout.slots)))
            logger.info("[KVCache Check] %s: %s, tokens=%d, slot_mapping: %s", self._owner, operation, tokens, slots)


def _hit(spans: Sequence[Span]) -> int:
    return spans[-1].end if spans else 0


class _Clock:
    """How long an operation takes, and its parts."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.parts: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - began


def _chunk_files(config_path: str, owner: str) -> list[tuple[bytes, Path]]:
    """The chunk files that a configuration leads to.

    Raises:
        LoadError: it cannot be read or leads nowhere.
    """
    try:
        values = read_yaml(config_path, of_a_caller=True)
    except ConfigError as error:  # only a system's error is told: others quote what the file holds
        raise LoadError(f"Invalid configuration file: {error.__cause__ or f'{config_path}: {UNUSABLE}'}") from None
    remote_url, local_disk = values.get("remote_url"), values.get("local_disk")
    if isinstance(remote_url, str) and remote_url.startswith(_FILE_SYSTEM):
        folder = "/" + remote_url.removeprefix(_FILE_SYSTEM).partition("/")[2]
    elif isinstance(local_disk, str):
        below = os.path.join(local_disk.removeprefix("file://"), folder_name(owner))
        folder = below if os.path.isdir(below) else os.path.dirname(below)
    else:
        raise LoadError(
            f"Invalid configuration file: {config_path}: expected remote_url: fs://HOST:PORT/FOLDER or local_disk"
        )
    try:
        return disk.chunk_files(Path(folder))
    except (OSError, ValueError) as error:
        raise LoadError(f"Invalid configuration file: {config_path}: {error}") from None
