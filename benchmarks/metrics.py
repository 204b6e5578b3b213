"""What the metrics of a whole cluster cost: `python benchmarks/metrics.py [--lmcache-python PYTHON]`.

- The merge alone, of so many nodes' texts of 57 KB, each size in a process of its own: CPU time to add and to write,
  the time for a node, which is to stay the same, and how much the process grew. Once the nodes are eight ranks of one
  layout, and once each has a label value of its own in all samples.
- With LMCache's Python also `GET /metrics` of our frontend beside LMCache's bundled dashboard, on the same nodes:
  servers on Unix sockets in another process, which answer with a text that is there already. The requests take turns;
  what is told is the ratio within a pair.
- `GET /metrics` of our frontend before a whole fleet: how long it takes, the most memory that the frontend ever had,
  and how long a `GET /health` waits at most meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import (
    RATIO_HEADS,
    BenchmarkError,
    Child,
    count_option,
    describe_machine,
    get,
    machine_text,
    progress,
    ratio_cells,
    run,
    short_folder,
    table_text,
)

TEXT_BYTES = 57_000
SIZES = (10, 50, 200, 1000)
RANKS = 8
READY_SECONDS = 60.0
OURS = (sys.executable, "-m", "lmcache_frontend")
MERGE_HEADS = ("nodes", "MB", "add ms", "write ms", "us a node", "MB out", "grown MiB")

Numbers = dict[str, float]


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in _CHILDREN:
        return int(_CHILDREN[sys.argv[1]](*sys.argv[2:]))
    parser = argparse.ArgumentParser(description="Measure the merge of a cluster's metrics.")
    python = os.environ.get("LMCACHE_PYTHON")
    parser.add_argument("--lmcache-python", default=python, help="with LMCache: its bundled dashboard is the peer")
    count_option(parser, "--nodes", 200, 1000, "nodes that are asked end to end")
    count_option(parser, "--fleet", 1000, 1000, "nodes that our frontend alone is asked for")
    count_option(parser, "--pairs", 5, 100, "requests to each side")
    return run("benchmarks/metrics.py", parser, measure)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    machine = describe_machine()
    print(machine_text(machine), flush=True)
    numbers: dict[str, Any] = {"machine": machine}
    for title, ranks in (("eight ranks", RANKS), ("a label of its own for each node", 0)):
        numbers[title] = [measure_merge(size, ranks) for size in SIZES]
        print(f"\nthe merge alone, {title}\n{merge_text(numbers[title])}", flush=True)
    numbers["fleet"] = measure_fleet(options.fleet, options.pairs)
    print(f"\n{options.fleet} nodes end to end\n{fleet_text(numbers['fleet'])}", flush=True)
    if options.lmcache_python:
        numbers["requests"] = measure_requests(options.lmcache_python, options.nodes, options.pairs)
        rows = [["GET /metrics, s", *ratio_cells(numbers["requests"]["ours"], numbers["requests"]["peer"], 3)]]
        print(f"\n{options.nodes} nodes end to end\n{table_text(RATIO_HEADS, rows)}", flush=True)
    return numbers


# The merge alone.


def measure_merge(size: int, ranks: int) -> Numbers:
    """The best of three runs, which a busy moment of the machine meets least."""
    progress(f"merging {size} nodes")
    keys = ("nodes", "read", "add", "write", "written", "grown")
    runs = []
    for _ in range(3):
        with Child.started([sys.executable, __file__, "merge", str(size), str(ranks)]) as child:
            runs.append(dict(zip(keys, map(float, child.line()), strict=True)))
    return min(runs, key=lambda numbers: numbers["add"] + numbers["write"])


def merge_text(runs: Sequence[Numbers]) -> str:
    rows = []
    for one in runs:
        a_node = (one["add"] + one["write"]) / one["nodes"] * 1e6
        cells = (
            one["read"] / 1e6,
            one["add"] * 1e3,
            one["write"] * 1e3,
            a_node,
            one["written"] / 1e6,
            one["grown"] / 1024,
        )
        rows.append([f"{one['nodes']:.0f}", *[f"{cell:.1f}" for cell in cells]])
    return table_text(MERGE_HEADS, rows)


def merge_once(size: str, ranks: str) -> int:
    """In a process of its own: the texts come one by one, as from the network, and are not kept."""
    from lmcache_frontend.telemetry.metrics.exposition import Merge

    texts = NodeTexts()
    before = resident()
    merge, read, add = Merge(), 0, 0.0
    for number in range(int(size)):
        payload = texts.of(number, int(ranks))
        read += len(payload)
        began = time.process_time()
        merge.add({"node": f"worker-{number}", "proxy": "rack-1", "instance": f"10.0.0.{number}:7000"}, payload)
        add += time.process_time() - began
    began = time.process_time()
    written = sum(map(len, merge.write(openmetrics=False)))
    print(size, read, add, time.process_time() - began, written, resident() - before, flush=True)
    return 0


def resident(pid: int | str = "self") -> int:
    """The most memory that a process ever had, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) if found else 0


class NodeTexts:
    """Texts of one cluster's nodes: prometheus_client's, of as many families as make 57 KB, each with other numbers."""

    def __init__(self) -> None:
        self._parts = re.split(rb"(?<=\}) [^ \n]+\n", _template_text())

    def of(self, number: int, ranks: int) -> bytes:
        chance = random.Random(number)
        numbers = [b" %.12g\n" % (chance.random() * 10 ** chance.randrange(9)) for _ in self._parts[1:]]
        text = b"".join([part for pair in zip(self._parts, [*numbers, b""], strict=True) for part in pair])
        rank = b"%d" % (number % ranks) if ranks else b"host-%d" % number
        return text.replace(b'worker_id="0"', b'worker_id="%b"' % rank)


def _template_text() -> bytes:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

    registry = CollectorRegistry()
    labels = {"model_name": "meta-llama/Llama-3.1-8B-Instruct", "worker_id": "0", "role": "worker"}
    number = 0
    while len(text := generate_latest(registry)) < TEXT_BYTES:
        made: list[Any] = [
            Counter(
                f"lmcache:num_{number}_requests",
                f"Total number of requests of kind {number}",
                labels,
                registry=registry,
            ),
            Gauge(f"lmcache:cache_{number}_usage", f"Usage of the cache {number} in bytes", labels, registry=registry),
        ]
        if number % 3 == 0:
            made.append(Histogram(f"lmcache:time_to_{number}", f"Time to do {number}", labels, registry=registry))
        for metric in made:
            metric.labels(**labels)
        number += 1
    return text


# End to end.


def measure_requests(python: str, count: int, pairs: int) -> dict[str, list[float]]:
    with short_folder() as folder:
        nodes = list_of_nodes(folder, count)
        peer = [python, "-m", "lmcache.lmcache_frontend.app"]
        with (
            Child.started(
                [sys.executable, __file__, "serve", str(folder), str(count)], log=folder / "nodes.log"
            ) as host,
            frontend(OURS, nodes, folder / "ours.log") as (ours, _),
            frontend(peer, nodes, folder / "peer.log") as (theirs, _),
        ):
            host.line()
            sides = {"ours": ours, "peer": theirs}
            check_same_samples({side: get(client, "/metrics") for side, client in sides.items()}, count)
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(pairs):
                progress(f"pair {number + 1} of {pairs}")
                for side in sorted(sides, reverse=bool(number % 2)):
                    began = time.perf_counter()
                    get(sides[side], "/metrics")
                    seconds[side].append(time.perf_counter() - began)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    progress(f"medians: {medians}")
    return seconds


def list_of_nodes(folder: Path, count: int) -> str:
    return json.dumps([{"name": f"n{n}", "host": "localhost", "port": str(folder / f"n{n}")} for n in range(count)])


def measure_fleet(count: int, times: int) -> dict[str, list[float]]:
    """Seconds of each scrape, plain and compressed in turns; seconds of the slowest other request beside it; KiB."""
    numbers: dict[str, list[float]] = {"identity": [], "gzip": [], "waited": [], "memory": []}
    with short_folder() as folder:
        serving = [sys.executable, __file__, "serve", str(folder), str(count)]
        with (
            Child.started(serving, log=folder / "nodes.log") as host,
            frontend(OURS, list_of_nodes(folder, count), folder / "ours.log") as (client, child),
        ):
            host.line()
            check_same_samples({"ours": get(client, "/metrics")}, count)
            for number in range(times):
                progress(f"the fleet, {number + 1} of {times}")
                for encoding in ("identity", "gzip"):
                    with others_waiting(client) as waited:
                        began = time.perf_counter()
                        client.request("GET", "/metrics", headers={"Accept-Encoding": encoding})
                        client.getresponse().read()
                        numbers[encoding].append(time.perf_counter() - began)
                    numbers["waited"].append(max(waited))
            numbers["memory"].append(resident(child.pid))
    return numbers


@contextlib.contextmanager
def others_waiting(client: http.client.HTTPConnection) -> Iterator[list[float]]:
    """How long each `GET /health` takes that a thread makes meanwhile, one after the other."""
    waited: list[float] = []
    over = threading.Event()

    def ask() -> None:
        with contextlib.closing(http.client.HTTPConnection(client.host, client.port, timeout=READY_SECONDS)) as other:
            while not over.wait(0.002):
                began = time.perf_counter()
                get(other, "/health")
                waited.append(time.perf_counter() - began)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield waited
    finally:
        over.set()
        thread.join()


def fleet_text(numbers: dict[str, list[float]]) -> str:
    rows = [
        ["GET /metrics, s", *_middle_and_most(numbers["identity"])],
        ["GET /metrics with gzip, s", *_middle_and_most(numbers["gzip"])],
        ["the slowest GET /health beside it, ms", *_middle_and_most([1000 * one for one in numbers["waited"]], 0)],
        ["memory of the frontend, MiB", "", f"{numbers['memory'][0] / 1024:.0f}"],
    ]
    return table_text(["", "median", "most"], rows)


def _middle_and_most(values: Sequence[float], digits: int = 2) -> list[str]:
    return [f"{statistics.median(values):.{digits}f}", f"{max(values):.{digits}f}"]


def check_same_samples(texts: dict[str, bytes], count: int) -> None:
    """
    Raises:
        BenchmarkError: one side does not tell all samples of all nodes.
    """
    expected = len(NodeTexts()._parts) - 1
    for side, text in texts.items():
        told = len(re.findall(rb"^lmcache:", text, re.MULTILINE))
        if told < expected * count:
            raise BenchmarkError(f"{side}: GET /metrics tells {told} samples of {expected * count}")


@contextlib.contextmanager
def frontend(command: Sequence[str], nodes: str, log: Path) -> Iterator[tuple[http.client.HTTPConnection, Child]]:
    """A connection to a frontend that has just started, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port), "--nodes", nodes]
    with Child.started(command, log=log) as child:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=READY_SECONDS)
            try:
                client.connect()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise child.ended() from None
                time.sleep(0.1)
        with contextlib.closing(client):
            yield client, child


def serve(folder: str, count: str) -> int:
    """In a process of its own: so many nodes, each on a socket, whose texts are there already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(Path(folder), int(count)))
    return 0


async def _serve(folder: Path, count: int) -> None:
    texts = NodeTexts()

    def answering(payload: bytes) -> Any:
        head = (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: %d\r\n\r\n"
        )
        answer = head % len(payload) + payload

        async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    await reader.readuntil(b"\r\n\r\n")
                    writer.write(answer)
                    await writer.drain()
            writer.close()

        return answer_all

    for number in range(count):
        await asyncio.start_unix_server(answering(texts.of(number, RANKS)), folder / f"n{number}")
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)


_CHILDREN: dict[str, Any] = {"merge": merge_once, "serve": serve}


if __name__ == "__main__":
    sys.exit(main())
