"""Checksums of the paged KV cache, as LMCache computes them, so that two engines' answers can be compared.

A slot is block times block size plus offset. A chunk's checksum is the MD5 of its bytes in one layer; over all layers
it is the MD5 of the layers' hex digests, one after the other, the layers by name.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lmcache_api.component import KVCaches, LayerInfo
from lmcache_shared.errors import Failure, Refusal

MAX_CHECKSUMS = 1 << 16
"""The most checksums that one answer holds."""

BATCH_SLOTS = 4096
"""The most slots of a layer that are fetched at once."""

MAX_DIGITS = 20
MAX_SHOWN = 16

_RANGE = re.compile(r"\[([0-9]{1,20}),([0-9]{1,20})\]")
_PART = re.compile(r"[^,\[\]]*\[[^\[\]]*\]?|[^,\[\]]+|\]")


@dataclass(frozen=True)
class Checksums:
    """Of each chunk over all layers, or of each layer and chunk."""

    chunks: int
    together: list[str] = field(default_factory=list)
    by_layer: dict[str, list[str]] = field(default_factory=dict)


def parse_slots(text: str, most: int) -> list[int]:
    """The slots of `0,1,[4,7],9`, in their order.

    Raises:
        Failure: 400, when the text is something else or names more than `most` slots.
    """
    slots: list[int] = []
    for part in _PART.findall("".join(text.split())):
        run = _run(part)
        if len(slots) + run.stop - run.start > most:
            message = f"more than {most} slots, which is what internal_api_server_max_tokens allows at once"
            raise Failure(400, "Too many slots", message)
        slots.extend(run)
    return slots


def _run(part: str) -> range:
    found = _RANGE.fullmatch(part)
    try:
        if found:
            start, end = int(found[1]), int(found[2])
            if start > end:
                raise ValueError(f"Range start {start} must be <= end {end}")
            return range(start, end + 1)
        if len(part) > MAX_DIGITS or not part.isascii():
            raise ValueError(part)
        return range(int(part), int(part) + 1)
    except ValueError as error:
        reason = str(error) if str(error).startswith("Range") else f"Invalid slot format: '{part[:80]}'"
        message = f"slot_mapping must be comma-separated integers or ranges like [start,end]: {reason}"
        raise Failure(400, "Invalid slot_mapping format", message) from None


def ranges_of(slots: Sequence[int]) -> list[int | list[int]]:
    """The slots with three or more in a row as `[first, last]`, in their order."""
    runs: list[list[int]] = []
    for slot in slots:
        if runs and slot == runs[-1][1] + 1:
            runs[-1][1] = slot
        else:
            runs.append([slot, slot])
    told: list[int | list[int]] = []
    for first, last in runs:
        if last - first >= 2:
            told.append([first, last])
        else:
            told.extend(range(first, last + 1))
    return told


def of_chunks(
    caches: KVCaches, slots: Sequence[int], chunk_size: int | None, *, layerwise: bool, until: float
) -> Checksums | None:
    """The checksums of the slots by `chunk_size`; without a size there are none, as with LMCache.

    Args:
        caches: where the bytes come from.
        slots: which of them.
        chunk_size: how many slots a chunk has; the last one may have fewer.
        layerwise: whether each layer is told by itself.
        until: when nobody waits any more, by the monotonic clock.

    Returns:
        `None` when there is no KV cache.

    Raises:
        Failure: 400, when a slot is out of bounds, or the size not positive or too small.
        Refusal: 504, when `until` has come.
    """
    layers = caches.layers()
    if not layers:
        return None
    _check_bounds(slots, layers)
    if chunk_size is None:
        return Checksums(0)
    if chunk_size <= 0:
        raise Failure(400, "Invalid chunk_size", "chunk_size must be a positive integer")
    chunks = -(-len(slots) // chunk_size)
    count = chunks * (len(layers) if layerwise else 1)
    if count > MAX_CHECKSUMS:
        message = f"{count} checksums, but one answer holds {MAX_CHECKSUMS}; take a larger chunk_size or fewer slots"
        raise Failure(400, "Too many chunks", message)
    by_layer = {
        name: list(_digests(caches, name, layer.shape, slots, chunk_size, until)) for name, layer in layers.items()
    }
    if layerwise:
        return Checksums(chunks, by_layer=by_layer)
    columns = zip(*(by_layer[name] for name in sorted(by_layer)), strict=True)
    together = [hashlib.md5("".join(column).encode(), usedforsecurity=False).hexdigest() for column in columns]
    return Checksums(chunks, together=together)


def _digests(
    caches: KVCaches, layer: str, shape: Sequence[int], slots: Sequence[int], chunk_size: int, until: float
) -> Iterator[str]:
    """The checksum of each chunk in a layer; many slots are fetched at once, as a device would have it, but not all.

    With keys and values (`planes`) a chunk's bytes are the keys of all its slots, then their values.
    """
    planes = shape[0] if len(shape) == 5 else 1

    def fetch(first: int, last: int) -> list[memoryview]:
        if time.monotonic() > until:
            raise Refusal(504, "compute checksums: not done in time; take fewer slots")
        data = memoryview(caches.slot_bytes(layer, slots[first:last]))
        size = len(data) // planes
        return [data[number * size : (number + 1) * size] for number in range(planes)]

    whole = max(1, BATCH_SLOTS // chunk_size) * chunk_size
    if chunk_size <= BATCH_SLOTS:
        for first in range(0, len(slots), whole):
            last = min(first + whole, len(slots))
            fetched = fetch(first, last)
            vector = len(fetched[0]) // (last - first)
            for start in range(0, last - first, chunk_size):
                end = min(start + chunk_size, last - first)
                digest = hashlib.md5(usedforsecurity=False)
                for plane in fetched:
                    digest.update(plane[start * vector : end * vector])
                yield digest.hexdigest()
        return
    for first in range(0, len(slots), chunk_size):
        digest = hashlib.md5(usedforsecurity=False)
        last = min(first + chunk_size, len(slots))
        for number in range(planes):  # each piece is fetched once for every plane: no more than a batch is held
            for start in range(first, last, BATCH_SLOTS):
                digest.update(fetch(start, min(start + BATCH_SLOTS, last))[number])
        yield digest.hexdigest()


def slots_of(shape: Sequence[int]) -> int:
    """How many slots a layer has: `[2, blocks, block size, …]` (MHA), otherwise `[blocks, block size, …]`."""
    blocks, block_size = shape[1:3] if len(shape) == 5 else shape[:2]
    return blocks * block_size


def _check_bounds(slots: Sequence[int], layers: Mapping[str, LayerInfo]) -> None:
    total = min(slots_of(layer.shape) for layer in layers.values())
    outside = [slot for slot in slots if not 0 <= slot < total]
    if outside:
        shown = ", ".join(map(str, outside[:MAX_SHOWN]))
        more = f" and {len(outside) - MAX_SHOWN} more" if len(outside) > MAX_SHOWN else ""
        message = f"Slot indices out of bounds: [{shown}]{more}. Valid range: 0 to {total - 1}"
        raise Failure(400, "Invalid slot indices", message)
