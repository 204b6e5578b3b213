"""What the node is: its version, its metadata, and how the KV cache of its model is laid out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lmcache_frontend.pages.reading import flat, listed, number, text
from lmcache_frontend.pages.tabs import Tab, View

MAX_ROWS = 3000
MAX_AXES = 16
MAX_EXTENT = 1 << 40

_BYTES = {"64": 8, "32": 4, "16": 2, "8": 1}
"""Of one value, by the bits that its type's name ends in or has before a `_` (`float8_e4m3fn`)."""

MAX_SIZE = 1 << 40
MAX_AXES = 16
"""What is more is no tensor, and its bytes no number."""

_AXES = ("layers", "K and V", "tokens", "heads", "head size")


@dataclass(frozen=True)
class Layout:
    """A chunk of the KV cache: its axes, its size, and that of one token."""

    axes: list[tuple[str, int]]
    dtype: str
    chunk_bytes: float | None
    token_bytes: float | None


def layout_of(shape: object, dtype: object, chunk_size: object) -> Layout | None:
    """The layout that metadata tells; None where they tell none."""
    sizes = [int(size) for size in map(number, listed(shape)) if size is not None and 0 < size < MAX_SIZE]
    if not 0 < len(sizes) == len(listed(shape)) <= MAX_AXES:
        return None
    names = _AXES if len(sizes) == len(_AXES) else tuple(f"axis {i}" for i in range(len(sizes)))
    kind = text(dtype).rpartition(".")[2]
    bits = "".join(character for character in kind.partition("_")[0] if character.isdigit())
    item = _BYTES.get(bits)
    chunk = None if item is None else float(math.prod(sizes) * item)
    tokens = number(chunk_size)
    token = chunk / tokens if chunk is not None and tokens else None
    return Layout(list(zip(names, sizes, strict=True)), kind, chunk, token)


async def show(view: View) -> Mapping[str, object]:
    paths = ("/meta", "/version", "/lmc_version", "/commit_id")
    outcome, *versions = await asyncio.gather(*(view.get(path) for path in paths))
    told = outcome.object()
    rows = list(flat(told))
    return {
        "outcome": outcome,
        "versions": [
            (title, text(it.json()) if it.ok else "", it)
            for title, it in zip(("Version", "Release", "Commit"), versions, strict=True)
        ],
        "rows": [(name, text(value), value is None) for name, value in rows[:MAX_ROWS]],
        "more": max(0, len(rows) - MAX_ROWS),
        "layout": layout_of(told.get("kv_shape"), told.get("kv_dtype"), told.get("chunk_size")),
    }


TAB = Tab("meta", "Metadata", 50, show, serves=("/meta",))
