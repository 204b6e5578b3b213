"""`make bench-lmcache`: what our server costs a process with a real LMCache, beside LMCache's own server.

One host process (`engine_host.py`) has a real LMCache standalone engine and both internal API servers on it, each on a
Unix socket of its own, LMCache's as LMCache configures it. Measured are

- the CPU time of that process for a `GET /metrics` and a `GET /version`, on a connection that is kept. Metrics are
  read at rest, and after every number of LMCache's was moved. Batches through both servers take turns.
- how much a busy thread of the process loses while another process reads the metrics ten times a second, in a window
  beside the windows before and after it in which nobody asks: the rounds that a loop of pure Python makes, and the time
  that its thread slept because another had the interpreter, which other processes of the machine do not change. And
  how long such a scrape takes.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import engines
from harness import (
    RATIO_HEADS,
    BenchmarkError,
    connection,
    count_option,
    describe_machine,
    families_of,
    get,
    machine_text,
    progress,
    ratio_cells,
    run,
    short_folder,
    table_text,
)

STORES = 8
TOKENS = 512
COUNTED_SECONDS = 30.0
WARM_REQUESTS = 50
METRICS_REQUESTS = 10
"""In a batch; `GET /version` comes ten times as often."""

SCRAPES_A_SECOND = 10
SIDES = ("ours", "peer")
BUSY_HEADS = ("", "ours (quartiles)", "peer (quartiles)", "ours lower")

Pair = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure our server beside LMCache's own, on a real LMCache.")
    engines.add_option(parser)
    count_option(parser, "--pairs", 40, 200, "batches through each server")
    count_option(parser, "--windows", 30, 100, "busy windows scraped through each server")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a busy window (default: %(default)s)")
    return run("make bench-lmcache", parser, measure)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if not 0.2 <= options.seconds <= 5:
        raise BenchmarkError(f"--seconds {options.seconds:g}: expected 0.2 to 5")
    python = engines.check_lmcache(options.lmcache_python)
    machine = describe_machine()
    print(machine_text(machine), flush=True)
    with short_folder() as folder, engines.running_lmcache(python, folder) as host:
        versions = engines.versions_text(host)
        print(f"in the host process: {versions}", flush=True)
        paths = {"ours": host.ours, "peer": host.theirs}
        for path in paths.values():
            fill(path)
        wait_until_counted(host.ours)
        with connection(host.ours) as ours, connection(host.theirs) as theirs:
            clients = {"ours": ours, "peer": theirs}
            served = compare(clients)
            requests = measure_requests(host, clients, options.pairs)
        print(requests_text(requests, served), flush=True)
        windows = measure_busy(host, paths, options.windows, options.seconds)
        print(busy_text(windows), flush=True)
    return {"machine": machine, "host": versions, "served": served, "requests": requests, "windows": windows}


def fill(path: Path) -> None:
    """Some stores and retrieves through this server, so that metrics have values."""
    with connection(path) as client:
        for number in range(STORES):
            for operation in ("store", "retrieve"):
                client.request("POST", f"/cache/{operation}?tokens_mock={number * TOKENS},{(number + 1) * TOKENS}")
                response = client.getresponse()
                if b'"success"' not in (body := response.read()):
                    raise BenchmarkError(f"/cache/{operation}: status {response.status}, {body[:200]!r}")


def wait_until_counted(path: Path) -> None:
    """LMCache counts what was done every some seconds; before that most of its metrics have no lines.

    Raises:
        BenchmarkError: it has not.
    """
    deadline = time.monotonic() + COUNTED_SECONDS
    with connection(path) as client:
        while not re.search(rb"^lmcache:num_store_requests_total.* [1-9]", get(client, "/metrics"), re.MULTILINE):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"LMCache has counted no store within {COUNTED_SECONDS:g} seconds")
            time.sleep(0.5)


def compare(clients: Mapping[str, HTTPConnection]) -> dict[str, Any]:
    """Both must tell the same version and the same metrics, or there is nothing to compare.

    Raises:
        BenchmarkError: they do not.
    """
    for client in clients.values():
        get(client, "/version", WARM_REQUESTS)
        get(client, "/metrics", WARM_REQUESTS)
    if get(clients["ours"], "/version") != get(clients["peer"], "/version"):
        raise BenchmarkError("the two servers tell different versions")
    texts = {side: get(client, "/metrics") for side, client in clients.items()}
    ours, theirs = (families_of(texts[side]) for side in SIDES)
    if ours != theirs:
        raise BenchmarkError(f"the two servers tell different metrics: {', '.join(sorted(ours ^ theirs))}")
    return {"families": len(ours), "lines": texts["ours"].count(b"\n"), "bytes": len(texts["ours"])}


def measure_requests(
    host: engines.EngineHost, clients: Mapping[str, HTTPConnection], count: int
) -> dict[str, list[Pair]]:
    """Milliseconds of CPU of one request, by what is asked, in pairs; who goes first alternates."""

    def moved(client: HTTPConnection) -> None:
        for _ in range(METRICS_REQUESTS):
            host.child.ask("move")  # by the thread whose CPU time is not counted
            get(client, "/metrics")

    def at_rest(client: HTTPConnection) -> None:
        get(client, "/metrics", METRICS_REQUESTS)

    def version(client: HTTPConnection) -> None:
        get(client, "/version", 10 * METRICS_REQUESTS)

    acts: Mapping[str, tuple[Callable[[HTTPConnection], None], int]] = {
        "CPU of GET /metrics at rest, ms": (at_rest, METRICS_REQUESTS),
        "CPU of GET /metrics, all moved, ms": (moved, METRICS_REQUESTS),
        "CPU of GET /version, ms": (version, 10 * METRICS_REQUESTS),
    }
    pairs: dict[str, list[Pair]] = {title: [] for title in acts}
    progress(f"{count} pairs of batches")
    for number in range(count):
        for title, (act, times) in acts.items():
            pair = {}
            for side in SIDES if number % 2 else SIDES[::-1]:
                client = clients[side]
                pair[side] = host.child.cpu_of(lambda: act(client)) / times * 1e3  # noqa: B023 - called at once
            pairs[title].append(pair)
    return pairs


def requests_text(requests: Mapping[str, Sequence[Pair]], served: Mapping[str, Any]) -> str:
    rows = [
        [title, *ratio_cells([pair["ours"] for pair in pairs], [pair["peer"] for pair in pairs], 3)]
        for title, pairs in requests.items()
    ]
    head = f"Both tell {served['families']} families in {served['lines']} lines, {served['bytes']} bytes."
    return f"\n{head} Medians; the ratio is the median of the ratios within the pairs.\n\n" + table_text(
        RATIO_HEADS, rows
    )


def measure_busy(
    host: engines.EngineHost, paths: Mapping[str, Path], count: int, seconds: float
) -> list[dict[str, Any]]:
    """Pairs of scraped windows, each beside windows without scrapes; which server goes first alternates."""
    busy_window(host, seconds)
    before = busy_window(host, seconds)
    pairs = []
    for number in range(count):
        progress(f"busy windows {number + 1} of {count}")
        pair: dict[str, Any] = {}
        for side in SIDES if number % 2 else SIDES[::-1]:
            window, latencies = scraped_window(host, paths[side], seconds)
            after = busy_window(host, seconds)
            rate, waited = ((before[at] + after[at]) / 2 for at in (0, 1))
            lost = {"rounds": (1 - window[0] / rate) * 100, "waited": (window[1] - waited) * 1e3 / SCRAPES_A_SECOND}
            pair[side] = {"window": window, "unscraped": [before, after], **lost, "latencies": latencies}
            before = after
        pairs.append(pair)
    return pairs


def busy_window(host: engines.EngineHost, seconds: float) -> tuple[float, float]:
    """The rounds a second of the busy thread, and the seconds in each that it waited for another thread."""
    rounds, passed, slept = (float(word) for word in host.child.ask(f"busy {seconds}"))
    return rounds / passed, slept / passed


def scraped_window(host: engines.EngineHost, path: Path, seconds: float) -> tuple[tuple[float, float], list[float]]:
    """A busy window that is scraped through this server, and how many milliseconds each scrape took."""
    over = threading.Event()
    latencies: list[float] = []
    failures: list[Exception] = []

    def scrape() -> None:
        try:
            with connection(path) as client:
                due = time.monotonic()
                while not over.wait(max(0.0, due - time.monotonic())):
                    due += 1 / SCRAPES_A_SECOND
                    began = time.perf_counter()
                    get(client, "/metrics")
                    latencies.append((time.perf_counter() - began) * 1e3)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        window = busy_window(host, seconds)
    finally:
        over.set()
        thread.join()
    if failures:
        raise BenchmarkError(f"a scrape failed: {failures[0]!r}")
    return window, latencies


def busy_text(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Medians with their quartiles: a difference from the windows around may well be negative."""
    rows = []
    for title, key in (("busy thread: rounds lost, %", "rounds"), ("busy thread: waits for a scrape, ms", "waited")):
        rows.append([title, *_busy_cells({side: [pair[side][key] for pair in pairs] for side in SIDES})])
    for percent in (50, 99):
        times = {side: [percentile(pair[side]["latencies"], percent) for pair in pairs] for side in SIDES}
        rows.append([f"scrape while busy, p{percent} of a window, ms", *_busy_cells(times)])
    all_told = []
    for side in SIDES:
        whole = [one for pair in pairs for one in pair[side]["latencies"]]
        p50, p99 = (percentile(whole, percent) for percent in (50, 99))
        all_told.append(f"{side} p50 {p50:.1f} ms, p99 {p99:.1f} ms of {len(whole)}")
    rates = [window[0] for pair in pairs for side in SIDES for window in pair[side]["unscraped"]]
    spread = statistics.pstdev(rates) / statistics.mean(rates) * 100
    return (
        f"\n{len(pairs)} pairs of windows with {SCRAPES_A_SECOND} scrapes a second; rounds of the windows without"
        f" scrapes spread by {spread:.1f} %.\n\n{table_text(BUSY_HEADS, rows)}\n\nAll scrapes: {'; '.join(all_told)}."
    )


def _busy_cells(values: Mapping[str, Sequence[float]]) -> list[str]:
    cells = []
    for side in SIDES:
        least, middle, most = (percentile(values[side], percent) for percent in (25, 50, 75))
        cells.append(f"{middle:.2f} ({least:.2f} to {most:.2f})")
    lower = sum(our < their for our, their in zip(values["ours"], values["peer"], strict=True))
    return [*cells, f"{lower} of {len(values['ours'])}"]


def percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


if __name__ == "__main__":
    sys.exit(main())
