import hashlib
import logging
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_api.embedded.statistics import NO_STATISTICS, BloomFilter, EmbeddedChunkStatistics
from tests.api.embedded.making import key_of, settings_of

KEYS = st.binary(min_size=16, max_size=16)


@given(keys=st.lists(KEYS, max_size=200), expected=st.integers(1, 100), rate=st.floats(1e-6, 0.5))
def test_what_was_added_is_never_new_again(keys: list[bytes], expected: int, rate: float) -> None:
    bloom = BloomFilter(expected, rate)
    new = sum(bloom.add(key) for key in keys)
    assert not any(bloom.add(key) for key in keys)
    assert bloom.items == new <= len(set(keys))
    assert 0 <= bloom.bits_set <= bloom.bits
    assert bloom.bits_set == sum(byte.bit_count() for byte in bloom._field)
    assert (bloom.bits_set > 0) == bool(keys)


@pytest.mark.parametrize("rate", [0.1, 0.01, 0.001])
def test_new_keys_are_taken_for_known_as_often_as_allowed(rate: float) -> None:
    expected = 5000
    bloom = BloomFilter(expected, rate)
    early = sum(not bloom.add(key_of(number)) for number in range(expected))
    assert early <= expected * rate  # while it fills it errs less
    field = bytes(bloom._field)
    asked, wrong = 20_000, 0
    for number in range(expected, expected + asked):
        bloom._field[:] = field
        wrong += not bloom.add(key_of(number))
    most = asked * rate
    assert wrong <= most + 5 * math.sqrt(most)
    assert wrong >= most / 3 - 5, "larger than it need be"


def test_its_size_is_the_textbooks() -> None:
    bloom = BloomFilter(1_000_000, 0.01)
    assert (bloom.bits, bloom.hashes) == (9_585_059, 7)
    assert bloom.megabytes == pytest.approx(9_585_059 / 8 / (1 << 20), rel=1e-6)
    assert (BloomFilter(1, 0.5).bits, BloomFilter(1, 0.5).hashes) == (64, 44)


def made(**given: Any) -> EmbeddedChunkStatistics:
    return EmbeddedChunkStatistics(settings_of(chunk_statistics_mem_bf_expected_chunks=1000, **given))


def keys(*numbers: int) -> list[bytes]:
    return [hashlib.md5(str(number).encode()).digest() for number in numbers]


def test_chunks_are_counted_between_start_and_stop() -> None:
    statistics = made()
    statistics.record(keys(1, 2, 3), 0.5)
    assert (statistics.status()["enabled"], statistics.status()["total_requests"]) == (False, 0)
    statistics.start()
    statistics.record(keys(1, 2, 3), 0.5)
    statistics.record(keys(1, 2, 4), 1.0)
    statistics.stop()
    statistics.record(keys(5), 0.25)
    status = statistics.status()
    assert {name: status[name] for name in status if "chunks" in name or "rate" in name or "requests" in name} == {
        "total_requests": 2,
        "total_chunks": 6,
        "unique_chunks": 4,
        "duplicate_chunks": 2,
        "reuse_rate": 2 / 6,
    }
    timing, bloom = status["timing"], status["bloom_filter"]
    assert timing["lookup_time_seconds"] == 2.25
    assert 0 < timing["record_statistics_time_seconds"] < 1
    assert timing["total_time_seconds"] == 2.25 + timing["overhead_time_seconds"]
    assert timing["overhead_percentage"] == timing["overhead_time_seconds"] / timing["total_time_seconds"] * 100
    assert (bloom["item_count"], bloom["expected_elements"], bloom["false_positive_rate"]) == (4, 1000, 0.01)
    assert bloom["bits_set"] == pytest.approx(4 * bloom["hash_count"], abs=3)
    statistics.start()
    statistics.record(keys(5, 1), 0.0)
    assert statistics.status()["unique_chunks"] == 5


def test_reset_begins_at_zero_and_goes_on() -> None:
    statistics = made(chunk_statistics_auto_start_statistics=True)
    statistics.record(keys(1), 1.0)
    statistics.reset()
    status = statistics.status()
    assert (status["enabled"], status["total_chunks"], status["timing"]["total_time_seconds"]) == (True, 0, 0.0)
    assert (status["reuse_rate"], status["timing"]["overhead_percentage"]) == (0.0, 0.0)
    statistics.record(keys(1), 0.0)
    assert statistics.status()["unique_chunks"] == 1


def test_they_stop_by_themselves_after_so_many_chunks(caplog: pytest.LogCaptureFixture) -> None:
    statistics = made(chunk_statistics_auto_start_statistics=True, chunk_statistics_auto_exit_target_unique_chunks=3)
    statistics.record(keys(1, 2, 1, 2), 0.0)
    assert statistics.status()["enabled"]
    statistics.record(keys(3, 4), 0.0)
    assert not statistics.status()["enabled"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "4 chunks, chunk_statistics_auto_exit_target_unique_chunks is 3" in caplog.text
    statistics.record(keys(9), 0.0)
    assert statistics.status()["total_chunks"] == 6


@pytest.mark.parametrize(("hours", "stops"), [(1e-12, True), (1000.0, False), (0.0, False)])
def test_they_stop_by_themselves_after_so_many_hours(
    hours: float, stops: bool, caplog: pytest.LogCaptureFixture
) -> None:
    statistics = made(chunk_statistics_auto_start_statistics=True, chunk_statistics_auto_exit_timeout_hours=hours)
    assert statistics.status()["enabled"]
    statistics.record(keys(1), 0.0)
    assert statistics.status()["enabled"] != stops
    assert ("chunk_statistics_auto_exit_timeout_hours is 1e-12" in caplog.text) == stops


def test_a_new_start_begins_the_hours_anew() -> None:
    statistics = made(chunk_statistics_auto_start_statistics=True, chunk_statistics_auto_exit_timeout_hours=1.0)
    statistics._started_at -= 3601
    statistics.start()
    statistics.record(keys(1), 0.0)
    assert statistics.status()["enabled"]
    statistics._started_at -= 3601
    statistics.record(keys(1), 0.0)
    assert not statistics.status()["enabled"]


def test_gauges_tell_the_same_and_have_the_same_names_when_there_are_none() -> None:
    statistics = made(chunk_statistics_auto_start_statistics=True)
    assert statistics.gauges().keys() == NO_STATISTICS.keys()
    statistics.record(keys(1, 1, 2), 0.0)
    gauges, status = statistics.gauges(), statistics.status()
    assert (gauges["chunk_statistics_enabled"], gauges["chunk_statistics_total_requests"]) == (True, 1)
    assert (gauges["chunk_statistics_total_chunks"], gauges["chunk_statistics_unique_chunks"]) == (3, 2)
    assert gauges["chunk_statistics_reuse_rate"] == status["reuse_rate"] == 1 / 3
    assert gauges["chunk_statistics_bloom_filter_size_mb"] == status["bloom_filter"]["size_mb"]
    assert gauges["chunk_statistics_bloom_filter_fill_rate"] == status["bloom_filter"]["fill_rate"] > 0
