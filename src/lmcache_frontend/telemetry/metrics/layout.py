"""What a text says besides its numbers and its labels: its families, their samples in order, where its numbers stand.

Nodes of one cluster send one layout. The numbers differ, and perhaps the value of a label that all samples of a node
have (a worker's rank). So the label sets of a text, a few for each hundred samples, go into a table, and a layout knows
only which of the table's a sample has. It is read once and then recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from typing import Final, NamedTuple

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
"""Stands in a label set's text for the node's labels: no UTF-8 text has this byte."""

BYTES_OF_A_LABEL: Final = 250
"""What a short label takes as Python objects; measured."""

Labels = tuple[tuple[str, str], ...]
Selects = Callable[[str, int], bool]
"""Whether a sample is wanted, by its name and the number of its label set in the table."""

SUFFIXES: Final[Mapping[str, tuple[bytes, ...]]] = {
    "counter": (b"",),
    "gauge": (b"",),
    "untyped": (b"",),
    "histogram": (b"_bucket", b"_count", b"_sum"),
    "summary": (b"", b"_count", b"_sum"),
}
BOUNDS: Final[Mapping[str, tuple[bytes, str]]] = {"histogram": (b"_bucket", "le"), "summary": (b"", "quantile")}
"""Which samples must have a label with a number; no other of the family may have it."""

BOUND_NAMES: Final = tuple([bound for _, bound in BOUNDS.values()])


class LabelSet:
    """The labels of a sample as the merge writes them: the node's first, then its own, renamed where both have one."""

    __slots__ = ("bounds", "key", "pairs", "text")

    def __init__(self, pairs: Labels, key: Labels, text: bytes) -> None:
        self.pairs = pairs
        self.key = key
        """The same in the order of their names."""
        self.text = text
        self.bounds: Mapping[str, Bound] = _NONE
        """Which of `le` and `quantile` it has; `le` is one in histograms only, `quantile` in summaries only."""
        if bounds := [pair for pair in key if pair[0] in BOUND_NAMES]:
            self.bounds = {name: _bound(name, value, pairs, key, text) for name, value in bounds}

    def group(self, bound: str) -> Labels:
        """What all samples of one histogram or summary have in common."""
        found = self.bounds.get(bound)
        return self.key if found is None else found.group

    def same(self, bound: str) -> Labels:
        """What is equal if the numbers are."""
        found = self.bounds.get(bound)
        return self.key if found is None else found.same

    def canonical(self, bound: str) -> bytes:
        """The text with the bound as OpenMetrics spells it."""
        found = self.bounds.get(bound)
        return self.text if found is None else found.canonical


class Bound(NamedTuple):
    """One label of a label set as the bound of a histogram's bucket, or of a summary's quantile."""

    is_number: bool
    group: Labels
    same: Labels
    canonical: bytes


_NONE: Final[Mapping[str, Bound]] = {}


def _bound(name: str, value: str, pairs: Labels, key: Labels, text: bytes) -> Bound:
    group = tuple([pair for pair in key if pair[0] != name])
    if not is_number(value.encode()):
        return Bound(is_number=False, group=group, same=key, canonical=text)
    spelled = _spelled(value)
    if spelled != value:
        text = _label_text([(other, spelled if other == name else given) for other, given in pairs])
    return Bound(is_number=True, group=group, same=(*group, (name, spelled)), canonical=text)


def _label_text(pairs: Collection[tuple[str, str]]) -> bytes:
    return b"{" + b",".join([MARK, *(b'%b="%b"' % (name.encode(), escaped(value)) for name, value in pairs)]) + b"}"


def _spelled(number: str) -> str:
    """As OpenMetrics spells it: 1 is 1.0."""
    return str(floatToGoString(float(number)))  # type: ignore[no-untyped-call]


class LabelSets(dict[bytes, LabelSet]):
    """By their spelling behind the `{`; the same labels in another spelling are the same object.

    Forgets nothing by itself; one text needs all of its own, no others.
    """

    def __init__(self, reserved: Collection[str]) -> None:
        super().__init__()
        self._reserved = frozenset(reserved)
        self._known: dict[Labels, LabelSet] = {}
        self.size = 0
        """About how many bytes all of them took, also those that were forgotten."""

    def __missing__(self, text: bytes) -> LabelSet:
        pairs = pairs_of(text) if text else []
        if pairs is None:
            raise ExpositionError(f"labels cannot be read: {shown(b'{' + text)}")
        renamed = tuple(pairs)
        if not self._reserved.isdisjoint([name for name, _ in pairs]):
            renamed = tuple(exported(pairs, self._reserved))
        renamed = tuple([pair for pair in renamed if pair[1]])  # an empty label is none, and is not written
        key = tuple(sorted(renamed))
        known = self._known.get(key)
        if known is None:
            is_as_written = pairs and renamed == tuple(pairs) and text[-2:-1] != b","
            spelled = b"{%b,%b" % (MARK, text) if is_as_written else _label_text(renamed)
            known = self._known[key] = LabelSet(renamed, key, spelled)
            self.size += len(spelled) + BYTES_OF_A_LABEL * len(pairs)
        self[text] = known
        return known

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


class Outline(NamedTuple):
    """The lines of a text less labels and numbers."""

    names: tuple[bytes, ...]
    """By line: the sample's name, or a comment less its last word."""
    sets: tuple[int, ...]
    """By line: which of the table's label sets the sample has; -1 for a comment."""
    shape: tuple[object, ...]
    """What of the table decides how it is read and written."""


Table = tuple[LabelSet, ...]


def outline_of(prefixes: Sequence[bytes], label_sets: LabelSets) -> tuple[Outline, Table]:
    """
    Raises:
        ExpositionError: labels cannot be read; also of a line that is only spelled in another way.
    """
    heads = [(prefix, b"", None) if prefix[:1] in b"#" else prefix.partition(b"{") for prefix in prefixes]
    names, braces, texts = zip(*heads, strict=True)
    found: dict[bytes | None, LabelSet] = {}
    text: bytes | None = None
    try:
        for text in dict.fromkeys(texts):
            if text is not None:
                found[text] = label_sets[text]
    except ExpositionError as error:
        raise error_at(texts.index(text), str(error)) from None
    except UnicodeDecodeError:
        raise error_at(texts.index(text), "not UTF-8") from None
    if b"" in found and (b"{", b"") in zip(braces, texts, strict=True):
        raise ExpositionError("labels without an end")
    table = tuple(dict.fromkeys(found.values()))
    index_of = {label_set: index for index, label_set in enumerate(table)}
    indexes: dict[bytes | None, int] = {text: index_of[label_set] for text, label_set in found.items()}
    indexes[None] = -1
    return Outline(names, tuple(map(indexes.__getitem__, texts)), _shape(table)), table


def _shape(table: Table) -> tuple[object, ...]:
    """By bound: nothing where no label set has it, because then each is its own group."""
    return tuple(
        [_shape_by(bound, table) if any(bound in one.bounds for one in table) else () for bound in BOUND_NAMES]
    )


def _shape_by(bound: str, table: Table) -> tuple[object, ...]:
    groups: dict[Labels, int] = {}
    same: dict[Labels, int] = {}
    return tuple(
        [
            (
                found.is_number if (found := one.bounds.get(bound)) is not None else None,
                groups.setdefault(one.group(bound), len(groups)),
                same.setdefault(one.same(bound), len(same)),
            )
            for one in table
        ]
    )


class Part:
    """One family in one layout: its samples, and which numbers are theirs (`start` and following of the picked)."""

    __slots__ = ("help", "name", "sets", "start", "suffixes", "type", "unit")

    def __init__(self, name: bytes, type: str) -> None:
        self.name = name
        self.type = type
        self.help: str | None = None
        self.unit: str | None = None
        self.suffixes: list[bytes] = []
        self.sets: list[int] = []
        self.start = 0

    def samples(self) -> list[tuple[bytes, int, int]]:
        """Of each sample the suffix of its name, its label set, and where its number is."""
        positions = range(self.start, self.start + len(self.sets))
        return list(zip(self.suffixes, self.sets, positions, strict=True))


class Node(NamedTuple):
    labels: bytes
    """The node's, as they stand in its samples."""
    table: Table
    numbers: tuple[bytes, ...]


class Layout:
    """The parts of a text in order, and how to pick their numbers and the words of its other lines from all lines."""

    __slots__ = ("has_timestamps", "nodes", "numbers", "parts", "read", "samples", "table", "words", "words_here")

    def __init__(
        self, parts: Sequence[Part], table: Table, picked: Sequence[int], read: Sequence[int], others: Sequence[int]
    ) -> None:
        self.parts = parts
        self.table = table
        """The first node's; all have as many label sets, and of the same shape."""
        self.samples = len(read)
        self.numbers = picker(picked)
        self.read = self.numbers if list(picked) == list(read) else picker(read)
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
    """Reads an outline, and the last word of each of its lines."""

    def __init__(self, table: Table, *, openmetrics: bool, selects: Selects | None, most_families: int) -> None:
        self._table = table
        self._openmetrics = openmetrics
        self._selects = selects
        self._most_families = most_families
        self._owners: dict[bytes, _Owner | None] = {}
        """By the name of a sample: its part, what the name adds to the part's, where its numbers stand."""
        self._parts: list[tuple[Part, bytes, list[int]]] = []
        self._told: dict[tuple[bytes, bytes], bytes] = {}
        self._declared: set[bytes] = set()
        self._others: list[int] = []

    def read(self, outline: Outline, words: Sequence[bytes]) -> Layout:
        """
        Raises:
            ExpositionError: the text is not as it has to be, or one of the lines is not spelled as it mostly is.
        """
        index = 0
        try:
            for index, (name, label_set) in enumerate(zip(outline.names, outline.sets, strict=True)):
                if label_set < 0:
                    self._others.append(index)
                    self._read_other(name, words[index])
                else:
                    self._read_sample(name, label_set, index)
        except ExpositionError as error:
            raise error_at(index, str(error)) from None
        except UnicodeDecodeError:
            raise error_at(index, "not UTF-8") from None
        return self._layout()

    def _read_sample(self, name: bytes, label_set: int, index: int) -> None:
        try:
            owner = self._owners[name]
        except KeyError:
            owner = self._add(name, "untyped", name)
        if owner is None:
            raise ExpositionError(f"{shown(name)} is no sample of its family's type")
        part, suffix, positions = owner
        part.suffixes.append(suffix)
        part.sets.append(label_set)
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
        return Layout(parts, self._table, picked, read, self._others)

    def _help_of(self, name: bytes) -> str | None:
        text = self._told.get((b"HELP", name))
        return None if text is None else unescaped_help(text.decode(), quotes=self._openmetrics)

    def _check(self, part: Part, positions: Sequence[int]) -> None:
        """No sample twice, and the bounds of histograms and summaries are there.

        Raises:
            ExpositionError: something else.
        """
        bounded, bound = BOUNDS.get(part.type, (None, ""))
        samples = list(zip(part.suffixes, part.sets, strict=True))
        if bounded is not None:
            for (suffix, label_set), index in zip(samples, positions, strict=True):
                found = self._table[label_set].bounds.get(bound)
                if (found is not None) != (suffix == bounded) or (found is not None and not found.is_number):
                    raise error_at(index, f"{bound} has to be a number, in {part.type}s", part.name + suffix)
        if len(samples) < 2:
            return
        same = samples if bounded is None else [(suffix, self._table[number].same(bound)) for suffix, number in samples]
        if len(set(same)) < len(same):
            seen = set()
            for sample, index in zip(same, positions, strict=True):
                if sample in seen:
                    raise error_at(index, "a sample twice", part.name + sample[0])
                seen.add(sample)

    def _select(self, part: Part, positions: Sequence[int]) -> list[int]:
        assert self._selects is not None
        kept = [
            (suffix, label_set, index)
            for suffix, label_set, index in zip(part.suffixes, part.sets, positions, strict=True)
            if self._selects((part.name + suffix).decode(), label_set)
        ]
        part.suffixes = [suffix for suffix, _, _ in kept]
        part.sets = [label_set for _, label_set, _ in kept]
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
