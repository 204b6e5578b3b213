"""The processes of these tests: a real LMCache, a host with both internal API servers, and our frontend.

Each has a log in its folder, is waited for within a bounded time, and is ended by its process id.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest
from yarl import URL

ROOT = Path(__file__).parents[2]
NODE = "worker0"
"""The engine's name at the frontend."""

START_SECONDS = 120.0
FRONTEND_START_SECONDS = 20.0
END_SECONDS = 20.0
KILL_SECONDS = 5.0
ASK_SECONDS = 30.0
LOG_TAIL_BYTES = 4000

WORKER_PORT = 7000
"""What LMCache appends to the socket prefix for worker 0: the port that it would have."""

SCHEDULER_PORT = WORKER_PORT - 1

SECRETS = {"HF_TOKEN": "hf_of_the_tests", "REDIS_URL": "redis://user:of-the-tests@localhost:6379"}
"""Variables of the host that LMCache's own `/env` shows and ours masks: one by its name, one by its content."""


@dataclass
class Child:
    """A process that runs, and where it logs."""

    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        return self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")

    def fail(self, what: str) -> NoReturn:
        pytest.fail(f"{what}. The end of its log:\n{self.tail()}", pytrace=False)

    def wait_until(self, ready: Callable[[], bool], *, seconds: float, what: str) -> None:
        """Fail with the end of the log when `ready()` stays false or the process ends."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None:
                self.fail(f"{what} ended with code {self.process.returncode}")
            if time.monotonic() > deadline:
                self.fail(f"{what} is not ready after {seconds:g} seconds")
            time.sleep(0.05)

    def kill(self) -> None:
        """As `kill -9` does."""
        self.process.kill()
        self.process.wait(KILL_SECONDS)

    def end(self, *, ask: Callable[[], None] | None = None) -> None:
        """Ask it to end (SIGTERM, or `ask`), and kill it when it has not within `END_SECONDS`."""
        if self.process.poll() is None:
            (ask or self.process.terminate)()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        if self.process.poll() is None:
            self.kill()


@dataclass
class Engine(Child):
    """A real LMCache engine that answers on its socket."""

    socket: Path


@dataclass
class Host(Child):
    """A process with a real LMCache, LMCache's own internal API server and ours, each on a socket."""

    theirs: Path
    ours: Path
    their_scheduler: Path
    our_scheduler: Path
    folder: Path

    def tell(self, command: str, answer: str) -> None:
        """Send a command of `host.py`; fail when its answer is another one."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()
        self.expect(answer, seconds=ASK_SECONDS)

    def expect(self, answer: str, *, seconds: float) -> None:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline().decode().strip() if ready else f"nothing within {seconds:g} seconds"
        if line != answer:
            self.fail(f"the host said {line!r}, not {answer!r}")


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A new folder whose path leaves room for a socket: the kernel takes 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="lmc", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_engine(python: str, folder: Path) -> Iterator[Engine]:
    """`python -m lmcache.v1.standalone`, with CPU and disk backends, on a socket in `folder`."""
    config = _write_config(folder)
    command = [python, "-m", "lmcache.v1.standalone", "--config", str(config)]
    with _started(command, folder / "engine.log", environ=lmcache_environ(folder)) as child:
        engine = Engine(child.process, child.log, folder / f"lm_{WORKER_PORT}")
        engine.wait_until(lambda: _answers(engine.socket, "/version"), seconds=START_SECONDS, what="LMCache")
        yield engine


@contextlib.contextmanager
def running_host(python: str, folder: Path) -> Iterator[Host]:
    """`host.py`: LMCache's server on the socket `lm_…` of `folder`, ours on `ours_…`."""
    config = _write_config(folder)
    command = [python, str(Path(__file__).with_name("host.py")), str(config), str(folder / "ours")]
    environ = lmcache_environ(folder, PYTHONPATH=str(ROOT / "src"), **SECRETS)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with _started(command, folder / "host.log", environ=environ, **pipes) as child:
        sockets = [folder / f"{name}_{port}" for port in (WORKER_PORT, SCHEDULER_PORT) for name in ("lm", "ours")]
        host = Host(child.process, child.log, *sockets, folder)
        try:
            host.expect("READY", seconds=START_SECONDS)
            for server in (host.theirs, host.their_scheduler):
                ready = functools.partial(_answers, server, "/version")
                host.wait_until(ready, seconds=ASK_SECONDS, what="LMCache's own server")
            yield host
        finally:
            assert host.process.stdin is not None
            host.end(ask=host.process.stdin.close)


@dataclass
class Controllers(Child):
    """LMCache's own controller server and ours on one manager, with two engines registered."""

    theirs: Path
    ours: Path
    workers: Sequence[Path]
    """The sockets of the engines' internal API servers: instances `one` and `two`."""


@contextlib.contextmanager
def running_controllers(python: str, folder: Path) -> Iterator[Controllers]:
    """`controller_host.py`, and two standalone engines that register with it."""
    pull, reply, *worker_ports = free_ports(4)
    theirs, prefix = folder / "their_controller", folder / "c"
    script = str(Path(__file__).with_name("controller_host.py"))
    command = [python, script, str(theirs), str(prefix), str(pull), str(reply)]
    environ = lmcache_environ(folder, PYTHONPATH=str(ROOT / "src"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with contextlib.ExitStack() as stack:
        child = stack.enter_context(_started(command, folder / "controllers.log", environ=environ, **pipes))
        sockets = []
        for name, port in zip(("one", "two"), worker_ports, strict=True):
            below = folder / name
            below.mkdir()
            engine = stack.enter_context(starting_worker(python, below, name, pull, reply, port))
            sockets.append((engine, engine.socket))
        controllers = Controllers(child.process, child.log, theirs, Path(f"{prefix}_9000"), [s for _, s in sockets])
        line = child.process.stdout.readline().decode().strip() if child.process.stdout is not None else ""
        if line != "READY":
            child.fail(f"the controllers said {line!r}")
        for engine, at in sockets:
            ready = functools.partial(_answers, at, "/version")
            engine.wait_until(ready, seconds=START_SECONDS, what="LMCache")
        try:
            yield controllers
        finally:
            assert child.process.stdin is not None
            child.end(ask=child.process.stdin.close)


@contextlib.contextmanager
def running_multiprocess(python: str, folder: Path) -> Iterator[int]:
    """LMCache's multiprocess server, on a CPU; the port of its HTTP server."""
    port, http_port = free_ports(2)
    where = ["--host", "localhost", "--port", str(port), "--http-host", "127.0.0.1", "--http-port", str(http_port)]
    memory = ["--l1-size-gb", "1", "--eviction-policy", "LRU"]
    yield from _serving(python, folder, "lmcache.v1.multiprocess.http_server", [*where, *memory], http_port)


@contextlib.contextmanager
def running_controller(python: str, folder: Path) -> Iterator[int]:
    """LMCache's own controller server; its port."""
    port, pull, reply = free_ports(3)
    monitor = json.dumps({"pull": pull, "reply": reply})
    options = ["--host", "127.0.0.1", "--port", str(port), "--monitor-ports", monitor]
    yield from _serving(python, folder, "lmcache.v1.api_server", options, port)


def _serving(python: str, folder: Path, module: str, options: Sequence[str], port: int) -> Iterator[int]:
    log = folder / f"{module}.log"
    with _started([python, "-m", module, *options], log, environ=lmcache_environ(folder)) as child:
        child.wait_until(lambda: _answers(port, "/metrics"), seconds=START_SECONDS, what=module)
        yield port


@contextlib.contextmanager
def starting_worker(python: str, folder: Path, instance: str, pull: int, reply: int, port: int) -> Iterator[Engine]:
    """A standalone engine behind our server; it registers with the controller at these ports and is asked at `port`."""
    extra = {
        "lmcache_instance_id": instance,
        "enable_controller": "true",
        "controller_pull_url": f"127.0.0.1:{pull}",
        "controller_reply_url": f"127.0.0.1:{reply}",
        "lmcache_worker_ports": f"[{port}]",
    }
    config = _write_config(folder, **extra)
    command = [python, "-m", "lmcache_api", "--engine", "lmcache", "--config", str(config)]
    environ = lmcache_environ(folder, PYTHONPATH=str(ROOT / "src"))
    with _started(command, folder / "engine.log", environ=environ) as child:
        yield Engine(child.process, child.log, folder / f"lm_{WORKER_PORT}")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


@contextlib.contextmanager
def running_program(python: str, folder: Path, *options: str, **variables: str) -> Iterator[Child]:
    """`python -m lmcache_api --engine lmcache` of this project; `Child.log` has what it says."""
    config = _write_config(folder)
    command = [python, "-m", "lmcache_api", "--engine", "lmcache", "--config", str(config), *options]
    environ = lmcache_environ(folder, PYTHONPATH=str(ROOT / "src"), **variables)
    with _started(command, folder / "program.log", environ=environ) as child:
        yield child


@contextlib.contextmanager
def running_frontend(folder: Path, nodes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """`python -m lmcache_frontend` of this project, before `nodes`; its URL."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    options = ["--port", str(port), "--host", "127.0.0.1", "--nodes", json.dumps(list(nodes))]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
    command = [sys.executable, "-m", "lmcache_frontend", *options]
    with _started(command, folder / "frontend.log", environ=environ) as child:
        child.wait_until(lambda: _answers(port, "/health"), seconds=FRONTEND_START_SECONDS, what="the frontend")
        yield f"http://127.0.0.1:{port}"


def lmcache_environ(folder: Path, **variables: str) -> dict[str, str]:
    """No setting and no secret of the caller's, no usage report to anybody, and a home that goes with the folder."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
    own = {"HOME": str(folder), "TMPDIR": str(folder), "LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0"}
    return {**kept, **own, **variables}


def node_at(path: Path) -> dict[str, str]:
    """The frontend's node for the engine on this socket."""
    return {"name": NODE, "host": "localhost", "port": str(path)}


def client_of(where: Path | str) -> aiohttp.ClientSession:
    """A client for the server on a socket, or at a URL."""
    timeout = aiohttp.ClientTimeout(total=ASK_SECONDS)
    if isinstance(where, Path):
        return aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(str(where)), timeout=timeout)
    return aiohttp.ClientSession(where, timeout=timeout)


@dataclass(frozen=True)
class Answer:
    """What a client can tell apart: status, media type with its charset, and the body's bytes."""

    status: int
    media_type: str
    charset: str | None
    body: bytes

    @property
    def head(self) -> tuple[int, str, str | None]:
        return self.status, self.media_type, self.charset

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


async def ask(client: aiohttp.ClientSession, method: str, path: str, **how: Any) -> Answer:
    """`path` goes out as it is written, nothing decoded or encoded anew."""
    async with client.request(method, URL(path, encoded=True), allow_redirects=False, **how) as response:
        return Answer(response.status, response.content_type, response.charset, await response.read())


@contextlib.contextmanager
def _started(command: Sequence[str], log: Path, *, environ: Mapping[str, str], **pipes: Any) -> Iterator[Child]:
    with log.open("wb") as output:
        how = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, **pipes}
        process = subprocess.Popen(command, cwd=log.parent, env=dict(environ), **how)
    child = Child(process, log)
    try:
        yield child
    finally:
        child.end()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _write_config(folder: Path, **extra: str) -> Path:
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    config = folder / "lm.yaml"
    config.write_text(
        f"""chunk_size: 256
local_cpu: true
max_local_cpu_size: 1
local_disk: "file://{disk}/"
max_local_disk_size: 1
internal_api_server_enabled: true
internal_api_server_port_start: {SCHEDULER_PORT}
internal_api_server_socket_path_prefix: {folder}/lm
"""
        + "".join(f"{key}: {value}\n" for key, value in extra.items())
    )
    return config


def _answers(where: Path | int, path: str) -> bool:
    """Whether a server on this socket or port answers 200."""
    family, address = (
        (socket.AF_UNIX, str(where)) if isinstance(where, Path) else (socket.AF_INET, ("127.0.0.1", where))
    )
    with socket.socket(family) as sock:
        sock.settimeout(1)
        try:
            sock.connect(address)
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return sock.recv(12) == b"HTTP/1.1 200"
        except OSError:
            return False
