"""Whatever is counted, `Exposition` writes what the library does, and keeps nothing that is gone."""

from __future__ import annotations

import gc
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    Summary,
    disable_created_metrics,
    enable_created_metrics,
    values,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    StateSetMetricFamily,
    SummaryMetricFamily,
    UnknownMetricFamily,
)
from prometheus_client.exposition import generate_latest

from lmcache_api import exposition
from lmcache_api.exposition import Exposition

NUMBERS = st.one_of(
    st.floats(),
    st.integers(-(10**9), 10**9).map(float),
    st.sampled_from([0.0, -0.0, 1e6, 999999.0, 1e16, 1e22, 5e-324, math.inf, -math.inf, math.nan]),
)
AMOUNTS = NUMBERS.map(abs)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(['"', "\\", "\n", "\r\n", "%s", "%%", "# HELP x", "a b 1.0", "{}", "\u2028", "ü"]),
)
LABEL_NAMES = st.lists(st.sampled_from(["a", "b", "z", "Z9", "model_name"]), unique=True, max_size=3)
BUCKETS = st.lists(st.floats(-10, 10), min_size=1, max_size=5, unique=True).map(sorted)


@pytest.fixture(autouse=True)
def created_metrics() -> Iterator[None]:
    yield
    enable_created_metrics()


def is_fast(subject: Exposition) -> bool:
    return subject._writer is not None


def same(subject: Exposition, registry: CollectorRegistry) -> bool:
    """Three times: as it finds it, as it has kept it, and once more."""
    expected = generate_latest(registry)
    return all(subject.render() == expected for _ in range(3))


class Collected:
    """A custom collector."""

    def __init__(self, collect: Callable[[], list[Any]]) -> None:
        self.collect = collect


def families(name: str, labels: list[str], values_of: list[str], number: float) -> list[Metric]:
    counter = CounterMetricFamily(name + "_c", "x\\\n%", labels=labels)
    counter.add_metric(values_of, number, created=12.5)
    counter.add_metric(values_of, number, created=1e10, timestamp=123.456)
    unknown = UnknownMetricFamily(name + "_u", "x", labels=labels)
    unknown.add_metric(values_of, number)
    spread = GaugeHistogramMetricFamily(name + "_gh", "x", labels=labels)
    spread.add_metric(values_of, [("1.0", number), ("+Inf", 7)], number)
    spread.add_metric(values_of, [("+Inf", 7)], 3)
    histogram = HistogramMetricFamily(name + "_h", "x", [("1.0", 1), ("+Inf", number)], number)
    states = StateSetMetricFamily(name + "_st", "x", {"on": True, "off": False})
    by_hand = Metric(name + "_m", "x", "untyped")
    by_hand.add_sample("other %s", {"z": "1", "a": '"'}, number)
    by_hand.add_sample("# other", {}, number)
    return [counter, unknown, spread, histogram, states, by_hand, SummaryMetricFamily(name + "_s", "x", 3, number)]


class Draft:
    """A registry that hypothesis makes and changes."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        target = self.draw(st.none() | st.just({"of": 'the "test"'}))
        self.registry = CollectorRegistry(target_info=target)
        self.collectors: list[Any] = []
        self.names = itertools.count()

    def add(self) -> None:
        kind = self.draw(st.sampled_from([Counter, Gauge, Histogram, Summary, Info, Enum, Collected]))
        name = f"n{next(self.names)}" + self.draw(st.sampled_from(["", "_total", ":x", "_created", "_bytes"]))
        labels = self.draw(LABEL_NAMES)
        if kind is Collected:
            label_values = [self.draw(TEXTS) for _ in labels]
            found = families(name, labels, label_values, self.draw(NUMBERS))
            collector: Any = Collected(lambda: found)
            self.registry.register(collector)
        else:
            more: dict[str, Any] = {"buckets": self.draw(BUCKETS)} if kind is Histogram else {}
            more |= {"states": ["on", "off"]} if kind is Enum else {}
            more |= {"unit": self.draw(st.sampled_from(["", "seconds"]))} if kind not in (Info, Enum) else {}
            collector = kind(name, self.draw(TEXTS), labels, registry=self.registry, **more)
        self.collectors.append(collector)

    def series(self) -> Any:
        collector = self.draw(st.sampled_from(self.collectors))
        if isinstance(collector, Collected) or not collector._labelnames:
            return collector
        return collector.labels(*(self.draw(TEXTS) for _ in collector._labelnames))

    def count(self) -> None:
        match self.series():
            case Counter() as counter:
                counter.inc(self.draw(AMOUNTS), self.draw(st.none() | st.just({"trace": "1"})))
            case Gauge() as gauge:
                gauge.set(self.draw(NUMBERS))
            case Histogram() as histogram:
                histogram.observe(self.draw(NUMBERS), self.draw(st.none() | st.just({"trace": "1"})))
            case Summary() as summary:
                summary.observe(self.draw(NUMBERS))
            case Info() as info:
                info.info({"of": self.draw(TEXTS)})
            case Enum() as enum:
                enum.state("off")

    def begin_anew(self) -> None:
        series = self.series()
        if isinstance(series, Counter) and self.draw(st.booleans()):
            series.reset()
        elif not isinstance(series, Collected):
            series._metric_init()

    def set_function(self) -> None:
        series = self.series()
        if isinstance(series, Gauge):
            number = self.draw(NUMBERS)
            series.set_function(lambda: number)

    def clear(self) -> None:
        collector = self.draw(st.sampled_from(self.collectors))
        if not isinstance(collector, Collected) and collector._labelnames:
            collector.clear()

    def remove(self) -> None:
        collector = self.draw(st.sampled_from(self.collectors))
        if not isinstance(collector, Collected) and collector._labelnames and collector._metrics:
            collector.remove(*self.draw(st.sampled_from(sorted(collector._metrics))))

    def unregister(self) -> None:
        self.registry.unregister(self.collectors.pop(self.draw(st.integers(0, len(self.collectors) - 1))))

    def created(self) -> None:
        self.draw(st.sampled_from([disable_created_metrics, enable_created_metrics]))()


CHANGES = [getattr(Draft, name) for name in "add count begin_anew set_function clear remove unregister created".split()]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_it_is_what_the_library_writes_however_the_registry_changes(data: st.DataObject) -> None:
    enable_created_metrics()
    draft = Draft(data)
    subject = Exposition(draft.registry)
    assert is_fast(subject)
    for _ in range(data.draw(st.integers(1, 4))):
        draft.add()
    for change in [Draft.count, *data.draw(st.lists(st.sampled_from([*CHANGES, Draft.count, Draft.count])))]:
        if draft.collectors or change is Draft.add:
            change(draft)
        if data.draw(st.booleans()):
            assert same(subject, draft.registry)
    assert same(subject, draft.registry)


@settings(max_examples=500)
@given(NUMBERS)
def test_numbers_are_written_as_the_library_does(number: float) -> None:
    assert exposition._number(number) == exposition.floatToGoString(number)


def test_zero_changes_its_sign() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("g", "x", registry=registry)
    subject = Exposition(registry)
    for number in (0.0, -0.0, 0.0, 0):
        gauge.set(number)
        assert same(subject, registry)


def test_a_counter_that_is_reset_twice_tells_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    counter = Counter("c", "x", registry=registry)
    subject = Exposition(registry)
    for now in (1.5, 2.5):
        monkeypatch.setattr("time.time", lambda now=now: now)
        counter.reset()
        assert f"c_created {now}\n".encode() in subject.render()
        assert same(subject, registry)


def test_a_metric_may_begin_anew_as_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnValue(values.MutexValue):
        def get(self) -> float:
            return 7.0

    registry = CollectorRegistry()
    histogram = Histogram("h", "x", buckets=[1, 2], registry=registry)
    subject = Exposition(registry)
    assert same(subject, registry)
    histogram._prepare_buckets([3, 4])
    histogram._metric_init()
    assert same(subject, registry)
    monkeypatch.setattr(values, "ValueClass", OwnValue)
    histogram._metric_init()
    assert same(subject, registry)


def test_a_timestamp_is_no_number_of_ours() -> None:
    family = GaugeMetricFamily("g", "x", labels=["a"])
    registry = CollectorRegistry()
    registry.register(Collected(lambda: [family]))
    subject = Exposition(registry)
    for number, timestamp in ((5.0, 0), (6.0, 0.001), (7.0, None)):
        family.add_metric([str(number)], number, timestamp)
        assert same(subject, registry)


def test_a_number_that_grows_in_place_is_seen() -> None:
    class Tensor:
        def __init__(self, number: float) -> None:
            self.number = number

        def __float__(self) -> float:
            return self.number

        def __radd__(self, other: float) -> Tensor:
            return Tensor(other + self.number)

        def __iadd__(self, other: Tensor) -> Tensor:
            self.number += other.number
            return self

    registry = CollectorRegistry()
    gauge = Gauge("g", "x", registry=registry)
    subject = Exposition(registry)
    for _ in range(3):
        gauge.inc(Tensor(1.5))  # type: ignore[arg-type]
        assert same(subject, registry)
    assert b"g 4.5\n" in subject.render()


def test_the_collectors_of_the_library() -> None:
    registry = CollectorRegistry()
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    subject = Exposition(registry)
    gc.disable()
    try:
        assert same(subject, registry)
    finally:
        gc.enable()


def test_what_is_not_the_librarys_own_class_is_collected() -> None:
    class Doubled(Gauge):
        def _child_samples(self) -> Any:
            return [sample._replace(value=2 * sample.value) for sample in super()._child_samples()]

    registry = CollectorRegistry()
    Doubled("d", "x", registry=registry).set(4)
    gauge = Gauge("g", "x", ["a"], registry=registry)
    gauge.labels("1").set(5)
    subject = Exposition(registry)
    assert b"d 8.0\n" in subject.render()
    gauge.collect = lambda: [GaugeMetricFamily("own", "x", 6)]  # type: ignore[method-assign]
    assert b"own 6.0\n" in subject.render()
    assert same(subject, registry)


def test_a_label_set_can_be_registered_alone() -> None:
    registry = CollectorRegistry()
    counter = Counter("c", "x", ["a"], registry=None)
    registry.register(counter.labels("1"))
    counter.labels("1").inc()
    assert same(Exposition(registry), registry)


@pytest.mark.parametrize("wrong", [None, "no number", [1.0]])
def test_a_collector_that_tells_nonsense_fails_as_in_the_library(wrong: Any) -> None:
    registry = CollectorRegistry()
    registry.register(Collected(lambda: [GaugeMetricFamily("a", "x", 1), Metric("b", wrong, "gauge"), wrong]))
    subject = Exposition(registry)
    with pytest.raises(Exception) as theirs:
        generate_latest(registry)
    with pytest.raises(theirs.type) as ours:
        subject.render()
    assert str(ours.value) == str(theirs.value)


def test_what_a_collector_or_a_function_raises_is_raised() -> None:
    def fail() -> Any:
        raise LookupError("broken")

    registry = CollectorRegistry()
    collector = Collected(fail)
    registry.register(collector)
    gauge = Gauge("g", "x", registry=registry)
    subject = Exposition(registry)
    with pytest.raises(LookupError, match=r"^broken$"):
        subject.render()
    registry.unregister(collector)
    assert same(subject, registry)
    gauge.set_function(fail)
    with pytest.raises(LookupError, match=r"^broken$"):
        subject.render()


def test_a_number_that_is_none_fails_as_in_the_library() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("g", "x", registry=registry)
    subject = Exposition(registry)
    assert same(subject, registry)
    gauge._value.set(SimpleNamespace())
    with pytest.raises(TypeError) as theirs:
        generate_latest(registry)
    with pytest.raises(TypeError) as ours:
        subject.render()
    assert [str(argument) for argument in ours.value.args[:1]] == [str(argument) for argument in theirs.value.args[:1]]


@pytest.fixture
def agrees_anew() -> Iterator[None]:
    """What was found of a patched library is not believed of the next one."""
    yield
    exposition._agrees.cache_clear()


@pytest.mark.usefixtures("agrees_anew")
def test_another_prometheus_client_writes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    Counter("c", "x", registry=registry).inc(3)
    original = Counter._child_samples
    otherwise = [
        lambda self: [*original(self)][:1] * 2,
        lambda self: [sample._replace(value=2 * sample.value) for sample in original(self)],
        lambda self: [sample._replace(timestamp=1) for sample in original(self)],
    ]
    for samples in otherwise:
        with monkeypatch.context() as patch:
            patch.setattr(Counter, "_child_samples", samples)
            exposition._agrees.cache_clear()
            assert same(Exposition(registry), registry)
    with monkeypatch.context() as patch:
        patch.setattr(exposition, "_number", lambda number: "0")
        assert not is_fast(Exposition(registry))


def test_a_process_of_many_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class SharedValue(values.MutexValue):
        def get(self) -> float:
            return 7.0

    registry = CollectorRegistry()
    Counter("before", "x", registry=registry)
    monkeypatch.setattr(values, "ValueClass", SharedValue)
    Counter("c", "x", registry=registry)
    assert not is_fast(Exposition(registry))
    monkeypatch.undo()
    subject = Exposition(registry)
    assert is_fast(subject)
    assert b"c_total 7.0\n" in subject.render()
    assert same(subject, registry)


def test_any_registry_will_do() -> None:
    class OwnRegistry(CollectorRegistry):
        def collect(self) -> Any:
            return reversed(list(super().collect()))

    registry = OwnRegistry()
    Gauge("a", "x", registry=registry)
    Gauge("b", "x", registry=registry)
    assert same(Exposition(registry), registry)


def test_what_is_gone_leaves_nothing_behind() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("h", "x", ["a"], registry=registry)
    subject = Exposition(registry)
    gone = []
    for number in range(1000):
        gone.append(weakref.ref(histogram.labels(str(number))))
        if number % 50 == 0:
            subject.render()
    subject.render()
    for number in range(1000):
        histogram.remove(str(number))
    counter = Counter("c", "x", registry=registry)
    gone.append(weakref.ref(counter))
    subject.render()
    registry.unregister(counter)
    del counter
    assert same(subject, registry)
    gc.collect()
    assert not [reference for reference in gone if reference() is not None]


def test_families_of_a_collector_that_are_gone_leave_nothing_behind() -> None:
    registry = CollectorRegistry()
    numbers = itertools.count()
    registry.register(Collected(lambda: [GaugeMetricFamily(f"g{next(numbers)}", "x", 1)]))
    subject = Exposition(registry)
    assert subject._writer is not None
    for _ in range(100):
        subject.render()
    assert subject._writer.knows == 1


def test_an_unchanged_registry_is_not_read_through_the_librarys_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    for kind in (Counter, Gauge, Summary, Histogram):
        kind(kind.__name__, "x", ["a"], registry=registry).labels("1")
    subject = Exposition(registry)
    expected = subject.render()
    monkeypatch.setattr(exposition, "generate_latest", None)
    assert subject.render() == expected


def test_it_is_written_while_others_count() -> None:
    registry = CollectorRegistry()
    counter = Counter("c", "x", registry=registry)
    histogram = Histogram("h", "x", ["a"], registry=registry)
    subject = Exposition(registry)
    is_over = threading.Event()
    failures: list[BaseException] = []

    def repeat(work: Callable[[int], object]) -> None:
        try:
            for number in itertools.count():
                if is_over.is_set():
                    return
                work(number)
        except BaseException as error:
            failures.append(error)

    def label(number: int) -> None:
        histogram.labels(str(number % 7)).observe(number)
        histogram.remove(str(number % 7))

    def register(number: int) -> None:
        gauge = Gauge(f"g{number}", "x", registry=registry)
        subject.render()
        registry.unregister(gauge)

    work: list[Callable[[int], object]] = [lambda _: counter.inc(), label, register, lambda _: subject.render()]
    threads = [threading.Thread(target=repeat, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    told = [float(subject.render().split(b"\nc_total ")[1].split(b"\n")[0]) for _ in range(300)]
    is_over.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert told == sorted(told)
    assert same(subject, registry)
