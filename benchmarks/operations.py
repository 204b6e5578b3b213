"""Operations a second of the internal API, and the CPU time of its process for each.

A host process (`engine_host.py`) has an embedded worker with memory and disk and serves on a Unix socket; this program
is the one client, with 1 connection and with 16 that are kept. Where LMCache is, another host has its standalone engine
with the same memory, disk, chunk size and KV layout, and is asked the same through LMCache's own server and through
ours, as far as a server has the operation. What is asked takes turns within a round; ratios are those within rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import uvloop
from harness import (
    BenchmarkError,
    Child,
    count_option,
    describe_machine,
    machine_text,
    progress,
    ratios_of,
    run,
    short_folder,
    table_text,
)

CONNECTIONS = (1, 16)
MAX_OPERATIONS = 20_000
MAX_STORES = 400
"""In a window, whatever its time. Stores are fewer, so that in 20 rounds they do not fill the disk's budget."""

SETTLE_SECONDS = 0.1
MAX_SETTLE_SECONDS = 10.0
QUIET = 0.1
"""What an engine still does after a window belongs to it: until it takes less than this share of a processor."""

LATE_SECONDS = 30.0
STORED = range(512)
KNOWN_TOKENS = 600

EMBEDDED, PEER, BRIDGE = "ours, embedded engine", "LMCache's, its engine", "ours, LMCache's engine"

Ask = Callable[[], bytes]
Numbers = dict[str, float]


@dataclass(frozen=True)
class Side:
    """A server that is asked, and the process that it costs."""

    child: Child
    socket: Path
    operations: Mapping[str, Ask]


def main() -> int:
    parser = argparse.ArgumentParser(description="Count operations a second of the internal API.")
    engines.add_option(parser)
    parser.add_argument("--embedded", action="store_true", help="the embedded engine alone, although LMCache is there")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a window (default: %(default)s)")
    count_option(parser, "--rounds", 7, 20, "windows of each operation")
    return run("operations", parser, measure)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if not 0.05 <= options.seconds <= 2:
        raise BenchmarkError(f"--seconds {options.seconds:g}: expected 0.05 to 2")
    python = None
    if options.lmcache_python and not options.embedded:
        python = engines.check_lmcache(options.lmcache_python)
    machine = describe_machine()
    print(machine_text(machine), flush=True)
    with short_folder() as folder, running_sides(python, folder) as sides:
        loop = uvloop.new_event_loop()
        try:
            rounds = [
                loop.run_until_complete(measure_round(sides, number, options.rounds, options.seconds))
                for number in range(options.rounds)
            ]
        finally:
            loop.close()
    print(operations_text(rounds), flush=True)
    if python is None:
        print("Without LMCache's own server and engine: " + engines.HOW_TO_FIND)
    return {"machine": machine, "rounds": rounds}


@contextlib.contextmanager
def running_sides(python: str | None, folder: Path) -> Iterator[dict[str, Side]]:
    """Every server that is asked, by its name."""
    with contextlib.ExitStack() as stack:
        embedded = stack.enter_context(engines.running_embedded(folder))
        sides = {EMBEDDED: Side(embedded.child, embedded.ours, make_operations())}
        if python is not None:
            host = stack.enter_context(engines.running_lmcache(python, folder))
            print(f"in LMCache's process: {engines.versions_text(host)}", flush=True)
            both = make_operations()  # of both servers: what one has stored is not new to the other
            own = {name: ask for name, ask in both.items() if not name.startswith("lookup")}
            sides |= {PEER: Side(host.child, host.theirs, own), BRIDGE: Side(host.child, host.ours, both)}
        yield sides


def make_operations() -> dict[str, Ask]:
    """What is asked of one engine; every store is of tokens that it has not seen."""
    starts = itertools.count(len(STORED), len(STORED))

    def store() -> bytes:
        start = next(starts)
        return request("POST", f"/cache/store?tokens_mock={start},{start + len(STORED)}")

    def always(method: str, path: str) -> Ask:
        text = request(method, path)
        return lambda: text

    return {
        "version": always("GET", "/version"),
        f"lookup {KNOWN_TOKENS}": always("GET", f"/cache/lookup?tokens_mock=0,{KNOWN_TOKENS}"),
        f"store {len(STORED)} new": store,
        f"retrieve {len(STORED)} hit": always("POST", f"/cache/retrieve?tokens_mock=0,{len(STORED)}"),
        "freeze/status": always("GET", "/freeze/status"),
        "metrics": always("GET", "/metrics"),
    }


def request(method: str, path: str) -> bytes:
    length = "" if method == "GET" else "Content-Length: 0\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n".encode()


CLEAR = request("DELETE", "/cache/clear")
STORE = request("POST", f"/cache/store?tokens_mock=0,{len(STORED)}")


async def measure_round(sides: Mapping[str, Side], number: int, count: int, seconds: float) -> list[dict[str, Any]]:
    """Every operation in a window on each side; who goes first changes from round to round.

    Stores begin with an empty engine, so that what is measured is no eviction; retrieves with what they ask for.
    """
    progress(f"round {number + 1} of {count}")
    order = [*sides][number % len(sides) :] + [*sides][: number % len(sides)]
    told = []
    for name in sides[EMBEDDED].operations:
        for connections in CONNECTIONS:
            row: dict[str, Any] = {"operation": name, "connections": connections}
            for title in order:
                side = sides[title]
                if name in side.operations:
                    if name.startswith("store"):  # nothing has to leave for what comes
                        await measure_window(side, lambda: CLEAR, 1, seconds=0)
                    elif name.startswith("retrieve"):
                        await measure_window(side, lambda: STORE, 1, seconds=0)
                    most = MAX_STORES if name.startswith("store") else MAX_OPERATIONS
                    row[title] = await measure_window(
                        side, side.operations[name], connections, seconds=seconds, most=most
                    )
            told.append(row)
    return told


async def measure_window(
    side: Side, ask: Ask, connections: int, *, seconds: float, most: int = MAX_OPERATIONS
) -> Numbers:
    """Operations a second and the milliseconds of CPU of each, with so many connections; at least one on each."""
    loop = asyncio.get_running_loop()
    callers = [
        (await loop.create_unix_connection(lambda: Caller(ask), str(side.socket)))[1] for _ in range(connections)
    ]
    try:
        cpu = side.child.cpu()
        began = time.monotonic()
        for caller in callers:
            caller.start(began + seconds, most // connections)
        await asyncio.wait_for(asyncio.gather(*(caller.over for caller in callers)), seconds + LATE_SECONDS)
        passed = time.monotonic() - began
        cpu = await settled_cpu(side.child) - cpu
    except (TimeoutError, asyncio.TimeoutError):
        raise BenchmarkError(f"{ask()[:80]!r}: no answer within {LATE_SECONDS:g} seconds") from None
    finally:
        for caller in callers:
            caller.close()
    done = sum(caller.done for caller in callers)
    return {"operations": done, "per_second": done / passed, "cpu_ms": cpu / done * 1e3}


async def settled_cpu(child: Child) -> float:
    """The CPU time of the process when it has come to rest."""
    cpu = child.cpu()
    for _ in range(round(MAX_SETTLE_SECONDS / SETTLE_SECONDS)):
        before = cpu
        await asyncio.sleep(SETTLE_SECONDS)
        cpu = child.cpu()
        if cpu - before < QUIET * SETTLE_SECONDS:
            break
    return cpu


class Caller(asyncio.Protocol):
    """One connection: asks, and when the whole answer has come asks again."""

    def __init__(self, ask: Ask) -> None:
        self.done = 0
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ask = ask
        self._received = b""
        self._end = 0.0
        self._most = 0
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def start(self, end: float, most: int) -> None:
        """Ask until `end`, by the monotonic clock, and not more than `most` times."""
        self._end, self._most = end, most
        self._send()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        head_end = self._received.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self._received[:head_end].lower()
        length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not head.startswith(b"http/1.1 200") or not length.strip().isdigit():
            self._fail(f"answered {self._received[:200]!r}")
            return
        if len(self._received) < head_end + 4 + int(length):
            return
        self._received = b""
        self.done += 1
        if time.monotonic() < self._end and self.done < self._most:
            self._send()
        elif not self.over.done():
            self.over.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"closed the connection ({error})")

    def _send(self) -> None:
        assert self._transport is not None, "it is connected"
        self._transport.write(self._ask())

    def _fail(self, what: str) -> None:
        if not self.over.done():
            self.over.set_exception(BenchmarkError(f"{self._ask()[:60]!r}: the server {what}"))


def operations_text(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Medians over the rounds, and the medians of the ratios within them."""
    titles = [title for title in (EMBEDDED, PEER, BRIDGE) if title in rounds[0][0]]
    tables = []
    for key, what, digits in (("per_second", "Operations a second", 0), ("cpu_ms", "CPU of an operation, ms", 3)):
        rows = []
        for index, first in enumerate(rounds[0]):
            cells = [f"{first['operation']}, {first['connections']} conn."]
            values = {title: [it[index][title][key] for it in rounds] for title in titles if title in first}
            cells += [f"{statistics.median(values[it]):.{digits}f}" if it in values else "-" for it in titles]
            if len(titles) > 1:
                cells += [_ratio(values, it) for it in (EMBEDDED, BRIDGE)]
            rows.append(cells)
        ratios = ["embedded / LMCache's", "ours / LMCache's, its engine"] if len(titles) > 1 else []
        tables.append(table_text([what, *titles, *ratios], rows))
    return (
        f"\nMedians of {len(rounds)} rounds; ratios with the least and the greatest.\n\n" + "\n\n".join(tables) + "\n"
    )


def _ratio(values: Mapping[str, Sequence[float]], ours: str) -> str:
    if PEER not in values:
        return "-"
    ratios = ratios_of(values[ours], values[PEER])
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
