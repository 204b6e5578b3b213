"""`make bench`: what the internal API server costs the process that hosts it, beside FastAPI and uvicorn.

Each number comes from a host process of its own (`host_process.py`), and the two servers take turns, so that a busy
moment of the machine meets both; what is told is the ratio within a pair. This program is the client: its own work is
no part of any number. It compares what both servers serve before it measures them, and says what differs.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.metadata
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "lmcache-ops"
PEERS = {
    "fastapi": "FastAPI + uvicorn as LMCache has them",
    "fastapi-lean": "FastAPI + uvicorn at their leanest: on uvloop, no WebSockets, no documentation pages",
}

IDLE_SECONDS = 2.0
SETTLE_SECONDS = 0.3
WARM_REQUESTS = 50
MEMORY_REQUESTS = 100
VERSION_REQUESTS = 1000
METRICS_REQUESTS = 300

MAX_PAIRS = 100
HOST_SECONDS = 120.0
"""A host process that lives longer is ended, and the benchmark fails."""

REQUEST_SECONDS = 10.0
POLL_SECONDS = 0.0005

LIBRARIES = (
    "lmcache-ops", "aiohttp", "uvloop", "prometheus-client", "fastapi", "starlette", "pydantic", "uvicorn", "httptools",
)  # fmt: skip

Numbers = dict[str, float]


class BenchmarkError(Exception):
    """There is nothing to tell; the text says why, in one line."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    key: str
    title: str
    digits: int


ROWS = (
    Row("import_ms", "import, ms", 0),
    Row("import_cpu_ms", "CPU of the import, ms", 0),
    Row("first_answer_ms", "import to first answer, ms", 0),
    Row("rss_mib", "resident memory, MiB", 1),
    Row("pss_mib", "proportional memory (Pss), MiB", 1),
    Row("idle_ms", f"CPU of {IDLE_SECONDS:g} s idle, ms", 2),
    Row("version_us", "CPU of GET /version, us", 0),
    Row("metrics_us", "CPU of GET /metrics, us", 0),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        machine = describe_machine()
        print(machine_text(machine), flush=True)
        with tempfile.TemporaryDirectory(prefix="bench") as folder:
            differences = compare(options.peer, folder)  # this also fills the bytecode cache of both
            pairs = measure_pairs(options.peer, options.pairs, folder)
        print(table(pairs, PEERS[options.peer], differences), flush=True)
        if options.json:
            result = {"machine": machine, "peer": options.peer, "differences": differences, "pairs": pairs}
            Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (BenchmarkError, OSError, http.client.HTTPException) as error:
        print(f"make bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure what the internal API server costs its host process.")
    parser.add_argument(
        "--pairs", type=int, choices=range(1, MAX_PAIRS + 1), metavar="N", default=7, help="default: %(default)s"
    )
    parser.add_argument("--peer", choices=tuple(PEERS), default="fastapi", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the raw numbers there")
    return parser


def measure_pairs(peer: str, count: int, folder: str) -> list[dict[str, Numbers]]:
    """The numbers of both servers, `count` times in turn."""
    pairs = []
    for number in range(1, count + 1):
        print(f"pair {number} of {count}", file=sys.stderr, flush=True)
        pairs.append({"ours": measure(OURS, folder), "peer": measure(peer, folder)})
    return pairs


def measure(server: str, folder: str) -> Numbers:
    """Start a host process with this server, and take every number from it."""
    with Host.started(server, folder) as host:
        answered = host.wait_for_answer()
        began, imported, import_cpu, modules, rss, pss = host.first_line()
        numbers = {
            "import_ms": (imported - began) * 1e3,
            "import_cpu_ms": import_cpu * 1e3,
            "first_answer_ms": (answered - began) * 1e3,
            "modules_imported": modules,
        }
        with host.connection() as connection:
            _get(connection, "/version", MEMORY_REQUESTS)
        rss_now, pss_now = host.ask("memory")
        numbers["modules_loaded"] = host.ask("modules")[0]
        numbers["rss_mib"] = (rss_now - rss) / 1024
        if pss:
            numbers["pss_mib"] = (pss_now - pss) / 1024
        time.sleep(SETTLE_SECONDS)
        numbers["idle_ms"] = host.cpu_of(lambda: time.sleep(IDLE_SECONDS)) * 1e3
        for path, key, requests in (
            ("/version", "version_us", VERSION_REQUESTS),
            ("/metrics", "metrics_us", METRICS_REQUESTS),
        ):
            with host.connection() as connection:
                _get(connection, path, WARM_REQUESTS)
                seconds = host.cpu_of(lambda: _get(connection, path, requests))  # noqa: B023 - called at once
            numbers[key] = seconds / requests * 1e6
        return numbers


def compare(peer: str, folder: str) -> list[str]:
    """What the two servers do not have in common and ought to, for people; empty when they can be compared."""
    served: list[tuple[set[str], bytes, set[str]]] = []
    for server in (OURS, peer):
        with Host.started(server, folder) as host:
            host.wait_for_answer()
            host.first_line()
            with host.connection() as connection:
                version = _get(connection, "/version", 1)
                families = _get(connection, "/metrics", 1).decode().splitlines()
            names = {line.split()[2] for line in families if line.startswith("# TYPE ")}
            served.append((set(host.ask_words("routes")), version, names))
    ours, theirs = served
    different = [
        *(f"only {who} serves {route}" for who, route in _either(ours[0], theirs[0])),
        *(f"only {who} has the metric {name}" for who, name in _either(ours[2], theirs[2])),
    ]
    return different if ours[1] == theirs[1] else [*different, f"/version is {ours[1]!r} here, {theirs[1]!r} there"]


def _either(ours: set[str], theirs: set[str]) -> list[tuple[str, str]]:
    return [("ours", it) for it in sorted(ours - theirs)] + [("the peer", it) for it in sorted(theirs - ours)]


class Host:
    """A running `host_process.py`, its socket, and the questions that it answers."""

    def __init__(self, process: subprocess.Popen[str], path: str) -> None:
        self._process = process
        self._path = path

    @classmethod
    @contextlib.contextmanager
    def started(cls, server: str, folder: str) -> Iterator[Host]:
        """A fresh process; it is gone at the end, and so is its socket.

        Both servers' bytecode is cached in `folder`, whatever the environment says of caching it.
        """
        prefix = f"{folder}/{server}"
        program = Path(__file__).with_name("host_process.py")
        python = [sys.executable, "-E", "-s", "-X", f"pycache_prefix={folder}/bytecode"]
        process = subprocess.Popen(
            [*python, str(program), server, prefix],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        watchdog = threading.Timer(HOST_SECONDS, process.kill)
        watchdog.daemon = True
        watchdog.start()
        path = f"{prefix}_6999"
        try:
            yield cls(process, path)
        except BrokenPipeError:
            raise BenchmarkError(f"the host process of {server} has ended") from None
        finally:
            watchdog.cancel()
            process.kill()
            process.communicate()
            Path(path).unlink(missing_ok=True)

    def wait_for_answer(self) -> float:
        """The time at which the first `GET /version` is answered; asked for as soon as somebody listens."""
        while self._process.poll() is None:
            try:
                with self.connection() as connection:
                    _get(connection, "/version", 1)
                    return time.monotonic()
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(POLL_SECONDS)
        raise BenchmarkError(f"the host process ended with code {self._process.returncode} before it served")

    def first_line(self) -> list[float]:
        return [float(word) for word in self._line()]

    def ask(self, question: str) -> list[float]:
        return [float(word) for word in self.ask_words(question)]

    def ask_words(self, question: str) -> list[str]:
        assert self._process.stdin is not None, "it is started with a pipe"
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return self._line()

    def cpu_of(self, act: Callable[[], object]) -> float:
        """The seconds of CPU time that the host process takes while we `act`."""
        before = self.ask("cpu")[0]
        act()
        return self.ask("cpu")[0] - before

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = _UnixConnection(self._path)
        with contextlib.closing(connection):
            connection.connect()
            yield connection

    def _line(self) -> list[str]:
        assert self._process.stdout is not None, "it is started with a pipe"
        words = self._process.stdout.readline().split()
        if not words:
            raise BenchmarkError("the host process has ended, or was killed because it took too long")
        return words


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=REQUEST_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(REQUEST_SECONDS)
        self.sock.connect(self._path)


def _get(connection: http.client.HTTPConnection, path: str, times: int) -> bytes:
    """The last of so many answers, all on this one connection."""
    body = b""
    for _ in range(times):
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200 or response.will_close:
            raise BenchmarkError(f"GET {path}: status {response.status}, or the connection is not kept")
    return body


def table(pairs: Sequence[Mapping[str, Numbers]], peer: str, differences: Sequence[str]) -> str:
    """Medians of both, and of the ratios within the pairs with the least and the greatest."""
    heads = ("", "ours", "peer", "ours/peer", "least", "greatest")
    lines = [[*heads]]
    for row in ROWS:
        if not all(row.key in pair[side] for pair in pairs for side in ("ours", "peer")):
            continue
        ours, theirs = ([pair[side][row.key] for pair in pairs] for side in ("ours", "peer"))
        medians = [f"{statistics.median(values):.{row.digits}f}" for values in (ours, theirs)]
        ratios = [our / their for our, their in zip(ours, theirs, strict=True) if their > 0]
        told = [f"{it:.2f}" for it in (statistics.median(ratios), min(ratios), max(ratios))] if ratios else ["-"] * 3
        lines.append([row.title, *medians, *told])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
    notes = "".join(f"\nNot the same on both sides: {it}" for it in differences)
    return f"\nPeer: {peer}. Medians of {len(pairs)} pairs; below 1, ours costs less.\n\n{text}\n{notes}"


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on.

    Raises:
        BenchmarkError: what is to be measured is not installed.
    """
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise BenchmarkError(f"{name} is not installed; `make bench` installs all that is needed") from None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown processor"


def machine_text(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cores']} cores ({machine['processor']}), {machine['system']}, {machine['python']},"
        f" load {machine['load']} before the run\n{versions}"
    )


if __name__ == "__main__":
    sys.exit(main())
