"""The merge of many nodes' Prometheus texts, against prometheus_client's readers and Prometheus' own."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
from collections import Counter as Bag
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from lmcache_frontend.telemetry.metrics import exposition
from lmcache_frontend.telemetry.metrics.exposition import ExpositionError, Merge, parse_match

PROMTOOL = shutil.which("promtool")
LINTED = 3
"""promtool's exit code when it reads a text and would name something otherwise; 1 when it cannot read it."""


def node(name: str) -> dict[str, str]:
    return {"node": name, "proxy": "p", "instance": f"{name}:1"}


def merged(*payloads: bytes, matchers: Sequence[str] | None = None) -> Merge:
    merge = Merge(matchers=None if matchers is None else [parse_match(text) for text in matchers])
    for number, payload in enumerate(payloads):
        merge.add(node(f"n{number}"), payload)
    return merge


def written(merge: Merge, *, openmetrics: bool = False) -> str:
    return b"".join(merge.write(openmetrics=openmetrics)).decode()


def plain(merge: Merge, *, openmetrics: bool = False) -> list[str]:
    """The lines, with the nodes' labels cut to their number."""
    text = written(merge, openmetrics=openmetrics)
    for number in range(5):
        text = text.replace(f'node="n{number}",proxy="p",instance="n{number}:1"', f"#{number}")
    return text.splitlines()


def check(text: str) -> None:
    """Prometheus' own reader takes it."""
    if PROMTOOL is not None:
        found = subprocess.run([PROMTOOL, "check", "metrics"], input=text.encode(), capture_output=True)
        assert found.returncode in (0, LINTED), found.stderr.decode()


def samples_of(families: Iterable[Any]) -> Bag[tuple[object, ...]]:
    return Bag(
        (sample.name, frozenset((*sample.labels.items(),)), repr(float(sample.value)), sample.timestamp)
        for family in families
        for sample in family.samples
    )


def text_samples(text: str) -> Bag[tuple[object, ...]]:
    return samples_of(text_string_to_metric_families(text))


def openmetrics_samples(text: str) -> Bag[tuple[object, ...]]:
    return samples_of(openmetrics_parser.text_string_to_metric_families(text))


def labelled(samples: Bag[tuple[object, ...]], labels: Mapping[str, str]) -> Bag[tuple[object, ...]]:
    return Bag({(name, frozenset((*own, *labels.items())), *rest): n for (name, own, *rest), n in samples.items()})  # type: ignore[misc]


def refusal(payload: bytes, **options: Any) -> str:
    with pytest.raises(ExpositionError) as refused:
        Merge().add(node("n"), payload, **options)
    message = str(refused.value)
    assert message.isprintable() and len(message) < 200
    return message


def test_an_empty_merge() -> None:
    assert written(Merge()) == ""
    assert written(Merge(), openmetrics=True) == "# EOF\n"
    assert written(merged(b"", b"\n\n", b"# a comment\n")) == ""


def test_a_family_once_with_all_nodes_samples() -> None:
    first = b'# HELP a first\n# TYPE a gauge\na{x="1"} 1\na 2\n'
    first += b'# TYPE h histogram\nh_bucket{le="+Inf"} 3\nh_count 3\nh_sum 4\n'
    second = b"# HELP a second\n# TYPE a gauge\na 5\nb 6\n"
    merge = merged(first, second)
    assert plain(merge) == [
        "# HELP a first",
        "# TYPE a gauge",
        'a{#0,x="1"} 1',
        "a{#0} 2",
        "a{#1} 5",
        "# TYPE h histogram",
        'h_bucket{#0,le="+Inf"} 3',
        "h_count{#0} 3",
        "h_sum{#0} 4",
        "# TYPE b untyped",
        "b{#1} 6",
    ]
    assert merge.conflicts == 0
    check(written(merge))
    assert openmetrics_samples(written(merge, openmetrics=True)) == text_samples(written(merge))


def test_add_tells_the_samples() -> None:
    merge = Merge(matchers=[parse_match("a")])
    assert merge.add(node("n"), b"a 1\nb 2\n# c\n") == 2
    assert merge.add(node("m"), b"a 1\nb 2\n# c\n") == 2
    assert written(merge).count("\n") == 3


def test_interleaved_families_come_together() -> None:
    merge = merged(b'# TYPE a gauge\n# TYPE b gauge\na{x="1"} 1\nb 2\na{x="2"} 3\n')
    assert plain(merge) == ["# TYPE a gauge", 'a{#0,x="1"} 1', 'a{#0,x="2"} 3', "# TYPE b gauge", "b{#0} 2"]


@pytest.mark.parametrize(
    "line",
    [
        b"x\t1",
        b"  x   1",
        b"x 1 ",
        b"x{} 1",
        b"x{ }1",
        b"x 1\r",
        b"x{,} 1".replace(b",", b""),
    ],
)
def test_other_spellings(line: bytes) -> None:
    assert plain(merged(b"# c\n\n" + line + b"\n")) == ["# TYPE x untyped", "x{#0} 1"]


def test_other_spellings_of_labels() -> None:
    for line in (b'x{a="b",c="d"} 1', b'x { a = "b" ,\tc="d" , } 1', b'x{a="b",c="d",} 1', b'x{a="b",c="d"}1'):
        assert plain(merged(line + b"\n")) == ["# TYPE x untyped", 'x{#0,a="b",c="d"} 1']


@pytest.mark.parametrize(
    "number", "1 +1 -0 1. .5 1e5 1E-5 NaN nan +Inf -Inf inf Infinity -infinity 1234567890123".split()
)
def test_all_numbers_of_prometheus(number: str) -> None:
    merge = merged(f"x {number}\n".encode(), f"x {number}\ny 1\n".encode())
    assert f"x{{#0}} {number}" in plain(merge)
    check(written(merge))


@pytest.mark.parametrize("number", "1e400 0x10 0x1p2 1_0 +nan - . e5 1,5 \u0661 1e --1 true".split())
def test_what_is_no_number(number: str) -> None:
    assert refusal(f"y 1\nx {number}\n".encode()).startswith("line 2: ")
    merge = merged(b"y 1\nx 2\n")  # also when the lines are known
    with pytest.raises(ExpositionError, match="line 2: "):
        merge.add(node("m"), f"y 1\nx {number}\n".encode())


def test_timestamps_are_kept() -> None:
    text = merged(b'x 1 1700000000123\ny{a="b"} 2\n', b"x 1 -5\n")
    assert {"x{#0} 1 1700000000123", "x{#1} 1 -5"} < set(plain(text))
    assert {"x{#0} 1 1700000000.123", "x{#1} 1 -0.005", 'y{#0,a="b"} 2'} < set(plain(text, openmetrics=True))
    check(written(text))
    open_metrics = merged(b"x 1 1700000000.1234\n# EOF\n")
    assert "x{#0} 1 1700000000123" in plain(open_metrics)


def test_known_lines_with_and_without_timestamps() -> None:
    merge = merged(b"x 1\n", b"x 2 3000\n", b"x 4\n")
    assert plain(merge)[1:] == ["x{#0} 1", "x{#1} 2 3000", "x{#2} 4"]
    assert plain(merge, openmetrics=True)[1:-1] == ["x{#0} 1", "x{#1} 2 3.000", "x{#2} 4"]


def test_exemplars_and_units() -> None:
    text = (
        b'# TYPE a_seconds counter\n# UNIT a_seconds seconds\n# HELP a_seconds a \\"b\\"\n'
        b'a_seconds_total{x="1"} 5 # {trace="1 # 2"} 0.5 1700000000\na_seconds_created{x="1"} 1.5\n# EOF\n'
    )
    merge = merged(text)
    assert plain(merge) == [
        '# HELP a_seconds_total a "b"',
        "# TYPE a_seconds_total counter",
        'a_seconds_total{#0,x="1"} 5',
        '# HELP a_seconds_created a "b"',
        "# TYPE a_seconds_created gauge",
        'a_seconds_created{#0,x="1"} 1.5',
    ]
    assert plain(merge, openmetrics=True) == [
        '# HELP a_seconds a \\"b\\"',
        "# TYPE a_seconds counter",
        "# UNIT a_seconds seconds",
        'a_seconds_total{#0,x="1"} 5',
        'a_seconds_created{#0,x="1"} 1.5',
        "# EOF",
    ]
    assert "text behind the sample" in refusal(text.removesuffix(b"# EOF\n"))


def test_openmetrics_is_told_or_recognised() -> None:
    text = b"# TYPE a counter\na_total 1\n"
    assert plain(merged(text + b"# EOF\n"))[0] == plain(merged(text + b"# EOF"))[0] == "# TYPE a_total counter"
    assert "without # EOF" in refusal(text, openmetrics=True)
    assert "behind # EOF" in refusal(b"# EOF\n" + text + b"# EOF\n")
    assert Merge().add(node("n"), text + b"# EOF\n", openmetrics=False) == 1


def test_a_nodes_labels_that_are_there_already() -> None:
    text = b'x{node="a",exported_node="b",proxy="",z="c"} 1\n'
    assert plain(merged(text))[1] == 'x{#0,exported_exported_node="a",exported_node="b",z="c"} 1'
    assert "twice" in refusal(b'x{node="a"} 1\nx{exported_node="a"} 1\n')


def test_values_of_a_nodes_labels() -> None:
    merge = Merge()
    merge.add({"node": 'a"\\\n%s\xff', "proxy": ""}, b'x{a="%d\\n\\"\\\\"} 1\n')
    assert written(merge).splitlines()[1] == 'x{node="a\\"\\\\\\n%s\xff",proxy="",a="%d\\n\\"\\\\"} 1'
    merge.add({}, b"x 2\n")  # the frontend's own
    assert "x 2" in written(merge).splitlines()
    with pytest.raises(ValueError, match="labels of a node"):
        merge.add({"a-b": "c"}, b"")


def test_the_frontends_own_text_has_no_labels_of_a_node() -> None:
    merge = merged(b"x 1\n")
    assert merge.add({}, b'x{node="a",b="%"} 2\nx 3\n') == 2
    assert written(merge).splitlines()[2:] == ['x{node="a",b="%"} 2', "x 3"]
    assert written(merge, openmetrics=True).splitlines()[2:] == ['x{node="a",b="%"} 2', "x 3", "# EOF"]


def test_a_node_twice() -> None:
    merge = merged(b"x 1\n")
    with pytest.raises(ExpositionError, match="already"):
        merge.add(node("n0"), b"y 1\n")
    assert plain(merge) == ["# TYPE x untyped", "x{#0} 1"]


def test_types_that_disagree() -> None:
    gauge, counter = b"# HELP x of all\n# TYPE x gauge\nx 1\n", b"# TYPE x counter\nx 2\n"
    histogram = b'# TYPE x histogram\nx_bucket{le="+Inf"} 3\nx_count 3\nx_sum 3\n'
    merge = merged(counter, gauge, gauge, histogram, b"# TYPE x_as_counter gauge\nx_as_counter 4\n")
    assert merge.conflicts == 2
    assert plain(merge) == [
        "# TYPE x_as_counter_2 counter",
        "x_as_counter_2{#0} 2",
        "# HELP x of all",
        "# TYPE x gauge",
        "x{#1} 1",
        "x{#2} 1",
        "# TYPE x_as_histogram histogram",
        'x_as_histogram_bucket{#3,le="+Inf"} 3',
        "x_as_histogram_count{#3} 3",
        "x_as_histogram_sum{#3} 3",
        "# TYPE x_as_counter gauge",
        "x_as_counter{#4} 4",
    ]
    check(written(merge))
    openmetrics_samples(written(merge, openmetrics=True))
    assert plain(merged(gauge, counter))[3] == "# TYPE x counter", "of as many nodes, in the order of the alphabet"


def test_names_that_one_type_forbids_another() -> None:
    histogram = b'# TYPE x histogram\nx_bucket{le="+Inf"} 3\nx_count 3\nx_sum 3\n'
    merge = merged(histogram, histogram, b"# TYPE x_count gauge\nx_count 1\n", b"# TYPE x_total counter\nx_total 1\n")
    assert merge.conflicts == 1 and "x_count_as_gauge{#2} 1" in plain(merge)
    check(written(merge))
    fewer = merged(b"# TYPE x_count gauge\nx_count 1\n", b"# TYPE x_count gauge\nx_count 1\n", histogram)
    assert fewer.conflicts == 1 and "x_count{#1} 1" in plain(fewer) and "x_as_histogram_count{#2} 3" in plain(fewer)
    check(written(fewer))
    text = written(merge, openmetrics=True)
    openmetrics_samples(text)
    assert "# TYPE x_total unknown\n" in text, "a histogram is named x already"


def test_when_samples_began() -> None:
    registry = CollectorRegistry()
    for value in ("a", "b"):
        Counter(f"c{value}", "c", ["l"], registry=registry).labels(value).inc()
    histogram = Histogram("h", "h", ["l"], buckets=(1, 2), registry=registry)
    summary = Summary("s", "s", ["l"], registry=registry)
    for value in ("a", "b"):
        histogram.labels(value).observe(1)
        summary.labels(value).observe(2)
    merge = merged(generate_latest(registry), openmetrics_exposition.generate_latest(registry))
    text, open_metrics = written(merge), written(merge, openmetrics=True)
    assert text.count("_created gauge") == 4
    assert "_created gauge" not in open_metrics and open_metrics.count("h_created{") == 4
    assert openmetrics_samples(open_metrics) == text_samples(text)
    check(text)


@pytest.mark.parametrize("type", ["gauge", "histogram", "counter"])
def test_a_name_for_when_samples_began_that_is_taken(type: str) -> None:
    histogram = b'x_created_bucket{le="+Inf"} 1\nx_created_count 1\nx_created_sum 1\n'
    samples = histogram if type == "histogram" else b"x_created 1\n"
    text = b"# TYPE x_created " + type.encode() + b"\n" + samples
    for other in (b"# TYPE x_total counter\nx_total 1\n", b"# TYPE x histogram\n", b"# TYPE x_created_total counter\n"):
        merge = merged(text + other)
        check(written(merge))
        read = openmetrics_samples(written(merge, openmetrics=True))
        assert sum(read.values()) == sum(text_samples(written(merge)).values())


def test_when_something_began_that_is_not_there() -> None:
    counter, began = b'# TYPE x_total counter\nx_total{a="1"} 5\n', b'# TYPE x_created gauge\nx_created{a="1"} 6\n'
    merge = merged(counter + began + b'x_created{a="2"} 7\n', began, counter)
    assert plain(merge, openmetrics=True) == [
        "# TYPE x counter",
        'x_total{#0,a="1"} 5',
        'x_created{#0,a="1"} 6',
        'x_total{#2,a="1"} 5',
        "# TYPE x_created_as_gauge gauge",
        'x_created_as_gauge{#0,a="2"} 7',
        'x_created_as_gauge{#1,a="1"} 6',
        "# EOF",
    ]
    openmetrics_samples(written(merge, openmetrics=True))


def test_a_bound_of_the_other_type_is_a_label_like_others() -> None:
    histogram = b'# TYPE a histogram\na_bucket{le="1",quantile="2"} 1\na_bucket{le="+Inf",quantile="2"} 1\n'
    histogram += b'a_count{quantile="2"} 1\na_sum{quantile="2"} 1\na_created{quantile="2"} 7\n'
    other = b'a_created{quantile="0.5"} 1\na_created{le="1"} 1\n'
    summary = b'# TYPE b summary\nb{quantile="1",le="2"} 1\nb_count{le="2"} 1\nb_sum{le="2"} 1\nb_created{le="1"} 1\n'
    merge = merged(histogram + other + summary)
    check(written(merge))
    read = openmetrics_samples(written(merge, openmetrics=True))
    assert sum(read.values()) == sum(text_samples(written(merge)).values())
    assert plain(merge, openmetrics=True) == [
        "# TYPE a histogram",
        'a_bucket{#0,le="1.0",quantile="2"} 1',
        'a_bucket{#0,le="+Inf",quantile="2"} 1',
        'a_count{#0,quantile="2"} 1',
        'a_sum{#0,quantile="2"} 1',
        'a_created{#0,quantile="2"} 7',
        "# TYPE b summary",
        'b{#0,quantile="1.0",le="2"} 1',
        'b_count{#0,le="2"} 1',
        'b_sum{#0,le="2"} 1',
        "# TYPE a_created_as_gauge gauge",
        'a_created_as_gauge{#0,quantile="0.5"} 1',
        'a_created_as_gauge{#0,le="1"} 1',
        "# TYPE b_created_as_gauge gauge",
        'b_created_as_gauge{#0,le="1"} 1',
        "# EOF",
    ]


def test_bounds_as_openmetrics_spells_them() -> None:
    text = b'# TYPE h histogram\nh_bucket{le="1"} 1\nh_bucket{le="+Inf"} 2\nh_count 2\nh_sum 3\n'
    text += b'# TYPE g gauge\ng{le="1"} 5\n'
    merge = merged(text)
    assert 'h_bucket{#0,le="1"} 1' in plain(merge) and 'g{#0,le="1"} 5' in plain(merge, openmetrics=True)
    assert 'h_bucket{#0,le="1.0"} 1' in plain(merge, openmetrics=True)
    openmetrics_samples(written(merge, openmetrics=True))
    assert "twice" in refusal(text.replace(b'"+Inf"', b'"1.0"'))


def test_samples_of_one_metric_are_together_in_openmetrics() -> None:
    lines = [f'h_bucket{{a="{a}",le="+Inf"}} 1' for a in "12"] + [
        f'h_{s}{{a="{a}"}} 1' for s in ("count", "sum") for a in "12"
    ]
    merge = merged("\n".join(["# TYPE h histogram", *lines, ""]).encode())
    assert [line.replace("#0,", "") for line in plain(merge)[1:]] == lines
    assert openmetrics_samples(written(merge, openmetrics=True)) == text_samples(written(merge))


def test_labels_of_one_number_that_mean_something_else() -> None:
    """Layouts are recognised by their label sets' number, not by what is in them: what is in them may forbid it."""

    def text(*bounds: str) -> bytes:
        return b"# TYPE h histogram\n" + b"".join(f'h_bucket{{le="{bound}"}} 1\n'.encode() for bound in bounds)

    for bounds, reason in ((("2.0", "2"), "twice"), (("2", "many"), "le has to be")):
        merge = merged(text("1", "+Inf"))
        merge.add(node("other"), text("2", "+Inf"))
        with pytest.raises(ExpositionError, match=f"line 3: .*{reason}"):
            merge.add(node("wrong"), text(*bounds))
    metrics = [
        "".join(
            f'h_{suffix}{{a="{a}"{bound}}} 1\n'
            for suffix, bound in (("bucket", ',le="+Inf"'), ("count", ""), ("sum", ""))
            for a in ("12" if bound else order)
        )
        for order in ("12", "21")
    ]
    merge = merged(*[b"# TYPE h histogram\n" + metric.encode() for metric in metrics])
    assert openmetrics_samples(written(merge, openmetrics=True)) == text_samples(written(merge))


def test_types_of_openmetrics() -> None:
    text = (
        b'# TYPE i info\ni_info{a="b"} 1\n# TYPE s stateset\ns{s="on"} 1\n# TYPE u unknown\nu 1\n'
        b'# TYPE g gaugehistogram\ng_bucket{le="+Inf"} 1\ng_gcount 1\ng_gsum 1\n# TYPE c counter\n# EOF\n'
    )
    merge = merged(text)
    assert [line for line in plain(merge) if line.startswith("#")] == [
        "# TYPE i_info gauge",
        "# TYPE s gauge",
        "# TYPE u untyped",
        "# TYPE g_bucket gauge",
        "# TYPE g_gcount gauge",
        "# TYPE g_gsum gauge",
        "# TYPE c_total counter",
    ]
    check(written(merge))
    openmetrics_samples(written(merge, openmetrics=True))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"<html>\n", "line 1: neither a sample"),
        (b"x 1\n<html><body>\n", "line 2: neither a sample"),
        (b"x 1\nx 1", "line 2: the text ends within a line"),
        (b"x 1\nx", "line 2: the text ends within a line"),
        (b'x{a="b} 1\n', "line 1: "),
        (b'x{a="b\\t"} 1\n', "line 1: "),
        (b"x{ 1\n", "line 1: "),
        (b"x{\n", "line 1: "),
        (b"x\n", "line 1: "),
        (b"x 1\nx{} 2\n", "line 2: a sample twice: x"),
        (b'x{a="",b="c"} 1\nx{b="c"} 2\n', "line 2: a sample twice: x"),
        (b'x{a="1",b="c"} 1\nx{b="c",a="1"} 2\n', "line 2: a sample twice: x"),
        (b'x{a="1",a="2"} 1\n', "line 1: a label twice"),
        (b'x{__name__="a"} 1\n', "line 1: the label __name__"),
        (b'{"x",a="b"} 1\n', "line 1: "),
        (b"x 1 2 3\n", "line 1: text behind"),
        (b"x 1 1.5\n", "line 1: not a timestamp"),
        (b"x 1 9223372036854775808\n", "line 1: not a timestamp"),
        (b'x 1 # {a="b"} 1\n', "line 1: text behind"),
        (b'# c\nx{a="\xff"} 1\n', "line 2: not UTF-8"),
        (b"# HELP x \xff\nx 1\n", "line 1: not UTF-8"),
        (b"# c\n# TYPE x foo\n", "line 2: the type of x is unknown: foo"),
        (b"# TYPE x\n", "line 1: the type of x is unknown"),
        (b"x 1\n# TYPE x gauge\n", "line 2: x has a type after"),
        (b"x_count 1\n# TYPE x summary\n", "line 2: x_count has a type after"),
        (b"# TYPE x gauge\n# TYPE x gauge\n", "line 2: a second TYPE of x"),
        (b"# HELP x a\n# HELP x a\n", "line 2: a second HELP of x"),
        (b"# TYPE x histogram\nx 1\n", "line 2: x is no sample"),
        (b"# TYPE x histogram\nx_bucket 1\n", "line 2: le has to be"),
        (b'# TYPE x histogram\nx_bucket{le="a"} 1\n', "line 2: le has to be"),
        (b'# TYPE x histogram\nx_sum{le="1"} 1\n', "line 2: le has to be"),
        (b"# TYPE x summary\nx 1\n", "line 2: quantile has to be"),
        (b"x" * 70000 + b" 1\n", "line 1: longer than"),
        (b'x{a="' + b"y" * 70000 + b'"} 1\n', "line 1: longer than"),
        (b"x{" + b",".join(b'l%d="v"' % n for n in range(65)) + b"} 1\n", "line 1: more than 64 labels"),
        (b"\n" * 200_001, "line 1: a text of more than"),
        (b"".join(b"x%d 1\n" % n for n in range(20_001)), "line 20001: too many families"),
        (b"\x00\x1b[31m\n", "line 1: neither"),
    ],
)
def test_refusals_name_the_line_and_leave_no_trace(payload: bytes, reason: str) -> None:
    assert refusal(payload).startswith(reason)
    merge = merged(b"# TYPE x gauge\nx 1\n")
    before = written(merge)
    with pytest.raises(ExpositionError):
        merge.add(node("m"), payload)
    assert written(merge) == before
    merge.add(node("m"), b"# TYPE x gauge\nx 2\n")
    assert written(merge).count("\n") == 3


def test_a_merge_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    most = exposition._Held(samples=6, parts=3, label_sets=4, label_bytes=15_000)
    monkeypatch.setattr(exposition, "_MOST", most)
    for text, name in (
        (b"".join(b'x{a="%d"} 1\n' % (n % 2) + b'y{a="%d"} 1\n' % (n % 2) for n in range(2)), "samples"),
        (b"x 1\ny 1\n", "parts"),
        (b'x{a="1"} 1\nx{a="2"} 1\nx 3\n', "label sets"),
        (b'x{a="' + b"y" * 6000 + b'"} 1\n', "label bytes"),
    ):
        merge = merged(text)
        before = written(merge)
        with pytest.raises(ExpositionError, match=f"the merge is full: more than .* {name}"):
            merge.add(node("m"), text + b"# other lines\n" if name != "parts" else b"z 1\nv 1\n")
        assert written(merge) == before
        assert merge.add(node("o"), b"") == 0


def test_known_layouts_are_forgotten_not_their_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "MAX_KEPT_KEYS", 100)
    texts = [b'x%d{a="b"} 1\n' % (n % 7) for n in range(30)]
    merge = merged(*texts)
    assert written(merge).count("\n") == 7 + 30
    assert len(merge._known._values) < 3 and len(merge._spelled._values) < 3


def test_pieces_are_bounded_and_are_not_all_there_at_once() -> None:
    text = b"".join(b'x{a="%d"} 1\n' % n for n in range(20_000))
    pieces = list(merged(text, text).write(openmetrics=False))
    assert max(map(len, pieces)) <= 2 * exposition.PIECE and len(pieces) > 5
    small = list(merged(*[b'y{a="b"} 1\n'] * 1).write(openmetrics=False))
    assert len(small) == 1


def test_matchers() -> None:
    text = b'# TYPE a gauge\na{x="1"} 1\na{x="2"} 2\n# TYPE b gauge\nb{node="own"} 3\n'
    assert plain(merged(text, text, matchers=['a{x="2"}', 'b{node="n1"}'])) == [
        "# TYPE a gauge",
        'a{#0,x="2"} 2',
        'a{#1,x="2"} 2',
        "# TYPE b gauge",
        'b{#1,exported_node="own"} 3',
    ]
    assert plain(merged(text, matchers=['{exported_node=~"o.*"}'])) == ["# TYPE b gauge", 'b{#0,exported_node="own"} 3']
    assert plain(merged(b'a{x="1"} 1\n', b'a{x="2"} 1\n', matchers=['a{x="2"}']))[1:] == ['a{#1,x="2"} 1']
    assert plain(merged(text, matchers=[])) == [] == plain(merged(text, matchers=['a{node="n1"}']))
    with pytest.raises(ExpositionError):
        merged(text + b"a", matchers=['b{node="n1"}'])


def test_a_matcher_makes_new_layouts_only_of_labels_that_it_is_about() -> None:
    def texts(count: int) -> list[bytes]:
        return [b'a{host="h%d"} 1\nb{host="h%d",x="1"} 2\nb{host="h%d",x="2"} 3\n' % (n, n, n) for n in range(count)]

    for selector, layouts in (("b", 1), ('{__name__=~"b",x="2"}', 1), ('b{host="h3"}', 2), ('b{host!="h3"}', 2)):
        merge = merged(*texts(5), matchers=[selector])
        assert len(merge._known._values) == layouts, selector
        alone = [line for n, text in enumerate(texts(5)) for line in _samples_alone(n, text, selector)]
        assert sorted(line for line in plain(merge) if line[0] != "#") == sorted(alone)


def _samples_alone(number: int, text: bytes, selector: str) -> list[str]:
    merge = Merge(matchers=[parse_match(selector)])
    merge.add(node(f"n{number}"), text)
    return [line for line in plain(merge) if line[0] != "#"]


VALUES = st.one_of(st.integers(0, 10**9), st.floats(0, 1e300))
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), max_size=6)
HARD_TEXTS = st.one_of(TEXTS, st.sampled_from(["", "\\", '"', "a\nb", "} 1", "# EOF", "%s", " a b ", "\\n", ","]))


@st.composite
def registries(draw: st.DrawFn) -> CollectorRegistry:
    """One node of a cluster, in which a name has one type."""
    registry = CollectorRegistry()
    for number in draw(st.lists(st.integers(0, 6), unique=True, max_size=6)):
        labels = ("l", draw(st.sampled_from(["node", "exported_node", "m"])))
        sets = draw(st.lists(st.tuples(HARD_TEXTS, HARD_TEXTS), unique=True, max_size=3))
        kind: Any = (Counter, Gauge, Histogram, Summary, Info, Enum, Gauge)[number]
        options = {"states": ["on", "off"]} if kind is Enum else {"buckets": (1, 2.5)} if kind is Histogram else {}
        metric = kind(f"m_{number}", draw(HARD_TEXTS), labels, registry=registry, **options)
        for one in sets:
            child = metric.labels(*one)
            value = draw(VALUES)
            if kind in (Counter, Histogram, Summary):
                (child.inc if kind is Counter else child.observe)(value)
            elif kind is Gauge:
                child.set(draw(st.sampled_from([-value, math.inf, -math.inf, math.nan])))
            elif kind is Info:
                child.info({"i": draw(HARD_TEXTS)})
    return registry


def expected(samples: Bag[tuple[object, ...]], labels: Mapping[str, str]) -> Bag[tuple[object, ...]]:
    """As Prometheus labels them; an empty label is none."""
    result: Bag[tuple[object, ...]] = Bag()
    for (name, own, *rest), number in samples.items():
        renamed = {f"exported_{label}" if label in labels else label: value for label, value in own if value}  # type: ignore[attr-defined]
        result[(name, frozenset({**renamed, **labels}.items()), *rest)] += number
    return result


def without_empty(samples: Bag[tuple[object, ...]]) -> Bag[tuple[object, ...]]:
    return Bag(
        {(name, frozenset(pair for pair in own if pair[1]), *rest): n for (name, own, *rest), n in samples.items()}  # type: ignore[attr-defined]
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(registries(), st.booleans()), min_size=1, max_size=4))
def test_no_sample_is_lost_or_changed(nodes: Sequence[tuple[CollectorRegistry, bool]]) -> None:
    merge = Merge()
    wanted: Bag[tuple[object, ...]] = Bag()
    for number, (registry, is_openmetrics) in enumerate(nodes):
        generate = openmetrics_exposition.generate_latest if is_openmetrics else generate_latest
        samples = text_samples(generate_latest(registry).decode())
        added = merge.add(node(f"n{number}"), generate(registry))
        assert added == sum(samples.values())
        wanted += expected(samples, node(f"n{number}"))
    text, open_metrics = written(merge), written(merge, openmetrics=True)
    assert without_empty(text_samples(text)) == wanted
    assert without_empty(openmetrics_samples(open_metrics)) == wanted
    heads = [line.split(" ")[1:3] for line in text.split("\n") if line.startswith("#")]
    assert len(heads) == len(set(map(tuple, heads)))
    assert merge.conflicts == 0


def real_text(rank: int) -> bytes:
    registry = CollectorRegistry()
    labels = {"model_name": "m\\n", "worker_id": str(rank)}
    for number in range(3):
        Counter(f"lmcache:c{number}", "Total", labels, registry=registry).labels(**labels).inc(number)
        Gauge(f"lmcache:g{number}", "Now", labels, registry=registry).labels(**labels).set(number / 7)
        Histogram(f"lmcache:h{number}", "Of", labels, buckets=(1, 2), registry=registry).labels(**labels).observe(1.5)
    return generate_latest(registry)


def mutated(text: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.randrange(1, 4)):
        at, end = sorted(chance.randrange(len(text) + 1) for _ in range(2))
        match chance.randrange(6):
            case 0:
                text = text[:at] + bytes([chance.randrange(256)]) + text[at + 1 :]
            case 1:
                text = text[:at] + text[min(end, at + 20) :]
            case 2:
                text = text[:at]
            case 3:
                text = text[:at] + text[at : at + 60] + text[at:]
            case 4:
                text = (
                    text[:at]
                    + chance.choice([b'"', b"{", b"}", b" ", b"\n", b"\\", b"#", b",", b"\t", b"\r\n"])
                    + text[at:]
                )
            case _:
                lines = text.split(b"\n")
                chance.shuffle(lines)
                text = b"\n".join(lines)
    return text


def test_mutated_texts_are_refused_or_merged_into_what_promtool_reads() -> None:
    chance = random.Random(5)
    texts = [real_text(rank) for rank in range(2)]
    taken = 0
    for _ in range(40):
        merge = merged(*texts)
        kept = text_samples(written(merge))
        for number in range(20):
            text = mutated(texts[number % 2], chance)
            before = written(merge) if number % 10 == 0 else None
            try:
                merge.add(node(f"m{number}"), text)
                taken += 1
            except ExpositionError as error:
                assert str(error).startswith("line ") and "\n" not in str(error) and len(str(error)) < 200
                assert before is None or written(merge) == before
        text_now = written(merge)
        check(text_now)
        assert max(text_samples(text_now).values()) == 1
        assert merge.conflicts or not kept - text_samples(text_now)
        b"".join(merge.write(openmetrics=True))
    assert taken > 50
