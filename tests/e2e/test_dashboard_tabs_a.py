"""The tabs that look into a node's process, in a real Chromium before real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from lmcache_api.pytest_plugin import free_port
from tests.e2e.pages import Seen
from tests.e2e.processes import read_until, running

NODE = "/nodes/local_proxy"
WORKER = f"{NODE}/worker0"
REFUSED = ("loglevel", "conf", "env", "lookup", "script")
SETTINGS = (
    "run_script_api_enabled=true",
    "script_allowed_imports=[time]",
    "enable_chunk_statistics=true",
    "chunk_statistics_auto_start_statistics=true",
    "engine_load=5",
)


@dataclass(frozen=True)
class Cluster:
    """Where its frontend is for an admin, and where another one that takes nobody for one."""

    port: int
    for_viewers: int


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("tabs")
    nodes = [
        {"name": name, "host": "localhost", "port": f"{folder}/s_{port}"}
        for name, port in (("scheduler", 6999), ("worker0", 7000), ("gone", 1))
    ]
    prefix = f"internal_api_server_socket_path_prefix={folder}/s"
    api = ["-m", "lmcache_api", *(f"--set={setting}" for setting in (prefix, *SETTINGS))]
    ports = free_port(), free_port()
    frontend = ["-m", "lmcache_frontend", "--host", "127.0.0.1", "--nodes", json.dumps(nodes), "--health-interval", "1"]
    with running(*api) as components:
        read_until(components, "serves on")
        admins, viewers = (*frontend, "--port", str(ports[0])), (*frontend, "--port", str(ports[1]), "--no-trust-local")
        with running(*admins) as first, running(*viewers) as second:
            read_until(first, "serves on")
            read_until(second, "serves on")
            yield Cluster(*ports)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_a_viewer_sees_is_accessible(browser: Browser, cluster: Cluster, scheme: str) -> None:
    seen = Seen(browser, cluster.for_viewers, width=390, scheme=scheme)
    for tab in REFUSED:
        seen.open(f"{WORKER}/{tab}")
        assert "you need the role" in seen.page.inner_text("main")
        assert seen.too_wide() <= 0, tab
        assert seen.problems() == [], tab
    assert (seen.errors, seen.outside) == ([], [])
    seen.page.close()


def test_levels_are_set_in_a_dialog_found_and_reset(browser: Browser, cluster: Cluster) -> None:
    seen = Seen(browser, cluster.port)
    page = seen.page
    seen.open(f"{WORKER}/loglevel")
    page.keyboard.press("/")
    page.keyboard.type("lmcache_api server")
    expect(page.locator(".logger:visible")).to_have_count(1)
    assert "q=lmcache_api+server" in page.url
    page.locator(".logger:visible input").check()
    page.get_by_label("Level", exact=True).select_option("ERROR")
    page.get_by_role("button", name="Set marked").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("inherited")
    assert seen.problems() == []
    dialog.get_by_role("button", name="Set one logger to ERROR").click()
    expect(dialog).to_contain_text("One logger set.")
    dialog.get_by_role("link", name="Back").click()
    expect(page.get_by_text("1 logger changed from this dashboard.")).to_be_visible()
    assert seen.problems() == []
    page.get_by_role("button", name="Reset all").click()
    dialog.get_by_role("button", name="Reset one logger").click()
    dialog.get_by_role("link", name="Back").click()
    expect(page.get_by_text("changed from this dashboard")).to_have_count(0)
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_settings_are_edited_together(browser: Browser, cluster: Cluster) -> None:
    seen = Seen(browser, cluster.port)
    page = seen.page
    seen.open(f"{WORKER}/conf?show=mutable")
    page.get_by_label("min_retrieve_tokens").fill("some")
    page.get_by_label("save_decode_cache").select_option("true")
    expect(page.get_by_text("2 settings are to be changed.")).to_be_visible()
    dialog = page.get_by_role("dialog")
    page.get_by_role("button", name="Review changes").click()
    expect(dialog.get_by_role("alert")).to_contain_text("'some' is no whole number")
    assert dialog.get_by_role("button").count() == 0
    dialog.get_by_role("link", name="Cancel").click()
    page.get_by_label("min_retrieve_tokens").fill("48")  # what was typed is still there
    page.get_by_role("button", name="Review changes").click()
    expect(dialog.get_by_role("row").filter(has_text="min_retrieve_tokens")).to_contain_text("48")
    dialog.get_by_role("button", name="Change 2 settings").click()
    dialog.get_by_role("link", name="Back").click()
    seen.open(f"{WORKER}/conf?show=running")
    assert page.locator(".setting").count() == 2
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_the_editor_indents_runs_and_remembers(browser: Browser, cluster: Cluster) -> None:
    seen = Seen(browser, cluster.port)
    page = seen.page
    seen.open(f"{WORKER}/script")
    editor = page.get_by_label("Python")
    editor.click()
    page.keyboard.type("for i in range(3):\nprint(i)")
    assert editor.input_value() == "for i in range(3):\n    print(i)"
    page.keyboard.press("Shift+Tab")
    assert editor.input_value() == "for i in range(3):\nprint(i)"
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    editor.focus()
    page.keyboard.press("End")
    page.keyboard.type("\n")
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("result = 'done'")
    page.keyboard.press("Control+Enter")
    output = page.locator("#output")
    expect(output).to_contain_text("The script has run in")
    assert output.locator("pre").all_inner_texts() == ["done", "0\n1\n2\n"]
    assert seen.problems() == []
    seen.open(f"{WORKER}/script")
    page.get_by_role("button", name="for i in range(3):").click()
    assert page.get_by_label("Python").input_value() == "for i in range(3):\n    print(i)\nresult = 'done'"
    page.get_by_role("button", name="Forget all").click()
    assert page.locator(".history li").count() == 0
    page.get_by_text("The engine's parts").click()
    page.locator("details[open]").get_by_role("button", name="Put into the editor").click()
    page.get_by_role("button", name="Run on worker0").click()
    expect(output).to_contain_text("Result")
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_all_of_it_works_without_javascript(browser: Browser, cluster: Cluster) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page, url = context.new_page(), f"http://127.0.0.1:{cluster.port}"
        page.goto(f"{url}{WORKER}/env")
        page.get_by_label("Search", exact=True).fill("LMCACHE_FRONTEND")
        page.get_by_role("button", name="Search").click()
        assert page.locator("tbody tr:visible").count() == 1
        page.goto(f"{url}{WORKER}/script")
        page.get_by_label("Python").fill("print('seen')\nresult = {}['no']")
        page.get_by_role("button", name="Run on worker0").click()
        assert "KeyError" in page.inner_text("main")
        assert "seen" in page.inner_text("main")
        page.goto(f"{url}{NODE}/scheduler/chunks")
        page.get_by_role("button", name="Stop counting").click()
        page.get_by_role("button", name="Stop counting").click()
        page.get_by_role("link", name="Back").click()
        assert page.get_by_text("Not counting").is_visible()
        page.goto(f"{url}{WORKER}/loglevel?q=lmcache_api.server")
        page.locator(".logger:visible input").check()
        page.get_by_label("Level", exact=True).select_option("DEBUG")
        page.get_by_role("button", name="Set marked").click()
        page.get_by_role("button", name="Set one logger to DEBUG").click()
        assert "One logger set." in page.inner_text("main")
