"""Every page and tab in a real Chromium, before real processes: in both schemes and three widths nothing goes wrong.

The pages are found by following links from the overview and from a scheduler's, a worker's and a controller's page; a
route of a page that nothing leads to is found, too. What a link does not lead to, as an empty search, is named here.
"""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from lmcache_api.pytest_plugin import free_port
from lmcache_frontend.app import create_app
from lmcache_frontend.cluster import Cluster as Nodes
from lmcache_frontend.options import Options
from tests.e2e.addresses import Found
from tests.e2e.pages import Seen
from tests.e2e.processes import read_until, running

NODE = "/nodes/local_proxy"
BEGIN = (f"{NODE}/worker0", f"{NODE}/scheduler", f"{NODE}/controller", "/")
STATES = (
    "/?q=nobody",
    "/nodes?q=nobody",
    f"{NODE}/gone/metrics",
    f"{NODE}/gone/conf",
    f"{NODE}/worker0/metrics?q=tokens",
    f"{NODE}/worker0/conf?show=changed&q=nothing",
    f"{NODE}/worker0/loglevel?q=engine",
    f"{NODE}/worker0/periodic?thread=PinMonitor-thread",
    "/compare?what=env&key=PATH",
    "/compare?key=nothing-has-this",
    "/compare?q=nobody",
    "/operations?kind=settings&q=worker",
    "/operations?q=nobody",
    "/manage/entry?proxy=local_proxy&name=worker0&test=yes",
)
"""Addresses that no link leads to."""

NO_PAGES = {"/favicon.ico"}
SETTINGS = ("run_script_api_enabled=true", "enable_chunk_statistics=true", "engine_load=5", "enable_controller=true")
ACCESSIBLE = {(1440, "light"), (390, "dark")}
"""Where axe-core looks: once in each scheme, wide and narrow."""


@dataclass(frozen=True)
class Cluster:
    port: int
    pages: list[str]
    missing: set[str]
    """Routes of pages that nothing leads to."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A controller with a scheduler and two workers under load, a node that is gone, and another frontend."""
    folder: Path = tmp_path_factory.mktemp("all")
    other, port = free_port(), free_port()
    sockets = [("scheduler", 6999), ("worker0", 7000), ("worker1", 7001), ("controller", 9000), ("gone", 1)]
    nodes: list[dict[str, object]] = [
        {"name": name, "host": "localhost", "port": f"{folder}/s_{number}"} for name, number in sockets
    ]
    rack2 = {"name": "rack2", "host": "127.0.0.1", "port": other, "nodes": []}
    prefix = f"--set=internal_api_server_socket_path_prefix={folder}/s"
    api = ["-m", "lmcache_api", prefix, *(f"--set={setting}" for setting in SETTINGS)]
    host = ["-m", "lmcache_frontend", "--host", "127.0.0.1", "--health-interval", "1", "--refresh-interval", "1"]
    of_rack = [*host, "--port", str(other), "--nodes", json.dumps(nodes[2:3])]
    first = [*host, "--port", str(port), "--nodes", json.dumps([*nodes, rack2])]
    with (
        running("-m", "lmcache_api", "--role", "controller", prefix) as controller,
        running(*api, "--workers", "2") as components,
        running(*of_rack) as rack,
        running(*first) as frontend,
    ):
        for child in (controller, components, rack, frontend):
            read_until(child, "serves on")
        _wait_until_known(port, 5)
        url = f"http://127.0.0.1:{port}"
        done, planned = _planned_operation(url), _planned_operation(url)
        _wait_for(f"{url}{done}/results.json", "ready")
        _ask(f"{url}{done}/start", {})
        _wait_for(f"{url}{done}/results.json", "done")
        resources = _pages_of_the_application()
        found = Found(url, resources)
        found.follow(*BEGIN, done)
        missing = {it.canonical for it in resources} - found.routes - NO_PAGES
        yield Cluster(port, [*found.pages, planned, *STATES], missing)


def _pages_of_the_application() -> list[object]:
    """What answers GET and is a page's."""
    app = create_app(Options(), Nodes(Options(registry="memory")))
    routes = [it for it in app.router.routes() if it.method == "GET" and ".pages." in it.handler.__module__]
    return [route.resource for route in routes]


def _wait_until_known(port: int, up: int) -> None:
    until = time.monotonic() + 20
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/nodes?detail=true", timeout=10) as answer:
            nodes = [node for proxy in json.load(answer)["nodes"] for node in proxy["children"]]
        states = [node["health"]["state"] for node in nodes]
        if states.count("up") + states.count("slow") >= up:
            return
        assert time.monotonic() < until, states
        time.sleep(0.1)


def _planned_operation(url: str) -> str:
    """Where one is that freezes every node, and has not begun."""
    return urllib.parse.urlsplit(_ask(f"{url}/operations", {"kind": "freeze", "switch": "enable", "scope": "all"})).path


def _ask(url: str, fields: dict[str, str]) -> str:
    with urllib.request.urlopen(url, urllib.parse.urlencode(fields).encode(), timeout=20) as answer:
        told: str = answer.url
        return told


def _wait_for(results: str, wanted: str) -> None:
    until = time.monotonic() + 20
    while True:
        with urllib.request.urlopen(results, timeout=10) as answer:
            state = json.load(answer)["state"]
        if state == wanted:
            return
        assert time.monotonic() < until, state
        time.sleep(0.05)


def test_every_page_is_led_to(cluster: Cluster) -> None:
    assert cluster.missing == set(), "link to it, or name it in STATES"
    assert len(cluster.pages) > 40, cluster.pages


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 1024, 390])
def test_each_page_fits_is_accessible_and_keeps_to_itself(
    browser: Browser, cluster: Cluster, width: int, scheme: str
) -> None:
    seen = Seen(browser, cluster.port, width=width, scheme=scheme)
    wrong = {}
    for path in cluster.pages:
        seen.open(path)
        problems = [f"{wide} px too wide"] if (wide := seen.too_wide()) > 0 else []
        problems += seen.problems() if (width, scheme) in ACCESSIBLE else []
        problems += seen.errors + [f"asks {url}" for url in seen.outside]
        seen.errors.clear()
        seen.outside.clear()
        if problems:
            wrong[path] = problems
    assert wrong == {}
    seen.page.close()
