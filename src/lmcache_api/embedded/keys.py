"""The keys of chunks: each hashes its tokens and the key before it, so that a key stands for the whole prefix."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_api.embedded.layout import KVLayout
from lmcache_shared.settings import Settings

KEY_BYTES = 16


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end`, without the last, of a request."""

    start: int
    end: int
    key: bytes


class ChunkKeys:
    """Cuts tokens into chunks.

    What else two caches must have in common to share a chunk goes into the first hash: the salt, the model, the
    worker among how many, and the layout of its KV.
    """

    def __init__(self, settings: Settings, layout: KVLayout, *, worker_id: int, world_size: int) -> None:
        self._chunk_size = settings.chunk_size
        self._partial = settings.save_unfull_chunk
        self._hash: Callable[[bytes], Any] = (
            hashlib.sha256 if settings.pre_caching_hash_algorithm == "sha256" else _blake2b
        )
        identity = [settings.engine_hash_salt, settings.engine_model_name, world_size, worker_id, layout.chunk_shape]
        self._first = self._digest(json.dumps([*identity, layout.dtype]).encode())

    def of(self, tokens: Sequence[int]) -> Iterator[Chunk]:
        """The chunks of the tokens; of a last one that is not full only when the settings keep such."""
        key, size = self._first, self._chunk_size
        end = len(tokens) if self._partial else len(tokens) // size * size
        for start in range(0, end, size):
            piece = array("q", tokens[start : start + size])
            key = self._digest(key + piece.tobytes())
            yield Chunk(start, start + len(piece), key)

    def _digest(self, data: bytes) -> bytes:
        digest: bytes = self._hash(data).digest()
        return digest[:KEY_BYTES]


def _blake2b(data: bytes) -> Any:
    return hashlib.blake2b(data, digest_size=KEY_BYTES)
