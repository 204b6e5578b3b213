"""The embedded component's metrics: LMCache's family names and labels, this component's values, its own registry.

Families of things that the embedded engine has not (a remote backend, P2P) are there and stay at zero, as they do in
a LMCache that is not configured for them: dashboards and alerts find what they ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.metrics import MetricWrapperBase

from lmcache_api.component import Level, PeriodicThreadStatus
from lmcache_api.exposition import Exposition

PREFIX = "lmcache:"

_LEVELS: tuple[Level, ...] = ("critical", "high", "medium", "low")

_COUNTERS: Mapping[str, str] = {
    "num_retrieve_requests": "Total number of retrieve requests sent to lmcache",
    "num_store_requests": "Total number of store requests sent to lmcache",
    "num_lookup_requests": "Total number of lookup requests sent to lmcache",
    "num_requested_tokens": "Total number of tokens requested from lmcache",
    "num_hit_tokens": "Total number of tokens hit in lmcache",
    "num_stored_tokens": "Total number of tokens stored in lmcache including evicted ones",
    "num_lookup_tokens": "Total number of tokens requested in lookup from lmcache",
    "num_lookup_hits": "Total number of tokens hit in lookup from lmcache",
    "num_vllm_hit_tokens": "Number of hit tokens in vllm",
    "num_prompt_tokens": "Number of prompt tokens in lmcache",
    "num_remote_read_requests": "Total number of requests read from remote backends in lmcache",
    "num_remote_read_bytes": "Total number of bytes read from remote backends in lmcache",
    "num_remote_write_requests": "Total number of requests write to remote backends in lmcache",
    "num_remote_write_bytes": "Total number of bytes write to remote backends in lmcache",
    "local_cpu_evict_count": "Total number of evict in local cpu backend",
    "local_cpu_evict_keys_count": "Total number of evict keys in local cpu backend",
    "local_cpu_evict_failed_count": "Total number of failed eviction in local cpu backend",
    "forced_unpin_count": "Total number of forced unpin due to timeout",
    "lookup_0_hit_requests": "Total number of 0 hit lookup requests",
    "num_slow_retrieval_by_time": "Total number of slow retrievals by time threshold",
    "num_slow_retrieval_by_speed": "Total number of slow retrievals by speed threshold",
    "remote_ping_errors": "Number of ping errors to remote backends",
    "remote_ping_successes": "Number of ping successes to remote backends",
}

_GAUGES: Mapping[str, str] = {
    "retrieve_hit_rate": "Share of requested tokens that were hit in retrieve requests",
    "lookup_hit_rate": "Share of tokens that were hit in lookup requests",
    "local_cache_usage": "Local cache usage (bytes) of lmcache",
    "remote_cache_usage": "Remote cache usage (bytes) of lmcache",
    "local_storage_usage": "Local storage usage (bytes) of lmcache",
    "active_memory_objs_count": "The number of active memory objects",
    "pinned_memory_objs_count": "The number of pinned memory objects",
    "remote_ping_latency": "Latest ping latency to remote backends (milliseconds)",
    "remote_ping_error_code": "Latest ping error code to remote backends",
    "local_cpu_hot_cache_count": "The number of chunks in the hot cache",
    "local_cpu_keys_in_request_count": "The number of keys that requests hold in the local cpu backend",
    "kv_msg_queue_size": "The number of messages to the controller that wait",
    "remote_put_task_num": "The number of remote put tasks",
    "pin_monitor_pinned_objects_count": "The number of objects that the pin monitor watches",
    "lmcache_is_healthy": "Whether every important thread is active",
    "get_blocking_failed_count": "The number of chunks that could not be read",
    "put_failed_count": "The number of chunks that could not be written",
    "storage_events_ongoing_count": "The number of storage events that go on",
    "storage_events_done_count": "The number of storage events that are done",
    "storage_events_not_found_count": "The number of storage events that were not found",
    "chunk_statistics_enabled": "Whether chunk statistics are counted",
    "chunk_statistics_total_requests": "The number of requests in the chunk statistics",
    "chunk_statistics_total_chunks": "The number of chunks in the chunk statistics",
    "chunk_statistics_unique_chunks": "The number of different chunks in the chunk statistics",
    "chunk_statistics_reuse_rate": "Share of chunks that were seen before",
    "chunk_statistics_bloom_filter_size_mb": "Size of the Bloom filter of the chunk statistics (MiB)",
    "chunk_statistics_bloom_filter_fill_rate": "Share of its bits that are set",
    "chunk_statistics_file_count": "The number of files of the chunk statistics",
    "chunk_statistics_current_file_size": "Size of the current file of the chunk statistics (bytes)",
    "scheduler_unfinished_requests_count": "The number of unfinished requests in the scheduler",
    "connector_load_specs_count": "The number of load specs in the connector",
    "connector_request_trackers_count": "The number of request trackers in the connector",
    "connector_kv_caches_count": "The number of layers of the KV cache",
    "connector_layerwise_retrievers_count": "The number of layerwise retrievers in the connector",
    "connector_invalid_block_ids_count": "The number of invalid block ids in the connector",
    "connector_requests_priority_count": "The number of requests with a priority in the connector",
    "periodic_threads_total_count": "Number of periodic threads",
    "periodic_threads_running_count": "Number of periodic threads that run",
    "periodic_threads_active_count": "Number of periodic threads that ran of late",
    **{
        f"periodic_threads_{level}_{state}": f"Number of {level} periodic threads{which}"
        for level in _LEVELS
        for state, which in (("total", ""), ("running", " that run"), ("active", " that ran of late"))
    },
}

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_FINE_SECONDS = tuple(0.00001 * 2**power for power in range(20))
_TOKENS_A_SECOND = (1, 8, 16, *(2**power for power in range(5, 17)))
_MINUTES = (1, 5, 10, 20, 40, 60, 80, 100, 250, 500, 750, 1000, 2500, 5000, 7500, 10000)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

_HISTOGRAMS: Mapping[str, tuple[str, Sequence[float]]] = {
    "time_to_retrieve": ("Time to retrieve from lmcache (seconds)", _SECONDS),
    "time_to_store": ("Time to store to lmcache (seconds)", _SECONDS),
    "time_to_lookup": ("Time to lookup in lmcache (seconds)", _FINE_SECONDS),
    "retrieve_process_tokens_time": ("Time to process tokens in retrieve (seconds)", _FINE_SECONDS),
    "retrieve_broadcast_time": ("Time to broadcast memory objects in retrieve (seconds)", _FINE_SECONDS),
    "retrieve_to_gpu_time": ("Time to move data to GPU in retrieve (seconds)", _FINE_SECONDS),
    "remote_backend_batched_get_blocking_time": ("Time to get data from remote backend (seconds)", _FINE_SECONDS),
    "instrumented_connector_batched_get_time": ("Time used by the connector (seconds)", _FINE_SECONDS),
    "store_process_tokens_time": ("Time to process tokens in store (seconds)", _FINE_SECONDS),
    "store_from_gpu_time": ("Time to move data from GPU in store (seconds)", _FINE_SECONDS),
    "store_put_time": ("Time to put data to storage in store (seconds)", _FINE_SECONDS),
    "retrieve_speed": ("Retrieve speed of lmcache (tokens per second)", _TOKENS_A_SECOND),
    "store_speed": ("Store speed of lmcache (tokens per second)", _TOKENS_A_SECOND),
    "p2p_time_to_transfer": ("Time to transfer to a peer (seconds)", _SECONDS),
    "p2p_transfer_speed": ("Transfer speed to a peer (tokens per second)", _TOKENS_A_SECOND),
    "remote_time_to_get": ("Time to get from remote backends (milliseconds)", _MINUTES),
    "remote_time_to_put": ("Time to put to remote backends (milliseconds)", _MINUTES),
    "remote_time_to_get_sync": ("Time to get from remote backends synchronously (milliseconds)", _MINUTES),
    "request_cache_hit_rate": ("Share of a request's tokens that a lookup found", _SHARES),
    "request_cache_lifespan": ("Time that a chunk was kept (minutes)", _MINUTES),
}


@dataclass(frozen=True)
class Families:
    """The families of a kind of component: each one's help by its name, of histograms the bounds too."""

    counters: Mapping[str, str]
    gauges: Mapping[str, str]
    histograms: Mapping[str, tuple[str, Sequence[float]]]


ENGINE_FAMILIES = Families(_COUNTERS, _GAUGES, _HISTOGRAMS)
CONTROLLER_FAMILIES = Families(
    {},
    {
        "cache_controller_kv_pool_keys_count": "Number of keys that the registered workers hold",
        "cache_controller_registered_workers_count": "Number of registered workers",
        **{name: text for name, text in _GAUGES.items() if name.startswith(("periodic_threads_", "lmcache_is_"))},
    },
    {},
)


class EmbeddedMetrics:
    """A registry that only this component writes to; `registry` is open to what an endpoint wants to count."""

    def __init__(self, labels: Mapping[str, str], families: Families = ENGINE_FAMILIES) -> None:
        self.registry = CollectorRegistry()
        GCCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        ProcessCollector(registry=self.registry)
        names = list(labels)
        make: Mapping[str, Any] = {"labelnames": names, "registry": self.registry}
        self._counters = {
            n: Counter(PREFIX + n, text, **make).labels(**labels) for n, text in families.counters.items()
        }
        self._gauges = {n: Gauge(PREFIX + n, text, **make).labels(**labels) for n, text in families.gauges.items()}
        self._histograms = {
            name: Histogram(PREFIX + name, text, buckets=bounds, **make).labels(**labels)
            for name, (text, bounds) in families.histograms.items()
        }
        self._exposition = Exposition(self.registry)
        self._refreshers: list[Callable[[], Mapping[str, float]]] = []

    def refresh_with(self, gauges: Callable[[], Mapping[str, float]]) -> None:
        """Before each scrape set the gauges that `gauges()` names."""
        self._refreshers.append(gauges)

    def add(self, counter: str, amount: float = 1) -> None:
        self._counters[counter].inc(amount)

    def observe(self, histogram: str, value: float) -> None:
        self._histograms[histogram].observe(value)

    def exposition(self) -> bytes:
        for refresher in self._refreshers:
            for name, value in refresher().items():
                self._gauges[name].set(value)
        return self._exposition.render()

    def share(self, part: str, whole: str) -> float:
        """One counter as a share of another."""
        total = self._counters[whole]._value.get()
        return self._counters[part]._value.get() / total if total else 0.0

    def reset(self) -> None:
        """Counters and histograms of the registry back to zero, with the label sets that they have seen."""
        for metric in list(self.registry._collector_to_names):
            if isinstance(metric, Counter | Histogram):
                _reset(metric)


def of_threads(threads: Sequence[PeriodicThreadStatus]) -> dict[str, float]:
    """The gauges of the periodic threads."""
    gauges: dict[str, float] = {}
    for level in (None, *_LEVELS):
        counted = [thread for thread in threads if level is None or thread["level"] == level]
        name = "periodic_threads_{}_count" if level is None else f"periodic_threads_{level}_{{}}"
        gauges[name.format("total")] = len(counted)
        gauges[name.format("running")] = sum(thread["is_running"] for thread in counted)
        gauges[name.format("active")] = sum(thread["is_active"] for thread in counted)
    return gauges


def _reset(metric: MetricWrapperBase) -> None:
    """prometheus_client resets a counter but no histogram; `_metric_init` is how both begin."""
    parts: list[Any] = [metric]
    if metric._labelnames and not metric._labelvalues:
        with metric._lock:
            parts = list(metric._metrics.values())
    for part in parts:
        part._metric_init()
