"""What the dashboard costs with a fleet: the server's CPU and memory while pages are open, and a browser's time.

Some real embedded workers are under load, and the fleet is as many names for them, each checked and asked for its
metrics like a node of its own. The browser is the system's Chromium without a window, on the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import socket
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
from playwright.sync_api import Browser, CDPSession, Page, ViewportSize

sys.path.insert(0, str(harness.ROOT / "tools"))
import chromium

WORKERS = 8
LOAD = 2.0
"""Conversations' requests a second."""

PAGES = ("/", "/nodes")
SIZE: ViewportSize = {"width": 1440, "height": 900}
FOUND_SECONDS = 60.0
WARM_UP_SECONDS = 25.0
"""Some rounds of the health board and of the history."""

UPDATES_SECONDS = 120.0
"""At most for all updates of a page."""
LIBRARIES = ("lmcache-ops", "aiohttp", "jinja2", "playwright")

OPENED = """() => new Promise(told => new PerformanceObserver(found => {
  const paint = found.getEntriesByName("first-contentful-paint")[0];
  if (!paint) return;
  const page = performance.getEntriesByType("navigation")[0];
  told([page.responseStart, paint.startTime, page.decodedBodySize, page.transferSize]);
}).observe({type: "paint", buffered: true}))"""
"""Milliseconds until the first byte and the first paint; bytes of the page, and of its answer."""

FILES = """() => performance.getEntriesByType("resource").reduce((sum, it) => sum + it.transferSize, 0)"""

UPDATES = """count => new Promise(told => {
  const swaps = [], tasks = [];
  let begun = 0;
  performance.clearResourceTimings();
  const note = found => tasks.push(...found.getEntries().map(it => it.duration));
  new PerformanceObserver(note).observe({type: "longtask"});
  document.addEventListener("htmx:before:swap", () => (begun = performance.now()));
  document.addEventListener("htmx:after:swap", () => {
    document.body.offsetHeight;  // lays the page out
    swaps.push(performance.now() - begun);
    if (swaps.length < count) return;
    const asked = performance.getEntriesByType("resource").filter(it => it.name === location.href);
    setTimeout(() => told([swaps, tasks, asked.map(it => it.decodedBodySize)]), 500);
  });
})"""
"""Milliseconds of each swap with its layout, of the tasks above 50 ms, and bytes of each answer."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for the other processes, which inherit it
    machine = harness.describe_machine(LIBRARIES)
    print(harness.machine_text(machine))
    with (
        harness.short_folder() as folder,
        _workers(folder) as file,
        _frontend(folder, file, options.nodes) as (frontend, url),
        chromium.running() as browser,
    ):
        machine["versions"]["Chromium"] = browser.version
        print(f"Chromium {browser.version}")
        _wait_until_up(url, options.nodes)
        time.sleep(WARM_UP_SECONDS)
        servers = []
        for count in (0, *options.pages):
            harness.progress(f"{count} open pages: {options.seconds} seconds")
            servers.append({"pages": count, **_server(browser, frontend, url, count, options.seconds)})
        print("\n" + _table(SERVER_HEADS, [(f"{it['pages']} open pages", it) for it in servers]))
        opened, updates = {}, {}
        for path in PAGES:
            harness.progress(f"{path}: {options.rounds} times, and {options.updates} updates")
            opened[path] = _opened(browser, url + path, options.rounds)
            updates[path] = _updates(browser, url + path, options.updates)
    print("\n" + _table(OPENED_HEADS, list(opened.items())))
    print("\n" + _table(UPDATE_HEADS, list(updates.items())))
    return {"machine": machine, "server": servers, "opened": opened, "updates": updates}


SERVER_HEADS = {"cores": "cores used", "MiB": "memory, MiB"}
OPENED_HEADS = {
    "first_byte": "first byte, ms",
    "most_first_byte": "most",
    "paint": "first paint, ms",
    "most_paint": "most",
    "bytes": "page, KB",
    "files": "its files once, KB",
}
UPDATE_HEADS = {
    "swap": "swap and layout, ms",
    "most_swap": "most",
    "change": "script, style, layout: CPU ms",
    "work": "all work, CPU ms",
    "long": "tasks above 50 ms",
    "longest": "longest, ms",
    "bytes": "bytes, KB",
}


def _table(heads: dict[str, str], rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    cells = [[title, *(f"{numbers[key]:.3g}" for key in heads)] for title, numbers in rows]
    return harness.table_text(("", *heads.values()), cells)


@contextlib.contextmanager
def _workers(folder: Path) -> Iterator[list[str]]:
    """Embedded workers under load, and their sockets."""
    settings = {"internal_api_server_socket_path_prefix": f"{folder}/w", "engine_load": LOAD}
    command = [sys.executable, "-m", "lmcache_api", "--log-level", "error", "--workers", str(WORKERS)]
    command += [f"--set={name}={value}" for name, value in settings.items()]
    with harness.Child.started(command, log=folder / "workers.log") as child:
        for _ in range(1 + WORKERS):
            child.line()
        yield [f"{folder}/w_{7000 + i}" for i in range(WORKERS)]


@contextlib.contextmanager
def _frontend(folder: Path, sockets: Sequence[str], count: int) -> Iterator[tuple[harness.Child, str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = folder / "nodes.json"
    nodes = [
        {"name": f"rack{i // 50:02}-worker{i % 50}", "host": "localhost", "port": sockets[i % len(sockets)]}
        for i in range(count)
    ]
    file.write_text(json.dumps(nodes), encoding="utf-8")
    command = [sys.executable, "-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--registry", "memory", "--log-level", "error", "--config", str(file)]
    with harness.Child.started(command, log=folder / "frontend.log") as child:
        child.line()
        yield child, f"http://127.0.0.1:{port}"


def _wait_until_up(url: str, count: int) -> None:
    until = time.monotonic() + FOUND_SECONDS
    while time.monotonic() < until:
        with urllib.request.urlopen(f"{url}/api/nodes?detail=true", timeout=harness.REQUEST_SECONDS) as answer:
            nodes = [node for proxy in json.load(answer)["nodes"] for node in proxy["children"]]
        if sum(node["health"]["state"] in ("up", "slow") for node in nodes) == count:
            return
        time.sleep(1)
    raise harness.BenchmarkError(f"not all of {count} nodes were up within {FOUND_SECONDS:g} seconds")


def _server(browser: Browser, frontend: harness.Child, url: str, count: int, seconds: float) -> dict[str, float]:
    """What the server takes while so many pages are open, each in a profile of its own."""
    pages = [_open(browser, url + "/") for _ in range(count)]
    time.sleep(2)
    before, clock = _cpu(frontend), time.monotonic()
    time.sleep(seconds)
    cores = (_cpu(frontend) - before) / (time.monotonic() - clock)
    for page in pages:
        if page.evaluate("document.hidden"):
            raise harness.BenchmarkError("a page is in the background, where it asks for nothing")
        page.context.close()
    memory = int(Path(f"/proc/{frontend.pid}/statm").read_text(encoding="ascii").split()[1]) * 4096
    return {"cores": cores, "MiB": memory / (1 << 20)}


def _open(browser: Browser, url: str) -> Page:
    page = browser.new_context(viewport=SIZE).new_page()
    page.goto(url)
    return page


def _opened(browser: Browser, url: str, rounds: int) -> dict[str, float]:
    """A page that is opened for the first time, and again and again; the first one is not counted but for its files."""
    page = _open(browser, url)
    page.wait_for_load_state()
    files = page.evaluate(FILES)
    found = []
    for _ in range(rounds):
        page.goto(url)
        found.append(page.evaluate(OPENED))
    page.context.close()
    first_byte, paint, size, _ = zip(*found, strict=True)
    return {
        "first_byte": statistics.median(first_byte),
        "most_first_byte": max(first_byte),
        "paint": statistics.median(paint),
        "most_paint": max(paint),
        "bytes": statistics.median(size) / 1000,
        "files": files / 1000,
    }


def _updates(browser: Browser, url: str, count: int) -> dict[str, float]:
    """A page that stays open. All work is the CPU time of its main thread from one update to the next."""
    page = _open(browser, url)
    page.set_default_timeout(1000 * UPDATES_SECONDS)
    session = page.context.new_cdp_session(page)
    session.send("Performance.setTimeDomain", {"timeDomain": "threadTicks"})
    session.send("Performance.enable")
    page.evaluate("() => new Promise(told => setTimeout(told, 1000))")  # what opening it takes has ended
    before = _metrics(session)
    swaps, tasks, sizes = page.evaluate(UPDATES, count)
    took = {name: 1000 * (value - before[name]) / count for name, value in _metrics(session).items()}
    page.context.close()
    return {
        "swap": statistics.median(swaps),
        "most_swap": max(swaps),
        "change": took["ScriptDuration"] + took["RecalcStyleDuration"] + took["LayoutDuration"],
        "work": took["TaskDuration"],
        "long": len(tasks),
        "longest": max(tasks, default=0.0),
        "bytes": statistics.median(sizes or [0]) / 1000,
    }


def _metrics(session: CDPSession) -> dict[str, float]:
    """Seconds of CPU time of the page's main thread until now, by what it did."""
    told = session.send("Performance.getMetrics")["metrics"]
    return {it["name"]: it["value"] for it in told if it["name"].endswith("Duration")}


def _cpu(process: harness.Child) -> float:
    """Seconds of CPU time until now."""
    return time.clock_gettime((~process.pid << 3) | 2)  # clock_getcpuclockid(3)


def main() -> int:
    parser = argparse.ArgumentParser(description="What the dashboard costs its server and a browser.")
    parser.add_argument("--nodes", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 10], metavar="N", help="default: 1 10")
    parser.add_argument("--seconds", type=int, default=30, help="how long each is measured (default: %(default)s)")
    harness.count_option(parser, "--rounds", 15, 50, "how often a page is opened")
    harness.count_option(parser, "--updates", 8, 50, "how many updates are measured")
    return harness.run("dashboard.py", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
