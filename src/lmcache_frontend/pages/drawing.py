"""Small pictures that the server draws: SVG without a script, its colours from the style sheet."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

SPARK_WIDTH, SPARK_HEIGHT = 96, 24
"""Units of the picture; the style sheet says how large it is shown."""


def spark(values: Sequence[float | None], label: str = "", *, high: float = 0.0) -> Markup:
    """A line of values, oldest first; a gap is a gap, and nothing at all is a dotted line.

    Args:
        label: what a screen reader says of it; without one it is decoration.
        high: where the scale ends at least: the same for all that are to be compared. It begins at 0.
    """
    known = [value for value in values if value is not None]
    name = Markup('role="img" aria-label="{}"').format(label) if label else Markup('aria-hidden="true"')
    start = Markup('<svg class="spark{}" viewBox="0 0 {} {}" preserveAspectRatio="none" {}>')
    if not known:
        middle = SPARK_HEIGHT / 2
        line = Markup('<path class="none" d="M0 {}H{}"/></svg>').format(f"{middle:g}", SPARK_WIDTH)
        return start.format(" empty", SPARK_WIDTH, SPARK_HEIGHT, name) + line
    bottom = min(0.0, *known)
    height = (max(high, *known) - bottom) or 1.0
    step = SPARK_WIDTH / max(len(values) - 1, 1)
    lines, areas, run = [], [], list[str]()
    for i, value in enumerate([*values, None]):
        if value is not None:
            run.append(f"{i * step:.1f} {SPARK_HEIGHT - 1 - (value - bottom) / height * (SPARK_HEIGHT - 3):.1f}")
            continue
        if len(run) == 1:  # a single value would be no line
            run.append(f"{float(run[0].split()[0]) + 1:.1f} {run[0].split()[1]}")
        if run:
            lines.append("M" + "L".join(run))
            first, last = run[0].split()[0], run[-1].split()[0]
            areas.append(f"M{first} {SPARK_HEIGHT}L" + "L".join(run) + f"L{last} {SPARK_HEIGHT}Z")
        run = []
    drawn = Markup('<path class="area" d="{}"/><path class="line" d="{}"/></svg>')
    return start.format("", SPARK_WIDTH, SPARK_HEIGHT, name) + drawn.format("".join(areas), "".join(lines))


CELL_COLUMNS = 80

_CELLS = {
    "up": "m1.5 1.5h5v5h-5z",
    "slow": "m4 0 4.5 8h-9z",
    "down": "h8v8h-8z",
    "unknown": "h8v8h-8zm2 2v4h4v-4z",
}
"""A cell's shape by state, from its upper left corner: small, a triangle, full, hollow."""


def cells(states: Sequence[str], label: str) -> Markup:
    """Many nodes, each a cell in the colour and the shape of its state: four paths, however many there are."""
    paths: dict[str, list[str]] = {}
    for i, state in enumerate(states):
        row, column = divmod(i, CELL_COLUMNS)
        paths.setdefault(state, []).append(f"M{column * 10 + 1} {row * 10 + 1}{_CELLS[state]}")
    rows = -(-len(states) // CELL_COLUMNS)
    width = CELL_COLUMNS * 10
    start = Markup('<svg class="cells" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, rows * 10, label)
    drawn = [Markup('<path class="{}" d="{}"/>').format(state, "".join(path)) for state, path in paths.items()]
    return start + Markup("").join(drawn) + Markup("</svg>")


def bars(parts: Sequence[tuple[str, float]], label: str) -> Markup:
    """One bar of parts, each a class and its amount, in proportion."""
    total = sum(amount for _, amount in parts) or 1.0
    pieces, left = [], 0.0
    for kind, amount in parts:
        width = amount / total * 100
        if width:
            pieces.append(
                Markup('<rect class="{}" x="{}" width="{}" height="6"/>').format(kind, f"{left:.2f}", f"{width:.2f}")
            )
        left += width
    start = Markup('<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label="{}">')
    return start.format(label) + Markup("").join(pieces) + Markup("</svg>")
