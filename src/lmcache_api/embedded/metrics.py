"""The embedded component's metrics: LMCache's family names, this component's values, a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics import MetricWrapperBase

from lmcache_api.component import Level, PeriodicThreadStatus

_LEVELS: tuple[Level, ...] = ("critical", "high", "medium", "low")


class EmbeddedMetrics:
    """A registry that only this component writes to; `registry` is open to what an endpoint wants to count."""

    def __init__(
        self,
        labels: Mapping[str, str],
        threads: Callable[[], Sequence[PeriodicThreadStatus]],
        is_healthy: Callable[[], bool],
    ) -> None:
        self.registry = CollectorRegistry()
        GCCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        ProcessCollector(registry=self.registry)
        self.registry.register(_ComponentCollector(labels, threads, is_healthy))

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def reset(self) -> None:
        """Counters and histograms of the registry back to zero, with the label sets that they have seen."""
        for metric in list(self.registry._collector_to_names):
            if isinstance(metric, Counter | Histogram):
                _reset(metric)


def _reset(metric: MetricWrapperBase) -> None:
    """prometheus_client resets a counter but no histogram; `_metric_init` is how both begin."""
    parts: list[Any] = [metric]
    if metric._labelnames and not metric._labelvalues:
        with metric._lock:
            parts = list(metric._metrics.values())
    for part in parts:
        part._metric_init()


class _ComponentCollector:
    """Reads the component at each scrape: nothing is kept between two."""

    def __init__(
        self,
        labels: Mapping[str, str],
        threads: Callable[[], Sequence[PeriodicThreadStatus]],
        is_healthy: Callable[[], bool],
    ) -> None:
        self._names = list(labels)
        self._values = list(labels.values())
        self._threads = threads
        self._is_healthy = is_healthy

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("lmcache_is_healthy", "Whether every important thread is active", self._is_healthy())
        threads = self._threads()
        yield from self._thread_gauges("periodic_threads_{}_count", "periodic threads", threads)
        for level in _LEVELS:
            of_level = [thread for thread in threads if thread["level"] == level]
            yield from self._thread_gauges(f"periodic_threads_{level}_{{}}", f"{level} periodic threads", of_level)

    def _thread_gauges(self, name: str, what: str, threads: Sequence[PeriodicThreadStatus]) -> Iterator[Metric]:
        yield self._gauge(name.format("total"), f"Number of {what}", len(threads))
        running = sum(thread["is_running"] for thread in threads)
        yield self._gauge(name.format("running"), f"Number of {what} that run", running)
        active = sum(thread["is_active"] for thread in threads)
        yield self._gauge(name.format("active"), f"Number of {what} that ran of late", active)

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"lmcache:{name}", help, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering does not read a component that is still being made."""
        return iter(())
