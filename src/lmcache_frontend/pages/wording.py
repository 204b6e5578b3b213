"""Values as people read them: the templates' filters. What is not known is an en dash everywhere."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import jinja2

UNKNOWN = "\N{EN DASH}"

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_LARGE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float | None) -> str:
    """`1,234`, and from ten thousand on `12.3k`."""
    if value is None:
        return UNKNOWN
    for size, letter in _LARGE:
        if abs(value) >= size and abs(value) >= 1e4:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def share(value: float | None) -> str:
    """Of 1, as per cent."""
    return UNKNOWN if value is None else f"{value * 100:.1f} %" if 0 < value < 0.9995 else f"{value * 100:.0f} %"


def size(value: float | None) -> str:
    """Bytes."""
    if value is None:
        return UNKNOWN
    for unit in _BYTES[:-1]:
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1024
    return f"{value:.3g} {_BYTES[-1]}"


def span(seconds: float | None) -> str:
    """`3.2 ms`, `41 s`, `5 min`, `3 h 12 min`, `4 d 6 h`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def quantity(value: float | None, unit: str) -> str:
    """A value of a series, by its unit."""
    if unit == "share":
        return share(value)
    if unit == "bytes":
        return size(value)
    if unit == "s":
        return span(value)
    return count(value)


def clock(moment: datetime.datetime | float | None) -> str:
    """The time of day in the frontend's time zone, and the day where it is another one than today."""
    if moment is None:
        return UNKNOWN
    if isinstance(moment, int | float):
        moment = datetime.datetime.fromtimestamp(moment, datetime.timezone.utc)
    now = datetime.datetime.now().astimezone()
    local = moment.astimezone(now.tzinfo)
    return f"{local:%H:%M:%S}" if local.date() == now.date() else f"{local:%Y-%m-%d %H:%M}"


def ago(moment: datetime.datetime | None) -> str:
    """How long since."""
    if moment is None:
        return UNKNOWN
    return span(max(0.0, (datetime.datetime.now(datetime.timezone.utc) - moment).total_seconds()) // 1)


def _filter(write: Callable[..., str]) -> Callable[..., str]:
    """What a template does not know is not known."""

    def apply(value: Any, *more: Any) -> str:
        return UNKNOWN if isinstance(value, jinja2.Undefined) else write(value, *more)

    return apply


FILTERS: dict[str, Callable[..., str]] = {
    "number": _filter(count),
    "share": _filter(share),
    "size": _filter(size),
    "span": _filter(span),
    "quantity": _filter(quantity),
    "clock": _filter(clock),
    "ago": _filter(ago),
}
