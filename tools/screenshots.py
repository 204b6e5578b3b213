"""`make screenshots`: the dashboard's pictures in docs/img, taken of a cluster that runs for some minutes and ends.

Two racks, each with a frontend; load, so that charts have a past; a worker that is lost, a setting that somebody has
changed. The pictures are put in place together, or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import chromium
from local_cluster import Child, end, wait_until_serving
from playwright.sync_api import Browser, Page, ViewportSize, expect

from lmcache_shared.errors import StartError

FOLDER = Path(__file__).parents[1] / "docs" / "img"
WIDTH, HEIGHT = 1440, 900
CONTROLLER_PORT = 9000
MAX_BYTES = 200_000
"""Of one picture: they are in everybody's clone."""

WORKERS, BATCH_WORKERS = 4, 3
LOST = "the worker that is lost"
LOST_AFTER = 0.6
"""The share of the time after which a worker is lost."""

NODE = "/nodes/local_proxy/worker1"
OPERATION = "min_retrieve_tokens = 512"
ANSWER_SECONDS = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Take the dashboard's pictures for the docs.")
    parser.add_argument("--seconds", type=float, default=300, help="how long the cluster runs before (default: 300)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where they go (default: docs/img)")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        del os.environ[name]  # the cluster is the same everywhere
    children: dict[str, Child] = {}
    folder = Path(tempfile.mkdtemp(prefix="lmcache-", dir="/tmp"))  # a socket's path is short
    try:
        url = _start(folder, children, stop)
        _live(url, children, options.seconds, stop)
        if stop.is_set():
            return 1
        taken = folder / "taken"
        taken.mkdir()
        with chromium.running() as browser:
            _take_all(browser, url, taken)
        _put_in_place(taken, options.folder)
    except (StartError, OSError) as error:
        print(f"make screenshots: {error}", file=sys.stderr)
        return 1
    finally:
        end(list(children.values()))
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _start(folder: Path, children: dict[str, Child], stop: threading.Event) -> str:
    """The cluster; the address of its first frontend."""
    rack2, port = _free_ports(2)
    chat, batch = _nodes(folder / "chat", "", WORKERS + 1), _nodes(folder / "batch", "batch-", BATCH_WORKERS)
    chat.append({"name": "controller", "host": "localhost", "port": f"{folder}/chat_{CONTROLLER_PORT}"})
    chat.append({"name": "rack2", "host": "127.0.0.1", "port": rack2, "nodes": []})
    api = ["lmcache_api", "--log-level", "warning"]
    of_chat = _settings(folder / "chat", instance="chat", chunk_statistics=True)
    of_chat.append("--set=enable_controller=true")
    of_batch = [*_settings(folder / "batch", instance="batch", chunk_statistics=False), "--set=chunk_size=512"]
    frontend = ["lmcache_frontend", "--registry", "memory", "--host", "127.0.0.1", "--refresh-interval", "5"]
    lost = ["--role", "worker", "--worker-id", str(WORKERS), "--workers", str(WORKERS + 1)]
    for name, command, servers in (
        ("the controller", [*api, *of_chat, "--role", "controller"], 1),
        ("the chat's servers", [*api, *of_chat, "--set=engine_load=5", "--workers", str(WORKERS)], WORKERS + 1),
        ("the batch's servers", [*api, *of_batch, "--set=engine_load=2", "--workers", str(BATCH_WORKERS)], 1),
        (LOST, [*api, *of_chat, *lost], 1),
        ("the second frontend", [*frontend, "--port", str(rack2), "--nodes", json.dumps(batch)], 1),
        ("the frontend", [*frontend, "--port", str(port), "--nodes", json.dumps(chat)], 1),
    ):
        children[name] = Child(name, command)
        if not wait_until_serving(children[name], servers, stop):
            raise StartError(f"{name} did not start")
    return f"http://127.0.0.1:{port}"


def _nodes(prefix: Path, name: str, workers: int) -> list[dict[str, object]]:
    names = ["scheduler", *(f"worker{i}" for i in range(workers))]
    return [{"name": name + it, "host": "localhost", "port": f"{prefix}_{6999 + i}"} for i, it in enumerate(names)]


def _settings(prefix: Path, *, instance: str, chunk_statistics: bool) -> list[str]:
    settings = {
        "internal_api_server_socket_path_prefix": str(prefix),
        "lmcache_instance_id": instance,
        "max_local_cpu_size": 0.1,
        "local_disk": f"file://{prefix}-disk/",
        "max_local_disk_size": 1,
        "enable_chunk_statistics": chunk_statistics,
        "chunk_statistics_auto_start_statistics": chunk_statistics,
    }
    return [f"--set={name}={json.dumps(value) if value is True else value}" for name, value in settings.items()]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [it.getsockname()[1] for it in sockets]
    for it in sockets:
        it.close()
    return ports


def _live(url: str, children: Mapping[str, Child], seconds: float, stop: threading.Event) -> None:
    """Let the cluster have a past: a while in which something changes."""
    print(f"the cluster runs for {seconds:g} seconds: {url}/", flush=True)
    begun, lost = time.monotonic(), children[LOST]
    while not stop.wait(0.2) and time.monotonic() - begun < seconds:
        for child in children.values():
            child.read()
            if child.ended and child is not lost:
                raise StartError(f"{child.name} ended with code {child.process.returncode}")
        if not lost.ended and time.monotonic() - begun > LOST_AFTER * seconds:
            lost.process.kill()
            lost.process.wait()
            for node, value in (("worker0", 512), ("worker2", 256)):
                _post(f"{url}/proxy2/{node}/conf", {"min_retrieve_tokens": value})


def _post(url: str, values: Mapping[str, object]) -> None:
    request = urllib.request.Request(url, json.dumps(values).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:  # noqa: S310 - our own server
        answer.read()


def _take_all(browser: Browser, url: str, folder: Path) -> None:
    def open_page(scheme: Literal["dark", "light"]) -> Page:
        size: ViewportSize = {"width": WIDTH, "height": HEIGHT}
        return browser.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")

    def take(page: Page, name: str, path: str = "", wait_for: str = "main") -> None:
        if path:
            page.goto(f"{url}{path}")
        page.locator(wait_for).first.wait_for()
        page.evaluate("() => document.fonts.ready")
        page.screenshot(path=folder / f"{name}.png", animations="disabled")
        print(f"{name}.png", flush=True)

    dark = open_page("dark")
    take(dark, "overview-dark", "/?range=5m", ".tile")
    dark.close()
    page = open_page("light")
    take(page, "overview", "/?range=5m", ".tile")
    take(page, "nodes", "/nodes?group=instance", "tbody tr")
    take(page, "node", f"{NODE}?range=5m", ".plot canvas")
    page.goto(f"{url}{NODE}/metrics?q=retrieve")
    page.get_by_text("lmcache:time_to_retrieve", exact=True).click()
    take(page, "metrics")
    take(page, "threads", f"{NODE}/threads", "details.stack")
    take(page, "configuration", "/nodes/local_proxy/worker0/conf?show=mutable", ".setting")
    take(page, "compare", "/compare", ".difference")
    take(page, "manage", "/manage", "tbody tr")
    page.goto(f"{url}/operations?kind=settings&role=worker")
    page.get_by_label("Settings", exact=False).last.fill(OPERATION)
    page.get_by_role("button", name="See what it will do").click()
    expect(page.get_by_role("heading", name="It changes")).to_be_visible(timeout=1000 * ANSWER_SECONDS)
    take(page, "operation-plan")
    page.get_by_role("button", name="Set min_retrieve_tokens").click()
    expect(page.get_by_role("heading", name="nodes")).to_be_visible(timeout=1000 * ANSWER_SECONDS)
    page.get_by_role("link", name="CSV").wait_for()
    take(page, "operation-result")
    page.close()


def _put_in_place(taken: Path, folder: Path) -> None:
    """All of them, and nothing else stays there."""
    for picture in taken.iterdir():
        if picture.stat().st_size > MAX_BYTES:
            raise OSError(f"{picture.name} has {picture.stat().st_size} bytes, more than {MAX_BYTES}")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for picture in taken.iterdir():
        shutil.copyfile(picture, folder / picture.name)


if __name__ == "__main__":
    sys.exit(main())
