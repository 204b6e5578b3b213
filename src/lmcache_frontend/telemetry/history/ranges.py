"""How far back somebody looks: by name, or from one time to another."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lmcache_shared.errors import Refusal
from lmcache_shared.responses import plain

RANGES: Mapping[str, int] = {"5m": 300, "15m": 900, "1h": 3600, "6h": 21600, "24h": 86400}
"""Seconds by name."""

MAX_STAMP = 1e11
"""A Unix time beyond this is in milliseconds, or none."""


def range_of(text: str) -> int:
    """The seconds of a range.

    Raises:
        Refusal: 422.
    """
    if text not in RANGES:
        raise refused("range", f"Input should be one of {', '.join(RANGES)}", text)
    return RANGES[text]


def stamp_of(name: str, text: str) -> float:
    """The Unix time of a parameter.

    Raises:
        Refusal: 422.
    """
    try:
        stamp = float(text) if text.isascii() else math.nan
    except ValueError:
        stamp = math.nan
    if not 0 <= stamp <= MAX_STAMP:
        raise refused(name, "Input should be a Unix time in seconds", text)
    return stamp


def refused(name: str, message: str, given: object) -> Refusal:
    """A parameter that is of the right type and cannot be used."""
    return Refusal(422, [{"type": "value_error", "loc": ["query", name], "msg": message, "input": plain(given)}])
