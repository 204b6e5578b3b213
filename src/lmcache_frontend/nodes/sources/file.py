"""Nodes of a file, read again when it changes and on SIGHUP: a list in JSON, or an `lmcache.yaml` that implies them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lmcache_frontend.nodes.node import Node, Proxy, read_list, read_usable
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.nodes.sources import Told
from lmcache_shared import config
from lmcache_shared.blocking import BlockingPool
from lmcache_shared.errors import ConfigError, Refusal
from lmcache_shared.placement import SCHEDULER_INDEX, place, serves

LOOK_SECONDS = 1.0
READ_SECONDS = 30.0
MAX_NODE_FILE_BYTES = 8 << 20
PIPE_SECONDS = 5.0
"""For nodes that come through a pipe."""

Read = Callable[[], tuple[list[Node | Proxy], list[str]]]


class FileSource:
    """Publishes a file's nodes. When it can no longer be read as a whole, what was last read of it stays.

    Args:
        name: the source's name in the registry.
        path: the file.
        read: reads it; returns its entries, and one line for each that cannot be used.

    Raises:
        ConfigError: the file cannot be read at all.
    """

    def __init__(self, name: str, path: str, read: Read, registry: Registry) -> None:
        self.name = name
        self.place = path
        self.problems: Sequence[str] = ()
        self._path = path
        self._read = read
        self._registry = registry
        self._now = asyncio.Event()
        self._told = Told(name, path)
        self._seen = _stamp(path)
        self._publish(*read())

    async def run(self) -> None:
        pool = BlockingPool(f"{self.name}-source", threads=1, waiting=1)
        try:
            while True:
                await self._look(pool)
                await _wait(self._now, LOOK_SECONDS)
        finally:
            pool.close()

    def reload(self) -> None:
        self._now.set()

    async def _look(self, pool: BlockingPool) -> None:
        """Read the file, if it is another one or somebody wants it."""
        try:
            stamp = await pool.run(lambda: _stamp(self._path), seconds=READ_SECONDS, what=self._path)
            if stamp != self._seen or self._now.is_set():
                entries, problems = await pool.run(self._read, seconds=READ_SECONDS, what=self._path)
                self._seen = stamp
                self._publish(entries, problems)
                self._now.clear()
        except ConfigError as error:  # it may be half written, or this process out of files: it is read again soon
            self._now.clear()
            self._tell([str(error)])
            await asyncio.sleep(LOOK_SECONDS)
        except Refusal as late:  # the disk; it is tried again
            self._tell([str(late.detail)])
            await asyncio.sleep(LOOK_SECONDS)

    def _publish(self, entries: list[Node | Proxy], problems: list[str]) -> None:
        self._registry.publish(self.name, entries)
        self._tell(problems)

    def _tell(self, problems: Sequence[str]) -> None:
        self.problems = problems
        self._told.tell(problems)


def node_file(path: str, registry: Registry) -> FileSource:
    """The source of `--config`: a JSON list of nodes, or of proxies with nodes of their own.

    Raises:
        ConfigError: it cannot be read or is no list; single entries that cannot be used are told and passed over.
    """
    return FileSource("file", path, lambda: read_usable(_read_file(Path(path)), path), registry)


def lmcache_file(path: str, workers: int, registry: Registry) -> FileSource:
    """The source of `--lmcache-config`: where the scheduler and the workers of that configuration serve.

    Raises:
        ConfigError: it cannot be read, or gives them no usable address.
    """

    def read() -> tuple[list[Node | Proxy], list[str]]:
        settings = config.load(path, environ={})
        indexes = range(SCHEDULER_INDEX, SCHEDULER_INDEX + 1 + workers)
        nodes = [place(settings, index).node for index in indexes if serves(settings, index)]
        off = "internal_api_server_enabled" in settings.given and not settings.internal_api_server_enabled
        problems = [f"{path}: internal_api_server_enabled is false: no node answers"] if off else []
        return read_list(json.dumps(nodes).encode(), path), problems

    return FileSource("lmcache-config", path, read, registry)


def _read_file(path: Path) -> bytes:
    """What the file holds. It may be a pipe, as a shell makes it; one that nobody writes into is not waited for."""
    data = bytearray()
    until = time.monotonic() + PIPE_SECONDS
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r}: is no path")
    try:
        with _opened(path) as file:
            readable = select.poll()  # select() takes no descriptor above 1023
            readable.register(file, select.POLLIN)
            while len(data) <= MAX_NODE_FILE_BYTES:
                if not readable.poll(max(0.0, until - time.monotonic()) * 1000):
                    raise ConfigError(f"{path}: nobody has written the nodes within {PIPE_SECONDS:g} seconds")
                with contextlib.suppress(BlockingIOError):
                    piece = os.read(file, 1 << 20)
                    if not piece:
                        return bytes(data)
                    data += piece
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the nodes: {error.strerror}") from None
    raise ConfigError(f"{path}: larger than {MAX_NODE_FILE_BYTES} bytes; this is no list of nodes")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield file
    finally:
        os.close(file)


def _stamp(path: str) -> tuple[int, int, int] | None:
    """Another one when the file was written or replaced; a Kubernetes ConfigMap is replaced by its symbolic links.

    None for a pipe, which is read once.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except asyncio.TimeoutError:
        return
