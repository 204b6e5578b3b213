"""`make bench`: what the internal API server costs the process that hosts it, beside FastAPI and uvicorn.

Each number comes from a host process of its own (`host_process.py`), and the two servers take turns, so that a busy
moment of the machine meets both; what is told is the ratio within a pair. This program is the client: its own work is
no part of any number. It compares what both servers serve before it measures them, and says what differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import (
    LIBRARIES,
    RATIO_HEADS,
    Child,
    connection,
    count_option,
    describe_machine,
    families_of,
    get,
    machine_text,
    progress,
    ratio_cells,
    run,
    table_text,
)

OURS = "lmcache-ops"
PEERS = {
    "fastapi": "FastAPI + uvicorn as LMCache has them",
    "fastapi-lean": "FastAPI + uvicorn at their leanest: on uvloop, no WebSockets, no documentation pages",
}
PEER_LIBRARIES = ("fastapi", "starlette", "pydantic", "uvicorn", "httptools")

IDLE_SECONDS = 2.0
SETTLE_SECONDS = 0.3
WARM_REQUESTS = 50
MEMORY_REQUESTS = 100
VERSION_REQUESTS = 1000
METRICS_REQUESTS = 300
FAMILIES = "families.json"

Numbers = dict[str, float]


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what the internal API server costs its host process.")
    count_option(parser, "--pairs", 7, 100, "host processes of each server")
    parser.add_argument("--peer", choices=tuple(PEERS), default="fastapi", help="default: %(default)s")
    return run("make bench", parser, measure_all)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    machine = describe_machine((*LIBRARIES, *PEER_LIBRARIES))
    print(machine_text(machine), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp", ignore_cleanup_errors=True) as folder:
        write_families(folder)
        differences = compare(options.peer, folder)  # this also fills the bytecode cache of both
        pairs = measure_pairs(options.peer, options.pairs, folder)
    print(table(pairs, PEERS[options.peer], differences), flush=True)
    return {"machine": machine, "peer": options.peer, "differences": differences, "pairs": pairs}


def measure_pairs(peer: str, count: int, folder: str) -> list[dict[str, Numbers]]:
    """The numbers of both servers, `count` times in turn."""
    pairs = []
    for number in range(1, count + 1):
        progress(f"pair {number} of {count}")
        pairs.append({"ours": measure(OURS, folder), "peer": measure(peer, folder)})
    return pairs


def measure(server: str, folder: str) -> Numbers:
    """Start a host process with this server, and take every number from it."""
    with running_host(server, folder) as (host, path):
        answered = host.wait_for_answer(path)
        began, imported, import_cpu, modules, rss, pss = map(float, host.line())
        numbers = {
            "import_ms": (imported - began) * 1e3,
            "import_cpu_ms": import_cpu * 1e3,
            "first_answer_ms": (answered - began) * 1e3,
            "modules_imported": modules,
        }
        with connection(path) as client:
            get(client, "/version", MEMORY_REQUESTS)
        rss_now, pss_now = map(float, host.ask("memory"))
        numbers["modules_loaded"] = float(host.ask("modules")[0])
        numbers["rss_mib"] = (rss_now - rss) / 1024
        if pss:
            numbers["pss_mib"] = (pss_now - pss) / 1024
        time.sleep(SETTLE_SECONDS)
        numbers["idle_ms"] = host.cpu_of(lambda: time.sleep(IDLE_SECONDS)) * 1e3
        for asked, key, requests in (
            ("/version", "version_us", VERSION_REQUESTS),
            ("/metrics", "metrics_us", METRICS_REQUESTS),
        ):
            with connection(path) as client:
                get(client, asked, WARM_REQUESTS)
                seconds = host.cpu_of(lambda: get(client, asked, requests))  # noqa: B023 - called at once
            numbers[key] = seconds / requests * 1e6
        return numbers


def compare(peer: str, folder: str) -> list[str]:
    """What the two servers do not have in common and ought to, for people; empty when they can be compared."""
    served: list[tuple[set[str], bytes, set[str]]] = []
    for server in (OURS, peer):
        with running_host(server, folder) as (host, path):
            host.wait_for_answer(path)
            host.line()
            with connection(path) as client:
                version, names = get(client, "/version"), families_of(get(client, "/metrics"))
            served.append((set(host.ask("routes")), version, names))
    ours, theirs = served
    different = [
        *(f"only {who} serves {route}" for who, route in _either(ours[0], theirs[0])),
        *(f"only {who} has the metric {name}" for who, name in _either(ours[2], theirs[2])),
    ]
    return different if ours[1] == theirs[1] else [*different, f"/version is {ours[1]!r} here, {theirs[1]!r} there"]


def _either(ours: set[str], theirs: set[str]) -> list[tuple[str, str]]:
    return [("ours", it) for it in sorted(ours - theirs)] + [("the peer", it) for it in sorted(theirs - ours)]


def write_families(folder: str) -> None:
    """The families of our component's own metrics, for the peer: `[kind, name, help, labels, bounds]` of each."""
    from prometheus_client import Histogram
    from prometheus_client.metrics import MetricWrapperBase

    from lmcache_api.embedded import EmbeddedComponent
    from lmcache_shared.settings import Settings

    rows = []
    collectors: Mapping[Any, Any] = EmbeddedComponent(Settings()).metrics.registry._collector_to_names
    for metric in collectors:
        if isinstance(metric, MetricWrapperBase):
            values = next(iter(metric._metrics))
            bounds = list(metric._kwargs["buckets"]) if isinstance(metric, Histogram) else None
            labels = dict(zip(metric._labelnames, values, strict=True))
            rows.append([metric._type, metric._name, metric._documentation, labels, bounds])
    Path(folder, FAMILIES).write_text(json.dumps(rows), encoding="utf-8")


@contextlib.contextmanager
def running_host(server: str, folder: str) -> Iterator[tuple[Child, Path]]:
    """A fresh `host_process.py` and its socket.

    Both servers' bytecode is cached in `folder`, whatever the environment says of caching it.
    """
    program = str(Path(__file__).with_name("host_process.py"))
    python = [sys.executable, "-E", "-s", "-X", f"pycache_prefix={folder}/bytecode"]
    path = Path(f"{folder}/{server}_6999")
    try:
        with Child.started([*python, program, server, f"{folder}/{server}", f"{folder}/{FAMILIES}"]) as child:
            yield child, path
    finally:
        path.unlink(missing_ok=True)


def table(pairs: Sequence[Mapping[str, Numbers]], peer: str, differences: Sequence[str]) -> str:
    """Medians of both, and of the ratios within the pairs with the least and the greatest."""
    rows = []
    for row in ROWS:
        if all(row.key in pair[side] for pair in pairs for side in ("ours", "peer")):
            ours, theirs = ([pair[side][row.key] for pair in pairs] for side in ("ours", "peer"))
            rows.append([row.title, *ratio_cells(ours, theirs, row.digits)])
    notes = "".join(f"\nNot the same on both sides: {it}" for it in differences)
    head = f"\nPeer: {peer}. Medians of {len(pairs)} pairs; below 1, ours costs less.\n\n"
    return f"{head}{table_text(RATIO_HEADS, rows)}\n{notes}"


if __name__ == "__main__":
    sys.exit(main())
