"""The history without a network: what a text says, what two of them say, what a ring keeps, what a history tells."""

import math
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_api.embedded.metrics import EmbeddedMetrics
from lmcache_frontend.telemetry.history import history as history_module
from lmcache_frontend.telemetry.history import reading as reading_module
from lmcache_frontend.telemetry.history.clock import Clock
from lmcache_frontend.telemetry.history.counting import Point, between, merged, quantile
from lmcache_frontend.telemetry.history.history import History, NoPast
from lmcache_frontend.telemetry.history.reading import Order, Reading, read
from lmcache_frontend.telemetry.history.ring import COARSE_POINTS, FINE_PER_COARSE, FINE_POINTS, Ring
from lmcache_frontend.telemetry.history.series import HISTOGRAMS, KEPT, OF_NODES, RETRIEVE, SCALARS, SERIES, STARTED
from lmcache_frontend.telemetry.history.timeline import MAX_ALIKE, MAX_EVENTS, Event, Timeline

HERE = Path(__file__).parent
NAN = math.nan
INF = math.inf
LABELS = {"model_name": "m", "role": "worker", "worker_id": "0"}
PLACE = {series.key: place for place, series in enumerate(KEPT)}


def text(started: float = 1.0, **families: object) -> bytes:
    """A node's text; `hits_2=3` is not one: names are given without `lmcache:`, a list is several samples."""
    lines = [f"{STARTED} {started}"]
    for name, value in families.items():
        values = value if isinstance(value, list) else [value]
        lines += [f'lmcache:{name}{{worker_id="{i}"}} {it}' for i, it in enumerate(values)]
    return "\n".join([*lines, ""]).encode()


def buckets(bounds: dict[str, float], worker: str = "0") -> str:
    return "".join(f'{RETRIEVE}_bucket{{le="{le}",worker_id="{worker}"}} {n}\n' for le, n in bounds.items())


def reading(body: bytes, moment: float = 0.0) -> Reading:
    return read(body, moment, None)[0]


def point(before: bytes, now: bytes, seconds: float = 5.0) -> dict[str, float]:
    values = between(reading(before), reading(now, seconds)).values
    return dict(zip(PLACE, values, strict=True))


# What a text says


def test_every_family_of_the_embedded_engine_and_of_lmcache_is_found() -> None:
    metrics = EmbeddedMetrics(LABELS)
    metrics.add("num_hit_tokens", 7)
    metrics.observe("time_to_retrieve", 0.3)
    found = reading(metrics.exposition())
    engine = {name for name in SCALARS if name.startswith("lmcache:") and "controller" not in name}
    assert found.scalars.keys() == engine | {STARTED}
    assert found.scalars["lmcache:num_hit_tokens_total"] == 7.0
    told = found.histograms[RETRIEVE]
    assert found.histograms.keys() == set(HISTOGRAMS)
    assert (told.bounds[0], told.bounds[-1], told.counts[0], told.counts[-1]) == (0.001, INF, 0.0, 1.0)
    assert dict(zip(told.bounds, told.counts, strict=True))[0.25] == 0.0
    assert dict(zip(told.bounds, told.counts, strict=True))[0.5] == 1.0


def test_several_workers_in_one_text_are_added_up() -> None:
    body = (
        text(num_hit_tokens_total=[1, 2, 3.5])
        + (buckets({"1": 1, "+Inf": 2}) + buckets({"1": 10, "+Inf": 20}, "1")).encode()
    )
    found = reading(body)
    assert (found.scalars["lmcache:num_hit_tokens_total"], *found.samples.values()) == (6.5, 3)
    assert found.histograms[RETRIEVE] == ((1.0, INF), (11.0, 22.0), 4)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"lmcache:num_hit_tokens_total 3", 3.0),
        (b"lmcache:num_hit_tokens_total\t3", 3.0),
        (b"lmcache:num_hit_tokens_total 3 1700000000000", 3.0),
        (b'lmcache:num_hit_tokens_total{a="} 9"} 3 1700000000000', 3.0),
        (b'lmcache:num_hit_tokens_total{a="}"} 1e3', 1000.0),
        (b"# TYPE lmcache:num_hit_tokens_total counter", None),
        (b"lmcache:num_hit_tokens_total_created 3", None),
        (b"lmcache:num_hit_tokens_total NaN", None),
        (b"lmcache:num_hit_tokens_total +Inf", None),
        (b"lmcache:num_hit_tokens_total three", None),
        (b"lmcache:num_hit_tokens_total ", None),
        (b"lmcache:num_hit_tokens_total{", None),
        (b"xlmcache:num_hit_tokens_total 3", None),
        (b"lmcache:num_hit_tokens_total", None),
    ],
)
def test_a_line(line: bytes, value: float | None) -> None:
    for body in (line, line + b"\n", b"a 1\n" + line + b"\nb 2\n"):
        assert reading(body).scalars.get("lmcache:num_hit_tokens_total") == value


def test_families_that_come_go_or_change_their_order_are_found() -> None:
    first, order = read(text(num_hit_tokens_total=1, num_stored_tokens_total=2), 0, None)
    second, same = read(text(num_hit_tokens_total=10, num_stored_tokens_total=20), 5, order)
    assert same is order
    assert second.scalars["lmcache:num_stored_tokens_total"] == 20
    third, order = read(text(num_stored_tokens_total=200, num_hit_tokens_total=100), 10, order)
    assert third.scalars["lmcache:num_hit_tokens_total"] == 100
    fourth, order = read(text(num_stored_tokens_total=5), 15, order)
    assert fourth.scalars.keys() == {STARTED, "lmcache:num_stored_tokens_total"}
    fifth, _ = read(text(num_stored_tokens_total=5, num_hit_tokens_total=6, num_requested_tokens_total=7), 20, order)
    assert len(fifth.scalars) == 4
    assert len(first.scalars) == 3


def test_a_histogram_that_is_not_clear_is_none() -> None:
    for odd in (
        buckets({"1": 1, "2": 2}),
        buckets({"1": 1, "+Inf": 2}) + buckets({"3": 1, "+Inf": 2}, "1"),
        buckets({"one": 1, "+Inf": 2}),
        buckets({"1": NAN, "+Inf": 2}),
        f"{RETRIEVE}_bucket 3\n",
        "".join(buckets({str(i): 1}) for i in range(reading_module.MAX_BOUNDS + 1)) + buckets({"+Inf": 1}),
    ):
        assert reading(odd.encode()).histograms == {}


PIECES = [b"lmcache:num_hit_tokens_total", f"{RETRIEVE}_bucket".encode(), b'{le="1"}', b'{le="', b"{", b" 3", b"}"]
ODD = [b"\n", b"\xff", b'"', b" ", b"+Inf", b"\x00"]


@given(st.binary(max_size=300) | st.lists(st.sampled_from(PIECES + ODD)).map(b"".join))
def test_no_text_is_too_odd(body: bytes) -> None:
    found, order = read(body, 1.0, None)
    again, _ = read(body, 1.0, order)
    assert found == again
    assert all(map(math.isfinite, found.scalars.values()))


def test_a_family_with_very_many_samples_is_left_out() -> None:
    body = text(num_hit_tokens_total=[1] * (reading_module.MAX_SAMPLES + 5), num_stored_tokens_total=3)
    assert reading(body).scalars.keys() == {STARTED, "lmcache:num_stored_tokens_total"}


# What two texts say


def test_rates_gauges_and_what_is_missing() -> None:
    found = point(
        text(num_hit_tokens_total=100, local_cache_usage=5, put_failed_count=1, get_blocking_failed_count=2),
        text(num_hit_tokens_total=150, local_cache_usage=9, put_failed_count=2, get_blocking_failed_count=6),
    )
    assert found["hit_tokens"] == 10
    assert found["cpu_bytes"] == 9
    assert found["failures"] == 1
    known = {key for key, value in found.items() if not math.isnan(value)}
    assert known == {"hit_tokens", "cpu_bytes", "failures"}


def test_the_first_text_has_gauges_alone() -> None:
    values = between(None, reading(text(num_hit_tokens_total=1000, local_cache_usage=9))).values
    assert math.isnan(values[PLACE["hit_tokens"]])
    assert values[PLACE["cpu_bytes"]] == 9


def test_a_reset_is_a_gap_and_no_spike() -> None:
    for before, now in (
        (text(num_hit_tokens_total=1000), text(num_hit_tokens_total=30)),  # `/metrics/reset`
        (text(num_hit_tokens_total=[900, 100]), text(num_hit_tokens_total=[950])),  # a worker of the node has gone
        (text(num_hit_tokens_total=[900]), text(num_hit_tokens_total=[950, 5000])),  # or has come
        (text(started=1, num_hit_tokens_total=3), text(started=2, num_hit_tokens_total=9)),  # another process
    ):
        assert math.isnan(point(before, now)["hit_tokens"])
    seen = between(reading(text(started=1)), reading(text(started=2), 5.0))
    assert seen.restarted
    after = between(reading(text(num_hit_tokens_total=30), 5.0), reading(text(num_hit_tokens_total=80), 10.0))
    assert after.values[PLACE["hit_tokens"]] == 10


def test_a_family_that_appears_began_at_zero() -> None:
    before, now = text(), text(num_hit_tokens_total=20) + buckets({"1": 2, "+Inf": 2}).encode()
    found = point(before, now)
    assert (found["hit_tokens"], found["retrieve_p50"]) == (4.0, 0.5)
    without = now.replace(STARTED.encode(), b"x")  # who knows which process it is
    found = point(before.replace(STARTED.encode(), b"x") + b"lmcache:local_cache_usage 1\n", without)
    assert math.isnan(found["hit_tokens"])
    assert math.isnan(found["retrieve_p50"])


def test_readings_too_far_apart_or_in_no_order_tell_no_rate() -> None:
    before, now = text(num_hit_tokens_total=1), text(num_hit_tokens_total=2)
    assert math.isnan(point(before, now, 91.0)["hit_tokens"])
    assert math.isnan(point(before, now, 0.0)["hit_tokens"])
    assert math.isnan(point(before, now, -3.0)["hit_tokens"])


def test_quantiles_are_of_the_interval_alone() -> None:
    before = text() + buckets({"0.1": 1000, "1": 1000, "+Inf": 1000}).encode()
    now = text() + buckets({"0.1": 1000, "1": 1100, "+Inf": 1100}).encode()
    found = point(before, now)
    assert found["retrieve_p50"] == pytest.approx(0.55)
    assert found["retrieve_p99"] == pytest.approx(0.991)
    assert math.isnan(point(now, now)["retrieve_p50"])
    assert math.isnan(point(now, before)["retrieve_p50"])


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ((10, 10, 10), 0.5, 0.5),
        ((0, 10, 10), 0.5, 2.0),
        ((5, 10, 10), 0.75, 2.0),
        ((5, 5, 10), 0.5, 1.0),
        ((5, 5, 10), 0.51, 3.0),
        ((0, 0, 10), 0.01, 3.0),
        ((0, 0, 0), 0.5, NAN),
        ((1, 1, 1), 1.0, 1.0),
    ],
)
def test_a_quantile(counts: tuple[float, ...], share: float, expected: float) -> None:
    assert quantile(((1.0, 3.0, INF), counts), share) == pytest.approx(expected, nan_ok=True)


@given(
    st.lists(st.floats(0, 20), min_size=1, max_size=60),
    st.sampled_from([0.5, 0.95, 0.99]),
    st.lists(st.floats(0.01, 15), min_size=1, max_size=8, unique=True),
)
def test_a_quantile_lies_in_the_bucket_that_the_observation_lies_in(
    seen: list[float], share: float, bounds: list[float]
) -> None:
    edges = (*sorted(bounds), INF)
    found = quantile((edges, tuple(float(sum(it <= edge for it in seen)) for edge in edges)), share)
    exact = sorted(seen)[math.ceil(share * len(seen)) - 1]
    upper = next(edge for edge in edges if exact <= edge)
    lower = max((edge for edge in (0.0, *edges) if edge < upper), default=0.0)
    assert lower <= found <= (upper if upper < INF else edges[-2])


def test_quantiles_of_several_nodes_are_of_all_that_they_observed() -> None:
    fast = ((0.1, 1.0, INF), (99.0, 99.0, 99.0))
    slow = ((0.1, 1.0, INF), (0.0, 1.0, 1.0))
    both = merged([fast, slow])
    assert both == ((0.1, 1.0, INF), (99.0, 100.0, 100.0))
    assert both is not None
    assert quantile(both, 0.99) == pytest.approx(0.1)  # and not the mean of 0.1 and 1
    assert merged([fast, ((0.1, 5.0, INF), (1.0, 2.0, 4.0))]) == ((0.1, INF), (100.0, 103.0))
    assert merged([]) is None


# What a ring keeps

SERIES_OF_RING = (SERIES["hit_tokens"], SERIES["retrieve_p99"], SERIES["disk_bytes"])


def test_a_ring_is_empty_at_first() -> None:
    ring = Ring(SERIES_OF_RING)
    assert all(map(math.isnan, ring.fine(0, 5, 9)))
    assert all(map(math.isnan, ring.coarse(0, 0, 3)))
    assert len(ring.fine(0, 9, 5)) == 0


def same(left: float, right: float) -> bool:
    return (math.isnan(left) and math.isnan(right)) or math.isclose(left, right, rel_tol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_ring_has_what_was_written_and_gaps_in_between(data: st.DataObject) -> None:
    """Beside a dictionary that forgets nothing."""
    size = FINE_POINTS
    ring, kept = Ring(SERIES_OF_RING), dict[int, float]()
    slot = data.draw(st.integers(0, 3 * size))
    steps = st.sampled_from([0, 1, 1, 1, 2, 5, FINE_PER_COARSE, size - 1, size, size + 1, COARSE_POINTS * 12 + 7])
    for value in data.draw(st.lists(st.floats(0, 1000, width=32) | st.just(NAN), min_size=1, max_size=30)):
        slots = data.draw(st.sampled_from([1, 1, 2, 16]))
        if kept:
            slot += data.draw(steps)
        for covered in range(slot - slots + 1, slot):
            if kept and covered > max(kept):
                kept[covered] = value
        kept[slot] = value
        ring.write(slot, [value, NAN if len(kept) < 4 else 7.0, 5.0], {}, slots)
    found = ring.fine(0, slot - 2 * size, slot + 3)
    for number, value in enumerate(found, slot - 2 * size):
        expected = kept.get(number, NAN) if number > slot - size else NAN
        assert same(value, expected), number
    minute = slot // FINE_PER_COARSE
    for number, value in enumerate(ring.coarse(0, minute - COARSE_POINTS - 5, minute + 2), minute - COARSE_POINTS - 5):
        known = [kept[it] for it in range(number * 12, number * 12 + 12) if not math.isnan(kept.get(it, NAN))]
        is_old = number <= minute - COARSE_POINTS  # it may be there until another minute takes its place
        assert same(value, sum(known) / len(known) if known else NAN) or (is_old and math.isnan(value)), number


def test_a_minute_has_the_quantile_of_all_that_was_observed_in_it() -> None:
    ring = Ring(SERIES_OF_RING)
    bounds = (0.1, 1.0, INF)
    for slot in range(12, 24):
        is_slow = slot == 15
        counts = (0.0, 1.0, 1.0) if is_slow else (9.0, 9.0, 9.0)
        ring.write(slot, [1.0, 1.0 if is_slow else 0.1, NAN], {RETRIEVE: (bounds, counts)})
    expected = 0.1 * 0.99 * 100 / 99  # one of a hundred is slow
    for _ in range(2):
        assert ring.coarse(1, 1, 2)[0] == pytest.approx(expected, rel=1e-6)
        ring.write(24, [1.0, NAN, NAN], {})  # now it is whole
    assert math.isnan(ring.coarse(1, 2, 3)[0])


def test_a_series_without_values_takes_no_memory() -> None:
    ring = Ring(SERIES_OF_RING)
    for slot in range(100):
        ring.write(slot, [1.0, NAN, NAN], {})
    assert (len(ring._fine), len(ring._coarse)) == (FINE_POINTS, COARSE_POINTS)


# What a history tells


class Still(Clock):
    """A clock that is put forward by hand."""

    def __init__(self) -> None:
        self.moment_of_now, self.ahead = 1_000_000.0, 1_700_000_000.0

    def now(self) -> float:
        return self.moment_of_now

    def wall(self) -> float:
        return self.moment_of_now + self.ahead


def a_point(**values: float) -> Point:
    return Point([values.get(series.key, NAN) for series in KEPT])


KEY, OTHER = ("p", "a"), ("p", "b")
NOBODY = {"up": 0, "slow": 0, "down": 0, "unknown": 0}


def filled(rounds: int = 30) -> tuple[History, Still]:
    """Two nodes; the second one gives nothing in every third round."""
    clock = Still()
    history = History(clock)
    for number in range(rounds):
        clock.moment_of_now += 5
        history.record(KEY, a_point(hit_tokens=number, requested_tokens=2 * number, cpu_bytes=7), history.slot())
        if number % 3:
            history.record(OTHER, a_point(hit_tokens=10, requested_tokens=10, cpu_bytes=1), history.slot())
        else:
            history.note(OTHER, "no answer")
        history.end_round(history.slot(), 1, {"up": 2, "slow": 0, "down": 1, "unknown": 0})
    return history, clock


def test_latest_values_and_their_age() -> None:
    history, clock = filled()
    latest = history.latest(KEY)
    assert latest is not None
    assert (latest.values["hit_tokens"], latest.values["hit_rate"], latest.problem) == (29, 0.5, None)
    assert latest.values["evictions"] is None
    assert latest.values.keys() == {series.key for series in OF_NODES}
    assert latest.time == clock.wall()
    clock.moment_of_now += 30
    clock.ahead -= 5000  # somebody sets the clock back
    assert history.age(latest) == 30
    assert history.latest(("p", "nobody")) is None
    history.note(KEY, "no answer")
    noted = history.latest(KEY)
    assert noted is not None
    assert (noted.values["hit_tokens"], noted.problem, history.age(noted)) == (29, "no answer", 30)
    assert history.row(("p", "nobody"), ["load"])["values"] == {"load": None}


def test_totals() -> None:
    history, _ = filled(29)
    total = history.latest(None)
    assert total is not None
    assert (total.values["hit_tokens"], total.values["requested_tokens"], total.values["cpu_bytes"]) == (38, 66, 8)
    assert total.values["hit_rate"] == pytest.approx(38 / 66)
    assert (total.values["nodes_up"], total.values["nodes_down"], total.values["nodes_recorded"]) == (2, 1, 2)
    assert History(Still()).latest(None) is None


def test_totals_of_quantiles_are_merged() -> None:
    history = History(Still())
    for key, counts in ((KEY, (99.0, 99.0, 99.0)), (OTHER, (0.0, 1.0, 1.0))):
        history.record(key, Point([NAN] * len(KEPT), {RETRIEVE: ((0.1, 1.0, INF), counts)}), history.slot())
    history.end_round(history.slot(), 1, NOBODY)  # type: ignore[arg-type]
    total = history.latest(None)
    assert total is not None
    assert total.values["retrieve_p99"] == pytest.approx(0.1)
    assert total.values["retrieve_p50"] == pytest.approx(0.1 * 50 / 99)
    assert total.values["store_p50"] is None


def test_a_frame_has_gaps_and_the_moments_of_its_steps() -> None:
    history, clock = filled(12)
    now = clock.wall()
    frame = history.frame(OTHER, ["hit_tokens", "hit_rate"], now - 40, now, 100)
    assert frame.step == 5
    assert frame.times == [now - 40 + 5 * i for i in range(9)]
    assert frame.values["hit_tokens"] == [None, 10, 10, None, 10, 10, None, 10, 10]
    assert frame.values["hit_rate"] == [None, 1, 1, None, 1, 1, None, 1, 1]
    thinned = history.frame(OTHER, ["hit_tokens"], now - 60, now, 4)
    assert len(thinned.times) <= 4
    assert set(thinned.values["hit_tokens"]) <= {10, None}
    with pytest.raises(KeyError):
        history.frame(KEY, ["nonsense"], now - 40, now)
    with pytest.raises(KeyError):
        history.frame(KEY, ["nodes_up"], now - 40, now)
    with pytest.raises(NoPast):
        history.frame(("p", "nobody"), ["load"], now - 40, now)
    assert history.frame(None, ["nodes_up"], now - 10, now).values["nodes_up"] == [2, 2, 2]


@pytest.mark.parametrize("late", [0.0, 5.0])
def test_the_past_hour_is_told_at_five_seconds(late: float) -> None:
    history, clock = filled(FINE_POINTS + 20)
    now = clock.wall() - late
    frame = history.frame(KEY, ["hit_tokens"], now - 3600, now, 1440)
    assert frame.step == 5
    assert FINE_POINTS - 1 <= len(frame.times) <= FINE_POINTS
    assert None not in frame.values["hit_tokens"]
    assert history.frame(KEY, ["hit_tokens"], now - 3600, now, 300).step == 15
    assert history.frame(KEY, ["hit_tokens"], now - 3700, now, 1440).step == 60


@given(st.floats(0, 90_000), st.floats(0, 90_000), st.integers(1, 500))
@settings(max_examples=100, deadline=None)
def test_a_frame_is_never_larger_than_asked_for(back: float, length: float, points: int) -> None:
    clock = Still()
    history = History(clock)
    history.record(KEY, a_point(load=1), history.slot())
    start = clock.wall() - back
    frame = history.frame(KEY, ["load", "hit_rate"], start, start + length, points)
    assert len(frame.times) <= points
    assert all(len(values) == len(frame.times) for values in frame.values.values())
    assert all(later - earlier == frame.step for earlier, later in zip(frame.times, frame.times[1:], strict=False))
    assert not frame.times or frame.times[-1] <= clock.wall()


def test_a_jump_of_the_wall_clock_moves_the_stamps_and_no_value() -> None:
    history, clock = filled(12)
    before = history.frame(KEY, ["hit_tokens"], clock.wall() - 30, clock.wall())
    clock.ahead += 7200
    after = history.frame(KEY, ["hit_tokens"], clock.wall() - 30, clock.wall())
    assert after.values == before.values
    assert after.times == [stamp + 7200 for stamp in before.times]


def test_a_ratio_of_a_longer_step_is_that_of_the_sums() -> None:
    clock = Still()
    history = History(clock)
    first = history.slot() // 2 * 2
    for slot, (hits, requested) in enumerate([(100, 100), (0, 900)], first):
        clock.moment_of_now = slot * 5.0
        history.record(KEY, a_point(hit_tokens=hits, requested_tokens=requested), slot)
    frame = history.frame(KEY, ["hit_rate"], clock.stamp(first * 5.0), clock.wall(), 1)
    assert frame.values["hit_rate"] == [0.1]  # and not the mean of 1 and 0


def test_sparklines() -> None:
    history, _ = filled(5)
    found = history.sparklines("hit_tokens", [KEY, OTHER, ("p", "nobody")], 6)
    assert found == {KEY: [None, 0, 1, 2, 3, 4], OTHER: [None, None, 10, 10, None, 10]}


def test_who_has_changed() -> None:
    history, _ = filled(3)
    revision = history.revision
    assert history.changed_since(revision) == []
    history.record(OTHER, a_point(load=1), history.slot())
    assert history.changed_since(revision) == [OTHER]
    assert set(history.changed_since(-1)) == {None, KEY, OTHER}


def test_a_node_that_left_is_forgotten_later_and_goes_on_before() -> None:
    history, clock = filled(3)
    history.keep({KEY})
    clock.moment_of_now += history_module.FORGET_SECONDS - 5
    history.keep({KEY})
    assert OTHER in history.latest_all()
    history.keep({KEY, OTHER})  # it is back
    clock.moment_of_now += 10
    history.keep({KEY})
    assert OTHER in history.latest_all()
    clock.moment_of_now += history_module.FORGET_SECONDS
    history.keep({KEY})
    assert OTHER not in history.latest_all()


def test_more_nodes_than_have_a_past() -> None:
    clock = Still()
    history = History(clock, max_nodes=1)
    for key in (KEY, OTHER):
        history.record(key, a_point(load=1), history.slot())
    history.end_round(history.slot(), 1, NOBODY)  # type: ignore[arg-type]
    latest, total = history.latest(OTHER), history.latest(None)
    assert latest is not None
    assert total is not None
    assert (latest.values["load"], total.values["load"]) == (1, 2)
    with pytest.raises(NoPast, match="the past of 1 nodes is kept"):
        history.frame(OTHER, ["load"], clock.wall() - 5, clock.wall())
    assert history.sparklines("load", [OTHER]) == {}
    history.keep({OTHER})  # the first one has left: its place is wanted
    history.record(OTHER, a_point(load=1), history.slot())
    assert history.frame(OTHER, ["load"], clock.wall() - 5, clock.wall()).values["load"][-1] == 1


def test_a_node_with_a_full_past_takes_no_more_than_its_share() -> None:
    """200 MiB for 1,000 nodes are 209,715 bytes for each."""
    ring = Ring(KEPT)
    of_engine = [0.0 if "controller" in series.key else random.random() for series in KEPT]
    values = [NAN if "controller" in series.key else value for series, value in zip(KEPT, of_engine, strict=True)]
    for slot in range(0, 2 * COARSE_POINTS * FINE_PER_COARSE, FINE_PER_COARSE // 2):
        ring.write(slot, values, {})
    size = sum(map(sys.getsizeof, (ring._fine, ring._coarse)))
    assert 100_000 < size < 190_000


# The timeline


def test_the_timeline_is_bounded_and_numbered() -> None:
    timeline = Timeline(lambda: 12.5)
    for number in range(MAX_EVENTS + 50):
        timeline.record(Event("up", f"{number} is up\nand more", node="n" * 1000))
    assert timeline.revision == MAX_EVENTS + 50
    newest = timeline.newest(3)
    assert [event.number for event in newest] == [1050, 1049, 1048]
    assert newest[0].text == "1049 is up?and more"
    assert len(newest[0].node) == 301
    assert newest[0].time == 12.5
    assert [event.number for event in timeline.newest(2, before=1049)] == [1048, 1047]
    assert [event.number for event in timeline.since(1048)] == [1049, 1050]
    assert len(timeline.newest(5000)) == len(timeline.since(0)) == MAX_EVENTS


def test_a_whole_fleet_takes_no_more_than_some_lines() -> None:
    timeline = Timeline()
    timeline.record_all(Event("down", f"n{i} is down") for i in range(1000))
    assert timeline.revision == MAX_ALIKE + 1
    assert timeline.newest(1)[0].text == f"and {1000 - MAX_ALIKE} more nodes: down"


def test_every_series_is_told_in_the_docs() -> None:
    text_of_docs = (HERE.parents[1] / "docs" / "history.md").read_text()
    for series in SERIES.values():
        assert f"`{series.key}`" in text_of_docs, series.key
        assert all(f"`{family}`" in text_of_docs for family in series.families), series.key


def test_the_order_is_kept_for_the_next_text() -> None:
    body = text(num_hit_tokens_total=1)
    assert read(body, 0, None)[1] == Order((STARTED.encode(), b"lmcache:num_hit_tokens_total"), 3)
