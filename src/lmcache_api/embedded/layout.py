"""How the KV of a token lies in memory, and the paged KV cache that an inference engine would compute into.

A layer is a tensor `[2, blocks, block size, heads, head size]` (MHA: keys and values) or `[blocks, block size, head
size]` (MLA: one latent vector); slot = block times block size plus offset. Here it is plain bytes, C-contiguous.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lmcache_api.component import LayerInfo
from lmcache_shared.errors import ConfigError
from lmcache_shared.settings import Settings

WIDTHS: Mapping[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "uint8": 1}
"""Bytes of a number."""

MAX_BYTES = 1 << 30
"""The largest paged KV cache that is made."""

PATTERN_BYTES = 1 << 16
LAYER_NAME = "model.layers.{}"
"""As vLLM and LMCache's standalone engine name them."""


@dataclass(frozen=True)
class KVLayout:
    """The shape of a model's KV cache."""

    layers: int
    heads: int
    head_size: int
    dtype: str
    mla: bool
    blocks: int
    block_size: int
    chunk_size: int

    @classmethod
    def of(cls, settings: Settings) -> KVLayout:
        """The layout that the settings ask for.

        Raises:
            ConfigError: it is too large, or a chunk does not fit into it.
        """
        layout = cls(
            settings.engine_layers,
            1 if settings.engine_use_mla else settings.engine_heads,
            settings.engine_head_size,
            settings.engine_dtype,
            settings.engine_use_mla,
            settings.engine_blocks,
            settings.engine_block_size,
            settings.chunk_size,
        )
        if layout.slots * layout.token_bytes > MAX_BYTES:
            raise ConfigError(
                f"engine_layers, engine_heads, engine_head_size, engine_blocks and engine_block_size: the KV cache"
                f" would have {layout.slots * layout.token_bytes} bytes, but at most {MAX_BYTES} are made"
            )
        if layout.slots < layout.chunk_size:
            raise ConfigError(
                f"engine_blocks={layout.blocks}, engine_block_size={layout.block_size}: {layout.slots} slots, but a"
                f" chunk has chunk_size={layout.chunk_size} tokens; make more of them"
            )
        return layout

    @property
    def planes(self) -> int:
        """Keys and values, or the one latent vector."""
        return 1 if self.mla else 2

    @property
    def slots(self) -> int:
        return self.blocks * self.block_size

    @property
    def vector_bytes(self) -> int:
        """Bytes of a slot in one plane of one layer."""
        return self.heads * self.head_size * WIDTHS[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token over all layers."""
        return self.layers * self.planes * self.vector_bytes

    @property
    def layer_shape(self) -> tuple[int, ...]:
        if self.mla:
            return (self.blocks, self.block_size, self.head_size)
        return (2, self.blocks, self.block_size, self.heads, self.head_size)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """What LMCache's metadata call `kv_shape`."""
        return (self.layers, self.planes, self.chunk_size, self.heads, self.head_size)


class PagedKVCache:
    """The layers' bytes. Every call holds the one lock for as long as it copies."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self._lock = threading.Lock()
        size = layout.planes * layout.slots * layout.vector_bytes
        names = [LAYER_NAME.format(number) for number in range(layout.layers)]
        self._layers = {name: bytearray(pattern(name.encode(), size)) for name in names}

    def layers(self) -> Mapping[str, LayerInfo]:
        info = LayerInfo(self.layout.layer_shape, f"torch.{self.layout.dtype}", "cpu")
        return dict.fromkeys(self._layers, info)

    def slot_bytes(self, layer: str, slots: Sequence[int]) -> bytes:
        width, buffer = self.layout.vector_bytes, self._layers[layer]
        out = bytearray()
        with self._lock:
            for plane in self._planes():
                for start, end in _runs(slots):
                    out += buffer[plane + start * width : plane + end * width]
        return _widened(out) if self.layout.dtype == "bfloat16" else bytes(out)

    def write(self, position: int, data: bytes) -> None:
        """Put a chunk's bytes, as `read` gives them, into the slots of the tokens from `position` on.

        Beyond the last slot it goes on at the first, as a cache reuses its blocks.
        """
        width = self.layout.vector_bytes
        tokens = len(data) // self.layout.token_bytes
        first = position % self.layout.slots
        head = min(tokens, self.layout.slots - first)
        source = memoryview(data)
        with self._lock:
            for buffer in self._layers.values():
                for plane in self._planes():
                    buffer[plane + first * width : plane + (first + head) * width] = source[: head * width]
                    buffer[plane : plane + (tokens - head) * width] = source[head * width : tokens * width]
                    source = source[tokens * width :]

    def _planes(self) -> range:
        """Where each plane of a layer begins."""
        size = self.layout.slots * self.layout.vector_bytes
        return range(0, self.layout.planes * size, size)


def pattern(key: bytes, size: int) -> bytes:
    """Bytes that look random and are the same for the same key: what a model would compute for it."""
    block = hashlib.shake_128(key).digest(min(size, PATTERN_BYTES))
    count = -(-size // max(1, len(block)))
    return b"".join(block[turn % len(block) :] + block[: turn % len(block)] for turn in range(count))[:size]


def _runs(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Slots in a row as one piece: its first, and the one after its last."""
    start = end = -1
    for slot in slots:
        if slot != end:
            if end > start:
                yield start, end
            start = slot
        end = slot + 1
    if end > start:
        yield start, end


def _widened(data: bytes | bytearray) -> bytes:
    """bfloat16 as float32: the same upper half, and a lower half of zeros (little endian)."""
    out = bytearray(2 * len(data))
    out[2::4], out[3::4] = data[0::2], data[1::2]
    return bytes(out)
