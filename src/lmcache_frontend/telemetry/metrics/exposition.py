"""Many nodes' Prometheus texts as one: every family once, every sample with the labels of its node.

Nodes of a cluster send the same lines with other numbers. A text is split at its lines' last blanks, and where another
node has sent the same lines, only the numbers are looked at. Where only values of labels differ, the few label sets of
the text are read too. Writing is one `%` for each family of each node. So nothing is done for each sample but in C.

Measured with 200 texts of 57 KB, CPU time of one core for reading and writing (`benchmarks/metrics.py`; in brackets,
when each node has a label value of its own):

- 70 ms (180): this. 1,000 nodes take 5 times as long and 30 MiB (70).
- 70 ms (430): a template for each layout with the label sets inside, filled by `replace` and `%`. Every node with
  labels of its own was a new layout, and the garbage collector made 1,000 of them cost 3 s.
- Cutting the lines with one expression for the whole text (`findall`, or `split` at the numbers) takes 130 to 190 us
  for each text, `bytes.split` and `rpartition` take 80. An expression for each line takes another 170, and is only for
  lines in another spelling.
- Checking the numbers with one expression takes 28 us for each text; `float` and `translate` take as long, and find
  numbers beyond a float too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Final, Generic, NamedTuple, TypeVar

from .layout import (
    BOUND_NAMES,
    BOUNDS,
    MARK,
    LabelSets,
    Layout,
    LayoutReader,
    Node,
    Outline,
    Part,
    Selects,
    Table,
    outline_of,
)
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
MAX_SAMPLES: Final = 8_000_000
MAX_PARTS: Final = 500_000
MAX_LABEL_SETS: Final = 1_000_000
MAX_LABEL_BYTES: Final = 256 * 2**20
"""Of a merge: samples, families of each layout, label sets of each node, and about what those take.

10,000 nodes with 760 samples in 62 KB take 700 MiB when each has labels of its own, and 800 while they are written;
with 370 samples, as ranks of one layout, 210 and 270 (measured).
"""
MAX_KEPT_KEYS: Final = 16 * 2**20
"""Bytes of texts by which layouts are recognised."""
PIECE: Final = 128 * 1024
"""A piece that `write` gives is about as long, and at most twice."""

_K = TypeVar("_K")
_V = TypeVar("_V")

_EOF: Final = b"# EOF"

_Lines = Sequence[bytes]
_Row = tuple[bytes, ...]
_Sample = tuple[bytes, int, int]
"""A sample's name, and where in a row its labels and its number are."""
_Matchers = tuple[Matcher, ...]
_Variant = tuple[bool, tuple[str, ...], _Matchers | None]
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


class _Recent(Generic[_K, _V]):
    """What was seen lately, up to `MAX_KEPT_KEYS`; the oldest is forgotten first."""

    def __init__(self) -> None:
        self._values: dict[_K, tuple[_V, int]] = {}
        self._size = 0

    def get(self, key: _K) -> _V | None:
        found = self._values.get(key)
        return None if found is None else found[0]

    def keep(self, key: _K, value: _V, size: int) -> None:
        if size > MAX_KEPT_KEYS:
            return
        self._size += size - self._values.pop(key, (value, 0))[1]
        self._values[key] = value, size
        while self._size > MAX_KEPT_KEYS:
            self._size -= self._values.pop(next(iter(self._values)))[1]


class _Held(NamedTuple):
    """How much a merge holds, by what is bounded."""

    samples: int = 0
    parts: int = 0
    label_sets: int = 0
    label_bytes: int = 0

    def and_(self, samples: int, parts: int, label_sets: int, label_bytes: int) -> _Held:
        """
        Raises:
            ExpositionError: it would be too much.
        """
        sums = map(sum, zip(self, (samples, parts, label_sets, label_bytes), strict=True))
        total = _Held(*sums)
        for name, number, most in zip(self._fields, total, _MOST, strict=True):
            if number > most:
                raise ExpositionError(f"the merge is full: more than {most} {name.replace('_', ' ')}")
        return total


_MOST: Final = _Held(MAX_SAMPLES, MAX_PARTS, MAX_LABEL_SETS, MAX_LABEL_BYTES)


class Merge:
    """Not for two threads at once. What `add` refuses leaves no trace."""

    def __init__(self, *, matchers: Sequence[Matcher] | None = None) -> None:
        self._matchers = None if matchers is None else tuple(matchers)
        self._known: _Recent[tuple[_Variant, Outline, tuple[_Matchers, ...]], Layout] = _Recent()
        self._spelled: _Recent[tuple[_Variant, _Lines], tuple[Layout, Table]] = _Recent()
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
        names = tuple(labels)
        label_sets = self._label_sets.setdefault(names, LabelSets(names))
        size_before = label_sets.size
        layout, table, numbers = self._recognised((is_openmetrics, names, selecting), lines)
        label_bytes = label_sets.size - size_before + sum([len(one.text) for one in table]) + len(table) * len(own)
        self._held = self._held.and_(layout.samples, 0 if layout.nodes else len(layout.parts), len(table), label_bytes)
        if not layout.nodes:
            self._register(layout)
        layout.nodes.append(Node(own, table, numbers))
        self._nodes.add(node)
        return layout.samples

    @property
    def conflicts(self) -> int:
        """How many families have another name than the nodes say, because other nodes say another type."""
        return sum(name != key[0] for key, name in self._names().items())

    def _recognised(self, variant: _Variant, lines: _Lines) -> tuple[Layout, Table, tuple[bytes, ...]]:
        """The layout of these lines, their label sets and their numbers; a layout without nodes is a new one."""
        prefixes, _, words = zip(*[line.rpartition(b" ") for line in lines], strict=True)
        found = self._spelled.get((variant, prefixes))
        if found is not None:
            layout, table = found
            if layout.words(words) == layout.words_here and are_numbers(layout.read(words)):
                return layout, table, layout.numbers(words)
        try:
            layout, table = self._outlined(variant, prefixes, words)
            is_plain = are_numbers(layout.read(words)) and max(map(len, lines)) <= MAX_LINE
        except ExpositionError:
            is_plain = False
        if not is_plain:
            # Some line is spelled in another way, has a timestamp or an exemplar, or is wrong: now line by line.
            prefixes, words = _spelled_plainly(lines, openmetrics=variant[0])
            layout, table = self._outlined(variant, prefixes, words)
        numbers = layout.numbers(words)
        layout.has_timestamps = layout.has_timestamps or b" " in b"".join(numbers)
        self._spelled.keep((variant, prefixes), (layout, table), _size(prefixes))
        return layout, table, numbers

    def _outlined(self, variant: _Variant, prefixes: _Lines, words: _Lines) -> tuple[Layout, Table]:
        is_openmetrics, names, selecting = variant
        label_sets = self._label_sets[names]
        if len(label_sets) > MAX_LINES:
            label_sets.clear()
        outline, table = outline_of(prefixes, label_sets)
        # What is selected hangs on the labels only through these: a label that no matcher is about makes no new layout.
        matching = () if selecting is None else _matching(selecting, names, table)
        key = variant, outline, matching
        layout = self._known.get(key)
        if layout is None or layout.words(words) != layout.words_here:
            selects = None if selecting is None else _selects(matching)
            reader = LayoutReader(table, openmetrics=is_openmetrics, selects=selects, most_families=MAX_FAMILIES)
            layout = reader.read(outline, words)
            layout.words_here = layout.words(words)
            self._known.keep(key, layout, _size(outline.names))
        return layout, table

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
        names = self._names()
        rows = _Rows(openmetrics=False)
        for key, family in self._families.items():
            name = names[key]
            yield _head(name, key[1], family.help)
            for layout, part in family.uses:
                width = len(layout.table)
                samples = [(name + suffix, label_set, width + number) for suffix, label_set, number in part.samples()]
                yield from _filled(samples, rows.of(layout))

    def _openmetrics_texts(self) -> Iterator[bytes]:
        rows = _Rows(openmetrics=True)
        for key, named in openmetrics_families(self._names()).items():
            family = self._families[key]
            other = named.created or named.began
            others = {} if other is None else dict(self._families[other].uses)
            is_begun = False
            for layout, part in family.uses:
                if named.began is None:
                    samples = _openmetrics_samples(named, layout, part, others.get(layout))
                else:
                    samples = _without_metric(named, layout, part, others.get(layout))
                if not is_begun and (samples or named.began is None):
                    unit = family.unit if family.unit and named.name.endswith(b"_" + family.unit.encode()) else None
                    yield _head(named.name, named.type, family.help, unit, openmetrics=True)
                    is_begun = True
                yield from _filled(samples, rows.of(layout))
        yield b"# EOF\n"


class _Rows:
    """For each node its label sets as they are written, and its numbers: what the templates of its layout pick from."""

    def __init__(self, *, openmetrics: bool) -> None:
        self._openmetrics = openmetrics
        self._known: dict[Layout, list[_Row]] = {}

    def of(self, layout: Layout) -> list[_Row]:
        rows = self._known.get(layout)
        if rows is None:
            rows = self._known[layout] = [self._row(layout, node) for node in layout.nodes]
        return rows

    def _row(self, layout: Layout, node: Node) -> _Row:
        texts = [_labelled(one.text, node.labels) for one in node.table]
        if not self._openmetrics:
            return (*texts, *node.numbers)
        spelled: list[bytes] = []
        for bound in BOUND_NAMES:
            spelled += [
                _labelled(one.canonical(bound), node.labels) if bound in one.bounds else text
                for one, text in zip(node.table, texts, strict=True)
            ]
        return (*texts, *spelled, *(map(in_seconds, node.numbers) if layout.has_timestamps else node.numbers))


def _labelled(text: bytes, own: bytes) -> bytes:
    """A label set's text with the node's labels in it; the frontend's own text has none."""
    if own:
        return text.replace(MARK, own)
    return text.replace(b"{" + MARK + b"}", b"").replace(MARK + b",", b"")


def _own_labels(labels: Mapping[str, str]) -> bytes:
    """A node's labels as they stand in its samples.

    Raises:
        ValueError: one has no name that Prometheus takes.
    """
    if not all(map(is_label_name, labels)):
        raise ValueError(f"not the labels of a node: {list(labels)}")
    pairs = [b'%b="%b"' % (name.encode(), escaped(value)) for name, value in labels.items()]
    return b",".join(pairs)


def _lines(payload: bytes, openmetrics: bool | None) -> tuple[_Lines, bool]:
    """The lines of a text, and whether it is OpenMetrics.

    Raises:
        ExpositionError: it is too long or not complete.
    """
    if len(payload) > MAX_LINES and (len(payload) > MAX_PAYLOAD or payload.count(b"\n") > MAX_LINES):
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


def _matching(matchers: _Matchers, node_labels: Sequence[str], table: Table) -> tuple[_Matchers, ...]:
    """For each label set the matchers whose conditions on its labels hold."""
    labels = [dict(one.pairs) for one in table]
    return tuple([tuple([m for m in matchers if m.matches_labels(one, node_labels)]) for one in labels])


def _selects(matching: Sequence[_Matchers]) -> Selects:
    return lambda name, label_set: any(matcher.matches_name(name) for matcher in matching[label_set])


def _size(texts: _Lines) -> int:
    return sum(map(len, texts)) + 40 * len(texts)


def _head(name: bytes, type: str, help: str | None, unit: str | None = None, *, openmetrics: bool = False) -> bytes:
    lines = []
    if help is not None:
        text = escaped(help) if openmetrics else escaped_help(help)
        lines.append(b"# HELP %b %b\n" % (name, text))
    lines.append(b"# TYPE %b %b\n" % (name, type.encode()))
    if unit is not None:
        lines.append(b"# UNIT %b %b\n" % (name, unit.encode()))
    return b"".join(lines)


def _openmetrics_samples(
    named: OpenMetricsFamily, layout: Layout, part: Part, created: Part | None
) -> Sequence[_Sample]:
    """As OpenMetrics wants the samples of a family: those of one metric together, each followed by when it began."""
    bounded, bound = BOUNDS.get(part.type, (None, ""))
    width = len(layout.table)
    spelled = 0 if bounded is None else width * (BOUND_NAMES.index(bound) + 1)
    metrics: dict[object, list[_Sample]] = {}
    for suffix, label_set, number in part.samples():
        sample = named.samples + suffix, label_set + (spelled if suffix == bounded else 0), _numbers_at(layout) + number
        metrics.setdefault(layout.table[label_set].group(bound), []).append(sample)
    for _, label_set, number in [] if created is None else created.samples():
        if (metric := metrics.get(layout.table[label_set].key)) is not None:
            metric.append((named.name + b"_created", label_set, _numbers_at(layout) + number))
    return [sample for metric in metrics.values() for sample in metric]


def _without_metric(named: OpenMetricsFamily, layout: Layout, created: Part, part: Part | None) -> Sequence[_Sample]:
    """When those samples began that are not there: in OpenMetrics they are a family of their own."""
    _, bound = (None, "") if part is None else BOUNDS.get(part.type, (None, ""))
    metrics = set() if part is None else {layout.table[label_set].group(bound) for label_set in part.sets}
    return [
        (named.samples, label_set, _numbers_at(layout) + number)
        for _, label_set, number in created.samples()
        if layout.table[label_set].key not in metrics
    ]


def _numbers_at(layout: Layout) -> int:
    """Where the numbers begin in OpenMetrics' rows: behind the label sets as they are, and with each bound spelled."""
    return len(layout.table) * (1 + len(BOUND_NAMES))


def _filled(samples: Sequence[_Sample], rows: Sequence[_Row]) -> Iterator[bytes]:
    """The samples of one family for each of the rows, many at once."""
    if not samples:
        return
    template = b"".join([name + b"%b %b\n" for name, _, _ in samples])
    pick = itemgetter(*[place for _, *places in samples for place in places])
    step = PIECE // (256 * len(samples)) + 1
    for start in range(0, len(rows), step):
        yield b"".join([template % pick(row) for row in rows[start : start + step]])


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
