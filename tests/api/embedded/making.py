"""What the tests of the embedded engine make it from: small layouts, budgets in chunks, a worker with all its parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_api.embedded.configuration import EmbeddedConfiguration
from lmcache_api.embedded.engine import EmbeddedEngine
from lmcache_api.embedded.keys import ChunkKeys
from lmcache_api.embedded.layout import KVLayout, PagedKVCache, pattern
from lmcache_api.embedded.metrics import EmbeddedMetrics
from lmcache_shared.settings import Settings

CHUNK = 16
TOKEN_BYTES = 64
"""Of the small layout: 2 layers, keys and values, 2 heads of 4 numbers of 2 bytes."""

CHUNK_BYTES = CHUNK * TOKEN_BYTES
CHUNK_SPACE = 4096
"""What the file of such a chunk takes of the disk's budget."""

CPU = "LocalCPUBackend"
DISK = "LocalDiskBackend"

SMALL = {
    "chunk_size": CHUNK,
    "engine_layers": 2,
    "engine_heads": 2,
    "engine_head_size": 4,
    "engine_blocks": 4,
    "engine_block_size": 16,
}


def gib(size: int) -> float:
    return size / (1 << 30)


def settings_of(*, cpu_chunks: float | None = None, disk_chunks: float | None = None, **given: Any) -> Settings:
    """Settings of the small layout, budgets in chunks of it."""
    if cpu_chunks is not None:
        given["max_local_cpu_size"] = gib(int(cpu_chunks * CHUNK_BYTES))
    if disk_chunks is not None:
        given["max_local_disk_size"] = gib(int(disk_chunks * CHUNK_SPACE))
    if "local_disk" in given:
        given["local_disk"] = str(given["local_disk"])
    return Settings(**{**SMALL, **given})


@dataclass
class Made:
    """An engine, and what stands around it."""

    engine: EmbeddedEngine
    configuration: EmbeddedConfiguration
    metrics: EmbeddedMetrics

    def set(self, **values: Any) -> None:
        _, errors = self.configuration.update(values)
        assert errors == {}

    def count(self, name: str) -> float:
        value = self.metrics.registry.get_sample_value(f"lmcache:{name}_total", {"model_name": "m"})
        assert value is not None
        return value

    @property
    def folder(self) -> Path:
        return Path(self.configuration.settings.local_disk or "") / "worker"

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.kv"))


def make(*, worker_id: int = 0, **given: Any) -> Made:
    configuration = EmbeddedConfiguration(settings_of(**given))
    metrics = EmbeddedMetrics({"model_name": "m"})
    engine = EmbeddedEngine(
        lambda: configuration.settings, metrics, owner="worker", worker_id=worker_id, world_size=1 + worker_id
    )
    return Made(engine, configuration, metrics)


def kv_of(caches: PagedKVCache, count: int) -> str:
    """An MD5 over the first slots of every layer."""
    digest = hashlib.md5()
    for name in caches.layers():
        digest.update(caches.slot_bytes(name, range(min(count, caches.layout.slots))))
    return digest.hexdigest()


def computed(settings: Settings, tokens: range, count: int, *, worker_id: int = 0, world_size: int = 1) -> str:
    """`kv_of` as it must be after the first `count` tokens were computed or brought back, by parts of its own."""
    layout = KVLayout.of(settings)
    caches = PagedKVCache(layout)
    for chunk in ChunkKeys(settings, layout, worker_id=worker_id, world_size=world_size).of(tokens[:count]):
        caches.write(chunk.start, pattern(chunk.key, (chunk.end - chunk.start) * layout.token_bytes))
    return kv_of(caches, count)


def key_of(number: int) -> bytes:
    return hashlib.md5(str(number).encode()).digest()
