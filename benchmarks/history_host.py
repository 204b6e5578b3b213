"""A process of `history.py`.

`history_host.py nodes FOLDER COUNT` serves so many nodes, every second one on a Unix socket, with a worker's metrics of
57 KB that count on; it answers each line on standard input with the number of answers so far. `history_host.py fill
COUNT` fills a history of so many nodes for a day, without a network, and tells its memory and what asking it takes.
`history_host.py frontend FILE` runs a frontend with the nodes of a file, and tells by line how long others waited for
its event loop. All end with their standard input.
"""

from __future__ import annotations

import array
import asyncio
import gc
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import uvloop

from lmcache_api.embedded.metrics import EmbeddedMetrics
from lmcache_frontend.options import Options
from lmcache_frontend.server import FrontendServer
from lmcache_frontend.telemetry.history.clock import Clock
from lmcache_frontend.telemetry.history.counting import Point
from lmcache_frontend.telemetry.history.history import History
from lmcache_frontend.telemetry.history.ring import COARSE_POINTS, FINE_PER_COARSE
from lmcache_frontend.telemetry.history.series import HISTOGRAMS, KEPT, OF_NODES

LABELS = {"model_name": "a/model", "role": "worker", "served_model_name": "model", "worker_id": "0"}
TEXT_BYTES = 57_000
VERSION = b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"0.5.6"'
LOOK_SECONDS = 0.002
LOOKS = 20


class Served(asyncio.Protocol):
    """A node for next to nothing: whatever piece comes is a request; some of the metrics move."""

    answers = 0
    head = b""
    tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if b"/metrics" not in data:
            self._transport.write(VERSION)
            return
        Served.answers += 1
        moving = _moving(Served.answers)
        body = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(self.head) + len(moving) + len(self.tail))
        self._transport.writelines([body, self.head, moving, self.tail])


def _moving(count: int) -> bytes:
    lines = [f'lmcache:num_{name}_tokens_total{{worker_id="0"}} {count * 100}.0' for name in ("requested", "hit")]
    for name in HISTOGRAMS:
        lines += [f'{name}_bucket{{le="{le}",worker_id="0"}} {count}.0' for le in (*range(1, 17), "+Inf")]
    return "\n".join([*lines, ""]).encode()


def _still() -> bytes:
    """The other lines of a worker's text, cut to the size that LMCache's workers send."""
    names = (
        "lmcache:num_requested_tokens_total{",
        "lmcache:num_hit_tokens_total{",
        *(f"{it}_bucket" for it in HISTOGRAMS),
    )
    lines = EmbeddedMetrics(LABELS).exposition().decode().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(names)]
    size = sum(map(len, kept))
    while size > TEXT_BYTES:  # histograms of other things
        at = max(i for i, line in enumerate(kept) if "_bucket{" in line)
        size -= len(kept.pop(at))
    return "".join(kept).encode()


async def serve(folder: Path, count: int) -> None:
    text = _still()
    half = text.index(b"\n", len(text) // 2) + 1
    Served.head, Served.tail = text[:half], text[half:]
    loop = asyncio.get_running_loop()
    nodes: list[dict[str, str | int]] = []
    servers = []  # uvloop closes a server that nobody holds
    for number in range(count):
        if number % 2:
            path = str(folder / f"s{number}")
            servers.append(await loop.create_unix_server(Served, path, backlog=128))
            nodes.append({"name": f"n{number}", "host": "localhost", "port": path})
        else:
            servers.append(await loop.create_server(Served, "127.0.0.1", 0, backlog=128))
            nodes.append({"name": f"n{number}", "host": "127.0.0.1", "port": servers[-1].sockets[0].getsockname()[1]})
    (folder / "nodes.json").write_text(json.dumps(nodes), encoding="utf-8")
    print("ready", flush=True)
    await asyncio.to_thread(_tell_answers)


def _tell_answers() -> None:
    for _ in sys.stdin:
        print(Served.answers, flush=True)


async def frontend(file: str, port: int, no_history: bool) -> None:
    options = Options(host="127.0.0.1", port=port, config=file, registry="memory", no_history=no_history)
    async with FrontendServer(options) as server:
        gc.freeze()  # as the program does
        waits: list[float] = []
        looking = asyncio.create_task(_look(waits))
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            found, waits[:] = sorted(waits), []
            at = [found[int(len(found) * share)] * 1000 for share in (0.5, 0.99, 0.999)]
            print(*at, found[-1] * 1000, server.cluster.history.interval, flush=True)
        looking.cancel()


async def _look(waits: list[float]) -> None:
    """How much later than it should a timer fires: what another request would wait for."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(LOOK_SECONDS)
        waits.append(max(time.perf_counter() - began - LOOK_SECONDS, 0.0))


class Forward(Clock):
    """A clock that is put forward."""

    seconds = 1e6

    def now(self) -> float:
        return self.seconds

    def wall(self) -> float:
        return self.seconds


def fill(count: int) -> None:
    """The first and the last rounds of a day; what lies between is laid over the whole at once."""
    before = _memory()
    clock = Forward()
    history = History(clock)
    worker = [0.0 if "controller" not in series.key else math.nan for series in KEPT]
    keys = [("local_proxy", f"n{number}") for number in range(count)]
    for number in range(3 * FINE_PER_COARSE):
        clock.seconds += 5 if number else COARSE_POINTS * 60
        for key in keys:
            values = [value + random.random() for value in worker]
            history.record(key, Point(values), history.slot())
        history.end_round(history.slot(), 1, {"up": count, "slow": 0, "down": 0, "unknown": 0})
    for key in keys:
        ring = history._nodes[key].ring
        assert ring is not None
        for kept in (ring._fine, ring._coarse):
            kept[:] = array.array("f", [random.random()]) * len(kept)
    size = _memory() - before
    end = clock.wall()
    names = [series.key for series in OF_NODES]
    took = {
        "latest": _took(lambda: [history.row(key, names) for key in keys]),
        "sparklines": _took(lambda: history.sparklines("hit_rate", keys)),
        "hour": _took(lambda: history.frame(keys[0], ["hit_rate", "load"], end - 3600, end, 300)),
        "day": _took(lambda: history.frame(None, ["hit_rate", "load"], end - 86400, end, 300)),
    }
    print(size, *(f"{value:.3f}" for value in took.values()), flush=True)


def _took(act: Callable[[], object]) -> float:
    """Milliseconds of one call, the median of some."""
    times = []
    for _ in range(LOOKS):
        began = time.perf_counter()
        act()
        times.append((time.perf_counter() - began) * 1000)
    return sorted(times)[LOOKS // 2]


def _memory() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "nodes":
        uvloop.run(serve(Path(rest[0]), int(rest[1])))
    elif kind == "fill":
        fill(int(rest[0]))
    else:
        uvloop.run(frontend(rest[0], int(rest[1]), rest[2] == "off"))
