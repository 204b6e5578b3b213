"""The paged KV cache of a node as the shapes of its layers tell it, and a picture of it: layers by slots.

The picture is bounded: of many layers or blocks several share a row or a column, and it says how many.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

MAX_ROWS = 128
MAX_COLUMNS = 96
MAX_LAYERS = 10_000
MAX_EXTENT = 1 << 40
"""Of a tensor in one direction: what is more is no tensor."""
MAX_AXES = 16
HEIGHT = 320
"""Pixels of the picture, when there are enough rows for it."""

MAX_PITCH = 36.0
MIN_GAP_PITCH = 4.0
"""Of a row: the most, and from which on there is a gap below it."""

_WIDTH = 960
_KINDS = 4
"""So many kinds have a colour of their own; the letters go on."""

MAX_AXES = 16
_BYTES = re.compile(r"([0-9]{1,4})")
_DIGITS = re.compile(r"([0-9]{1,18})")
_DTYPE_BYTES = {"bool": 1, "half": 2, "float": 4, "double": 8, "short": 2, "int": 4, "long": 8}


def _form(*parts: str) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(parts)


@dataclass(frozen=True)
class Layer:
    """One layer's tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def blocks(self) -> int:
        """How many blocks it has; 0 where its shape is none that is known."""
        return self._paged()[0]

    @property
    def block_size(self) -> int:
        return self._paged()[1]

    @property
    def slots(self) -> int:
        return self.blocks * self.block_size

    @property
    def form(self) -> str:
        """How its shape is read."""
        if self._has_pair():
            return _form("keys and values", "blocks", "block size", "heads", "head size")
        return {
            5: _form("blocks", "keys and values", "block size", "heads", "head size"),
            4: _form("blocks", "block size", "heads", "head size"),
            3: _form("blocks", "block size", "head size"),
        }.get(len(self.shape), "of no known form")

    @property
    def bytes(self) -> int:
        found = _BYTES.search(self.dtype)
        name = self.dtype.removeprefix("torch.")
        return math.prod(self.shape) * (int(found[1]) // 8 if found else _DTYPE_BYTES.get(name, 0))

    def _has_pair(self) -> bool:
        return len(self.shape) == 5 and self.shape[0] == 2

    def _paged(self) -> tuple[int, int]:
        if self._has_pair():
            return self.shape[1], self.shape[2]
        if len(self.shape) == 5 and self.shape[1] == 2:
            return self.shape[0], self.shape[2]
        return (self.shape[0], self.shape[1]) if len(self.shape) in (3, 4) else (0, 0)


@dataclass
class Kind:
    """Layers that are alike."""

    letter: str
    number: int
    first: Layer
    layers: list[Layer] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)


@dataclass(frozen=True)
class Layout:
    """All layers in their order, and their kinds."""

    layers: Sequence[Layer]
    kinds: Sequence[Kind]

    @property
    def slots(self) -> int:
        """Of the layer that has most."""
        return max((layer.slots for layer in self.layers), default=0)

    @property
    def blocks(self) -> int:
        return max((layer.blocks for layer in self.layers), default=0)

    @property
    def block_size(self) -> int:
        return max((layer.block_size for layer in self.layers), default=0)

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def layers_a_row(self) -> int:
        return -(-len(self.layers) // MAX_ROWS) or 1

    @property
    def blocks_a_column(self) -> int:
        return -(-self.blocks // MAX_COLUMNS) or 1


def read_layout(told: Mapping[str, object]) -> Layout:
    """What `/cache/kvcache/info` tells; a layer that is none is left out."""
    found = told.get("layers")
    layers = []
    for name, layer in list(found.items())[:MAX_LAYERS] if isinstance(found, dict) else ():
        shape = layer.get("shape") if isinstance(layer, dict) else None
        if (
            isinstance(shape, list)
            and len(shape) <= MAX_AXES
            and all(isinstance(it, int) and 0 <= it < MAX_EXTENT for it in shape)
        ):
            layers.append(Layer(name, tuple(shape), str(layer.get("dtype", "")), str(layer.get("device", ""))))
    layers.sort(key=lambda layer: natural(layer.name))
    kinds: dict[tuple[object, ...], Kind] = {}
    for layer in layers:
        key = (layer.shape, layer.dtype, layer.device)
        number = len(kinds)
        kind = kinds.setdefault(key, Kind(_letter(number), min(number, _KINDS - 1) + 1, layer))
        kind.layers.append(layer)
    return Layout(layers, list(kinds.values()))


def natural(name: str) -> list[tuple[int, str]]:
    """An order in which layer 10 comes after layer 9."""
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(_DIGITS.split(name))]


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"A{number}"


def picture(layout: Layout, marked: Sequence[tuple[int, int]] = ()) -> Markup:
    """Layers from top to bottom, slots from left to right, each kind in its colour and with its letter in its title.

    Args:
        marked: runs of slots, the first and the last of each, that are to be seen in it.
    """
    slots = layout.slots
    if not slots:
        return Markup("")
    kind_of = {id(layer): kind for kind in layout.kinds for layer in kind.layers}
    together = layout.layers_a_row
    rows = [layout.layers[i : i + together] for i in range(0, len(layout.layers), together)]
    pitch = max(2.0, min(MAX_PITCH, HEIGHT / len(rows)))
    height = pitch * len(rows)
    drawn = [_row(row, i * pitch, pitch, slots, kind_of) for i, row in enumerate(rows)]
    lines = []
    for column in range(1, -(-layout.blocks // layout.blocks_a_column)):
        lines.append(f"M{column * layout.blocks_a_column / layout.blocks * _WIDTH:.1f} 0V{height:g}")
    drawn.append(Markup('<path class="grid" d="{}"/>').format("".join(lines)))
    for first, last in marked[:MAX_COLUMNS]:
        if first < slots:
            width = max(3.0, (min(last + 1, slots) - first) / slots * _WIDTH)
            drawn.append(
                Markup(
                    '<rect class="marked" x="{:.1f}" y="0" width="{:.1f}" height="{:g}"><title>{}</title></rect>'
                ).format(first / slots * _WIDTH, width, height, f"slots {first:,} to {last:,}")
            )
    label = f"{len(layout.layers):,} layers of {slots:,} slots in {len(layout.kinds)} kinds"
    start = Markup(
        '<svg class="layout" viewBox="0 0 {} {:g}" height="{:g}" preserveAspectRatio="none" role="img" aria-label="{}">'
    )
    return start.format(_WIDTH, height, height, label) + Markup("").join(drawn) + Markup("</svg>")


def _row(row: Sequence[Layer], y: float, pitch: float, slots: int, kind_of: Mapping[int, Kind]) -> Markup:
    kinds = list(dict.fromkeys(kind_of[id(layer)].letter for layer in row))
    title = row[0].name if len(row) == 1 else f"{row[0].name} to {row[-1].name}"
    piece = Markup('<rect class="kind-{}" x="0" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')
    return piece.format(
        kind_of[id(row[0])].number if len(kinds) == 1 else "mixed",
        y,
        max(layer.slots for layer in row) / slots * _WIDTH,
        pitch - (1 if pitch >= MIN_GAP_PITCH else 0),
        f"{title}: {' and '.join(kinds)}, {max(layer.slots for layer in row):,} slots",
    )
