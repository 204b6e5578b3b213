"""Switches, cache and controller of a node in a real Chromium, before real processes."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, expect

from lmcache_api.pytest_plugin import free_port
from tests.e2e.pages import Seen
from tests.e2e.processes import read_until, running

NODE = "/nodes/local_proxy"
OTHER = quote(f"{NODE}/worker1", safe="")
CHECKSUMS = f"{NODE}/worker0/cache?view=checksums&slots=[0,511]&chunk_size=32&layers=yes&with={OTHER}"
PAGES = (
    f"{NODE}/worker0/switches",
    f"{NODE}/worker0/cache?start=0&end=900",
    f"{NODE}/worker0/cache?view=layout",
    CHECKSUMS,
    f"{NODE}/scheduler/cache",
    f"{NODE}/controller/controller?instance=lmcache&start=0&end=512",
    f"{NODE}/gone/switches",
    f"{NODE}/gone/cache?view=layout",
)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The frontend's, before a controller, a scheduler, two workers that have registered, and a node that is gone."""
    folder: Path = tmp_path_factory.mktemp("tabs")
    names = {"scheduler": 6999, "worker0": 7000, "worker1": 7001, "controller": 9000}
    nodes = [{"name": name, "host": "localhost", "port": f"{folder}/s_{port}"} for name, port in names.items()]
    nodes.append({"name": "gone", "host": "127.0.0.1", "port": str(free_port())})
    settings = ["--set", f"internal_api_server_socket_path_prefix={folder}/s", "--set", "controller_worker_seconds=1"]
    disk = ["--set", f"local_disk=file://{folder}/disk", "--set", "max_local_disk_size=1"]
    port = free_port()
    with running("-m", "lmcache_api", "--role", "controller", *settings) as controller:
        read_until(controller, "serves on")
        with running("-m", "lmcache_api", "--workers", "2", "--set", "enable_controller=true", *settings, *disk) as api:
            read_until(api, "serves on")
            options = ["--port", str(port), "--health-interval", "1", "--nodes", json.dumps(nodes)]
            with running("-m", "lmcache_frontend", "--host", "127.0.0.1", *options) as child:
                read_until(child, "serves on")
                _wait(port, "/api/nodes?detail=true", lambda text: text.count('"state":"up"') == 4)
                _wait(port, "/proxy2/controller/controller/workers", lambda text: json.loads(text)["total_count"] == 2)
                yield port


def _wait(port: int, path: str, done: object) -> None:
    until = time.monotonic() + 20
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            text = answer.read().decode()
        if done(text):  # type: ignore[operator]
            return
        assert time.monotonic() < until, text
        time.sleep(0.05)


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1024, "dark"), (390, "dark")])
def test_each_tab_fits_is_accessible_and_keeps_to_itself(browser: Browser, port: int, width: int, scheme: str) -> None:
    seen = Seen(browser, port, width=width, scheme=scheme)
    for path in PAGES:
        seen.open(path)
        assert seen.too_wide() <= 0, path
        assert seen.problems() == [], path
    assert (seen.errors, seen.outside) == ([], [])
    seen.page.close()


def test_a_switch_is_confirmed_in_a_dialog_and_seen_afterwards(browser: Browser, port: int) -> None:
    seen = Seen(browser, port)
    page = seen.page
    seen.open(f"{NODE}/worker0/switches")
    page.get_by_role("button", name="Freeze the cache").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("del")).to_have_text("off")
    expect(dialog.locator("ins")).to_have_text("on")
    assert seen.problems() == []
    dialog.get_by_role("button", name="Freeze the cache").click()
    expect(dialog.get_by_role("status")).to_contain_text("the node says that it is on")
    dialog.get_by_role("link", name="Back").click()
    expect(page.locator("#freeze .switch")).to_have_text("On")
    page.get_by_role("button", name="Unfreeze the cache").click()
    dialog.get_by_role("button", name="Unfreeze the cache").click()
    expect(dialog.get_by_role("status")).to_contain_text("the node says that it is off")
    dialog.get_by_role("link", name="Back").click()
    page.get_by_role("button", name="Bypass … LocalDiskBackend").click()
    dialog.get_by_role("button", name="Bypass LocalDiskBackend").click()
    expect(dialog.get_by_role("status")).to_contain_text("is bypassed")
    dialog.get_by_role("link", name="Back").click()
    page.get_by_role("button", name="Use again … LocalDiskBackend").click()
    dialog.get_by_role("button", name="Use LocalDiskBackend again").click()
    expect(dialog.get_by_role("status")).to_contain_text("is in use")
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_the_cache_is_filled_and_cleared_without_javascript(browser: Browser, port: int) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page, url = context.new_page(), f"http://127.0.0.1:{port}"
        page.goto(f"{url}{NODE}/worker1/cache")
        page.get_by_label("to, not included").fill("1024")
        page.get_by_role("button", name="Look up").click()
        assert "end=1024" in page.url
        page.get_by_role("button", name="Store 0 to 1,024").click()
        page.get_by_role("button", name="Store tokens 0 to 1,024").click()
        assert "knows 1,024 of 1,024" in page.inner_text("main")
        page.get_by_role("link", name="Back").click()
        page.get_by_label("LocalCPUBackend").check()
        page.get_by_role("button", name="Clear …").click()
        assert page.get_by_role("heading", level=1).inner_text() == "Clear LocalCPUBackend"
        page.get_by_role("button", name="Clear LocalCPUBackend").click()
        assert "1,024 tokens were forgotten" in page.inner_text("main")


def test_two_nodes_are_compared_by_colour_and_by_mark(browser: Browser, port: int) -> None:
    seen = Seen(browser, port)
    page = seen.page
    seen.open(f"{NODE}/worker0/cache?view=checksums")
    page.get_by_label("Slots", exact=True).fill("[0,511]")
    page.get_by_label("Chunk size").fill("32")
    page.get_by_label("Compare with").select_option(label="worker1")
    page.get_by_role("button", name="Compute").click()
    assert page.locator(".headline .state").count() == 1
    picture = page.get_by_role("img", name="of 32 chunks are equal")
    assert picture.locator("path").count() == 4
    page.get_by_label("Compare with").select_option(label="no other node")
    page.get_by_role("button", name="Compare", exact=True).click()
    assert page.get_by_role("heading", name="Checksums of worker0").is_visible()
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_a_controller_leads_to_its_workers(browser: Browser, port: int) -> None:
    seen = Seen(browser, port)
    page = seen.page
    seen.open(f"{NODE}/controller")
    page.keyboard.press("]")
    page.wait_for_url("**/controller/controller")
    page.get_by_role("link", name="Look at lmcache").click()
    expect(page.get_by_text("worker 0 well")).to_be_visible()
    page.get_by_role("button", name="Clear LocalCPU").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Clear lmcache").click()
    expect(dialog.get_by_role("status")).to_contain_text("tokens cleared")
    dialog.get_by_role("link", name="Back").click()
    page.get_by_role("link", name="lmcache 0").click()
    assert page.get_by_role("heading", level=1).inner_text() == "worker0"
    assert (seen.errors, seen.outside) == ([], [])
    page.close()
