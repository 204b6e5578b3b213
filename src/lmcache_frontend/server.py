"""The frontend as a running server, or, without HTTP, as heartbeats alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from lmcache_frontend.app import create_app
from lmcache_frontend.discovery.heartbeat import HEARTBEAT, Heartbeat
from lmcache_frontend.nodes.node import Node, Proxy, read_list
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.options import Options
from lmcache_shared.address import TcpAddress, tcp_address
from lmcache_shared.errors import ConfigError
from lmcache_shared.listen import make_runner, make_site
from lmcache_shared.program import say

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 1.0
"""How long requests in flight may take when the frontend stops."""

MAX_NODE_FILE_BYTES = 8 << 20
READ_SECONDS = 5.0
"""For the file of nodes."""


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
        self.registry = _registry(options, nodes)
        self.heartbeat = _heartbeat(options, self.registry)
        self._options = options
        app = create_app(options, self.registry)
        app[HEARTBEAT] = self.heartbeat
        self._runner = make_runner(
            app,
            drain_seconds=DRAIN_SECONDS,
            access_log=logger if logger.isEnabledFor(logging.INFO) else None,
        )

    async def start(self) -> None:
        """Listen, and send heartbeats if the options say where.

        Raises:
            AddressInUse: somebody serves there already.
            AddressError: the address cannot be listened on.
        """
        await self._runner.setup()
        try:
            await make_site(self._runner, self.address).start()
        except BaseException:
            await self._runner.cleanup()
            raise
        _start(self.heartbeat, self._options)

    async def stop(self) -> None:
        """Take no more connections, let requests in flight end within the drain time, close every client."""
        await self.heartbeat.stop()
        await self._runner.cleanup()

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
        async with FrontendServer(options, nodes) as server:
            count = sum(1 for _ in server.registry.nodes())
            say(f"frontend serves on http://{server.address} ({count} nodes)")
            await stop.wait()
            say("stopping")
        return
    registry = _registry(options, nodes)
    heartbeat = _heartbeat(options, registry)
    _start(heartbeat, options)
    say(f"frontend sends heartbeats and serves nothing ({sum(1 for _ in registry.nodes())} nodes)")
    await stop.wait()
    say("stopping")
    await heartbeat.stop()


def _registry(options: Options, nodes: Iterable[Node | Proxy]) -> Registry:
    return Registry([*nodes, *read_nodes(options)], host=options.host, port=options.port)


def _heartbeat(options: Options, registry: Registry) -> Heartbeat:
    return Heartbeat(registry, port=options.port, report_host=options.report_host)


def _start(heartbeat: Heartbeat, options: Options) -> None:
    if options.heartbeat_url is not None:
        heartbeat.start(
            options.heartbeat_url,
            initial_delay=options.heartbeat_initial_delay,
            interval=options.heartbeat_interval,
        )


def read_nodes(options: Options) -> list[Node | Proxy]:
    """The nodes and proxies of `--config` and `--nodes`.

    Raises:
        ConfigError: the file cannot be read, or one of them is no list of nodes.
    """
    entries: list[Node | Proxy] = []
    if options.config is not None:
        entries += read_list(_read_file(Path(options.config)), options.config)
    if options.nodes is not None:
        entries += read_list(options.nodes.encode("utf-8", "surrogateescape"), options.place_of("nodes"))
    return entries


def _read_file(path: Path) -> bytes:
    """What the file holds. It may be a pipe, as a shell makes it; one that nobody writes into is not waited for."""
    data = bytearray()
    until = time.monotonic() + READ_SECONDS
    try:
        with _opened(path) as file:
            while len(data) <= MAX_NODE_FILE_BYTES:
                if not select.select([file], [], [], max(0.0, until - time.monotonic()))[0]:
                    raise ConfigError(f"{path}: nobody has written the nodes within {READ_SECONDS:g} seconds")
                with contextlib.suppress(BlockingIOError):
                    piece = os.read(file, 1 << 20)
                    if not piece:
                        return bytes(data)
                    data += piece
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the nodes: {error.strerror}") from None
    except ValueError:  # a NUL in it
        raise ConfigError(f"{str(path)!r}: is no path") from None
    raise ConfigError(f"{path}: larger than {MAX_NODE_FILE_BYTES} bytes; this is no list of nodes")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield file
    finally:
        os.close(file)
