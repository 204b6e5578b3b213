"""The frontend as a running server, or, without HTTP, as heartbeats alone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import signal
import socket
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

from lmcache_frontend.app import create_app
from lmcache_frontend.cluster import Cluster
from lmcache_frontend.discovery.heartbeat import HEARTBEAT, Heartbeat
from lmcache_frontend.nodes.node import Node, Proxy
from lmcache_frontend.options import Options
from lmcache_frontend.proxy.fronted import FrontedRunner
from lmcache_frontend.telemetry.metrics.own import OWN_METRICS
from lmcache_frontend.workers.supervisor import Workers, telling
from lmcache_shared.address import TcpAddress, is_loopback_host, tcp_address
from lmcache_shared.listen import TcpPortSite, make_runner
from lmcache_shared.program import say

logger = logging.getLogger(__name__)

ANY_HOST = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared, not bound

DRAIN_SECONDS = 1.0
"""How long requests in flight may take when the frontend stops."""


class FrontendServer:
    """Serves the frontend in the event loop that starts it.

        async with FrontendServer(Options(port=8080)) as server:
            print(server.address)

    Args:
        options: its options.
        nodes: nodes beside those of the options.

    Raises:
        ConfigError: an option or a list of nodes cannot be used.
        RouteError: a route module is broken, or two claim one route.
    """

    def __init__(self, options: Options, nodes: Iterable[Node | Proxy] = ()) -> None:
        self.address: TcpAddress = tcp_address(options.host, options.port)
        self.cluster = Cluster(options, nodes)
        self.heartbeat = _heartbeat(options, self.cluster)
        self._options = options
        app = create_app(options, self.cluster)
        app[HEARTBEAT] = self.heartbeat
        self.workers = Workers(options, self.cluster.registry, app[OWN_METRICS], self.cluster.timeline)
        if options.workers > 1:
            app.middlewares.append(telling(self.workers, self.cluster.registry))
        runner = make_runner(
            app,
            drain_seconds=DRAIN_SECONDS,
            kind=FrontedRunner,
            access_log=logger if logger.isEnabledFor(logging.INFO) else None,
        )
        assert isinstance(runner, FrontedRunner), "it is of that kind"
        self._runner = runner

    async def start(self) -> None:
        """Listen, and send heartbeats if the options say where.

        Raises:
            AddressInUse: somebody serves there already.
            AddressError: the address cannot be listened on.
        """
        await self._runner.setup()
        try:
            await self.cluster.load()
            site = TcpPortSite(self._runner, self.address)
            await site.start()
            if self._options.workers > 1:
                self.workers.start(site.listening, self._runner.server, self._runner.others)
            self.cluster.start()
        except BaseException:
            await self.workers.stop()
            await self._runner.cleanup()
            await self.cluster.stop()
            raise
        _start(self.heartbeat, self._options)

    async def stop(self) -> None:
        """Take no more connections, let requests in flight end within the drain time, close every client."""
        await self.heartbeat.stop()
        await asyncio.gather(self.workers.stop(), self._runner.cleanup())
        await self.cluster.stop()

    async def __aenter__(self) -> FrontendServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


async def serve(options: Options, stop: asyncio.Event, nodes: Iterable[Node | Proxy] = ()) -> None:
    """Serve until `stop` is set, or with `no_http` send heartbeats until then.

    Raises:
        StartError: as `FrontendServer` and its `start`.
    """
    if not options.no_http:
        made = _made_token(options)
        if made is not None:
            options = replace(options, token=made)
        async with FrontendServer(options, nodes) as server:
            with _hangup_reloads(server.cluster):
                await _first([stop.wait(), server.workers.ready()])
                gc.freeze()  # what is here now stays: looking at it again and again holds requests up for milliseconds
                say(
                    f"frontend serves on http://{server.address} ({_nodes(server.cluster)}{_processes(server.workers)})"
                )
                if made is not None:
                    where = "" if options.no_trust_local else " from another machine"
                    say(f"to change something{where}: http://{_public(server.address)}/sign-in?token={made}")
                await stop.wait()
            say("stopping")
        return
    cluster = Cluster(replace(options, registry="memory"), nodes)  # nobody can add any by hand
    heartbeat = _heartbeat(options, cluster)
    cluster.start()
    try:
        _start(heartbeat, options)
        with _hangup_reloads(cluster):
            say(f"frontend sends heartbeats and serves nothing ({sum(1 for _ in cluster.registry.nodes())} nodes)")
            await stop.wait()
        say("stopping")
    finally:
        await heartbeat.stop()
        await cluster.stop()


async def _first(waits: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Until the first of them is over; the others are not waited for."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _processes(workers: Workers) -> str:
    return f", {workers.count()} processes" if workers.count() > 1 else ""


def _made_token(options: Options) -> str | None:
    """A token where one is needed and the operator gave none: whoever reads the first lines of the log has it."""
    is_given = options.token or options.token_file or options.no_auth
    is_needed = options.no_trust_local or not is_loopback_host(options.host)
    return secrets.token_urlsafe(24) if is_needed and not is_given else None


def _public(address: TcpAddress) -> TcpAddress:
    """The address as others may know it: of all interfaces, this machine's name."""
    return replace(address, host=socket.gethostname()) if address.host in ANY_HOST else address


def _nodes(cluster: Cluster) -> str:
    """How many there are at the start, and why these may not be all."""
    problem = cluster.not_ready()
    return f"{sum(1 for _ in cluster.registry.nodes())} nodes" + (f"; {problem}" if problem else "")


@contextlib.contextmanager
def _hangup_reloads(cluster: Cluster) -> Iterator[None]:
    """SIGHUP: read every source again now."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, cluster.sources.reload)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def _heartbeat(options: Options, cluster: Cluster) -> Heartbeat:
    return Heartbeat(cluster.registry, cluster.health, port=options.port, report_host=options.report_host)


def _start(heartbeat: Heartbeat, options: Options) -> None:
    if options.heartbeat_url is not None:
        heartbeat.start(
            options.heartbeat_url,
            initial_delay=options.heartbeat_initial_delay,
            interval=options.heartbeat_interval,
        )
