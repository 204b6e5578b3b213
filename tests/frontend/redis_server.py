"""A real Redis of a test's own, and a way to it that loses what a test wants lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator

import redis

from lmcache_api.pytest_plugin import free_port

PROGRAM = shutil.which("redis-server") or "/usr/bin/redis-server"
START_SECONDS = 20.0


class RedisServer:
    """Keeps everything in memory: what it held is gone when it is started again. Serves on a port and a socket."""

    def __init__(self, folder: str, *arguments: str) -> None:
        self.port = free_port()
        self.socket = f"{folder}/redis.sock"
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.socket_url = f"unix://{self.socket}"
        self._command = [
            PROGRAM, "--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", self.socket, "--dir", folder,
            "--save", "", "--appendonly", "no", "--loglevel", "warning", *arguments,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert self._process.poll() is None, "redis-server has ended by itself"
            assert time.monotonic() < deadline, "redis-server does not come up"
            time.sleep(0.02)

    def kill(self) -> None:
        """As a crash would end it."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def pause(self) -> None:
        """It keeps its connections and answers no more, as a machine that hangs."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def ask(self, *command: str | bytes | int) -> object:
        """What it answers somebody else."""
        with redis.Redis(unix_socket_path=self.socket) as client:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def redis_server(*arguments: str) -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:  # a socket's path is short; pytest's folders are not
        server = RedisServer(folder, *arguments)
        try:
            server.start()
            yield server
        finally:
            server.kill()


class Way:
    """Connections to a Redis that go through the test."""

    def __init__(self, server: RedisServer) -> None:
        self.url = ""
        self.lose: bytes | None = None
        """The answer with this in it is lost once, and its connection with it."""
        self.hold: bytes | None = None
        """Questions with this in them wait until they are let go."""
        self.dead = False
        """Nothing comes through the connections that are subscribed now; they stay open."""
        self.subscriptions = 0
        self._server = server
        self._let_go = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def let_go(self) -> None:
        self.hold = None
        self._let_go.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
            state = {"subscribed": False, "dead": False}
            back = asyncio.ensure_future(self._back(there_reader, writer, state))
            try:
                while data := await reader.read(1 << 16):
                    if b"SUBSCRIBE" in data:
                        state["subscribed"] = True
                        self.subscriptions += 1
                    if self.hold is not None and self.hold in data:
                        await self._let_go.wait()
                    there_writer.write(data)
            finally:
                there_writer.close()
                back.cancel()
                await asyncio.wait([back])
                writer.close()
        self._tasks.discard(task)

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict[str, bool]) -> None:
        while data := await reader.read(1 << 16):
            state["dead"] = state["dead"] or (self.dead and state["subscribed"])
            if state["dead"]:
                continue
            if self.lose is not None and self.lose in data:
                self.lose = None
                break
            writer.write(data)
        writer.close()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


@contextlib.asynccontextmanager
async def way_to(server: RedisServer) -> AsyncIterator[Way]:
    way = Way(server)
    listener = await asyncio.start_server(way.serve, "127.0.0.1", 0)
    way.url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}/0"
    try:
        yield way
    finally:
        listener.close()
        await way.end()
