"""The dashboard's pages in a real Chromium, before real processes."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from lmcache_api.pytest_plugin import free_port
from tests.e2e.pages import Seen
from tests.e2e.processes import read_until, running

STRANGE = "a/b ..?#%2F \"<&>' ü"
"""A name that would break a path or a page that was put together by hand."""

NODE = "/nodes/local_proxy"


@dataclass(frozen=True)
class Cluster:
    port: int
    nodes: list[dict[str, object]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and two workers under load, one of them by a strange name, and a node that is gone."""
    folder: Path = tmp_path_factory.mktemp("dash")
    names = {"scheduler": 6999, "worker0": 7000, STRANGE: 7001}
    nodes = [{"name": name, "host": "localhost", "port": f"{folder}/s_{port}"} for name, port in names.items()]
    nodes.append({"name": "gone", "host": "127.0.0.1", "port": free_port()})
    settings = ["--set", f"internal_api_server_socket_path_prefix={folder}/s", "--set", "engine_load=5"]
    port = free_port()
    with running("-m", "lmcache_api", "--workers", "2", *settings) as api:
        read_until(api, "serves on")
        frontend = ["--host", "127.0.0.1", "--port", str(port), "--health-interval", "1", "--nodes", json.dumps(nodes)]
        with running("-m", "lmcache_frontend", *frontend) as child:
            read_until(child, "serves on")
            _wait_for_states(port, {"up": 3, "down": 1})
            yield Cluster(port, nodes)


def _wait_for_states(port: int, wanted: dict[str, int]) -> None:
    until = time.monotonic() + 20
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/nodes?detail=true", timeout=10) as answer:
            nodes = [node for proxy in json.load(answer)["nodes"] for node in proxy["children"]]
        found = [node["health"]["state"] for node in nodes]
        if all(found.count(state) == number for state, number in wanted.items()):
            return
        assert time.monotonic() < until, found
        time.sleep(0.1)


def test_a_node_is_found_by_its_name_whatever_that_is(browser: Browser, cluster: Cluster) -> None:
    seen = Seen(browser, cluster.port)
    page = seen.page
    seen.open("/nodes")
    page.get_by_role("link", name=STRANGE, exact=True).click()
    assert page.get_by_role("heading", level=1).inner_text() == STRANGE
    page.get_by_role("link", name="Threads", exact=True).click()
    assert page.get_by_role("heading", level=1).inner_text() == STRANGE
    assert page.locator("details.stack").count() > 3
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_a_list_is_one_address_for_each_view_and_works_without_javascript(browser: Browser, cluster: Cluster) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page, url = context.new_page(), f"http://127.0.0.1:{cluster.port}"
        page.goto(f"{url}/")
        page.get_by_label("State", exact=True).select_option("down")
        page.get_by_label("Search", exact=True).fill("go")
        page.get_by_role("button", name="Show").click()
        assert "state=down" in page.url
        for _ in range(2):
            assert page.locator(".tile").count() == 1
            assert page.locator(".tile").get_by_role("link").inner_text() == "gone"
            page.reload()
        page.goto(f"{url}{NODE}/worker0/metrics?q=num_store_requests")
        assert page.locator("details.family:not([hidden])").count() == 1
        page.get_by_role("button", name="Reset").click()
        assert page.get_by_role("heading", level=1).inner_text() == "Reset the metrics"
        page.get_by_role("button", name="Reset the metrics").click()
        assert "at zero" in page.inner_text("main")
        page.get_by_role("link", name="Back").click()
        assert page.url.endswith("/worker0/metrics")


def test_an_action_is_confirmed_in_a_dialog_and_told(browser: Browser, cluster: Cluster) -> None:
    seen = Seen(browser, cluster.port)
    page = seen.page
    seen.open(f"{NODE}/worker0/metrics")
    page.get_by_role("button", name="Reset").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading")).to_have_text("Reset the metrics")
    assert seen.problems() == []
    dialog.get_by_role("link", name="Cancel").click()
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Reset").click()
    dialog.get_by_role("button", name="Reset the metrics").click()
    expect(dialog.get_by_text("at zero")).to_be_visible()
    assert page.url.endswith("/worker0/metrics")
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_what_a_role_may_not_see_says_which_it_needs(browser: Browser, cluster: Cluster) -> None:
    port, token = free_port(), "a-token-of-sixteen"
    options = ["--no-trust-local", "--token", token, "--nodes", json.dumps(cluster.nodes)]
    with running("-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(port), *options) as child:
        read_until(child, "serves on")
        seen = Seen(browser, port)
        page = seen.page
        seen.open(f"{NODE}/worker0/threads")
        expect(page.locator(".outcome.refused")).to_contain_text("you need the role operator")
        page.locator(".outcome").get_by_role("link", name="Sign in").click()
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(f"**{NODE}/worker0/threads")
        assert page.locator("details.stack").count() > 3
        assert (seen.errors, seen.outside) == ([], [])
        page.close()


def test_the_keyboard_goes_everywhere_and_the_theme_stays(browser: Browser, cluster: Cluster) -> None:
    seen = Seen(browser, cluster.port)
    page = seen.page
    seen.open("/")
    page.keyboard.press("g")
    with page.expect_navigation():
        page.keyboard.press("n")
    assert page.url.endswith("/nodes")
    page.keyboard.press("/")
    expect(page.get_by_label("Search", exact=True)).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    for theme in ("light", "dark"):
        page.keyboard.press("t")
        page.reload()
        assert page.locator("html").get_attribute("data-theme") == theme
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_every_page_is_left_by_keyboard_and_never_while_somebody_types(browser: Browser, cluster: Cluster) -> None:
    seen = Seen(browser, cluster.port)
    page = seen.page
    for path in ("/nodes", "/operations", "/manage/add", f"{NODE}/worker0/conf", f"{NODE}/worker0/script"):
        seen.open(path)
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("/")
        page.keyboard.type("gc?")
        assert page.evaluate("document.activeElement.value") == "gc?", path
        assert page.get_by_role("dialog").count() == 0
        page.keyboard.press("Escape")
        page.keyboard.press("g")
        page.keyboard.press("c")
        page.wait_for_url("**/compare")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_on_a_phone_a_list_hides_nothing_that_matters(browser: Browser, cluster: Cluster) -> None:
    seen = Seen(browser, cluster.port, width=390)
    page = seen.page
    for path, row, shown in (
        ("/nodes", "tr:has-text('worker0')", ("Answers in", "Hit rate", "Requested/s", "Retrieve p95")),
        (f"{NODE}/worker0/periodic", "table.periodic tbody tr", ("Last run", "Every", "Took", "Runs", "Failed")),
    ):
        seen.open(path)
        for name in shown:
            box = page.locator(row).first.locator(f"[data-name='{name}']").bounding_box()
            assert box, (path, name)
            assert 0 <= box["x"] <= box["x"] + box["width"] <= 390, (path, name)
        for name in ("Overview", "Manage"):
            box = page.get_by_label("Pages", exact=True).get_by_role("link", name=name).bounding_box()
            assert box
            assert box["x"] + box["width"] <= 390, name
    page.close()


def test_an_open_page_of_who_was_signed_out_leads_to_the_sign_in_and_back(browser: Browser, cluster: Cluster) -> None:
    port, token = free_port(), "a-token-of-sixteen"
    options = ["--no-trust-local", "--viewers", "token", "--token", token, "--nodes", json.dumps(cluster.nodes)]
    with running("-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(port), *options) as child:
        read_until(child, "serves on")
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{port}/nodes?q=worker")
            assert "Not signed in" in page.inner_text("header")
            page.get_by_label("Token").fill(token)
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_url("**/nodes?q=worker")
            context.clear_cookies()
            page.evaluate("document.querySelector('#part').dispatchEvent(new Event('refresh'))")
            expect(page).to_have_url(f"http://127.0.0.1:{port}/sign-in?next=/nodes%3Fq%3Dworker", timeout=15_000)
