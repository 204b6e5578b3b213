"""The frontend's own metrics: what goes through its proxy, how its scrapes go, which nodes there are.

All are `lmcache_frontend_*` and belong to one application. `docs/metrics.md` tells of each, and is held against
`FAMILIES` by the tests.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import TracebackType
from typing import NamedTuple

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric

from lmcache_frontend.nodes.node import LOCAL_PROXY, Proxy
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.proxy.answering import Traffic
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_frontend.telemetry.metrics.scrape import OURS, Outcome, Wanted
from lmcache_shared.address import Address
from lmcache_shared.errors import Refusal
from lmcache_shared.version import VERSION

PREFIX = OURS.decode()

REQUEST_SECONDS_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

CALLER_LEFT = 499
"""The status, of nginx' invention, under which a request counts whose caller went before its answer came."""

MAX_PREFIX_SEGMENTS = 32
"""Of a path, what is looked at for a node behind other frontends."""

_CLASSES = ("0xx", "1xx", "2xx", "3xx", "4xx", "5xx")

_REASONS = {403: "forbidden", 502: "unreachable", 504: "late"}


class Family(NamedTuple):
    """A family as the exposition and `docs/metrics.md` tell of it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


FAMILIES: Mapping[str, Family] = {
    family.name.removeprefix(PREFIX): family
    for family in (
        Family(
            f"{PREFIX}scrape_success",
            "gauge",
            ("node", "proxy", "instance"),
            "Whether the node's metrics are part of this answer; the log says why not.",
        ),
        Family(
            f"{PREFIX}scrape_seconds",
            "gauge",
            ("node", "proxy", "instance"),
            "How long the node took to answer.",
        ),
        Family(
            f"{PREFIX}scrape_samples",
            "gauge",
            ("node", "proxy", "instance"),
            "Samples in the node's answer.",
        ),
        Family(
            f"{PREFIX}scrape_bytes",
            "gauge",
            ("node", "proxy", "instance"),
            "The length of the node's answer, uncompressed.",
        ),
        Family(
            f"{PREFIX}type_conflicts",
            "gauge",
            (),
            "Families that nodes send with different types; the rarer one is told under another name.",
        ),
        Family(f"{PREFIX}nodes", "gauge", ("state",), "Nodes by their state."),
        Family(f"{PREFIX}build_info", "gauge", ("version", "python"), "The frontend's version, and its Python's."),
        Family(
            f"{PREFIX}proxy_requests_total",
            "counter",
            ("node", "proxy", "code"),
            "Proxied requests by the class of their status. What is no registered node or proxy is the node 'other'.",
        ),
        Family(
            f"{PREFIX}proxy_request_seconds",
            "histogram",
            ("kind",),
            "From a proxied request to the end of its answer, by kind: node, proxy or other.",
        ),
        Family(
            f"{PREFIX}proxy_bytes_total",
            "counter",
            ("node", "proxy", "direction"),
            "Bytes of bodies that were sent to a target, and received from it.",
        ),
        Family(
            f"{PREFIX}proxy_errors_total",
            "counter",
            ("node", "proxy", "reason"),
            "Proxied requests that failed here: forbidden, unreachable, late, broken_off, caller_left, failed.",
        ),
    )
}


class TargetLabels(NamedTuple):
    """Whom a proxied request is for."""

    node: str
    proxy: str

    @property
    def kind(self) -> str:
        """`node`, `proxy` or `other`."""
        return "other" if self == OTHER else "node" if self.node else "proxy"


OTHER = TargetLabels("other", "")


class Watched:
    """A proxied request while it is counted; not a generator with a decorator, which costs as much as the counting."""

    def __init__(self, ended: Callable[[Watched, str | None], None], target: TargetLabels) -> None:
        self.traffic = Traffic()
        self.status = 500
        self.target = target
        self.began = time.perf_counter()
        self._ended = ended

    def answered(self, response: web.StreamResponse) -> web.StreamResponse:
        self.status = response.status
        return response

    def __enter__(self) -> Watched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        error: str | None = "failed"
        if raised is None:
            error = "broken_off" if self.traffic.broke_off else None
        elif isinstance(raised, Refusal):
            self.status = raised.status
            error = _REASONS.get(raised.status, "failed")
        elif isinstance(raised, asyncio.CancelledError):
            self.status = CALLER_LEFT
            error = "caller_left"
        self._ended(self, error)


class _Targets:
    """Whom an address and a path mean: the registered node or proxy that has them, or `OTHER`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.revision = -1
        """The registry's, of which this is the index."""
        self.known: Set[TargetLabels] = frozenset()
        """All that are registered, and `OTHER`."""
        self._found: dict[Address, dict[str, TargetLabels]] = {}

    def refresh(self) -> bool:
        """Whether the registry has changed since the last time."""
        if self._registry.revision == self.revision:
            return False
        proxies = list(self._registry.proxies())
        self.revision = self._registry.revision
        self._index(proxies)
        return True

    def labels(self, address: Address, path: str) -> TargetLabels:
        by_prefix = self._found.get(address, {})
        rest = path.partition("?")[0]
        segments = rest.split("/", MAX_PREFIX_SEGMENTS + 1)[: MAX_PREFIX_SEGMENTS + 1]
        for count in range(len(segments) if any(by_prefix) else 1, 0, -1):
            found = by_prefix.get("/".join(segments[:count]))
            if found is not None:
                return found
        return OTHER

    def _index(self, proxies: Sequence[Proxy]) -> None:
        self._found = {}
        for proxy in proxies:
            for node in proxy.nodes:
                by_prefix = self._found.setdefault(node.reach.address, {})
                by_prefix.setdefault(node.reach.prefix, TargetLabels(node.name, proxy.name))
        for proxy in proxies:
            if proxy.name != LOCAL_PROXY:
                self._found.setdefault(proxy.address, {}).setdefault("", TargetLabels("", proxy.name))
        of_nodes = (TargetLabels(node.name, proxy.name) for proxy in proxies for node in proxy.nodes)
        self.known = {OTHER, *of_nodes, *(TargetLabels("", proxy.name) for proxy in proxies)}


class OwnMetrics:
    """What one frontend counts.

    Args:
        registry: whose nodes and proxies may be told by their names; series of others are dropped.
        health: asked whenever metrics are read.
    """

    def __init__(self, registry: Registry, health: HealthBoard) -> None:
        self._targets = _Targets(registry)
        self._health = health
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(namespace=PREFIX.rstrip("_"), registry=self._registry)
        self._requests = self._counter("proxy_requests_total")
        self._bytes = self._counter("proxy_bytes_total")
        self._errors = self._counter("proxy_errors_total")
        name, _, labels, text = FAMILIES["proxy_request_seconds"]
        self._series: dict[TargetLabels, dict[tuple[Counter, str], Counter]] = {}
        """A target's series, by their counters and last labels: to look one up costs more than to count."""
        self._seconds = Histogram(name, text, labels, buckets=REQUEST_SECONDS_BUCKETS, registry=self._registry)
        self._seconds_of: dict[str, Histogram] = {}

    def _counter(self, short: str) -> Counter:
        name, _, labels, text = FAMILIES[short]
        return Counter(name, text, labels, registry=self._registry)

    def watching(self, address: Address, path: str) -> Watched:
        """Count a proxied request to `path` at `address`, however it ends: `with` it."""
        self._forget_the_gone()
        return Watched(self._ended, self._targets.labels(address, path))

    def target_of(self, address: Address, path: str) -> TargetLabels:
        """Whom a proxied request to `path` at `address` is for."""
        self._forget_the_gone()
        return self._targets.labels(address, path)

    def _ended(self, watched: Watched, error: str | None) -> None:
        target = watched.target
        self._count(self._requests, target, _CLASSES[watched.status // 100])
        self._observe(target.kind, time.perf_counter() - watched.began)
        if watched.traffic.sent:
            self._count(self._bytes, target, "sent", watched.traffic.sent)
        if watched.traffic.received:
            self._count(self._bytes, target, "received", watched.traffic.received)
        if error is not None:
            self._count(self._errors, target, error)

    def describe(self, wanted: Wanted, outcomes: Sequence[Outcome], conflicts: int) -> Callable[[], bytes]:
        """Writes the frontend's part of a round's exposition; where nodes were chosen, that of their scrapes alone.

        A job that asks for a few nodes and one that asks for others would tell everything else twice. What is not this
        object's own is read now, so that a thread may write.
        """
        if not wanted.tells_own:
            return lambda: b"".join(_of_scrapes(outcomes))
        build = {"version": VERSION, "python": platform.python_version()}
        families = [
            _family("type_conflicts", [({}, conflicts)]),
            _family("nodes", [({"state": state}, count) for state, count in self._health.counts().items()]),
            _family("build_info", [(build, 1)]),
        ]
        self._forget_the_gone()

        def write() -> bytes:
            counted = generate_latest(_WithoutCreated(self._registry))
            return b"".join([*_of_scrapes(outcomes), "".join(families).encode(), counted])

        return write

    def _count(self, counter: Counter, target: TargetLabels, last: str, amount: float = 1) -> None:
        if target not in self._targets.known:
            target = OTHER  # it left while it was asked
        of_target = self._series.setdefault(target, {})
        series = of_target.get((counter, last))
        if series is None:
            series = of_target[counter, last] = counter.labels(*target, last)
        series.inc(amount)

    def _observe(self, kind: str, seconds: float) -> None:
        series = self._seconds_of.get(kind)
        if series is None:
            series = self._seconds_of[kind] = self._seconds.labels(kind)
        series.observe(seconds)

    def _forget_the_gone(self) -> None:
        """Series of nodes that are no longer registered end, or they would pile up as nodes come and go."""
        if self._targets.refresh():
            for target in self._series.keys() - self._targets.known:
                for counter, last in self._series.pop(target):
                    counter.remove(*target, last)


class _WithoutCreated:
    """A registry without the `_created` series, which tell Prometheus' text format nothing and double every counter."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


def _of_scrapes(outcomes: Sequence[Outcome]) -> Iterator[bytes]:
    if not outcomes:
        return
    labels = [_labels(outcome.leaf.labels) for outcome in outcomes]
    columns: dict[str, Iterable[float]] = {
        "scrape_success": (int(outcome.problem is None) for outcome in outcomes),
        "scrape_seconds": (round(outcome.seconds, 6) for outcome in outcomes),
        "scrape_samples": (outcome.samples for outcome in outcomes),
        "scrape_bytes": (outcome.bytes for outcome in outcomes),
    }
    for short, values in columns.items():
        lines = [_head(short), *(f"{PREFIX}{short}{own} {value}\n" for own, value in zip(labels, values, strict=True))]
        yield "".join(lines).encode("utf-8", "replace")


def _family(short: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> str:
    return _head(short) + "".join(f"{PREFIX}{short}{_labels(labels)} {value}\n" for labels, value in samples)


def _head(short: str) -> str:
    name, kind, _, text = FAMILIES[short]
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


OWN_METRICS: web.AppKey[OwnMetrics] = web.AppKey("own metrics", OwnMetrics)
