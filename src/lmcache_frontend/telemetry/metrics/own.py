"""The frontend's own metrics: what goes through its proxy, how its scrapes go, which nodes there are.

All are `lmcache_frontend_*` and belong to one application. `docs/metrics.md` tells of each, and is held against
`FAMILIES` by the tests.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import accumulate
from types import TracebackType
from typing import NamedTuple

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from lmcache_frontend.nodes.node import LOCAL_PROXY, Proxy
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.proxy.answering import Traffic
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_frontend.telemetry.metrics.scrape import OURS, Outcome, Wanted
from lmcache_frontend.telemetry.metrics.tally import SECONDS_BUCKETS, Counted, Seconds, Series, Tally
from lmcache_shared.address import Address
from lmcache_shared.errors import Refusal
from lmcache_shared.version import VERSION

PREFIX = OURS.decode()

CALLER_LEFT = 499
"""The status, of nginx' invention, under which a request counts whose caller went before its answer came."""

MAX_PREFIX_SEGMENTS = 32
"""Of a path, what is looked at for a node behind other frontends."""

_COUNTERS = ("proxy_requests_total", "proxy_bytes_total", "proxy_errors_total")
_BY_CLASS = tuple(Series("proxy_requests_total", f"{number}xx") for number in range(6))
_SENT, _RECEIVED = Series("proxy_bytes_total", "sent"), Series("proxy_bytes_total", "received")

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
        Family(
            f"{PREFIX}worker_requests_total",
            "counter",
            ("worker",),
            "Proxied requests by the process that served them; 0 is the main one.",
        ),
        Family(f"{PREFIX}workers", "gauge", (), "Processes that serve requests now, the main one included."),
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
        by_prefix = self._found.get(address)
        if by_prefix is None:
            return OTHER
        if len(by_prefix) == 1 and "" in by_prefix:
            return by_prefix[""]  # there is nothing behind it
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
        self._process = CollectorRegistry(auto_describe=False)
        ProcessCollector(namespace=PREFIX.rstrip("_"), registry=self._process)
        self._tally = Tally[TargetLabels]()
        self._by_worker = {0: 0}
        self.workers: Callable[[], int] = lambda: 1
        """How many processes serve requests; who starts others replaces it."""

    def watching(self, address: Address, path: str) -> Watched:
        """Count a proxied request to `path` at `address`, however it ends: `with` it."""
        self._forget_the_gone()
        return Watched(self._ended, self._targets.labels(address, path))

    def watching_again(self, former: Watched) -> Watched:
        """Count a request for the same as a former one, since which the registry has not changed."""
        return Watched(self._ended, former.target)

    def target_of(self, address: Address, path: str) -> TargetLabels:
        """Whom a proxied request to `path` at `address` is for."""
        self._forget_the_gone()
        return self._targets.labels(address, path)

    def _ended(self, watched: Watched, error: str | None) -> None:
        target, traffic = watched.target, watched.traffic
        self._by_worker[0] += 1
        self._tally.observe(target.kind, time.perf_counter() - watched.began)
        counts = self._counts(target)
        series = _BY_CLASS[watched.status // 100]
        counts[series] = counts.get(series, 0) + 1
        if traffic.received:
            counts[_RECEIVED] = counts.get(_RECEIVED, 0) + traffic.received
        if traffic.sent:
            counts[_SENT] = counts.get(_SENT, 0) + traffic.sent
        if error is not None:
            series = Series("proxy_errors_total", error)
            counts[series] = counts.get(series, 0) + 1

    def take(self) -> Counted:
        """What was counted since the last time, to be counted by another process."""
        taken = self._tally.taken()
        counts = [(tuple(target), *series, amount) for target, series, amount in taken.counts()]
        requests, self._by_worker[0] = self._by_worker[0], 0
        return Counted(requests, counts, taken.seconds())

    def add(self, worker: int, counted: Counted) -> None:
        """Count what a worker has counted."""
        self._forget_the_gone()
        self._by_worker[worker] = self._by_worker.get(worker, 0) + counted.requests
        for labels, family, last, amount in counted.counts:
            counts, series = self._counts(TargetLabels(*labels)), Series(family, last)
            counts[series] = counts.get(series, 0) + amount
        for kind, seconds in counted.seconds.items():
            self._tally.add_seconds(kind, seconds)

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
        families.append(_family("workers", [({}, self.workers())]))
        by_worker = [({"worker": str(worker)}, count) for worker, count in self._by_worker.items()]
        families.append(_family("worker_requests_total", by_worker))
        self._forget_the_gone()
        tally = self._tally.copy()

        def write() -> bytes:
            process = generate_latest(self._process)
            texts = "".join([*families, *_of_tally(tally)])
            return b"".join([*_of_scrapes(outcomes), texts.encode("utf-8", "replace"), process])

        return write

    def _counts(self, target: TargetLabels) -> dict[Series, int]:
        # one that left while it was asked is no longer told by its name
        return self._tally.of_target(target if target in self._targets.known else OTHER)

    def _forget_the_gone(self) -> None:
        """Series of nodes that are no longer registered end, or they would pile up as nodes come and go."""
        if self._targets.refresh():
            self._tally.keep(self._targets.known.__contains__)


def _of_tally(tally: Tally[TargetLabels]) -> Iterator[str]:
    """As the library wrote it: labels by their names, values with a point."""
    for short in _COUNTERS:
        *_, last_label = FAMILIES[short].labels
        yield _family(
            short,
            (
                (
                    dict(sorted({"node": target.node, "proxy": target.proxy, last_label: series.last}.items())),
                    float(amount),
                )
                for target, series, amount in tally.counts()
                if series.family == short
            ),
        )
    yield _head("proxy_request_seconds")
    for kind, seconds in tally.seconds().items():
        yield _histogram("proxy_request_seconds", {"kind": kind}, seconds)


def _histogram(short: str, labels: Mapping[str, str], seconds: Seconds) -> str:
    counts = list(accumulate(seconds.buckets))
    bounds = [*(str(float(bound)) for bound in SECONDS_BUCKETS), "+Inf"]
    lines = [
        f"{PREFIX}{short}_bucket{_labels({**labels, 'le': bound})} {count}.0\n"
        for bound, count in zip(bounds, counts, strict=True)
    ]
    own = _labels(labels)
    return "".join(
        [*lines, f"{PREFIX}{short}_count{own} {counts[-1]}.0\n", f"{PREFIX}{short}_sum{own} {seconds.total}\n"]
    )


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
