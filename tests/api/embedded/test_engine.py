import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_api import checksums
from lmcache_api.component import LoadedChunks, LoadError, Span
from lmcache_api.embedded import engine as engine_module
from lmcache_api.embedded.disk import LocalDiskBackend
from lmcache_api.embedded.engine import EmbeddedEngine
from lmcache_shared.errors import ConfigError
from tests.api.embedded.making import (
    CHUNK,
    CHUNK_BYTES,
    CHUNK_SPACE,
    CPU,
    DISK,
    Made,
    computed,
    gib,
    key_of,
    kv_of,
    make,
    settings_of,
)

NewEngine = Callable[..., Made]
TOKENS = range(4 * CHUNK)
OTHERS = range(1000, 1000 + 4 * CHUNK)


@pytest.fixture
def both(made: NewEngine, tmp_path: Path) -> Made:
    return made(cpu_chunks=50, disk_chunks=50, local_disk=tmp_path)


def locations(engine: EmbeddedEngine, tokens: range) -> list[tuple[int, int, tuple[str, ...]]]:
    return [(span.start, span.end, span.locations) for span in engine.lookup(tokens)]


def md5_of(engine: EmbeddedEngine, count: int) -> list[str]:
    """What `/cache/kvcache/check` answers."""
    until = time.monotonic() + 30
    found = checksums.of_chunks(engine.kv_caches, range(count), CHUNK, layerwise=False, until=until)
    assert found is not None
    return found.together


def test_a_retrieve_brings_the_bytes_of_a_store_back(both: Made) -> None:
    engine = both.engine
    fresh = md5_of(engine, 64)
    engine.store(TOKENS)
    stored = md5_of(engine, 64)
    assert kv_of(engine.kv_caches, 64) == computed(both.configuration.settings, TOKENS, 64)
    engine.store(OTHERS)
    others = md5_of(engine, 64)
    assert engine.retrieve(TOKENS) == 64
    assert md5_of(engine, 64) == stored
    assert engine.retrieve(OTHERS) == 64
    assert md5_of(engine, 64) == others
    assert len({*fresh, *stored, *others}) == 12


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "uint8"])
@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("source", [CPU, DISK])
def test_so_it_does_from_every_backend_in_every_layout(
    made: NewEngine, tmp_path: Path, dtype: str, mla: bool, source: str
) -> None:
    one = made(local_disk=tmp_path, disk_chunks=50, engine_dtype=dtype, engine_use_mla=mla, save_unfull_chunk=True)
    tokens = range(40)
    one.engine.store(tokens)
    stored = kv_of(one.engine.kv_caches, 40)
    one.engine.store(OTHERS)
    one.set(retrieve_locations=[source])
    assert kv_of(one.engine.kv_caches, 40) != stored
    assert one.engine.retrieve(tokens) == 40
    assert kv_of(one.engine.kv_caches, 40) == stored == computed(one.configuration.settings, tokens, 40)


def test_beyond_the_last_slot_it_goes_on_at_the_first(both: Made) -> None:
    long = range(6 * CHUNK)  # of four chunks' slots
    both.engine.store(long)
    after = kv_of(both.engine.kv_caches, 64)
    assert after == computed(both.configuration.settings, long, 96)
    both.engine.store(OTHERS)
    assert both.engine.retrieve(long) == 96
    assert kv_of(both.engine.kv_caches, 64) == after


@settings(max_examples=40, deadline=None)
@given(data=st.data(), partial=st.booleans())
def test_the_longest_known_prefix_is_found(data: st.DataObject, partial: bool) -> None:
    """Against a set of known prefixes, with tokens so few that requests share beginnings."""
    one = make(save_unfull_chunk=partial)
    piece = st.sampled_from([[token] * CHUNK for token in range(3)])
    requests = st.builds(
        lambda pieces, rest: [token for each in [*pieces, rest] for token in each],
        st.lists(piece, max_size=4),
        st.lists(st.just(0), max_size=CHUNK - 1),
    )
    known: set[tuple[int, ...]] = set()

    def ends(tokens: list[int]) -> list[int]:
        full = list(range(CHUNK, len(tokens) + 1, CHUNK))
        return [*full, len(tokens)] if partial and len(tokens) % CHUNK else full

    for tokens in data.draw(st.lists(requests, max_size=5)):
        one.engine.store(tokens)
        known |= {tuple(tokens[:end]) for end in ends(tokens)}
    for tokens in data.draw(st.lists(requests, max_size=8)):
        hit = max((end for end in ends(tokens) if tuple(tokens[:end]) in known), default=0)
        assert one.engine.hit_tokens(tokens) == one.engine.retrieve(tokens) == hit
    one.engine.close()


def test_a_hole_ends_what_is_found(both: Made) -> None:
    both.engine.store(TOKENS)
    both.engine.clear([CPU])
    second = sorted(both.files(), key=lambda path: path.stat().st_mtime_ns)[1]
    second.write_bytes(b"damaged")
    assert both.engine.hit_tokens(TOKENS) == 64  # asking does not read
    assert both.engine.retrieve(TOKENS) == CHUNK
    assert both.engine.hit_tokens(TOKENS) == CHUNK
    assert both.engine.gauges()["get_blocking_failed_count"] == 1
    both.engine.store(TOKENS)
    assert both.engine.retrieve(TOKENS) == 64


def test_what_is_asked_for_is_told_in_spans(both: Made) -> None:
    engine = both.engine
    engine.store(TOKENS[:16])
    both.set(store_location=DISK)
    engine.store(TOKENS[:48])
    assert engine.lookup(TOKENS) == [Span(0, 16, 1, (CPU, DISK)), Span(16, 48, 2, (DISK,))]
    both.set(store_location=CPU)
    engine.store(TOKENS)
    assert engine.lookup(TOKENS) == [Span(0, 48, 3, (CPU, DISK)), Span(48, 64, 1, (CPU,))]
    assert engine.lookup([]) == []
    assert engine.lookup(range(1, 65)) == []


def test_asking_changes_nothing(both: Made) -> None:
    both.engine.store(TOKENS)
    before = kv_of(both.engine.kv_caches, 64)
    both.engine.clear([CPU])
    both.engine.lookup(TOKENS)
    assert locations(both.engine, TOKENS) == [(0, 64, (DISK,))]  # nothing was promoted
    assert kv_of(both.engine.kv_caches, 64) == before


def test_known_tokens_are_neither_computed_nor_kept_again(made: NewEngine) -> None:
    one = made()
    before = kv_of(one.engine.kv_caches, 32)
    one.engine.store(TOKENS, known=32)
    assert kv_of(one.engine.kv_caches, 32) == before
    assert one.engine.backends.cpu is not None
    assert (one.engine.backends.cpu.chunks, one.engine.hit_tokens(TOKENS)) == (2, 0)
    assert one.count("num_stored_tokens") == 32


def test_clear_tells_the_tokens_of_each_backend(both: Made) -> None:
    engine = both.engine
    engine.store(TOKENS)
    assert engine.clear(["Nope"]) == 0
    assert engine.clear([]) == 0
    assert engine.clear([CPU]) == 64
    assert locations(engine, TOKENS) == [(0, 64, (DISK,))]
    engine.store(OTHERS)
    assert engine.clear(None) == 64 + 64 + 64
    assert (engine.lookup(TOKENS), engine.lookup(OTHERS), both.files()) == ([], [], [])


def test_what_is_found_on_disk_is_kept_in_memory_again(both: Made) -> None:
    both.engine.store(TOKENS)
    both.engine.clear([CPU])
    assert both.engine.retrieve(TOKENS[:32]) == 32
    assert locations(both.engine, TOKENS) == [(0, 32, (CPU, DISK)), (32, 64, (DISK,))]


def test_retrieve_locations_say_where_chunks_are_looked_up(both: Made) -> None:
    both.set(store_location=DISK)
    both.engine.store(TOKENS)
    for only, hit in (([CPU], 0), ([DISK], 64), ([CPU, DISK], 64), ([], 64)):
        both.engine.clear([CPU])
        both.set(retrieve_locations=only)
        assert (both.engine.hit_tokens(TOKENS), both.engine.retrieve(TOKENS)) == (hit, hit), only


@pytest.mark.parametrize(("location", "found"), [(CPU, (CPU,)), (DISK, (DISK,)), (None, (CPU, DISK))])
def test_store_location_is_where_chunks_go(both: Made, location: str | None, found: tuple[str, ...]) -> None:
    both.set(store_location=location)
    both.engine.store(TOKENS)
    assert locations(both.engine, TOKENS) == [(0, 64, found)]
    assert both.count("num_stored_tokens") == 64


def state_of(one: Made) -> Any:
    cpu, files = one.engine.backends.cpu, one.engine.backends.disk
    assert cpu is not None
    assert files is not None
    return [*cpu._chunks], cpu.used_bytes, [*files._files], files.used_bytes, [path.name for path in one.files()]


def test_frozen_nothing_is_stored_moved_or_evicted_and_memory_alone_serves(made: NewEngine, tmp_path: Path) -> None:
    one = made(cpu_chunks=6, disk_chunks=20, local_disk=tmp_path)
    engine = one.engine
    engine.store(OTHERS)
    engine.store(TOKENS)  # two chunks of the others leave memory
    assert not engine.is_frozen()
    engine.freeze(True)
    assert engine.is_frozen()
    before, kv, stored = state_of(one), kv_of(engine.kv_caches, 64), one.count("num_stored_tokens")
    engine.store(range(5000, 5064))
    assert kv_of(engine.kv_caches, 64) == kv
    assert locations(engine, TOKENS) == [(0, 64, (CPU,))]
    assert engine.retrieve(TOKENS[:16]) == 16
    assert (engine.hit_tokens(OTHERS), engine.retrieve(OTHERS)) == (0, 0)
    assert state_of(one) == before
    assert one.count("num_stored_tokens") == stored
    engine.freeze(False)
    assert engine.retrieve(OTHERS) == 64
    engine.store(range(5000, 5064))
    assert engine.hit_tokens(range(5000, 5064)) == 64


def test_a_store_that_goes_on_when_the_engine_is_frozen_ends(made: NewEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made()
    write = one.engine.kv_caches.write

    def freeze_at_the_second(position: int, data: bytes) -> None:
        write(position, data)
        one.engine.freeze(position >= CHUNK)

    monkeypatch.setattr(one.engine.kv_caches, "write", freeze_at_the_second)
    one.engine.store(TOKENS)
    assert one.engine.hit_tokens(TOKENS) <= 2 * CHUNK


def test_hot_cache_off_keeps_nothing_in_memory(both: Made) -> None:
    engine = both.engine
    engine.store(TOKENS)
    assert engine.is_hot_cache_enabled()
    engine.set_hot_cache(False)
    assert not engine.is_hot_cache_enabled()
    assert locations(engine, TOKENS) == [(0, 64, (DISK,))]
    engine.store(OTHERS)
    assert engine.retrieve(TOKENS) == 64
    assert engine.gauges()["local_cpu_hot_cache_count"] == 0
    engine.set_hot_cache(True)
    assert engine.retrieve(OTHERS) == 64
    assert locations(engine, OTHERS) == [(0, 64, (CPU, DISK))]
    engine.backends.close(CPU)
    engine.set_hot_cache(True)
    assert not engine.is_hot_cache_enabled()


def test_local_cpu_off_begins_with_the_hot_cache_off(made: NewEngine) -> None:
    one = made(local_cpu=False)
    one.engine.store(TOKENS)
    assert not one.engine.is_hot_cache_enabled()
    assert one.engine.hit_tokens(TOKENS) == 0


def test_pinned_chunks_stay_until_the_lookup_lets_go(made: NewEngine) -> None:
    one = made(cpu_chunks=4)
    engine = one.engine
    engine.store(TOKENS[:32])
    assert engine.pin(TOKENS, "one") == 32
    assert engine.pin(TOKENS, "two") == 32
    gauges = engine.gauges()
    assert (gauges["pinned_memory_objs_count"], gauges["local_cpu_keys_in_request_count"]) == (2, 4)
    engine.store(OTHERS)
    assert engine.clear(None) == 32  # the others' two
    assert engine.hit_tokens(TOKENS) == 32
    engine.unpin("one")
    engine.unpin("one")
    engine.unpin("never")
    engine.store(OTHERS)
    assert engine.hit_tokens(TOKENS) == 32
    engine.unpin("two")
    assert engine.gauges()["pinned_memory_objs_count"] == 0
    engine.store(OTHERS)
    assert engine.hit_tokens(TOKENS) == 0


def test_a_lookup_that_does_not_let_go_is_made_to(made: NewEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made(cpu_chunks=4, pin_timeout_sec=10)
    engine = one.engine
    engine.store(TOKENS)
    engine.pin(TOKENS, "forgotten")
    now = time.monotonic()
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: now + 9.0)
    assert engine.unpin_expired() == 0
    engine.pin(TOKENS[:16], "young")
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: now + 11.0)
    assert engine.unpin_expired() == 4
    assert (engine.gauges()["pinned_memory_objs_count"], one.count("forced_unpin_count")) == (1, 4)
    one.set(pin_timeout_sec=1)
    assert engine.unpin_expired() == 1
    assert engine.clear(None) == 64


def test_so_many_lookups_may_pin_and_no_more(made: NewEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_PINNING_LOOKUPS", 2)
    engine = made().engine
    engine.store(TOKENS)
    for name in ("a", "b", "c", "a"):
        assert engine.pin(TOKENS[:16], name) == 16
    assert engine.gauges()["local_cpu_keys_in_request_count"] == 2
    engine.unpin("c")
    engine.unpin("a")
    engine.pin(TOKENS, "c")
    assert engine.gauges()["local_cpu_keys_in_request_count"] == 5


def test_a_pin_on_a_memory_that_was_made_again_lets_go_of_nobody_elses(made: NewEngine) -> None:
    engine = made(cpu_chunks=4).engine
    engine.store(TOKENS)
    engine.pin(TOKENS, "old")
    engine.backends.recreate(CPU)
    engine.store(TOKENS)
    engine.pin(TOKENS, "new")
    engine.unpin("old")
    engine.store(OTHERS)
    assert engine.hit_tokens(TOKENS) == 64
    engine.unpin("new")
    engine.store(OTHERS)
    assert engine.hit_tokens(TOKENS) == 0


def test_without_memory_nothing_is_pinned(both: Made) -> None:
    both.engine.store(TOKENS)
    both.engine.backends.close(CPU)
    assert both.engine.pin(TOKENS, "x") == 64
    assert both.engine.gauges()["local_cpu_keys_in_request_count"] == 0


@pytest.fixture
def chunk_folder(made: NewEngine, tmp_path: Path) -> Path:
    """A folder with the four chunks of `TOKENS`, closed."""
    one = make(local_disk=tmp_path / "source", disk_chunks=50)
    one.engine.store(TOKENS)
    one.engine.close()
    return one.folder


def yaml_of(tmp_path: Path, text: str) -> str:
    (tmp_path / "load.yaml").write_text(text)
    return str(tmp_path / "load.yaml")


@pytest.mark.parametrize("form", ["remote_url: fs://host:1{}", "local_disk: {}", "local_disk: file://{}"])
def test_whole_chunk_files_are_loaded_into_memory(
    made: NewEngine, tmp_path: Path, chunk_folder: Path, form: str
) -> None:
    one = made(cpu_chunks=50)
    path = yaml_of(tmp_path, form.format(chunk_folder))
    (chunk_folder / "notes").write_text("x")
    assert one.engine.load_chunks(path, 2, 10) == LoadedChunks(2, 4, [])
    assert one.engine.load_chunks(path, None, 10) == LoadedChunks(4, 4, [])
    assert locations(one.engine, TOKENS) == [(0, 64, (CPU,))]
    assert one.engine.retrieve(TOKENS) == 64
    assert kv_of(one.engine.kv_caches, 64) == computed(one.configuration.settings, TOKENS, 64)


def test_what_is_damaged_or_of_another_key_or_layout_fails(
    made: NewEngine, tmp_path: Path, chunk_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = sorted(chunk_folder.glob("*.kv"))
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    files[1].rename(chunk_folder / f"{key_of(1).hex()}.kv")
    path = yaml_of(tmp_path, f"local_disk: {chunk_folder}")
    one = made(cpu_chunks=50)
    loaded = one.engine.load_chunks(path, None, 10)
    assert loaded == LoadedChunks(2, 4, sorted([files[0].stem, key_of(1).hex()]))
    assert caplog.text.count("is not loaded") == 2
    assert one.engine.load_chunks(path, None, 1) == LoadedChunks(2, 4, loaded.failed_keys[:1])
    assert one.engine.load_chunks(path, None, 0) == LoadedChunks(2, 4, [])
    for other in ({"engine_dtype": "float32"}, {"engine_dtype": "uint8"}, {"engine_heads": 4}, {"engine_layers": 1}):
        another = made(cpu_chunks=50, **other)
        assert another.engine.load_chunks(path, None, 0).loaded == 0, other
        assert another.engine.gauges()["local_cache_usage"] == 0


def test_what_finds_no_room_is_not_loaded(made: NewEngine, tmp_path: Path, chunk_folder: Path) -> None:
    path = yaml_of(tmp_path, f"local_disk: {chunk_folder}")
    full = made(cpu_chunks=2)
    full.engine.store(OTHERS[:32])
    full.engine.pin(OTHERS[:32], "held")
    assert full.engine.load_chunks(path, None, 10).loaded == 0
    off = made(cpu_chunks=50, local_cpu=False)
    assert off.engine.load_chunks(path, None, 10).loaded == 0
    frozen = made(cpu_chunks=50)
    frozen.engine.freeze(True)
    loaded = frozen.engine.load_chunks(path, None, 10)
    assert (loaded.loaded, len(loaded.failed_keys)) == (0, 4)
    frozen.engine.backends.close(CPU)
    frozen.engine.freeze(False)
    assert frozen.engine.load_chunks(path, None, 10).loaded == 0


@pytest.mark.parametrize(
    "text", ["", "chunk_size: 3", "remote_url: redis://x:1/y", "local_disk: 7", "- a", "a: [", "\0"]
)
def test_a_configuration_that_leads_nowhere_is_refused(made: NewEngine, tmp_path: Path, text: str) -> None:
    with pytest.raises(LoadError, match="Invalid configuration file"):
        made().engine.load_chunks(yaml_of(tmp_path, text), None, 10)


def test_a_missing_file_or_folder_is_refused(made: NewEngine, tmp_path: Path) -> None:
    engine = made().engine
    nowhere = yaml_of(tmp_path, f"local_disk: {tmp_path}/none")
    for path in (str(tmp_path / "none.yaml"), str(tmp_path), "a\0b", nowhere):
        with pytest.raises(LoadError, match="Invalid configuration file"):
            engine.load_chunks(path, None, 10)


def test_slots_are_logged_while_they_are_recorded(both: Made, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmcache_api.embedded.engine")
    engine = both.engine
    engine.store(TOKENS)
    assert not engine.records_slots()
    assert caplog.text == ""
    engine.record_slots(True)
    assert engine.records_slots()
    engine.store(range(100))
    engine.retrieve(range(100))
    engine.retrieve(range(7, 9))
    assert [record.getMessage() for record in caplog.records] == [
        "[KVCache Check] worker: Store, tokens=100, slot_mapping: [[0, 63]]",
        "[KVCache Check] worker: Retrieve, tokens=96, slot_mapping: [[0, 63]]",
        "[KVCache Check] worker: Retrieve, tokens=0, slot_mapping: []",
    ]
    engine.record_slots(False)
    engine.store(TOKENS)
    assert len(caplog.records) == 3


def test_gauges_and_counters_tell_what_happened(made: NewEngine, tmp_path: Path) -> None:
    one = made(cpu_chunks=3, disk_chunks=10, local_disk=tmp_path)
    one.engine.store(TOKENS)
    one.engine.lookup(TOKENS)
    one.engine.lookup(OTHERS)
    one.engine.retrieve(range(128))
    gauges = one.engine.gauges()
    assert gauges == {
        "retrieve_hit_rate": 0.5,
        "lookup_hit_rate": 0.5,
        "local_cache_usage": 3 * CHUNK_BYTES,
        "local_storage_usage": 4 * CHUNK_SPACE,
        "active_memory_objs_count": 3,
        "local_cpu_hot_cache_count": 3,
        "pinned_memory_objs_count": 0,
        "pin_monitor_pinned_objects_count": 0,
        "local_cpu_keys_in_request_count": 0,
        "get_blocking_failed_count": 0,
        "put_failed_count": 0,
        "connector_kv_caches_count": 2,
    }
    counted = {
        "num_store_requests": 1, "num_stored_tokens": 64, "num_lookup_requests": 2, "num_lookup_tokens": 128,
        "num_lookup_hits": 64, "lookup_0_hit_requests": 1, "num_retrieve_requests": 1, "num_requested_tokens": 128,
        "num_hit_tokens": 64, "local_cpu_evict_keys_count": 5,
    }  # fmt: skip
    assert {name: one.count(name) for name in counted} == counted
    one.engine.close()
    closed = one.engine.gauges()
    assert (closed["local_cache_usage"], closed["local_storage_usage"]) == (0, 0)


def test_the_budgets_hold_while_more_and_more_is_stored(made: NewEngine, tmp_path: Path) -> None:
    one = made(cpu_chunks=3.5, disk_chunks=5.5, local_disk=tmp_path)
    for first in range(0, 100_000, 5000):
        one.engine.store(range(first, first + 100))
        gauges = one.engine.gauges()
        assert 0 < gauges["local_cache_usage"] <= 3.5 * CHUNK_BYTES
        assert 0 < gauges["local_storage_usage"] <= 5.5 * CHUNK_SPACE
        assert sum(os.stat(path).st_blocks * 512 for path in one.files()) <= 5.5 * CHUNK_SPACE


def test_without_any_room_nothing_is_kept_and_all_goes_on(made: NewEngine) -> None:
    one = made(cpu_chunks=0)
    one.engine.store(TOKENS)
    assert (one.engine.hit_tokens(TOKENS), one.engine.retrieve(TOKENS)) == (0, 0)
    assert one.count("local_cpu_evict_failed_count") == 4


def test_an_engine_that_cannot_be_made_holds_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        make(engine_blocks=1, engine_block_size=1, local_disk=tmp_path, disk_chunks=5)
    make(local_disk=tmp_path, disk_chunks=5).engine.close()
    LocalDiskBackend(tmp_path / "worker", 1, 1).close()


def test_in_parallel_the_budgets_hold_and_what_is_left_is_right(made: NewEngine, tmp_path: Path) -> None:
    one = made(cpu_chunks=20, disk_chunks=30, local_disk=tmp_path)

    def churn(seed: int) -> None:
        for turn in range(100):
            first = (turn * 7 + seed * 3) % 20 * 1000
            one.engine.store(range(first, first + 64))
            assert one.engine.retrieve(range(first, first + 64)) in range(0, 65, CHUNK)
            if turn == 20:
                one.engine.clear([CPU] if seed % 2 else None)
            gauges = one.engine.gauges()
            assert 0 <= gauges["local_cache_usage"] <= 20 * CHUNK_BYTES
            assert 0 <= gauges["local_storage_usage"] <= 30 * CHUNK_SPACE

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(churn, seed) for seed in range(4)]:
            each.result()
    hits = 0
    for first in range(0, 20_000, 1000):
        tokens = range(first, first + 64)
        hits += (hit := one.engine.retrieve(tokens))
        assert kv_of(one.engine.kv_caches, hit) == computed(one.configuration.settings, tokens, hit)
    assert hits > 0


def test_settings_in_chunks_are_what_they_say() -> None:
    made_of = settings_of(cpu_chunks=3, disk_chunks=2)
    assert (made_of.max_local_cpu_size, made_of.max_local_disk_size) == (gib(3072), gib(8192))


def test_once_frozen_nothing_is_admitted_however_far_a_store_is(both: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freezing is a barrier: what was being written to disk then is not kept either."""
    files = both.engine.backends.disk
    assert files is not None
    write = files._write

    def write_and_freeze(key: bytes, data: bytes) -> bool:
        done = write(key, data)
        both.engine.freeze(True)
        return done

    monkeypatch.setattr(files, "_write", write_and_freeze)
    both.engine.store(TOKENS)
    assert (files.chunks, files.used_bytes) == (0, 0)
    assert both.files() == []
    cpu = both.engine.backends.cpu
    assert cpu is not None
    kept = cpu.chunks
    assert not cpu.put(b"k" * 16, b"x" * 64)
    both.engine.freeze(False)
    assert cpu.put(b"k" * 16, b"x" * 64)
    assert cpu.chunks == kept + 1


def test_a_file_that_cannot_be_removed_keeps_its_space(both: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    both.engine.store(TOKENS)
    files = both.engine.backends.disk
    assert files is not None
    before = files.used_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", _refuse)
        assert both.engine.clear([DISK]) == 0
    assert (files.used_bytes, len(both.files())) == (before, files.chunks)
    assert both.engine.clear([DISK]) == 64
    assert (files.used_bytes, both.files()) == (0, [])


def _refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")
