"""What the benchmark programs share: host processes, their CPU time, connections that are kept, ratios, and the end.

A program starts hosts, asks them over HTTP and through pipes, and tells ratios within pairs: what is compared takes
turns, so that a busy moment of the machine meets both. CPU time is read from outside by the kernel's clocks, so that
measuring costs the host nothing.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

CHILD_SECONDS = 1800.0
"""A host process that lives longer is ended, and the benchmark fails."""

REQUEST_SECONDS = 30.0
POLL_SECONDS = 0.0005
LIBRARIES = ("lmcache-ops", "aiohttp", "uvloop", "prometheus-client")
MAX_SHOWN = 300


class BenchmarkError(Exception):
    """There is nothing to tell; the text says why, in one line."""


def run(name: str, parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], dict[str, Any]]) -> int:
    """The whole of a program: options, its measuring, the raw numbers into `--json`, one line for what goes wrong."""
    parser.add_argument("--json", metavar="FILE", help="write the raw numbers there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        numbers = measure(options)
        if options.json:
            Path(options.json).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    except (BenchmarkError, OSError, http.client.HTTPException) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def count_option(parser: argparse.ArgumentParser, name: str, default: int, most: int, help: str) -> None:
    text = f"{help}, 1 to {most} (default: %(default)s)"
    parser.add_argument(name, type=int, choices=range(1, most + 1), metavar="N", default=default, help=text)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder whose path leaves room for a socket: the kernel takes 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class Child:
    """A host process: each line that it is sent is a question, and is answered with one line of words."""

    def __init__(self, process: subprocess.Popen[str], log: Path | None) -> None:
        self._process = process
        self._log = log

    @classmethod
    @contextlib.contextmanager
    def started(
        cls, command: Sequence[str], *, environ: Mapping[str, str] | None = None, log: Path | None = None
    ) -> Iterator[Child]:
        """A fresh process, gone at the end whatever happens; it also ends by itself when its standard input does.

        Args:
            command: what to run.
            environ: its whole environment, ours when `None`.
            log: where its standard error goes, ours when `None`.
        """
        with contextlib.ExitStack() as stack:
            errors = stack.enter_context(log.open("wb")) if log is not None else None
            process = subprocess.Popen(
                command,
                env=None if environ is None else dict(environ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C is for the program, which ends the process
            )
            watchdog = threading.Timer(CHILD_SECONDS, process.kill)
            watchdog.daemon = True
            watchdog.start()
            try:
                yield cls(process, log)
            finally:
                watchdog.cancel()
                process.kill()
                with contextlib.suppress(BrokenPipeError):
                    process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, question: str) -> list[str]:
        assert self._process.stdin is not None, "it is started with a pipe"
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self.ended() from None
        return self.line()

    def line(self) -> list[str]:
        assert self._process.stdout is not None, "it is started with a pipe"
        words = self._process.stdout.readline().split()
        if not words:
            raise self.ended()
        return words

    def ended(self) -> BenchmarkError:
        """It has ended, or was killed because it took too long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        lines = self._log.read_text(errors="replace").split("\n") if self._log is not None else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was logged")
        return BenchmarkError(f"a host process ended (code {self._process.returncode}): {last[:MAX_SHOWN]}")

    def wait_for_answer(self, path: Path) -> float:
        """The time at which the first `GET /version` on this socket is answered; asked as soon as somebody listens."""
        while self._process.poll() is None:
            try:
                with connection(path) as client:
                    get(client, "/version")
                    return time.monotonic()
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(POLL_SECONDS)
        raise self.ended()

    def cpu(self) -> float:
        """Seconds of CPU time of the process until now, less those of the thread that answers our questions.

        Raises:
            BenchmarkError: the kernel does not tell.
        """
        pid = self._process.pid
        try:
            whole = time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)
            asked = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text(encoding="ascii").split()[0]
        except OSError as error:
            if self._process.poll() is not None:
                raise self.ended() from None
            raise BenchmarkError(f"the kernel does not tell the CPU time of another process: {error}") from None
        return whole - int(asked) / 1e9

    def cpu_of(self, act: Callable[[], object]) -> float:
        """The seconds of CPU time that the process takes while we `act`."""
        before = self.cpu()
        act()
        return self.cpu() - before


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=REQUEST_SECONDS)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(REQUEST_SECONDS)
        self.sock.connect(self._path)


@contextlib.contextmanager
def connection(path: Path) -> Iterator[http.client.HTTPConnection]:
    """A connection to the server on this socket, kept until the end."""
    client = _UnixConnection(path)
    with contextlib.closing(client):
        client.connect()
        yield client


def get(client: http.client.HTTPConnection, path: str, times: int = 1) -> bytes:
    """The last of so many answers, all on this one connection."""
    body = b""
    for _ in range(times):
        client.request("GET", path)
        response = client.getresponse()
        body = response.read()
        if response.status != 200 or response.will_close:
            raise BenchmarkError(f"GET {path}: status {response.status}, or the connection is not kept")
    return body


def families_of(exposition: bytes) -> set[str]:
    """The names of the metrics in a text of Prometheus."""
    return {line.split()[2] for line in exposition.decode().splitlines() if line.startswith("# TYPE ")}


def ratios_of(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The ratio within each pair that has one."""
    return [our / their for our, their in zip(ours, theirs, strict=True) if their > 0]


def ratio_cells(ours: Sequence[float], theirs: Sequence[float], digits: int) -> list[str]:
    """A row of `RATIO_HEADS`: both medians, the median of the ratios within the pairs, and how far they spread."""
    ratios = ratios_of(ours, theirs)
    medians = [f"{statistics.median(values):.{digits}f}" for values in (ours, theirs)]
    if not ratios:
        return [*medians, "-", "-", "-", "-"]
    half = f"{sum(ratio <= 0.5 for ratio in ratios)} of {len(ratios)}"
    return [*medians, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}", half]


RATIO_HEADS = ("", "ours", "peer", "ours/peer", "least", "greatest", "at most half")


def table_text(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def describe_machine(libraries: Sequence[str] = LIBRARIES) -> dict[str, Any]:
    """What the numbers depend on.

    Raises:
        BenchmarkError: what is to be measured is not installed.
    """
    versions = {}
    for name in libraries:
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
