"""A worker: a process that serves proxied requests, by the nodes of which the main process tells it.

It has the rules, the tokens and the transports to the targets, but no pages, no sources, no checks. A connection that
asks for something else goes to the main process. Without the main process it ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from typing import Any

import msgspec
from aiohttp import web

from lmcache_frontend.app import proxying_app
from lmcache_frontend.nodes.registry import Registry, View, view_of
from lmcache_frontend.options import PROGRAM, Options
from lmcache_frontend.proxy.front import Front
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_frontend.telemetry.history.timeline import TIMELINE, Timeline
from lmcache_frontend.telemetry.metrics.own import OWN_METRICS
from lmcache_frontend.workers import snapshot
from lmcache_frontend.workers.adopting import sending_over
from lmcache_frontend.workers.channel import Channel, Kind
from lmcache_shared import program
from lmcache_shared.listen import BACKLOG

logger = logging.getLogger("lmcache_frontend.server")

COUNT_SECONDS = 1.0
"""How often the main process is told what was counted, were it nothing: so it knows that this one lives."""

DRAIN_SECONDS = 1.0
"""How long requests in flight may take when the worker ends."""

SEND_SECONDS = 1.0
"""How long the end waits for the main process to take the last counts."""


class Start(msgspec.Struct):
    """What the main process says first."""

    options: Options
    number: int
    """Which worker this is, from 1 on."""
    sockets: list[int]
    """The file descriptors on which it is to listen; they were inherited."""


_encoder = msgspec.msgpack.Encoder()


class Worker:
    """One worker, from its first frame on.

    Args:
        sock: the way to the main process.
        stop: set when it is to end.
    """

    def __init__(self, sock: socket.socket, stop: asyncio.Event) -> None:
        self._stop = stop
        self._is_alone = False
        self._told = 0
        """The number of the last event of which the main process was told."""
        self._start: asyncio.Future[Start] = asyncio.get_running_loop().create_future()
        self._snapshots: asyncio.Queue[bytes] = asyncio.Queue()
        self._channel = Channel(sock, self._received, self._lost)

    async def run(self) -> None:
        stopping = asyncio.create_task(_wait_for(self._stop))
        try:
            waits: list[asyncio.Future[Any]] = [self._start, stopping]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self._start.done():
                await self._serve(self._start.result(), stopping)
        finally:
            stopping.cancel()
            self._channel.close()

    async def _serve(self, start: Start, stopping: asyncio.Task[None]) -> None:
        options = start.options
        program.configure_logging(options.log_level)
        registry = Registry(host=options.host, port=options.port)
        app = proxying_app(options, registry, HealthBoard(registry), Timeline())  # nothing is checked here
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        front = Front(
            app,
            sending_over(self._channel),
            access_log=logger if logger.isEnabledFor(logging.INFO) else None,
        )
        servers: list[asyncio.AbstractServer] = []
        following = asyncio.create_task(self._follow(registry, front, start.sockets, servers), name="nodes")
        counting = asyncio.create_task(self._count(app), name="counts")
        try:
            await asyncio.wait([stopping, following, counting], return_when=asyncio.FIRST_COMPLETED)
        finally:
            following.cancel()
            counting.cancel()
            ended = await asyncio.gather(following, counting, return_exceptions=True)
            for server in servers:
                server.close()
            await front.shutdown(0.0 if self._is_alone else DRAIN_SECONDS)
            await self._tell_last(app)
            await runner.cleanup()
        for problem in ended:
            if isinstance(problem, Exception):
                raise problem

    async def _follow(
        self, registry: Registry, front: Front, sockets: list[int], servers: list[asyncio.AbstractServer]
    ) -> None:
        """Have the registry as the main process has it; listen as soon as that is known."""
        loop = asyncio.get_running_loop()
        while True:
            frame = await self._snapshots.get()
            while not self._snapshots.empty():
                frame = self._snapshots.get_nowait()
            registry.mirror(await asyncio.to_thread(_view, frame[8:]))  # thousands of nodes take a while
            if not servers:
                gc.collect()
                gc.freeze()
                for number in sockets:
                    sock = socket.socket(fileno=number)
                    servers.append(await loop.create_server(front, sock=sock, backlog=BACKLOG))
            self._channel.send(Kind.KNOWS, frame[:8])

    async def _count(self, app: web.Application) -> None:
        while True:
            await asyncio.sleep(COUNT_SECONDS)
            self._tell(app)

    def _tell(self, app: web.Application) -> None:
        if self._channel.waiting == 0:  # else all is told together, later
            self._channel.send(Kind.COUNTED, _encoder.encode(app[OWN_METRICS].take()))
            happened = app[TIMELINE].since(self._told)
            if happened:
                self._told = happened[-1].number
                self._channel.send(Kind.HAPPENED, _encoder.encode(happened))

    async def _tell_last(self, app: web.Application) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._channel.sent(), SEND_SECONDS)
        self._tell(app)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._channel.sent(), SEND_SECONDS)

    def _received(self, kind: Kind, payload: bytes, file: int) -> None:
        if kind == Kind.START and not self._start.done():
            self._start.set_result(msgspec.msgpack.decode(payload, type=Start))
        elif kind == Kind.NODES:
            self._snapshots.put_nowait(payload)
        elif kind == Kind.STOP:
            self._stop.set()

    def _lost(self) -> None:
        self._is_alone = True
        self._stop.set()


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()


def _view(data: bytes) -> View:
    return view_of(snapshot.decoded(data))


def main(arguments: list[str]) -> int:
    """Serve; the one argument is the file descriptor of the way to the main process."""
    if len(arguments) != 1 or not arguments[0].isdigit():
        print("lmcache_frontend --workers starts this program", file=sys.stderr)
        return 2
    # What the terminal sends to the whole group is the main process' matter, which says when to end.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=int(arguments[0]))
    os.set_inheritable(sock.fileno(), False)

    async def run(stop: asyncio.Event) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        await Worker(sock, stop).run()

    return program.run(PROGRAM, run)
