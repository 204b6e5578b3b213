"""The main process' side: starts the workers, tells them of the nodes, counts what they have counted, and ends them.

While a worker is away its sockets are still open here, and the main process serves who connects to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.options import Options
from lmcache_frontend.proxy.front import Others
from lmcache_frontend.telemetry.history.timeline import Event, Timeline
from lmcache_frontend.telemetry.metrics.own import OwnMetrics
from lmcache_frontend.telemetry.metrics.tally import Counted
from lmcache_frontend.workers import ports, snapshot
from lmcache_frontend.workers.adopting import Adopting
from lmcache_frontend.workers.channel import NO_FILE, Channel, Kind
from lmcache_frontend.workers.worker import DRAIN_SECONDS, SEND_SECONDS, Start
from lmcache_shared.listen import BACKLOG

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
"""How often it is looked whether the nodes have changed, when nobody says so."""

PAUSE_SECONDS = 0.02
PAUSE_SECONDS_PER_NODE = 20e-6
"""Between two snapshots, at least; to take one up costs a worker 14 microseconds for each node."""

TOLD_SECONDS = 1.0
"""How long the answer to a change waits until every worker knows of it."""

READY_SECONDS = 10.0
"""How long the start waits for the workers."""

FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 30.0
"""Before a worker is started again; doubled each time, until one has lasted for as long as the longest."""

SILENT_SECONDS = 30.0
"""A worker that serves and has said nothing for so long hangs, and is killed: its callers wait in vain. It is asked for
a word every second (`worker.COUNT_SECONDS`)."""

END_SECONDS = DRAIN_SECONDS + SEND_SECONDS + 1.0
"""How long a worker may take to end; then it is killed."""

ROOT = Path(__file__).parents[2]

_NUMBER = struct.Struct("!Q")

MakeProtocol = Callable[[], asyncio.BaseProtocol]


class Workers:
    """All workers of one frontend.

    Args:
        options: of the frontend; so many workers less one are started.
        registry: what they are told of.
        metrics: count what they have counted.
        timeline: has what was changed by their callers.
    """

    def __init__(self, options: Options, registry: Registry, metrics: OwnMetrics, timeline: Timeline) -> None:
        self._options = options
        self._registry = registry
        self._metrics = metrics
        self._timeline = timeline
        self._workers: list[_Place] = []
        self._publishing: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()
        self._snapshot = b""
        self._number = 0
        """Counts snapshots."""
        self._covered = -1
        """The registry's revision that the snapshot tells of."""
        metrics.workers = self.count

    def count(self) -> int:
        """How many processes serve, this one included."""
        return 1 + sum(worker.knows > 0 for worker in self._workers)

    def start(self, listening: Sequence[socket.socket], serve: MakeProtocol, others: Others) -> None:
        """Start the workers.

        Args:
            listening: on which this process listens.
            serve: makes the protocol of a connection that a worker cannot take now.
            others: goes on with connections that workers send here.

        Raises:
            AddressError: the port cannot be shared.
        """
        for number in range(1, self._options.workers):
            sockets: list[socket.socket] = []
            try:
                for sock in listening:
                    sockets.append(ports.beside(sock))
            except BaseException:
                for sock in sockets:
                    sock.close()
                raise
            self._workers.append(_Place(self, number, sockets, serve, others))
        for worker in self._workers:
            worker.task = asyncio.create_task(worker.run(), name=f"worker {worker.number}")
        if self._workers:
            self._publishing = asyncio.create_task(self._publish(), name="workers' nodes")

    async def ready(self) -> None:
        """Until every worker serves, `READY_SECONDS` at most."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._until(lambda: self.count() > len(self._workers)), READY_SECONDS)

    async def told(self) -> None:
        """Until every worker that serves knows of the nodes as they are now, `TOLD_SECONDS` at most."""
        if not self._workers:
            return
        wanted = self._registry.revision

        def are_told() -> bool:
            return self._covered >= wanted and all(worker.knows in (0, self._number) for worker in self._workers)

        self._wake.set()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._until(are_told), TOLD_SECONDS)

    async def stop(self) -> None:
        """End every worker; its requests in flight have a moment."""
        if self._publishing is not None:
            self._publishing.cancel()
            await asyncio.gather(self._publishing, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        self._workers = []

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._progress.clear()
            await self._progress.wait()

    async def _publish(self) -> None:
        nodes = 0
        while True:
            revision = self._registry.revision
            if revision != self._covered:
                proxies = list(self._registry.proxies())
                nodes = sum(len(proxy.nodes) for proxy in proxies)
                try:
                    data = await asyncio.to_thread(snapshot.encoded, proxies)
                except Exception:
                    logger.exception("workers do not hear of a change of the nodes: it cannot be written down")
                    data = self._snapshot
                if data != self._snapshot or self._number == 0:
                    self._snapshot = data
                    self._number += 1
                self._covered = revision
            for worker in self._workers:
                worker.tell(self._number, self._snapshot)
                worker.watch()
            self._progress.set()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), LOOK_SECONDS)
            self._wake.clear()
            await asyncio.sleep(PAUSE_SECONDS + PAUSE_SECONDS_PER_NODE * nodes)

    def _changed(self) -> None:
        """A worker has taken a snapshot, or come, or gone."""
        self._wake.set()
        self._progress.set()


def telling(workers: Workers, registry: Registry) -> Middleware:
    """A middleware: the answer to a change of the nodes comes when every worker knows of it."""

    @web.middleware
    async def told(request: web.Request, handler: Handler) -> web.StreamResponse:
        before = registry.revision
        response = await handler(request)
        if registry.revision != before and not response.prepared:
            await workers.told()
        return response

    return told


class _Place:
    """The place of one worker: its sockets, and the process that is there now."""

    def __init__(
        self, workers: Workers, number: int, sockets: list[socket.socket], serve: MakeProtocol, others: Others
    ) -> None:
        self.number = number
        self.task: asyncio.Task[None] | None = None
        self.told = self.knows = 0
        """The number of the snapshot that the worker was sent last, and of that by which it serves; 0: it does not."""
        self._workers = workers
        self._sockets = sockets
        self._serve = serve
        self._adopting = Adopting(others)
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._gone = asyncio.Event()
        self._has_served = self._stopping = False
        self._standing_in: list[asyncio.AbstractServer] = []
        self._looks_in_silence = 0

    async def run(self) -> None:
        """Have a worker in this place, one after the other."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            how = await self._run_one()
            if self._stopping:
                return
            await self._stand_in()
            if time.monotonic() - began > MAX_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            logger.warning("worker %d %s; it is started again in %g seconds", self.number, how, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def tell(self, number: int, data: bytes) -> None:
        """Send a snapshot, unless it was sent or the one before is not taken yet."""
        if self._channel is not None and self.told == self.knows != number:
            self.told = number
            self._channel.send(Kind.NODES, _NUMBER.pack(number) + data)

    def watch(self) -> None:
        """Kill a worker that hangs. By the calls, one each `LOOK_SECONDS`: this process may have stood still itself."""
        self._looks_in_silence += 1
        if self._looks_in_silence * LOOK_SECONDS > SILENT_SECONDS and self._process is not None and self.knows:
            logger.warning("worker %d has said nothing for %g seconds; it is killed", self.number, SILENT_SECONDS)
            self._process.kill()
            self._looks_in_silence = 0

    async def stop(self) -> None:
        """End the worker, and with it the place."""
        self._stopping = True
        self._end_standing_in()
        for sock in self._sockets:
            sock.close()
        if self._channel is not None:
            self._channel.send(Kind.STOP)
            try:
                await asyncio.wait_for(self._gone.wait(), END_SECONDS)
            except asyncio.TimeoutError:
                if self._process is not None:
                    self._process.kill()
        if self.task is not None:
            if self._channel is None and self._process is None:
                self.task.cancel()  # it only waits to start the next one
            self._gone.set()
            await asyncio.gather(self.task, return_exceptions=True)
        await self._adopting.close()

    async def _run_one(self) -> str:
        """Start a worker and wait for its end; how that came."""
        self._gone.clear()
        self._looks_in_silence = 0
        try:
            channel = self._start_one()
        except OSError as error:
            return f"cannot be started: {error.strerror or error}"
        assert self._process is not None, "it was started"
        try:
            await self._gone.wait()
        finally:
            self.told = self.knows = 0
            self._channel = None
            channel.close()
            self._workers._changed()
            code = await _ended(self._process)
            pid, self._process = self._process.pid, None
        return f"(process {pid}) " + (f"ended with {code}" if code >= 0 else f"was ended by {_signal(-code)}")

    def _start_one(self) -> Channel:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        files = [sock.fileno() for sock in self._sockets]
        try:
            # A session of its own: signals of the terminal are for the main process, which tells the workers.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lmcache_frontend.workers", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *files],
                env=_environment(os.environ),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._channel = Channel(ours, self._received, self._gone.set)
        start = Start(self._workers._options, self.number, files)
        self._channel.send(Kind.START, msgspec.msgpack.encode(start))
        self._workers._changed()
        return self._channel

    def _received(self, kind: Kind, payload: bytes, file: int) -> None:
        self._looks_in_silence = 0
        if kind == Kind.CONNECTION:
            if file == NO_FILE:
                logger.warning("a connection of worker %d was lost: too many files are open", self.number)
            else:
                self._adopting.take(file, payload)
        elif kind == Kind.COUNTED:
            self._workers._metrics.add(self.number, msgspec.msgpack.decode(payload, type=Counted))
        elif kind == Kind.HAPPENED:
            self._workers._timeline.record_all(msgspec.msgpack.decode(payload, type=list[Event]))
        elif kind == Kind.KNOWS:
            (self.knows,) = _NUMBER.unpack(payload)
            self._has_served = True
            self._end_standing_in()
            self._workers._changed()

    async def _stand_in(self) -> None:
        """Serve here who connects to the worker's sockets; before it ever served they do not listen."""
        if self._has_served and not self._standing_in:
            loop = asyncio.get_running_loop()
            for sock in self._sockets:
                try:
                    server = await loop.create_server(self._serve, sock=ports.duplicate(sock), backlog=BACKLOG)
                except OSError as error:
                    logger.warning("callers of worker %d wait for it: %s", self.number, error.strerror or error)
                else:
                    self._standing_in.append(server)

    def _end_standing_in(self) -> None:
        for server in self._standing_in:
            server.close()
        self._standing_in.clear()


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that has closed its end of the channel, and is killed when it does not end."""
    try:
        return await asyncio.to_thread(process.wait, END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return await asyncio.to_thread(process.wait)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """This process' environment, so that the worker finds the same package, and nothing else where it is started."""
    environ = {**inherited, "PYTHONSAFEPATH": "1"}
    if ROOT.name not in ("site-packages", "dist-packages"):
        environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH", "")])])
    return environ
