"""What checking a fleet costs: the CPU of the whole frontend, for 100 and for 1,000 nodes, beside aiohttp's client.

The nodes are served by another process, half on Unix sockets and half on TCP ports. The frontend is the real one, as an
operator starts it, with nobody looking at it. The peer asks the same nodes as often with an `aiohttp.ClientSession` for
each check. CPU time is the kernel's of that process alone, all its threads, after every node has been checked once.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).parent
WARM_UP_SECONDS = 12.0
LIBRARIES = ("lmcache-ops", "aiohttp", "uvloop", "httptools")

Started = contextlib.AbstractContextManager["subprocess.Popen[str]"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for the nodes' process, which inherits it
    machine = harness.describe_machine(LIBRARIES)
    print(harness.machine_text(machine))
    rows: list[list[str]] = []
    runs: list[dict[str, Any]] = []
    kinds: dict[str, Callable[[Path, str], Started]] = {"frontend": _frontend, "peer": _peer}
    for count in options.nodes:
        with (
            harness.short_folder() as folder,
            harness.Child.started(
                [sys.executable, str(HERE / "health_host.py"), "nodes", str(folder), str(count)]
            ) as nodes,
        ):
            nodes.line()
            found = {}
            for kind, start in kinds.items():
                harness.progress(f"{kind}, {count} nodes: {WARM_UP_SECONDS + options.seconds:g} seconds")
                with start(folder / "nodes.json", options.interval) as process:
                    found[kind] = _measure(process, nodes, options.seconds)
        runs += [{"kind": kind, "nodes": count, **run} for kind, run in found.items()]
        for kind, run in found.items():
            ratio = f"{run['microseconds'] / found['peer']['microseconds']:.2f}"
            cells = [f"{run['checks']:.1f}", f"{run['cores']:.4f}", f"{run['microseconds']:.0f}", ratio]
            rows.append([f"{kind}, {count} nodes", *cells])
    print()
    print(harness.table_text(("", "requests/s", "cores used", "CPU/request, us", "of the peer's"), rows))
    return {"machine": machine, "runs": runs}


def _measure(process: subprocess.Popen[str], nodes: harness.Child, seconds: float) -> dict[str, float]:
    time.sleep(WARM_UP_SECONDS)
    requests, cpu, clock = int(nodes.ask("count")[0]), _cpu(process), time.monotonic()
    time.sleep(seconds)
    requests, cpu, clock = int(nodes.ask("count")[0]) - requests, _cpu(process) - cpu, time.monotonic() - clock
    if process.poll() is not None or requests < 1:
        raise harness.BenchmarkError("nothing was checked, or the process that checks has ended")
    return {"checks": requests / clock, "cores": cpu / clock, "microseconds": cpu / requests * 1e6}


def _cpu(process: subprocess.Popen[str]) -> float:
    """Seconds of CPU time until now."""
    return time.clock_gettime((~process.pid << 3) | 2)  # clock_getcpuclockid(3)


def _frontend(file: Path, interval: str) -> Started:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    listen = ["--host", "127.0.0.1", "--port", str(port)]
    return _started("-m", "lmcache_frontend", *listen, "--config", str(file), "--health-interval", interval)


def _peer(file: Path, interval: str) -> Started:
    return _started(str(HERE / "health_host.py"), "peer", str(file), interval)


@contextlib.contextmanager
def _started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the program, which ends the process
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def main() -> int:
    parser = argparse.ArgumentParser(description="What continuous health checks cost.")
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000], metavar="N", help="default: 100 1000")
    parser.add_argument("--interval", default="10", help="seconds between two checks of a node (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=30, help="how long each is measured (default: %(default)s)")
    return harness.run("health.py", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
