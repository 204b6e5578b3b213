from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from lmcache_api.embedded.metrics import EmbeddedMetrics, of_threads
from lmcache_api.embedded.statistics import NO_STATISTICS
from tests.api.embedded.making import CHUNK, CHUNK_BYTES, Made

LABELS = {"model_name": "m", "worker_id": "3"}


def samples(metrics: EmbeddedMetrics) -> dict[str, float]:
    families = list(text_string_to_metric_families(metrics.exposition().decode()))
    found = [sample for family in families for sample in family.samples if sample.name.startswith("lmcache:")]
    assert all(LABELS["model_name"] == sample.labels["model_name"] for sample in found)
    return {sample.name.removeprefix("lmcache:"): sample.value for sample in found if "le" not in sample.labels}


def test_families_begin_at_zero_with_their_labels() -> None:
    metrics = EmbeddedMetrics(LABELS)
    found = {name: value for name, value in samples(metrics).items() if not name.endswith("_created")}
    assert set(found.values()) == {0.0}
    assert len(found) > 100
    assert b'lmcache:num_remote_read_requests_total{model_name="m",worker_id="3"} 0.0' in metrics.exposition()


def test_counters_histograms_and_refreshed_gauges() -> None:
    metrics = EmbeddedMetrics(LABELS)
    present = {"local_cache_usage": 5.0}
    metrics.refresh_with(lambda: present)
    metrics.refresh_with(lambda: {"pinned_memory_objs_count": 2})
    metrics.add("num_store_requests")
    metrics.add("num_stored_tokens", 32)
    metrics.observe("time_to_store", 0.25)
    found = samples(metrics)
    assert (found["num_store_requests_total"], found["num_stored_tokens_total"]) == (1, 32)
    assert (found["time_to_store_count"], found["time_to_store_sum"]) == (1, 0.25)
    assert (found["local_cache_usage"], found["pinned_memory_objs_count"]) == (5, 2)
    present["local_cache_usage"] = 6.0
    metrics.reset()
    found = samples(metrics)
    assert found["num_stored_tokens_total"] == found["time_to_store_count"] == found["time_to_store_sum"] == 0
    assert (found["local_cache_usage"], found["pinned_memory_objs_count"]) == (6, 2)
    metrics.add("num_stored_tokens", 3)
    assert samples(metrics)["num_stored_tokens_total"] == 3  # the counter goes on after a reset


def test_two_components_never_count_for_each_other() -> None:
    one, other = EmbeddedMetrics(LABELS), EmbeddedMetrics(LABELS)
    one.add("num_store_requests")
    assert samples(other)["num_store_requests_total"] == 0


def test_a_share_of_nothing_is_zero() -> None:
    metrics = EmbeddedMetrics(LABELS)
    assert metrics.share("num_hit_tokens", "num_requested_tokens") == 0
    metrics.add("num_requested_tokens", 8)
    metrics.add("num_hit_tokens", 2)
    assert metrics.share("num_hit_tokens", "num_requested_tokens") == 0.25
    metrics.reset()
    assert metrics.share("num_hit_tokens", "num_requested_tokens") == 0


def test_every_name_that_an_engine_uses_is_a_family(made: Callable[..., Made], tmp_path: Path) -> None:
    one = made(cpu_chunks=2, disk_chunks=9, local_disk=tmp_path)
    one.metrics.refresh_with(one.engine.gauges)
    one.metrics.refresh_with(lambda: NO_STATISTICS)
    one.metrics.refresh_with(lambda: of_threads([]))
    one.engine.store(range(4 * CHUNK))
    one.engine.retrieve(range(5 * CHUNK))
    one.engine.lookup(range(4 * CHUNK))
    found = samples(one.metrics)
    assert found["local_cache_usage"] == 2 * CHUNK_BYTES
    assert (found["retrieve_hit_rate"], found["lookup_hit_rate"]) == (0.8, 1.0)
    seen = {
        "time_to_store", "store_process_tokens_time", "store_from_gpu_time", "store_put_time", "store_speed",
        "time_to_retrieve", "retrieve_process_tokens_time", "retrieve_to_gpu_time", "retrieve_speed",
        "time_to_lookup", "request_cache_hit_rate",
    }  # fmt: skip
    assert {name.removesuffix("_count") for name, value in found.items() if name.endswith("_count") and value} >= seen
    assert {name: found[f"{name}_count"] for name in seen} == dict.fromkeys(seen, 1)
