"""What the proxy costs: beside one nginx worker, LMCache's bundled dashboard and a plain aiohttp proxy, in one run.

All of them stand before the same Unix socket, on which another nginx answers 7 bytes of JSON or a large file. They take
turns, each with 32 keep-alive connections of one load generator, which is a process of its own; `ratio` is the median
over the rounds of this one's requests per second by nginx's in the same round. CPU time is that of the
worker alone, with `--workers` of all processes. Memory is the greatest resident size that the kernel knows of them
(`VmHWM`) beyond that before the large body. Up: a body as large, to a socket on which it is read and thrown away.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).parent
LIBRARIES = ("lmcache-ops", "aiohttp", "uvloop", "httptools")
START_SECONDS = 60.0
DASHBOARD = "/tmp/real/venv/bin/python"
LARGE = "large"

NGINX = """
daemon off; worker_processes 1; pid {folder}/{name}.pid; error_log {folder}/{name}.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000; sendfile on; default_type application/json;
  client_body_temp_path {folder}/{name}.body; proxy_temp_path {folder}/{name}.proxy;
  fastcgi_temp_path {folder}/{name}.f; uwsgi_temp_path {folder}/{name}.u; scgi_temp_path {folder}/{name}.s;
  {rest}
}}
"""
SERVED = """server {{ listen unix:{folder}/up; root {folder}/files;
  location = /small {{ return 200 '{{"a":1}}'; }} }}"""
PROXY = """upstream up {{ server unix:{folder}/up; keepalive 64; keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{port}; proxy_http_version 1.1; proxy_set_header Connection "";
  proxy_max_temp_file_size 0; proxy_request_buffering off; client_max_body_size 0;
  location / {{ proxy_pass http://up; }} location /sink {{ proxy_pass http://unix:{folder}/sink; }} }}"""


@dataclass
class Contender:
    name: str
    port: int
    path: str
    pid: int
    sink: str = ""
    """Where a large body may be sent."""
    workers: Sequence[int] = ()
    """Further processes."""
    rates: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Microseconds for each request."""
    speeds: list[float] = field(default_factory=list)
    grown: float = 0.0
    uploads: list[float] = field(default_factory=list)

    def cpu_seconds(self) -> float:
        """Of CPU time until now."""
        return sum(_cpu(pid) for pid in (self.pid, *self.workers))

    def memory(self, key: str) -> int:
        return sum(memory(pid, key) for pid in (self.pid, *self.workers))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    machine = harness.describe_machine(LIBRARIES)
    print(harness.machine_text(machine))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(harness.short_folder())
        folder.chmod(0o755)
        (folder / "files").mkdir()
        with (folder / "files" / LARGE).open("wb") as file:
            file.truncate(options.mib << 20)
        stack.enter_context(_nginx(folder, "up", SERVED.format(folder=folder)))
        sink = [sys.executable, str(HERE / "proxy_host.py"), "sink", f"{folder}/sink"]
        stack.enter_context(process(*sink, log=folder / "sink.log"))
        load = stack.enter_context(harness.Child.started([sys.executable, str(HERE / "proxy_host.py"), "load"]))
        contenders = [start(stack, folder) for start in _starts(options)]
        for number in range(options.rounds):
            for one in contenders:
                harness.progress(f"round {number + 1}, {one.name}")
                cpu = one.cpu_seconds()
                words = load.ask(f"small {one.port} {one.path}small 32 {options.seconds} {options.varied:d}")
                if words[0] == "failed":
                    raise harness.BenchmarkError(f"{one.name}: {' '.join(words)}")
                one.rates.append(int(words[0]) / float(words[1]))
                one.p99.append(float(words[3]))
                one.cpu.append((one.cpu_seconds() - cpu) / int(words[4]) * 1e6)
        for number in range(options.rounds if options.mib else 0):
            for one in contenders:
                if one.name == "dashboard" and number:
                    continue  # it holds the body whole
                _large(load, one, options.mib)
    print()
    heads = (
        "",
        "requests/s",
        "ratio",
        "p99, ms",
        "ratio",
        "CPU, us",
        "ratio",
        "MB/s",
        "ratio",
        "MiB grown",
        "up, MB/s",
        "ratio",
    )
    print(harness.table_text(heads, [_row(one, contenders[0]) for one in contenders]))
    return {"machine": machine, "contenders": [vars(one) for one in contenders]}


def _large(load: harness.Child, one: Contender, mib: int) -> None:
    """A large body down, and one up."""
    before = one.memory("VmRSS")
    for pid in (one.pid, *one.workers):
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # the mark begins anew
    words = load.ask(f"large {one.port} {one.path}{LARGE}")
    one.speeds.append(int(words[0]) / float(words[1]))
    if int(words[0]) < mib << 20:
        raise harness.BenchmarkError(f"{one.name}: the large body is cut: {words[0]} bytes")
    one.grown = max(one.grown, (one.memory("VmHWM") - before) / 1024)
    if one.sink:
        words = load.ask(f"upload {one.port} {one.sink} {mib}")
        if words[0] == "failed":
            raise harness.BenchmarkError(f"{one.name}: {' '.join(words)}")
        one.uploads.append(int(words[0]) / float(words[1]))


def _row(one: Contender, nginx: Contender) -> list[str]:
    cells = [one.name, f"{statistics.median(one.rates):.0f}", _ratio(one.rates, nginx.rates)]
    cells += [f"{statistics.median(one.p99):.2f}", _ratio(one.p99, nginx.p99)]
    cells += [f"{statistics.median(one.cpu):.1f}", _ratio(one.cpu, nginx.cpu)]
    if not one.speeds:
        return [*cells, *"-----"]
    cells += [f"{statistics.median(one.speeds) / 1e6:.0f}", _ratio(one.speeds, nginx.speeds), f"{one.grown:.1f}"]
    if not one.uploads:
        return [*cells, "-", "-"]
    return [*cells, f"{statistics.median(one.uploads) / 1e6:.0f}", _ratio(one.uploads, nginx.uploads)]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    return f"{statistics.median(mine / their for mine, their in zip(ours, theirs, strict=False)):.3f}"


def _cpu(pid: int) -> float:
    """Seconds of CPU time until now."""
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)


def memory(pid: int, key: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(text.partition(f"{key}:")[2].split()[0])


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def process(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=errors, stderr=errors)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _nginx(folder: Path, name: str, rest: str) -> Iterator[int]:
    """The worker's process id."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    file = folder / f"{name}.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    file.write_text(user + NGINX.format(folder=folder, name=name, rest=rest), encoding="utf-8")
    with process(program, "-p", str(folder), "-c", str(file), log=folder / f"{name}.out") as master:
        deadline = time.monotonic() + START_SECONDS
        while not (found := _children(master.pid)):
            if time.monotonic() > deadline or master.poll() is not None:
                raise harness.BenchmarkError((folder / f"{name}.out").read_text(errors="replace")[:300] or "no nginx")
            time.sleep(0.05)
        yield found[0]


def _ready(one: Contender) -> Contender:
    wait_for_port(one.port)
    return one


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if time.monotonic() > deadline:
            raise harness.BenchmarkError(f"nobody listens on port {port}")
        time.sleep(0.1)


def _reference(stack: contextlib.ExitStack, folder: Path) -> Contender:
    port = free_port()
    pid = stack.enter_context(_nginx(folder, "proxy", PROXY.format(port=port, folder=folder)))
    return _ready(Contender("nginx", port, "/", pid, sink="/sink"))


def _ours(stack: contextlib.ExitStack, folder: Path, workers: int = 1) -> Contender:
    port = free_port()
    nodes = json.dumps([{"name": name, "host": "localhost", "port": f"{folder}/{name}"} for name in ("up", "sink")])
    command = [sys.executable, "-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(port), "--nodes", nodes]
    command += ["--registry", "memory", "--workers", str(workers)]
    log = folder / f"ours{workers}.log"
    started = stack.enter_context(process(*command, log=log))
    deadline = time.monotonic() + START_SECONDS
    while b"serves on" not in log.read_bytes():  # its workers do too
        if time.monotonic() > deadline or started.poll() is not None:
            raise harness.BenchmarkError(log.read_text(errors="replace")[:300] or "the frontend does not start")
        time.sleep(0.05)
    name = "frontend" if workers == 1 else f"frontend, {workers} workers"
    return Contender(name, port, "/proxy2/up/", started.pid, sink="/proxy2/sink/", workers=_children(started.pid))


def _plain(stack: contextlib.ExitStack, folder: Path) -> Contender:
    port = free_port()
    command = [sys.executable, str(HERE / "proxy_host.py"), "plain", str(port), f"{folder}/up"]
    return _ready(
        Contender("plain aiohttp", port, "/", stack.enter_context(process(*command, log=folder / "plain.log")).pid)
    )


def _dashboard(stack: contextlib.ExitStack, folder: Path) -> Contender:
    port = free_port()
    nodes = f'[{{"name": "up", "host": "localhost", "port": "{folder}/up"}}]'
    command = [DASHBOARD, "-m", "lmcache.lmcache_frontend.app", "--host", "127.0.0.1", "--port", str(port)]
    started = stack.enter_context(process(*command, "--nodes", nodes, log=folder / "dashboard.log"))
    quoted = f"{folder}/up".replace("/", "%252F")
    return _ready(Contender("dashboard", port, f"/proxy/localhost/{quoted}/", started.pid))


def _starts(options: argparse.Namespace) -> list[Callable[[contextlib.ExitStack, Path], Contender]]:
    several = [functools.partial(_ours, workers=options.workers)] if options.workers > 1 else []
    return [_reference, _ours, *several, _plain, *([_dashboard] if options.dashboard else [])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    harness.count_option(parser, "--rounds", 3, 20, "rounds, of which each has everyone's turn")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one turn (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=1024, help="of the large body; 0 for none (default: %(default)s)")
    parser.add_argument("--varied", action="store_true", help="no two requests alike: each has a field of its own")
    parser.add_argument("--workers", type=int, default=1, help="the frontend with so many processes, too")
    parser.add_argument("--dashboard", action="store_true", help=f"LMCache's bundled dashboard too ({DASHBOARD})")
    return harness.run("proxy", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
