"""What a node said in JSON, taken apart: it may be of any shape, and no page fails by it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

MAX_DEPTH = 12
MAX_LEVELS = 100
"""Of what is JSON for a page at all."""

MAX_TEXT = 4000
"""Characters of one value."""


def record(value: object) -> dict[str, Any]:
    """The object that it is, or an empty one."""
    return value if isinstance(value, dict) else {}


def listed(value: object) -> list[Any]:
    """The list that it is, or an empty one."""
    return value if isinstance(value, list) else []


def number(value: object) -> float | None:
    """The number that it is; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond a float's
        return None


def text(value: object) -> str:
    """A value in a line: a text as it is, all else in JSON."""
    if value is None:
        return ""
    found = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found if len(found) <= MAX_TEXT else f"{found[:MAX_TEXT]} … ({len(found) - MAX_TEXT:,} more characters)"


def flat(value: Mapping[str, Any], within: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Each value of an object by its dotted name; lists, and what lies too deep, stay as they are."""
    for key, inner in value.items():
        name = f"{within}.{key}" if within else str(key)
        if isinstance(inner, dict) and inner and depth < MAX_DEPTH:
            yield from flat(inner, name, depth + 1)
        else:
            yield name, inner


def is_deep(found: object) -> bool:
    """Whether it has more levels than can be gone through on any way."""
    level = [found]
    for _ in range(MAX_LEVELS):
        level = [
            inner
            for it in level
            if isinstance(it, dict | list)
            for inner in (it.values() if isinstance(it, dict) else it)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
