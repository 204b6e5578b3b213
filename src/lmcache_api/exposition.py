"""What Prometheus reads, written for a fraction of `prometheus_client.generate_latest`, and byte for byte the same.

The library makes an object of every sample, sorts and escapes its labels and formats its number, at every scrape. Of
all that only the number changes. Here the library writes a family or a label set once; its text is kept with a gap for
each number, and a scrape fills the gaps. The format is never spelled out here: every text is the library's own.

Metrics of the library itself, in a process that counts alone, are also read here, and filled in only when they have
moved. Other collectors are asked as the library asks them. A metric that is not as expected is written by the library;
and when it writes a registry of ours otherwise than this module does, as a future release may, it writes everything.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary, metrics, values
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString


class Exposition:
    """The text format of a registry, from any thread and as often as wanted.

    A metric that was unregistered and a label set that was removed are held until the next `render`, no longer.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        counts_alone = values.ValueClass is values.MutexValue
        self._writer = _Writer(registry) if type(registry) is CollectorRegistry and counts_alone and _agrees() else None

    def render(self) -> bytes:
        """What `generate_latest(registry)` returns or raises; a gauge's function that raises is asked once more."""
        if self._writer is None or "collect" in vars(self._registry):
            return generate_latest(self._registry)
        return self._writer.write()


# From here on private names of prometheus_client are used, as they are in 0.20 to 0.26. Where a release has others,
# `_agrees` or an exception tells, and the library writes.


class _Writer:
    """Holds no lock while it writes: of two renders at once each may prepare the same text, and one of them is kept."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._families: Mapping[Any, _Family] = {}
        self._others: Mapping[Hashable, _Gaps] = {}
        self._use_created: bool | None = None

    def write(self) -> bytes:
        registry: Any = self._registry
        with registry._lock:
            collectors = list(registry._collector_to_names)
            target = registry._target_info_metric() if registry._target_info else None
        use_created = metrics._use_created
        known = self._families if use_created == self._use_created else {}
        families: dict[Any, _Family] = {}
        others: dict[Hashable, _Gaps] = {}
        texts = [] if target is None else [_by_library([target])]
        for collector in collectors:
            text = _metric_text(collector, known, families)
            if text is not None:
                texts.append(text)
            else:
                texts += [_other_text(family, self._others, others) for family in collector.collect()]
        self._families, self._others, self._use_created = families, others, use_created
        return "".join(texts).encode()

    @property
    def knows(self) -> int:
        """How many families the library did not write at the last time."""
        return len(self._families) + len(self._others)


def _metric_text(collector: Any, known: Mapping[Any, _Family], families: dict[Any, _Family]) -> str | None:
    """The text of a metric of the library, kept in `families` for the next time; None when it has to be collected."""
    if type(collector) not in _KINDS:
        return None
    try:
        family = known.get(collector) or _Family(collector)
        text = family.write()
    except Exception:
        return None
    families[collector] = family
    return text


class _Family:
    """A metric with all its label sets."""

    __slots__ = ("_attributes", "_head", "_metric", "_seen")

    def __init__(self, metric: Any) -> None:
        if not vars(metric).keys().isdisjoint(_OWN_WAYS):
            raise _Unexpected
        self._metric = metric
        self._attributes = len(vars(metric))
        self._head = _by_library(metric.describe())
        self._seen: tuple[Mapping[Any, Any], Mapping[Any, _Series]] = {}, {}

    def write(self) -> str:
        metric = self._metric
        if len(vars(metric)) != self._attributes:  # it may have been given its own way since
            raise _Unexpected
        is_parent = metric._labelnames and not metric._labelvalues
        children = metric._metrics if is_parent else {(): metric}
        seen, series = self._seen
        if children != seen:
            if is_parent:
                with metric._lock:
                    children = metric._metrics.copy()
            series = {child: series.get(child) or _Series(metric, of, child) for of, child in children.items()}
            self._seen = children, series
        texts = [self._head]
        created_texts: list[str] = []
        for child, one in series.items():
            text, created_text = one.write(child)
            texts.append(text)
            if created_text:
                created_texts.append(created_text if created_texts else one.created_head + created_text)
        return "".join(texts + created_texts)


class _Told(NamedTuple):
    """What a label set told last, and of what; replaced as a whole, never changed."""

    numbers: Sequence[float]
    created: object
    texts: tuple[str, str]


class _Series:
    """A label set of a metric, or a metric without labels."""

    __slots__ = ("_cells", "_cells_of", "_created_line", "_lines", "_shown", "_shown_of", "_told", "created_head")

    def __init__(self, metric: Any, labels: Iterable[str], child: Any) -> None:
        self._cells_of, suffixes_of, self._shown_of = _KINDS[type(metric)]
        self._cells = cells = self._cells_of(child)
        self._told = _Told((), None, ("", ""))
        if type(child) is not type(metric) or any(type(cell) is not values.MutexValue for cell in cells):
            raise _Unexpected
        samples = type(metric)._child_samples(child)  # also of a gauge with a function, which is not called here
        has_created = samples[-1].name == "_created"
        self._shown = len(samples) - has_created
        if [sample.name for sample in samples[: self._shown]] != suffixes_of(cells)[: self._shown]:
            raise _Unexpected
        series_labels = dict(zip(metric._labelnames, labels, strict=False))
        family = next(iter(metric.describe()))
        for sample in samples:
            family.add_sample(metric._name + sample.name, {**series_labels, **sample.labels}, 0.0)
        gaps = _with_gaps(family)
        if gaps.order != list(range(len(samples))) or len(gaps.texts) != 2 + 2 * has_created:
            raise _Unexpected
        self._lines = gaps.texts[1]
        self.created_head, self._created_line = (gaps.texts[2] % (), gaps.texts[3]) if has_created else ("", "")

    def write(self, child: Any) -> tuple[str, str]:
        """The lines of its numbers, and the one that goes to the end of the family."""
        own = vars(child)
        if "_child_samples" in own:
            return self._lines % _number(_told_by_function(own["_child_samples"])), ""
        cells = self._cells_of(child)
        if cells != self._cells:  # begun anew, perhaps with other buckets
            raise _Unexpected
        numbers = list(map(_NUMBER_IN, cells))
        created = own.get("_created")
        told_numbers, told_created, told_texts = self._told
        # 0.0 == -0.0, and only the last number can be either
        if numbers == told_numbers and numbers[-1] is told_numbers[-1] and created is told_created:
            return told_texts
        shown = self._shown_of(numbers)[: self._shown]
        created_text = self._created_line % _number(created) if self._created_line else ""
        texts = self._lines % tuple(map(_number, shown)), created_text
        if _IMMUTABLE.issuperset(map(type, numbers)):
            self._told = _Told(numbers, created, texts)
        return texts


class _Kind(NamedTuple):
    """How a class of metrics keeps its numbers."""

    cells: Callable[[Any], list[Any]]
    """Where they are, in a label set."""
    suffixes: Callable[[Sequence[Any]], list[str]]
    """The names of the samples that it tells of them."""
    shown: Callable[[list[float]], list[float]]
    """The number of each sample."""


def _histogram_shown(numbers: list[float]) -> list[float]:
    *buckets, total = numbers
    counts = list(accumulate(buckets, initial=0.0))[1:]
    return [*counts, counts[-1], total]


_KINDS: Final[Mapping[Any, _Kind]] = MappingProxyType(
    {
        Counter: _Kind(lambda child: [child._value], lambda cells: ["_total"], list),
        Gauge: _Kind(lambda child: [child._value], lambda cells: [""], list),
        Summary: _Kind(lambda child: [child._count, child._sum], lambda cells: ["_count", "_sum"], list),
        Histogram: _Kind(
            lambda child: [*child._buckets, child._sum],
            lambda cells: ["_bucket"] * (len(cells) - 1) + ["_count", "_sum"],
            _histogram_shown,
        ),
    }
)
_NUMBER_IN: Final = attrgetter("_value")
_IMMUTABLE: Final = frozenset((int, float))
"""A tensor that somebody counts with is the same object after it has grown."""
_OWN_WAYS: Final = frozenset(("collect", "describe", "_get_metric", "_is_parent", "_samples", "_multi_samples"))
"""Methods that decide what a metric tells: one that has been given its own is collected."""


class _Unexpected(Exception):
    """A metric that has to be collected."""


def _told_by_function(samples: Any) -> float:
    """The number of a gauge with a function."""
    if samples.__func__.__qualname__ != "Gauge.set_function.<locals>.samples":
        raise _Unexpected
    (sample,) = samples()
    number: float = sample.value
    return number


def _other_text(family: Metric, known: Mapping[Hashable, _Gaps], others: dict[Hashable, _Gaps]) -> str:
    """The text of a family that was collected, its gaps kept in `others` for the next time."""
    try:
        shape = _shape(family)
        gaps = known.get(shape) or _with_gaps(family)
        numbers = [_number(sample.value) for sample in family.samples]
        text = "".join(gaps.texts) % tuple([numbers[position] for position in gaps.order])
    except Exception:
        return _by_library([family])
    others[shape] = gaps
    return text


def _shape(family: Metric) -> Hashable:
    """All of a family that is written, but the numbers."""
    samples = []
    for sample in family.samples:
        name, labels, _, *more = sample
        if type(sample) is not Sample or more.count(None) != len(more):
            raise _Unexpected
        samples.append((name, *labels.items()))
    return type(family), family.name, family.documentation, family.type, family.unit, tuple(samples)


class _Gaps(NamedTuple):
    """A family's text with a gap for every number: `texts` in turn comments and samples, ready for `%`."""

    texts: list[str]
    order: list[int]
    """Which sample's number goes into each gap."""


def _with_gaps(family: Metric) -> _Gaps:
    numbered = copy.copy(family)
    numbered.samples = [sample._replace(value=float(position)) for position, sample in enumerate(family.samples)]
    texts, order = [], []
    lines = _by_library([numbered]).replace("%", "%%").split("\n")[:-1]
    for is_comment, block in groupby(lines, lambda line: line.startswith("#")):
        if is_comment:
            texts.append("".join(f"{line}\n" for line in block))
            continue
        parted = [line.rpartition(" ") for line in block]
        order += [int(float(number)) for _, _, number in parted]
        texts.append("".join(f"{series} %s\n" for series, _, _ in parted))
    if sorted(order) != list(range(len(family.samples))):
        raise _Unexpected
    return _Gaps(texts, order)


def _number(number: Any) -> str:
    if type(number) is float and -1e6 < number < 1e6:
        return repr(number)
    text: str = floatToGoString(number)  # type: ignore[no-untyped-call]
    return text


class _Collected:
    """As much of a registry as `generate_latest` asks."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _by_library(families: Iterable[Metric]) -> str:
    return generate_latest(_Collected(families)).decode()


@functools.cache
def _agrees() -> bool:
    """Whether the installed prometheus_client writes a registry of ours as this module does, also when it changes."""
    try:
        registry = CollectorRegistry(target_info={"of": "the check"})
        writer = _Writer(registry)
        return all(writer.write() == generate_latest(registry) and writer.knows >= 9 for _ in _changes(registry))
    except Exception:
        return False


def _changes(registry: CollectorRegistry) -> Iterator[None]:
    """A registry with all that is treated specially; and again after each of its changes."""
    with_labels: Any = {"labelnames": ("b", "a"), "registry": registry}
    counters = [Counter("c", 'of "1"\\\n%s', unit="s", registry=registry), Counter("cl", "of many", **with_labels)]
    gauges = [Gauge("g", "of one", registry=registry), Gauge("gl", "of many", **with_labels)]
    summaries = [Summary("s", "of one", registry=registry), Summary("sl", "of many", **with_labels)]
    histograms = [
        Histogram("h", "of one", buckets=(-1, 0.5, 2e6), registry=registry),
        Histogram("hl", "of many", **with_labels),
    ]
    Gauge("gf", "of a function", registry=registry).set_function(lambda: 7)
    Info("i", "of words", registry=registry).info({"word": "\\"})
    Enum("e", "of states", states=["on", "off"], registry=registry)
    yield
    for number in (0.0, 0.25, 999999.5, 1e6, 12345678.9, 1e17, float("inf"), float("nan")):
        labels = ('quoted "%s"\\\n', str(number))
        for counter in (counters[0], counters[1].labels(*labels)):
            counter.inc(number)
        for gauge in (gauges[0], gauges[1].labels(*labels)):
            gauge.set(-number)
        for observed in (summaries[0], summaries[1].labels(*labels), histograms[0], histograms[1].labels(*labels)):
            observed.observe(number)
        yield
        yield
    counters[0].reset()
    yield
