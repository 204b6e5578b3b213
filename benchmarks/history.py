"""What the history costs: memory of a full day, CPU and waiting of its rounds, and what it takes to ask it.

The nodes are served by another process, half on Unix sockets and half on TCP ports, each with 57 KB of metrics of which
some move. The frontend is the whole one with nobody looking, once with its history and once without, which is the
peer: the difference is what the history takes.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness

HOST = str(Path(__file__).parent / "history_host.py")
WARM_UP_SECONDS = 25.0
"""Two rounds of the health board, which first finds the nodes to be up, and two of the history."""

LIBRARIES = ("lmcache-ops", "uvloop", "httptools")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for the other processes, which inherit it
    machine = harness.describe_machine(LIBRARIES)
    print(harness.machine_text(machine))
    rows, filled, runs = [], [], []
    for count in options.nodes:
        with harness.Child.started([sys.executable, HOST, "fill", str(count)]) as child:
            size, *took = map(float, child.line())
        filled.append({"nodes": count, "bytes": size, "milliseconds": took})
        rows.append([f"{count} nodes", f"{size / (1 << 20):.0f}", f"{size / count / 1000:.0f}", *map(str, took)])
    heads = ("", "MiB", "KB a node", "latest of all, ms", "sparklines of all, ms", "an hour, ms", "a day, ms")
    print("\n" + harness.table_text(heads, rows))
    rows = []
    for count in options.nodes:
        with harness.short_folder() as folder, _nodes(folder, count) as nodes:
            for mode in ("on", "off"):
                harness.progress(f"history {mode}, {count} nodes: {WARM_UP_SECONDS + options.seconds:g} seconds")
                run = {"nodes": count, "history": mode, **_run(folder, nodes, mode, options.seconds)}
                runs.append(run)
                cells = [f"{run[key]:{form}}" for key, form in COLUMNS.items()]
                rows.append([f"{count} nodes, {mode}", *cells])
    print("\n" + harness.table_text(("", *HEADS), rows))
    return {"machine": machine, "filled": filled, "runs": runs}


COLUMNS = {
    "answers": ".0f",
    "cores": ".3f",
    "MiB": ".0f",
    "p50": ".1f",
    "p99": ".1f",
    "p999": ".1f",
    "most": ".1f",
    "interval": "g",
}
HEADS = ("answers/s", "cores used", "MiB", "waits p50, ms", "p99", "p99.9", "longest", "interval, s")


@contextlib.contextmanager
def _nodes(folder: Path, count: int) -> Iterator[harness.Child]:
    with harness.Child.started([sys.executable, HOST, "nodes", str(folder), str(count)]) as nodes:
        nodes.line()
        yield nodes


def _run(folder: Path, nodes: harness.Child, mode: str, seconds: float) -> dict[str, float]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    command = [sys.executable, HOST, "frontend", str(folder / "nodes.json"), port, mode]
    with harness.Child.started(command) as frontend:
        frontend.line()
        time.sleep(WARM_UP_SECONDS)
        frontend.ask("waits")
        answers, cpu, clock = int(nodes.ask("count")[0]), _cpu(frontend), time.monotonic()
        time.sleep(seconds)
        answers, cpu, clock = int(nodes.ask("count")[0]) - answers, _cpu(frontend) - cpu, time.monotonic() - clock
        waits = [float(word) for word in frontend.ask("waits")]
        pages = int(Path(f"/proc/{frontend.pid}/statm").read_text(encoding="ascii").split()[1])
    names = ("p50", "p99", "p999", "most", "interval")
    return {
        "answers": answers / clock,
        "cores": cpu / clock,
        "MiB": pages * 4096 / (1 << 20),
        **dict(zip(names, waits, strict=True)),
    }


def _cpu(process: harness.Child) -> float:
    """Seconds of CPU time until now."""
    return time.clock_gettime((~process.pid << 3) | 2)  # clock_getcpuclockid(3)


def main() -> int:
    parser = argparse.ArgumentParser(description="What the history of the main series costs.")
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000], metavar="N", help="default: 100 1000")
    parser.add_argument("--seconds", type=int, default=30, help="how long each is measured (default: %(default)s)")
    return harness.run("history.py", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
