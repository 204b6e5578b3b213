"""What the families of a merge are called, so that no two of them write the same line or forbid each other's.

Two nodes may say different types for one name, or one may have a histogram `x` and the other a gauge `x_count`. The
family that most nodes have keeps the name, then the one whose type, in the alphabet, is first. The other becomes
`<name>_as_<type>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple

from .layout import BOUNDS, SUFFIXES

Key = tuple[bytes, str]
"""A family's name and type as a node says them, in terms of the text format."""


def text_names(nodes: Mapping[Key, int]) -> dict[Key, bytes]:
    """The name of each family; `nodes` says how many have it."""
    names: dict[Key, bytes] = {}
    taken: set[bytes] = set()
    late = []
    for key in sorted(nodes, key=lambda key: (-nodes[key], key[1], key[0])):
        if taken.isdisjoint(series := _series(*key)):
            names[key] = key[0]
            taken.update(series)
        else:
            late.append(key)
    for key in late:
        names[key] = _free_name(*key, taken)
        taken.update(_series(names[key], key[1]))
    return names


def _series(name: bytes, type: str) -> set[bytes]:
    """All names that a family claims in the text format."""
    return {name, *[name + suffix for suffix in SUFFIXES[type]]}


def _free_name(name: bytes, type: str, taken: set[bytes]) -> bytes:
    return next(other for other in _other_names(name, type) if taken.isdisjoint(_series(other, type)))


def _other_names(name: bytes, type: str) -> Iterator[bytes]:
    tail = b"_total" if type == "counter" and name.endswith(b"_total") else b""
    stem = name[: len(name) - len(tail)] + b"_as_" + type.encode()
    yield stem + tail
    for number in count(2):
        yield b"%b_%d%b" % (stem, number, tail)


class OpenMetricsFamily(NamedTuple):
    """A family as OpenMetrics has it, and which of ours are in it."""

    name: bytes
    type: str
    samples: bytes
    """The name of its samples, less their suffix."""
    created: Key | None = None
    """The family with the times at which its samples began."""
    began: Key | None = None
    """The family whose samples began at these times; only the others are here."""


def openmetrics_families(names: Mapping[Key, bytes]) -> dict[Key, OpenMetricsFamily]:
    """What each family is called in OpenMetrics.

    A counter is named without its `_total`; where it has none, or something else has that name, its type is unknown.
    """
    taken = {name for key, text_name in names.items() for name in _series(text_name, key[1])}
    single = {text_name: key for key, text_name in names.items() if key[1] not in BOUNDS}
    created: dict[bytes, Key | None] = {}
    bases: dict[Key, bytes] = {}
    for key in _parents_first(names):
        base = names[key]
        began = base + b"_created"
        if key[1] == "counter":
            base = base.removesuffix(b"_total")
            began = base + b"_created"
            if base == names[key] or base in taken or (began in taken and began not in single):
                continue
        bases[key] = base
        created[began] = key
        taken |= {base, began}
    families: dict[Key, OpenMetricsFamily] = {}
    inside = {single[began]: parent for began, parent in created.items() if began in single}
    inside = {key: parent for key, parent in inside.items() if key not in bases}
    folded = {parent: key for key, parent in inside.items()}
    for key, name in names.items():
        if key in inside:
            samples = _free_name(name, "gauge", taken)
            taken.add(samples)
            families[key] = OpenMetricsFamily(samples, "gauge", samples, began=inside[key])
            continue
        samples = name
        if key in bases and key[1] in BOUNDS and name in created:
            samples = bases[key] = _free_name(name, key[1], taken)
            taken.update(_series(samples, key[1]))
        known = key in bases or key[1] == "gauge"
        families[key] = OpenMetricsFamily(
            bases.get(key, samples), key[1] if known else "unknown", samples, folded.get(key)
        )
    return families


def _parents_first(names: Mapping[Key, bytes]) -> Sequence[Key]:
    """Families that have a time at which they began: histograms and summaries, then counters."""
    return [key for key in names if key[1] in BOUNDS] + [key for key in names if key[1] == "counter"]
