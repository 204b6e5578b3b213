"""The frontend as a running server."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType

from lmcache_frontend.app import create_app
from lmcache_frontend.nodes.node import Node, Proxy, read_list
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.options import Options
from lmcache_shared.address import TcpAddress, tcp_address
from lmcache_shared.errors import ConfigError
from lmcache_shared.listen import make_runner, make_site

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 1.0
"""How long requests in flight may take when the frontend stops."""

MAX_NODE_FILE_BYTES = 8 << 20


class FrontendServer:
    """Serves the frontend in the event loop that starts it.

        async with FrontendServer(Options(port=8080)) as server:
            print(server.address)

    Raises:
        ConfigError: an option or a list of nodes cannot be used.
        RouteError: a route module is broken, or two claim one route.
    """

    def __init__(self, options: Options) -> None:
        self.address: TcpAddress = tcp_address(options.host, options.port)
        self.registry = Registry(read_nodes(options), host=options.host, port=options.port)
        self._runner = make_runner(
            create_app(options, self.registry),
            drain_seconds=DRAIN_SECONDS,
            access_log=logger if logger.isEnabledFor(logging.INFO) else None,
        )

    async def start(self) -> None:
        """Listen.

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

    async def stop(self) -> None:
        """Take no more connections, let requests in flight end within the drain time, close every client."""
        await self._runner.cleanup()

    async def __aenter__(self) -> FrontendServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


def read_nodes(options: Options) -> list[Node | Proxy]:
    """The nodes and proxies of `--config` and `--nodes`.

    Raises:
        ConfigError: the file cannot be read, or one of them is no list of nodes.
    """
    entries: list[Node | Proxy] = []
    if options.config is not None:
        entries += read_list(_read_file(Path(options.config)), options.config)
    if options.nodes is not None:
        entries += read_list(options.nodes.encode("utf-8", "surrogateescape"), "--nodes")
    return entries


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_NODE_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the nodes: {error.strerror}") from None
    if len(data) > MAX_NODE_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_NODE_FILE_BYTES} bytes; this is no list of nodes")
    return data
