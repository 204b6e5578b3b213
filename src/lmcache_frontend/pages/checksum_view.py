"""Checksums of a node's KV cache beside those of another node: what is alike, by layer and chunk.

Nothing grows with what the nodes answer: the picture has so many cells at most, and the tables so many rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Literal

from markupsafe import Markup

from lmcache_frontend.pages.kv_layout import natural

MAX_ROWS = 64
MAX_COLUMNS = 96
MAX_LISTED = 100
MAX_RUNS = 4000
"""Of slots: a page asks for fewer."""

ALL_LAYERS = "all layers"

Cell = Literal["equal", "different", "missing"]
_WORST: tuple[Cell, ...] = ("different", "missing", "equal")
_SIZE = 12

Sums = Mapping[str, Sequence[str]]
"""By layer, those of its chunks in order."""


@dataclass(frozen=True)
class Difference:
    """Chunks of a layer, one after the other, that are not alike in the same way.

    Attributes:
        slots: those of all of them.
        here, there: the sums of the first; empty where a node has none.
    """

    layer: str
    first: int
    last: int
    slots: str
    here: str
    there: str


@dataclass(frozen=True)
class Comparison:
    """What is alike and what is not; `differences` are the first of `runs`."""

    rows: Mapping[str, Sequence[Cell]]
    differences: Sequence[Difference]
    runs: int
    different: int
    missing: int
    total: int

    @property
    def is_equal(self) -> bool:
        return self.different == self.missing == 0

    @property
    def layers(self) -> int:
        """So many have a difference."""
        return sum(any(cell != "equal" for cell in cells) for cells in self.rows.values())

    @property
    def chunks(self) -> int:
        return max((len(cells) for cells in self.rows.values()), default=0)

    @property
    def layers_a_row(self) -> int:
        return -(-len(self.rows) // MAX_ROWS) or 1

    @property
    def chunks_a_column(self) -> int:
        return -(-self.chunks // MAX_COLUMNS) or 1


def read_sums(told: Mapping[str, object]) -> Sums:
    """What `/cache/kvcache/check` tells."""
    found = told.get("chunk_checksums")
    if isinstance(found, list):
        return {ALL_LAYERS: [str(it) for it in found]}
    if isinstance(found, dict):
        return {
            name: [str(it) for it in found[name]]
            for name in sorted(found, key=natural)
            if isinstance(found[name], list)
        }
    return {}


def compare(here: Sums, there: Sums, runs: Sequence[tuple[int, int]], chunk_size: int) -> Comparison:
    """Each chunk of each layer of both nodes."""
    rows: dict[str, list[Cell]] = {}
    listed: list[Difference] = []
    runs_in_all = 0
    for layer in sorted({*here, *there}, key=natural):
        pairs = list(zip_longest(here.get(layer, ()), there.get(layer, ()), fillvalue=""))
        cells = [_cell(*pair) for pair in pairs]
        rows[layer] = cells
        for cell, run in groupby(range(len(cells)), key=lambda i: cells[i]):
            chunks = list(run)
            if cell == "equal":
                continue
            runs_in_all += 1
            if len(listed) < MAX_LISTED:
                first, last = chunks[0], chunks[-1]
                slots = slots_of(runs, first * chunk_size, (last - first + 1) * chunk_size)
                listed.append(Difference(layer, first, last, slots, *pairs[first]))
    flat = [cell for cells in rows.values() for cell in cells]
    return Comparison(rows, listed, runs_in_all, flat.count("different"), flat.count("missing"), len(flat))


def _cell(mine: str, other: str) -> Cell:
    return "equal" if mine == other else "different" if mine and other else "missing"


def slots_of(runs: Sequence[tuple[int, int]], first: int, count: int) -> str:
    """Which slots are the `first` and those after it of all that `runs` name: `256-511`, with a longer dash."""
    found = list[str]()
    for start, end in runs:
        length = end - start + 1
        if first >= length:
            first -= length
            continue
        begin = start + first
        stop = min(end, begin + count - 1)
        found.append(f"{begin:,}\N{EN DASH}{stop:,}" if stop > begin else f"{begin:,}")
        count -= stop - begin + 1
        first = 0
        if not count:
            break
    return ", ".join(found[:3]) + (" …" if len(found) > 3 else "")


def runs_of(ranges: object) -> list[tuple[int, int]]:
    """`slot_mapping_ranges` (`[0, [4, 7], 9]`) as runs."""
    runs = []
    for it in ranges[:MAX_RUNS] if isinstance(ranges, list) else ():
        if isinstance(it, int):
            runs.append((it, it))
        elif isinstance(it, list) and len(it) == 2 and all(isinstance(number, int) for number in it):
            runs.append((it[0], it[1]))
    return runs


def picture(found: Comparison) -> Markup:
    """Layers from top to bottom, chunks from left to right.

    What is equal is a line, what is different a crossed block, what one side lacks a frame.
    """
    names = list(found.rows)
    deep, wide = found.layers_a_row, found.chunks_a_column
    thin, block, ring = list[str](), list[str](), list[str]()
    grid = [[found.rows[name] for name in names[i : i + deep]] for i in range(0, len(names), deep)]
    columns = -(-found.chunks // wide)
    for y, rows in enumerate(grid):
        cells = [_worst(rows, x * wide, (x + 1) * wide) for x in range(columns)]
        for cell, run in groupby(range(columns), key=lambda x: cells[x]):
            places = list(run)
            top, left = y * _SIZE, places[0] * _SIZE
            if cell == "equal":
                thin.append(f"M{left + 1} {top + 5}h{len(places) * _SIZE - 2}v2h-{len(places) * _SIZE - 2}z")
            for x in places if cell != "equal" else ():
                left = x * _SIZE
                if cell == "missing":
                    ring.append(f"M{left + 2} {top + 2}h8v8h-8z")
                elif cell == "different":
                    block.append(f"M{left + 1} {top + 1}h10v10h-10z")
    crosses = "".join(f"{it.partition('h')[0]}m2 2l6 6m0 -6l-6 6" for it in block)
    label = f"{found.total - found.different - found.missing} of {found.total} chunks are equal"
    width, height = columns * _SIZE, len(grid) * _SIZE
    start = Markup('<svg class="sums" viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">')
    return (
        start.format(width, height, width * 3 // 2, height * 3 // 2, label)
        + Markup('<path class="equal" d="{}"/><path class="different" d="{}"/>').format("".join(thin), "".join(block))
        + Markup('<path class="cross" d="{}"/><path class="missing" d="{}"/></svg>').format(crosses, "".join(ring))
    )


def _worst(rows: Sequence[Sequence[Cell]], first: int, end: int) -> Cell | None:
    cells = {cell for row in rows for cell in row[first:end]}
    return next((cell for cell in _WORST if cell in cells), None)
