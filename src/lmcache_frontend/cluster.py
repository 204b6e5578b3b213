"""What the frontend knows of the cluster, and what keeps it known: sources, store, neighbours, checks, the history."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from lmcache_frontend.discovery.service import DiscoveryService
from lmcache_frontend.nodes.by_hand import ByHand
from lmcache_frontend.nodes.neighbours import Neighbours
from lmcache_frontend.nodes.node import Node, Proxy, read_list
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.nodes.sources import Source, Sources, end
from lmcache_frontend.nodes.sources.file import lmcache_file, node_file
from lmcache_frontend.nodes.sources.supplier import SupplierSource
from lmcache_frontend.nodes.stores import StoreAway, open_store
from lmcache_frontend.options import Options
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_frontend.telemetry.history.history import History
from lmcache_frontend.telemetry.history.recorder import Recorder
from lmcache_frontend.telemetry.history.timeline import Timeline
from lmcache_frontend.telemetry.history.watching import Watch

TICK_SECONDS = 1.0


class Cluster:
    """The registry with its sources. What needs no waiting is read at once, the rest from `start` on.

    Args:
        options: name the sources.
        nodes: of a plugin, beside those of the options.

    Raises:
        ConfigError: an option or a file cannot be used.
    """

    def __init__(self, options: Options, nodes: Iterable[Node | Proxy] = ()) -> None:
        self.registry = Registry(host=options.host, port=options.port, stale_seconds=options.stale_seconds)
        self.registry.publish("plugin", nodes)
        if options.nodes is not None:
            self.registry.publish("nodes", read_list(_bytes(options.nodes), options.place_of("nodes")))
        self.health = HealthBoard(self.registry, interval=options.health_interval)
        self.history = History(recording=not (options.no_history or options.no_http))
        self.timeline = Timeline()
        self.store = open_store(options.registry, options.port)
        self.by_hand = ByHand(self.registry, self.store)
        self.neighbours = Neighbours(self.registry, options.refresh_interval)
        self.discovery = DiscoveryService(self.registry, self.store)
        self.sources = Sources([*_sources(options, self.registry), self.discovery])
        self._tasks: list[asyncio.Task[None]] = []

    async def load(self) -> None:
        """Read what is kept by hand, unless its store is away. Nobody else is asked for anything yet."""
        try:
            await self.store.open()
            await self.by_hand.read()
        except StoreAway as away:
            self.by_hand.note(away)

    def start(self) -> None:
        """Follow every source, check the nodes, and record what they say."""
        self.sources.start()
        self.health.start()
        self._tasks = [
            asyncio.create_task(self.by_hand.run(), name="store"),
            asyncio.create_task(self.neighbours.run(), name="neighbours"),
            asyncio.create_task(self._tick(), name="registry"),
            asyncio.create_task(Watch(self.health, self.timeline).run(), name="timeline"),
        ]
        if self.history.recording:
            recorder = Recorder(self.health, self.history, self.timeline)
            self._tasks.append(asyncio.create_task(recorder.run(), name="recorder"))

    async def stop(self) -> None:
        await self.health.close()
        await self.sources.close()
        await end(self._tasks)
        self._tasks = []
        await self.store.close()

    def not_ready(self) -> str | None:
        """Why this frontend does not know its nodes yet; None when it does, or did before its store went away."""
        return None if self.by_hand.loaded else f"nodes by hand have not been read yet: {self.by_hand.problem}"

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.registry.tick()


def _bytes(argument: str) -> bytes:
    return argument.encode("utf-8", "surrogateescape")


def _sources(options: Options, registry: Registry) -> list[Source]:
    sources: list[Source] = []
    if options.config is not None:
        sources.append(node_file(options.config, registry))
    if options.lmcache_config is not None:
        sources.append(lmcache_file(options.lmcache_config, options.lmcache_workers, registry))
    if options.node_supplier_url is not None:
        sources.append(SupplierSource(options.node_supplier_url, options.refresh_interval, registry))
    if options.dns:
        from lmcache_frontend.nodes.sources.dns import DnsSource  # its library takes a while to load

        sources.append(DnsSource(options.dns, options.dns_server, registry))
    return sources
