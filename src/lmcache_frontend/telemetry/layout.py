"""What a node's text says besides its numbers: its families, their samples in order, and where each number stands.

Nodes of one cluster send one layout with other numbers, so a layout is read once and then recognised. The label sets of
a text repeat too, in every family; `LabelSets` reads each spelling once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from typing import Final

from prometheus_client.utils import floatToGoString

from .lines import (
    ExpositionError,
    error_at,
    escaped,
    is_name,
    is_number,
    metadata_of,
    pairs_of,
    shown,
    unescaped_help,
)

MARK: Final = b"\xff"
"""Stands in a template for the node's labels: no UTF-8 text has this byte."""

Labels = tuple[tuple[str, str], ...]
Node = tuple[bytes, tuple[bytes, ...]]
"""A node's labels as they go into a template, and the numbers of its text in the order of the parts."""

Selects = Callable[[str, Mapping[str, str]], bool]

SUFFIXES: Final[Mapping[str, tuple[bytes, ...]]] = {
    "counter": (b"",),
    "gauge": (b"",),
    "untyped": (b"",),
    "histogram": (b"_bucket", b"_count", b"_sum"),
    "summary": (b"", b"_count", b"_sum"),
}
BOUNDS: Final[Mapping[str, tuple[bytes, str]]] = {"histogram": (b"_bucket", "le"), "summary": (b"", "quantile")}
"""Which samples must have a label with a number; no other of the family may have it."""


class LabelSet:
    """The labels of a sample as the merge writes them: the node's first, then its own, renamed where both have one."""

    __slots__ = ("_canonical", "_without", "numbers", "pairs", "text", "words")

    def __init__(self, pairs: Labels) -> None:
        self.pairs = pairs
        bounds = [pair for pair in pairs if pair[0] in ("le", "quantile")]
        self.numbers = tuple([name for name, value in bounds if is_number(value.encode())])
        self.words = tuple([name for name, value in bounds if name not in self.numbers])
        self.text = _label_text(pairs)

        self._without: dict[str, Labels] = {}
        self._canonical: dict[str, bytes] = {}

    def without(self, bound: str) -> Labels:
        """What all samples of one histogram or summary have in common."""
        if bound not in self._without:
            self._without[bound] = tuple(sorted(pair for pair in self.pairs if pair[0] != bound and pair[1]))
        return self._without[bound]

    def canonical(self, bound: str) -> bytes:
        """The text with this number as OpenMetrics spells it: 1 is 1.0."""
        if bound not in self._canonical:
            pairs = [(name, _spelled(value) if name == bound else value) for name, value in self.pairs]
            self._canonical[bound] = _label_text(pairs)
        return self._canonical[bound]


def _spelled(number: str) -> str:
    return str(floatToGoString(float(number)))  # type: ignore[no-untyped-call]


def _label_text(pairs: Collection[tuple[str, str]]) -> bytes:
    own = b",".join([MARK, *(b'%b="%b"' % (name.encode(), escaped(value)) for name, value in pairs)])
    return b"{" + own.replace(b"%", b"%%") + b"} %b\n"


class LabelSets(dict[bytes, LabelSet]):
    """By their spelling behind the `{`; the same labels in another spelling are the same object.

    Forgets nothing by itself; one text needs all of its own, no others.
    """

    def __init__(self, reserved: Collection[str]) -> None:
        super().__init__()
        self._reserved = frozenset(reserved)
        self._known: dict[Labels, LabelSet] = {}
        self.empty = self._of([])

    def __missing__(self, text: bytes) -> LabelSet:
        pairs = pairs_of(text)
        if pairs is None:
            raise ExpositionError(f"labels cannot be read: {shown(b'{' + text)}")
        found = self[text] = self._of(pairs)
        return found

    def _of(self, pairs: Sequence[tuple[str, str]]) -> LabelSet:
        renamed = tuple(exported(pairs, self._reserved))
        key = tuple(sorted(pair for pair in renamed if pair[1]))  # an empty label is none
        return self._known.setdefault(key, LabelSet(renamed))

    def clear(self) -> None:
        super().clear()
        self._known.clear()


def exported(pairs: Sequence[tuple[str, str]], reserved: Collection[str]) -> list[tuple[str, str]]:
    """As Prometheus does with `honor_labels: false`: `exported_` before a reserved name, until the name is free."""
    names = {name for name, value in pairs if value}
    renamed = {}
    for name in sorted(names.intersection(reserved), key=lambda name: (len(name), name)):
        free = f"exported_{name}"
        while free in names or free in reserved:
            free = f"exported_{free}"
        names.add(free)
        renamed[name] = free
    return [(renamed.get(name, name), value) for name, value in pairs if value or name not in reserved]


class Part:
    """One family in one layout: its samples, and which numbers are theirs (`start` to `stop` of the picked ones)."""

    __slots__ = ("help", "label_sets", "name", "start", "suffixes", "type", "unit")

    def __init__(self, name: bytes, type: str) -> None:
        self.name = name
        self.type = type
        self.help: str | None = None
        self.unit: str | None = None
        self.suffixes: list[bytes] = []
        self.label_sets: list[LabelSet] = []
        self.start = 0

    @property
    def stop(self) -> int:
        return self.start + len(self.suffixes)


class Layout:
    """The parts of a text in order, and how to pick their numbers and the words of its other lines from all lines."""

    __slots__ = ("has_timestamps", "nodes", "numbers", "parts", "read", "samples", "words", "words_here")

    def __init__(
        self, parts: Sequence[Part], positions: Sequence[int], read: Sequence[int], others: Sequence[int]
    ) -> None:
        self.parts = parts
        self.samples = len(read)
        self.numbers = picker(positions)
        self.read = self.numbers if list(positions) == list(read) else picker(read)
        self.words = picker(others)
        self.words_here: tuple[bytes, ...] = ()
        self.has_timestamps = False
        self.nodes: list[Node] = []


def picker(positions: Sequence[int]) -> Callable[[Sequence[bytes]], tuple[bytes, ...]]:
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda texts: tuple([texts[position] for position in positions])


_Owner = tuple[Part, bytes, list[int]]


class LayoutReader:
    """Reads the lines of one text, each parted into what stands before its last blank and behind it."""

    def __init__(
        self, label_sets: LabelSets, *, openmetrics: bool, selects: Selects | None, most_families: int
    ) -> None:
        self._label_sets = label_sets
        self._openmetrics = openmetrics
        self._selects = selects
        self._most_families = most_families
        self._owners: dict[bytes, _Owner | None] = {}
        """By the name of a sample: its part, what the name adds to the part's, where its numbers stand."""
        self._parts: list[tuple[Part, bytes, list[int]]] = []
        self._told: dict[tuple[bytes, bytes], bytes] = {}
        self._declared: set[bytes] = set()
        self._others: list[int] = []

    def read(self, prefixes: Sequence[bytes], words: Sequence[bytes]) -> Layout:
        """
        Raises:
            ExpositionError: the text is not as it has to be, or one of the lines is not spelled as it mostly is.
        """
        index = 0
        try:
            for index, prefix in enumerate(prefixes):
                if prefix[:1] == b"#" or not prefix:
                    self._others.append(index)
                    self._read_other(prefix, words[index])
                else:
                    self._read_sample(prefix, index)
        except ExpositionError as error:
            raise error_at(index, str(error)) from None
        except UnicodeDecodeError:
            raise error_at(index, "not UTF-8") from None
        return self._layout()

    def _read_sample(self, prefix: bytes, index: int) -> None:
        name, brace, labels = prefix.partition(b"{")
        try:
            owner = self._owners[name]
        except KeyError:
            owner = self._add(name, "untyped", name)
        if owner is None:
            raise ExpositionError(f"{shown(name)} is no sample of its family's type")
        part, suffix, positions = owner
        part.suffixes.append(suffix)
        part.label_sets.append(self._label_sets[labels] if brace else self._label_sets.empty)
        positions.append(index)

    def _read_other(self, prefix: bytes, word: bytes) -> None:
        line = prefix + b" " + word if prefix else word
        if not line:
            return
        if not line.startswith(b"#"):
            raise ExpositionError(f"neither a sample nor a comment: {shown(line)}")
        line.decode()
        metadata = metadata_of(line)
        if metadata is None:
            return
        keyword, name, text = metadata
        if keyword == b"UNIT" and not self._openmetrics:
            return
        if (keyword, name) in self._told:
            raise ExpositionError(f"a second {keyword.decode()} of {shown(name)}")
        self._told[keyword, name] = text
        if keyword == b"TYPE":
            self._declare(name, text.strip(b" \t"))

    def _declare(self, name: bytes, type: bytes) -> None:
        families = (_OPENMETRICS if self._openmetrics else _TEXT).get(type)
        if families is None:
            raise ExpositionError(f"the type of {shown(name)} is unknown: {shown(type)}")
        if families[0][0]:
            self._reserve(name, None)
        for suffix, family_type in families:
            self._add(name + suffix, family_type, name)
        self._declared.add(name + families[0][0])

    def _add(self, name: bytes, type: str, told_of: bytes) -> _Owner | None:
        if not is_name(name):
            raise ExpositionError(f"not a name: {shown(name)}")
        if len(self._parts) >= self._most_families:
            raise ExpositionError("too many families")
        part, positions = Part(name, type), list[int]()
        self._parts.append((part, told_of, positions))
        self._reserve(name, None)
        for suffix in SUFFIXES[type]:
            if suffix:
                self._reserve(name + suffix, (part, suffix, positions))
            else:
                self._owners[name] = (part, suffix, positions)
        return self._owners[name]

    def _reserve(self, name: bytes, owner: _Owner | None) -> None:
        if name in self._owners:
            raise ExpositionError(f"{shown(name)} has a type after its samples, or is in two families")
        self._owners[name] = owner

    def _layout(self) -> Layout:
        picked: list[int] = []
        read: list[int] = []
        parts = []
        for part, told_of, positions in self._parts:
            self._check(part, positions)
            read += positions
            wanted = positions if self._selects is None else self._select(part, positions)
            if wanted or (self._selects is None and part.name in self._declared):
                part.start = len(picked)
                part.help = self._help_of(told_of)
                part.unit = self._told.get((b"UNIT", told_of), b"").strip(b" \t").decode() or None
                parts.append(part)
                picked += wanted
        return Layout(parts, picked, read, self._others)

    def _help_of(self, name: bytes) -> str | None:
        text = self._told.get((b"HELP", name))
        return None if text is None else unescaped_help(text.decode(), quotes=self._openmetrics)

    def _check(self, part: Part, positions: Sequence[int]) -> None:
        """No sample twice, and the bounds of histograms and summaries are there.

        Raises:
            ExpositionError: something else.
        """
        if len(positions) > 1 and len(set(zip(part.suffixes, part.label_sets, strict=True))) < len(positions):
            seen = set()
            for sample in zip(part.suffixes, part.label_sets, positions, strict=True):
                if sample[:2] in seen:
                    raise error_at(sample[2], "a sample twice", part.name + sample[0])
                seen.add(sample[:2])
        if part.type in ("histogram", "summary"):
            bounded, bound = BOUNDS[part.type]
            for suffix, label_set, index in zip(part.suffixes, part.label_sets, positions, strict=True):
                if (bound in label_set.numbers) != (suffix == bounded) or bound in label_set.words:
                    raise error_at(index, f"a {part.type} has a number as its {bound}", part.name + suffix)

    def _select(self, part: Part, positions: Sequence[int]) -> list[int]:
        assert self._selects is not None
        kept = [
            (suffix, label_set, index)
            for suffix, label_set, index in zip(part.suffixes, part.label_sets, positions, strict=True)
            if self._selects((part.name + suffix).decode(), dict(label_set.pairs))
        ]
        part.suffixes = [suffix for suffix, _, _ in kept]
        part.label_sets = [label_set for _, label_set, _ in kept]
        return [index for _, _, index in kept]


_TEXT: Final[Mapping[bytes, tuple[tuple[bytes, str], ...]]] = {
    b"counter": ((b"", "counter"),),
    b"gauge": ((b"", "gauge"),),
    b"untyped": ((b"", "untyped"),),
    b"unknown": ((b"", "untyped"),),
    b"histogram": ((b"", "histogram"),),
    b"summary": ((b"", "summary"),),
}
_OPENMETRICS: Final[Mapping[bytes, tuple[tuple[bytes, str], ...]]] = {
    b"counter": ((b"_total", "counter"), (b"_created", "gauge")),
    b"gauge": ((b"", "gauge"),),
    b"unknown": ((b"", "untyped"),),
    b"histogram": ((b"", "histogram"), (b"_created", "gauge")),
    b"summary": ((b"", "summary"), (b"_created", "gauge")),
    b"info": ((b"_info", "gauge"),),
    b"stateset": ((b"", "gauge"),),
    b"gaugehistogram": ((b"_bucket", "gauge"), (b"_gcount", "gauge"), (b"_gsum", "gauge")),
}
"""What a type of OpenMetrics is in the text format, as prometheus_client translates them."""
