"""Many nodes' Prometheus texts as one: every family once, every sample with the labels of its node.

Nodes of a cluster send the same lines with other numbers. A text is therefore split at its last blanks, and where
another node has sent the same lines, only the numbers are looked at. Writing is one `replace` and one `%` for each
family of each node: nothing is done for each sample but in C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Final, NamedTuple

from .layout import BOUNDS, MARK, LabelSets, Layout, LayoutReader, Node, Part, picker
from .lines import (
    MAX_LINE,
    ExpositionError,
    are_numbers,
    error_at,
    escaped,
    escaped_help,
    in_seconds,
    is_label_name,
    plain_sample,
    shown,
)
from .matching import Matcher, parse_match
from .naming import Key, OpenMetricsFamily, openmetrics_families, text_names

__all__ = ["ExpositionError", "Matcher", "Merge", "parse_match"]

MAX_PAYLOAD: Final = 16 * 2**20
"""Bytes of one node's text."""
MAX_LINES: Final = 200_000
MAX_FAMILIES: Final = 20_000
"""Of one node's text."""
MAX_SAMPLES: Final = 4_000_000
MAX_LABEL_SETS: Final = 300_000
MAX_PARTS: Final = 500_000
MAX_LAYOUT_BYTES: Final = 256 * 2**20
"""Of a merge: samples, distinct label sets, families counted once for each layout, texts that had a new layout."""
MAX_KEPT_KEYS: Final = 16 * 2**20
"""Bytes of texts by which layouts are recognised."""
PIECE: Final = 128 * 1024
"""A piece that `write` gives is about as long, and at most twice."""

_EOF: Final = b"# EOF"

_Lines = Sequence[bytes]
_Pick = Callable[[tuple[bytes, ...]], tuple[bytes, ...]]
_Variant = tuple[bool, tuple[str, ...], tuple[Matcher, ...] | None]
"""What besides the lines decides how a text is read: its format, the names of its node's labels, which matchers still
can match."""


class _Family:
    """All that the nodes say of one name with one type."""

    __slots__ = ("help", "unit", "uses")

    def __init__(self) -> None:
        self.help: str | None = None
        self.unit: str | None = None
        self.uses: list[tuple[Layout, Part]] = []

    def nodes(self) -> int:
        return sum(len(layout.nodes) for layout, _ in self.uses)


class _Held(NamedTuple):
    """How much a merge holds, by what is bounded."""

    samples: int = 0
    parts: int = 0
    label_sets: int = 0
    layout_bytes: int = 0

    def and_(self, samples: int, parts: int = 0, label_sets: int = 0, layout_bytes: int = 0) -> _Held:
        """
        Raises:
            ExpositionError: it would be too much.
        """
        sums = map(sum, zip(self, (samples, parts, label_sets, layout_bytes), strict=True))
        total = _Held(*sums)
        for name, number, most in zip(self._fields, total, _MOST, strict=True):
            if number > most:
                raise ExpositionError(f"the merge is full: more than {most} {name.replace('_', ' ')}")
        return total


_MOST: Final = _Held(MAX_SAMPLES, MAX_PARTS, MAX_LABEL_SETS, MAX_LAYOUT_BYTES)


class Merge:
    """Not for two threads at once. What `add` refuses leaves no trace."""

    def __init__(self, *, matchers: Sequence[Matcher] | None = None) -> None:
        self._matchers = None if matchers is None else tuple(matchers)
        self._known: dict[tuple[_Variant, _Lines], Layout] = {}
        self._known_bytes = 0
        self._label_sets: dict[tuple[str, ...], LabelSets] = {}
        self._families: dict[Key, _Family] = {}
        self._nodes: set[frozenset[tuple[str, str]]] = set()
        self._held = _Held()

    def add(self, labels: Mapping[str, str], payload: bytes, *, openmetrics: bool | None = None) -> int:
        """Takes one node's text, and tells its number of samples, also of those that no matcher selects.

        Args:
            labels: what every sample of it gets: node, proxy and instance; none for the frontend's own text.
            payload: the whole text.
            openmetrics: whether it is OpenMetrics; by default it is when `# EOF` is its end.

        Raises:
            ExpositionError: it is not as it has to be, or the merge is full.
        """
        node = frozenset(labels.items())
        if node in self._nodes:
            raise ExpositionError(f"there is a text of {shown(repr(dict(labels)).encode())} already")
        own = _own_labels(labels)
        lines, is_openmetrics = _lines(payload, openmetrics)
        selecting = None
        if self._matchers is not None:
            selecting = tuple([matcher for matcher in self._matchers if matcher.matches_node(labels)])
        layout, numbers = self._recognised((is_openmetrics, tuple(labels), selecting), lines)
        if layout.nodes:
            self._held = self._held.and_(layout.samples)
        else:
            label_sets = {label_set for part in layout.parts for label_set in part.label_sets}
            self._held = self._held.and_(layout.samples, len(layout.parts), len(label_sets), len(payload))
            self._register(layout)
        layout.nodes.append((own, numbers))
        self._nodes.add(node)
        return layout.samples

    @property
    def conflicts(self) -> int:
        """How many families have another name than the nodes say, because other nodes say another type."""
        return sum(name != key[0] for key, name in self._names().items())

    def _recognised(self, variant: _Variant, lines: _Lines) -> tuple[Layout, tuple[bytes, ...]]:
        """The layout of these lines and their numbers; a layout without nodes is a new one."""
        prefixes, _, words = zip(*[line.rpartition(b" ") for line in lines], strict=True)
        layout = self._known.get((variant, prefixes))
        if layout is not None and layout.words(words) == layout.words_here and are_numbers(layout.read(words)):
            return layout, layout.numbers(words)
        try:
            layout = self._read(variant, prefixes, words)
        except ExpositionError:
            layout = None
        if layout is None or not are_numbers(layout.read(words)):
            # Some line is spelled in another way, has a timestamp or an exemplar, or is wrong: now line by line.
            prefixes, words = _spelled_plainly(lines, openmetrics=variant[0])
            layout = self._known.get((variant, prefixes))
            if layout is None or layout.words(words) != layout.words_here:
                layout = self._read(variant, prefixes, words)
        numbers = layout.numbers(words)
        layout.has_timestamps = layout.has_timestamps or b" " in b"".join(numbers)
        if not layout.nodes:
            layout.words_here = layout.words(words)
            self._keep((variant, prefixes), layout)
        return layout, numbers

    def _keep(self, key: tuple[_Variant, _Lines], layout: Layout) -> None:
        """So that the next text like this one is recognised; the oldest layouts are forgotten, not their nodes."""
        size = _size(key)
        if size > MAX_KEPT_KEYS:
            return
        self._known[key] = layout
        self._known_bytes += size
        while self._known_bytes > MAX_KEPT_KEYS:
            oldest = next(iter(self._known))
            del self._known[oldest]
            self._known_bytes -= _size(oldest)

    def _read(self, variant: _Variant, prefixes: _Lines, words: _Lines) -> Layout:
        is_openmetrics, names, selecting = variant
        label_sets = self._label_sets.get(names)
        if label_sets is None:
            label_sets = self._label_sets[names] = LabelSets(names)
        elif len(label_sets) > MAX_LINES:
            label_sets.clear()
        selects = None
        if selecting is not None:
            selects = functools.partial(_selects, selecting, names)
        reader = LayoutReader(label_sets, openmetrics=is_openmetrics, selects=selects, most_families=MAX_FAMILIES)
        return reader.read(prefixes, words)

    def _register(self, layout: Layout) -> None:
        for part in layout.parts:
            family = self._families.setdefault((part.name, part.type), _Family())
            family.uses.append((layout, part))
            family.help = part.help if family.help is None else family.help
            family.unit = part.unit if family.unit is None else family.unit

    def _names(self) -> dict[Key, bytes]:
        return text_names({key: family.nodes() for key, family in self._families.items()})

    def write(self, *, openmetrics: bool) -> Iterator[bytes]:
        """The merged text in pieces of at most twice `PIECE`, family by family, in the order of their first nodes."""
        return _pieces(self._openmetrics_texts() if openmetrics else self._texts())

    def _texts(self) -> Iterator[bytes]:
        for key, name in self._names().items():
            family = self._families[key]
            yield _head(name, key[1], family.help)
            for layout, part in family.uses:
                samples = zip(part.suffixes, part.label_sets, strict=True)
                template = b"".join([name + suffix + label_set.text for suffix, label_set in samples])
                yield from _filled(template, itemgetter(slice(part.start, part.stop)), layout.nodes)

    def _openmetrics_texts(self) -> Iterator[bytes]:
        names = self._names()
        for key, family in openmetrics_families(names).items():
            ours = self._families[key]
            unit = ours.unit if ours.unit and family.name.endswith(b"_" + ours.unit.encode()) else None
            yield _head(family.name, family.type, ours.help, unit, openmetrics=True)
            began = {} if family.created is None else dict(self._families[family.created].uses)
            for layout, part in ours.uses:
                template, pick = _openmetrics_template(family, part, began.get(layout))
                nodes = layout.nodes
                if layout.has_timestamps:
                    nodes = [(own, tuple(map(in_seconds, numbers))) for own, numbers in nodes]
                yield from _filled(template, pick, nodes)
        yield b"# EOF\n"


def _own_labels(labels: Mapping[str, str]) -> bytes:
    """A node's labels as they go into a template.

    Raises:
        ValueError: one has no name that Prometheus takes.
    """
    if not all(map(is_label_name, labels)):
        raise ValueError(f"not the labels of a node: {list(labels)}")
    pairs = [b'%b="%b"' % (name.encode(), escaped(value)) for name, value in labels.items()]
    return b",".join(pairs).replace(b"%", b"%%")


def _lines(payload: bytes, openmetrics: bool | None) -> tuple[_Lines, bool]:
    """The lines of a text, and whether it is OpenMetrics.

    Raises:
        ExpositionError: it is too long or not complete.
    """
    if len(payload) > MAX_PAYLOAD or payload.count(b"\n") > MAX_LINES:
        raise ExpositionError(f"line 1: a text of more than {MAX_PAYLOAD} bytes or {MAX_LINES} lines")
    if b"\r\n" in payload:
        payload = payload.replace(b"\r\n", b"\n")
    lines = payload.split(b"\n")
    last = lines.pop()
    if last == _EOF:
        lines.append(last)
    elif last:
        raise error_at(len(lines), "the text ends within a line", last)
    ends = bool(lines) and lines[-1] == _EOF
    if openmetrics and not ends:
        raise error_at(len(lines), "the text ends without # EOF")
    is_openmetrics = ends if openmetrics is None else openmetrics
    if is_openmetrics and lines.index(_EOF) < len(lines) - 1:
        raise error_at(lines.index(_EOF) + 1, "text behind # EOF")
    return lines or [b""], is_openmetrics


def _spelled_plainly(lines: _Lines, *, openmetrics: bool) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """The same lines as prometheus_client spells them, parted at their last blank.

    Raises:
        ExpositionError: one is neither a sample nor a comment.
    """
    parted = []
    for index, line in enumerate(lines):
        if len(line) > MAX_LINE:
            raise error_at(index, f"longer than {MAX_LINE} bytes")
        text = line.strip(b" \t")
        try:
            parted.append(plain_sample(text, openmetrics=openmetrics) if text[:1] not in b"#" else _parted(text))
        except ExpositionError as error:
            raise error_at(index, str(error)) from None
    prefixes, words = zip(*parted, strict=True)
    return prefixes, words


def _parted(line: bytes) -> tuple[bytes, bytes]:
    prefix, _, word = line.rpartition(b" ")
    return prefix, word


def _selects(matchers: Sequence[Matcher], node_labels: Sequence[str], name: str, labels: Mapping[str, str]) -> bool:
    return any(matcher.matches_rest(name, labels, node_labels) for matcher in matchers)


def _size(key: tuple[_Variant, _Lines]) -> int:
    return sum(map(len, key[1])) + 40 * len(key[1])


def _head(name: bytes, type: str, help: str | None, unit: str | None = None, *, openmetrics: bool = False) -> bytes:
    lines = []
    if help is not None:
        text = escaped(help) if openmetrics else escaped_help(help)
        lines.append(b"# HELP %b %b\n" % (name, text))
    lines.append(b"# TYPE %b %b\n" % (name, type.encode()))
    if unit is not None:
        lines.append(b"# UNIT %b %b\n" % (name, unit.encode()))
    return b"".join(lines)


def _openmetrics_template(family: OpenMetricsFamily, part: Part, created: Part | None) -> tuple[bytes, _Pick]:
    """As OpenMetrics wants the samples of a family: those of one metric together, each followed by when it began."""
    bounded, bound = BOUNDS.get(part.type, (None, ""))
    if bounded is None and created is None:
        texts = [family.samples + label_set.text for label_set in part.label_sets]
        return b"".join(texts), itemgetter(slice(part.start, part.stop))
    metrics: dict[object, dict[bytes, int]] = {}
    positions = range(part.start, part.stop)
    for suffix, label_set, position in zip(part.suffixes, part.label_sets, positions, strict=True):
        text = label_set.canonical(bound) if suffix == bounded else label_set.text
        metrics.setdefault(label_set.without(bound), {}).setdefault(family.samples + suffix + text, position)
    if created is not None:
        name = family.name + b"_created"
        for position, label_set in enumerate(created.label_sets, created.start):
            if (metric := metrics.get(label_set.without(bound))) is not None:
                metric[name + label_set.text] = position
    samples = [sample for metric in metrics.values() for sample in metric.items()]
    return b"".join([text for text, _ in samples]), picker([position for _, position in samples])


def _filled(template: bytes, pick: _Pick, nodes: Sequence[Node]) -> Iterator[bytes]:
    """The samples of one family for each of the nodes, many nodes at once."""
    if not template:
        return
    step = PIECE // (2 * len(template)) + 1
    for start in range(0, len(nodes), step):
        yield b"".join([_labelled(template, own) % pick(numbers) for own, numbers in nodes[start : start + step]])


def _labelled(template: bytes, own: bytes) -> bytes:
    if own:
        return template.replace(MARK, own)
    return template.replace(b"{" + MARK + b"}", b"").replace(MARK + b",", b"")


def _pieces(texts: Iterable[bytes]) -> Iterator[bytes]:
    gathered: list[bytes] = []
    size = 0
    for text in texts:
        gathered.append(text)
        size += len(text)
        if size >= PIECE:
            whole = b"".join(gathered)
            yield from (whole[start : start + 2 * PIECE] for start in range(0, size, 2 * PIECE))
            gathered, size = [], 0
    if size:
        yield b"".join(gathered)
