"""The main series, each defined once: what it is, from which families a node's value comes, how a cluster's is made.

A series reads every one of its families that a node has: a worker has LMCache's engine families, a multiprocess server
its own. Where a node tells one family several times, for several workers, they are added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["rate", "gauge", "ratio", "quantile"]
Total = Literal["sum", "ratio", "merged"]
Thinned = Literal["mean", "max", "ratio"]

RETRIEVE = "lmcache:time_to_retrieve"
STORE = "lmcache:time_to_store"
HISTOGRAMS = (RETRIEVE, STORE)

STARTED = "process_start_time_seconds"
"""Another one: the process is another one, and all that it counts began anew."""


@dataclass(frozen=True)
class Series:
    """One value of a node, or of the cluster, over time.

    Attributes:
        kind: `rate` is counted per second between two answers of a node, `gauge` is as it is told, `ratio` is that of
            two other series, `quantile` is of what was observed between two answers.
        families: counters, gauges, or the one histogram.
        total: how the cluster's value comes from the nodes': their sum, the ratio of the sums, the quantile of what
            all observed.
        thinned: how one point comes from several, where there are more than asked for.
        of: of a ratio, the two series; numerator first.
        quantile: which one.
        is_of_cluster: nodes have none.
    """

    key: str
    title: str
    unit: str
    kind: Kind
    families: tuple[str, ...] = ()
    of: tuple[str, str] | None = None
    quantile: float = 0.0
    is_of_cluster: bool = False

    @property
    def total(self) -> Total:
        return "ratio" if self.kind == "ratio" else "merged" if self.kind == "quantile" else "sum"

    @property
    def thinned(self) -> Thinned:
        return "ratio" if self.kind == "ratio" else "max" if self.kind == "quantile" else "mean"


def _quantiles(key: str, title: str, histogram: str) -> list[Series]:
    return [
        Series(f"{key}_p{share}", f"{title}, p{share}", "s", "quantile", (histogram,), quantile=share / 100)
        for share in (50, 95, 99)
    ]


def _all() -> list[Series]:
    return [
        Series(
            "requested_tokens",
            "Requested tokens",
            "tokens/s",
            "rate",
            ("lmcache:num_requested_tokens_total", "lmcache_mp_lookup_requested_tokens_total"),
        ),
        Series(
            "hit_tokens",
            "Hit tokens",
            "tokens/s",
            "rate",
            ("lmcache:num_hit_tokens_total", "lmcache_mp_lookup_hit_tokens_total"),
        ),
        Series("hit_rate", "Hit rate", "share", "ratio", of=("hit_tokens", "requested_tokens")),
        Series("stored_tokens", "Stored tokens", "tokens/s", "rate", ("lmcache:num_stored_tokens_total",)),
        Series(
            "lookup_tokens",
            "Looked up tokens",
            "tokens/s",
            "rate",
            ("lmcache:num_lookup_tokens_total", "lmcache_mp_lookup_requested_tokens_total"),
        ),
        Series(
            "lookup_hit_tokens",
            "Found tokens",
            "tokens/s",
            "rate",
            ("lmcache:num_lookup_hits_total", "lmcache_mp_lookup_hit_tokens_total"),
        ),
        Series("lookup_hit_rate", "Lookup hit rate", "share", "ratio", of=("lookup_hit_tokens", "lookup_tokens")),
        *_quantiles("retrieve", "Time to retrieve", RETRIEVE),
        *_quantiles("store", "Time to store", STORE),
        Series(
            "cpu_bytes",
            "In memory",
            "bytes",
            "gauge",
            ("lmcache:local_cache_usage", "lmcache_mp_l1_memory_usage_bytes"),
        ),
        Series("disk_bytes", "On local disk", "bytes", "gauge", ("lmcache:local_storage_usage",)),
        Series("remote_bytes", "Remote", "bytes", "gauge", ("lmcache:remote_cache_usage", "lmcache_mp_l2_usage_bytes")),
        Series(
            "evictions",
            "Evictions",
            "chunks/s",
            "rate",
            ("lmcache:local_cpu_evict_keys_count_total", "lmcache_mp_l1_evicted_chunks_total"),
        ),
        Series(
            "retrieves",
            "Retrieves",
            "requests/s",
            "rate",
            ("lmcache:num_retrieve_requests_total", "lmcache_mp_num_finished_retrieves_total"),
        ),
        Series(
            "stores",
            "Stores",
            "requests/s",
            "rate",
            ("lmcache:num_store_requests_total", "lmcache_mp_num_finished_stores_total"),
        ),
        Series(
            "lookups",
            "Lookups",
            "requests/s",
            "rate",
            ("lmcache:num_lookup_requests_total", "lmcache_mp_lookups_requests_total"),
        ),
        Series("load", "Load", "s/s", "rate", (f"{RETRIEVE}_sum", f"{STORE}_sum")),
        Series(
            "failures",
            "Failures",
            "1/s",
            "rate",
            (
                "lmcache:get_blocking_failed_count",
                "lmcache:put_failed_count",
                "lmcache:local_cpu_evict_failed_count_total",
                "lmcache_mp_l1_allocation_failure_total",
                "lmcache_mp_l1_read_failure_total",
            ),
        ),
        Series(
            "unfinished", "Unfinished requests", "requests", "gauge", ("lmcache:scheduler_unfinished_requests_count",)
        ),
        Series(
            "controller_keys",
            "Keys at the controller",
            "keys",
            "gauge",
            ("lmcache:cache_controller_kv_pool_keys_count",),
        ),
        Series(
            "controller_workers",
            "Workers at the controller",
            "workers",
            "gauge",
            ("lmcache:cache_controller_registered_workers_count",),
        ),
        *(
            Series(f"nodes_{state}", f"Nodes {state}", "nodes", "gauge", is_of_cluster=True)
            for state in ("up", "slow", "down", "unknown", "recorded")
        ),
    ]


SERIES: Mapping[str, Series] = {series.key: series for series in _all()}
"""In the order in which they are shown."""

OF_NODES: tuple[Series, ...] = tuple(series for series in SERIES.values() if not series.is_of_cluster)

KEPT: tuple[Series, ...] = tuple(series for series in OF_NODES if series.kind != "ratio")
"""Those of a node that a ring holds; a ratio is worked out of two of them."""

KEPT_OF_CLUSTER: tuple[Series, ...] = (*KEPT, *(series for series in SERIES.values() if series.is_of_cluster))

SCALARS: tuple[str, ...] = tuple(
    dict.fromkeys(family for series in KEPT if series.kind != "quantile" for family in series.families)
)
"""Every counter and gauge that a series needs."""
