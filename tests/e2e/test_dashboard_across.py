"""Compare, operations and the list of nodes in a real Chromium, before real processes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from lmcache_api.pytest_plugin import free_port
from tests.e2e.pages import Seen
from tests.e2e.processes import read_until, running


@dataclass(frozen=True)
class Cluster:
    port: int
    more: int
    """A node that is in no list."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and two workers, one worker with another chunk size, and a node that is gone."""
    folder: Path = tmp_path_factory.mktemp("across")
    nodes = [{"name": f"worker{i}", "host": "localhost", "port": f"{folder}/s_{7000 + i}"} for i in range(2)]
    odd, gone, port = free_port(), free_port(), free_port()
    nodes += [{"name": "odd", "host": "127.0.0.1", "port": odd}, {"name": "gone", "host": "127.0.0.1", "port": gone}]
    file = folder / "nodes.json"
    file.write_text(json.dumps(nodes))
    prefix = f"--set=internal_api_server_socket_path_prefix={folder}/s"
    options = ["--role", "worker", f"--set=internal_api_server_port_start={odd - 1}", "--set=chunk_size=512"]
    frontend = ["--host", "127.0.0.1", "--port", str(port), "--health-interval", "1", "--config", str(file)]
    with running("-m", "lmcache_api", "--workers", "2", prefix) as api, running("-m", "lmcache_api", *options) as other:
        read_until(api, "serves on")
        read_until(other, "serves on")
        with running("-m", "lmcache_frontend", *frontend) as child:
            read_until(child, "serves on")
            yield Cluster(port, odd)


def test_the_odd_one_is_seen_and_searched_for(browser: Browser, cluster: Cluster) -> None:
    seen = Seen(browser, cluster.port)
    page = seen.page
    seen.open("/compare")
    line = page.locator(".difference", has=page.get_by_text("chunk_size", exact=True))
    expect(line.locator("li.odd")).to_contain_text("512")
    expect(line.locator("li.odd a")).to_have_text("odd")
    expect(page.locator(".silent")).to_contain_text("gone")
    page.keyboard.press("/")
    page.keyboard.type("chunk_size")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("key=chunk_size"))
    expect(page.locator("#differences .difference")).to_have_count(1)
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


@pytest.mark.parametrize("scripts", [True, False])
def test_an_operation_from_its_plan_to_its_results(browser: Browser, cluster: Cluster, scripts: bool) -> None:
    node = "worker0" if scripts else "worker1"  # whichever is first
    with browser.new_context(java_script_enabled=scripts) as context:
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{cluster.port}/operations?kind=freeze")
        page.select_option("select[name=switch]", "enable")
        page.get_by_role("checkbox", name=node).check()
        page.get_by_role("checkbox", name="gone").check()
        if scripts:
            expect(page.get_by_text("(2)")).to_be_visible()
        else:
            page.get_by_role("radio", name="Those that are ticked").check()
        page.get_by_role("button", name="See what it will do").click()
        expect(page.get_by_role("heading", name="It changes 1 of 2 nodes")).to_be_visible(timeout=15_000)
        expect(page.get_by_role("row", name=node)).to_contain_text("will change")
        page.get_by_role("checkbox", name="1 that did not answer").check()
        page.get_by_role("button", name="Freeze", exact=True).click()
        expect(page.get_by_role("heading", name="1 of 2 nodes failed")).to_be_visible(timeout=15_000)
        page.goto(f"{page.url}?show=failed")
        expect(page.get_by_role("row")).to_have_count(2)
        with page.expect_download() as download:
            page.get_by_role("link", name="CSV").click()
        assert node in Path(download.value.path()).read_text()
        page.get_by_role("button", name="Plan it again").click()
        expect(page.get_by_role("heading", name="It changes no node")).to_be_visible(timeout=15_000)
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_text("Cancelled before anything was changed")).to_be_visible()
        assert errors == []


@pytest.mark.parametrize("scripts", [True, False])
def test_a_node_is_tried_added_and_removed(browser: Browser, cluster: Cluster, scripts: bool) -> None:
    name = f"added-{scripts}"
    with browser.new_context(java_script_enabled=scripts) as context:
        page = context.new_page()
        url = f"http://127.0.0.1:{cluster.port}"
        page.goto(f"{url}/manage/add")
        page.fill("input[name=name]", name)
        page.fill("input[name=host]", "127.0.0.1")
        page.fill("input[name=port]", str(cluster.more))
        if scripts:
            page.get_by_role("button", name="Test the connection").click()
            expect(page.get_by_role("status")).to_contain_text("It answers in")
            page.keyboard.press("Escape")
        page.get_by_role("button", name="Add the node …").click()
        expect(page.get_by_text("with version 0.1.0-embedded")).to_be_visible()
        page.get_by_role("button", name="Add the node", exact=True).click()
        expect(page.get_by_text(f"{name} was added by hand")).to_be_visible()
        page.get_by_role("link", name="Back").click()
        expect(page.get_by_role("heading", name=name)).to_be_visible()
        page.get_by_role("button", name="Remove …").click()
        expect(page.locator("#dialog-part")).to_contain_text("gone for good")
        page.get_by_role("button", name="Remove the node", exact=True).click()
        expect(page.get_by_text(f"{name} was removed by hand")).to_be_visible()
        page.goto(f"{url}/manage")
        expect(page.get_by_role("link", name=name)).to_have_count(0)


def test_a_file_is_imported_and_exported(browser: Browser, cluster: Cluster) -> None:
    seen = Seen(browser, cluster.port)
    page = seen.page
    seen.open("/manage/import")
    page.fill("textarea", '[{"name": "x", "host": "127.0.0.1", "port": 70000}]')
    page.get_by_role("button", name="See what it would change").click()
    expect(page.get_by_role("heading", name="1 entry is wrong")).to_be_visible()
    assert seen.problems() == []
    page.locator("textarea").last.fill('[{"name": "imported", "host": "127.0.0.1", "port": 9}]')
    page.get_by_role("button", name="See what it would change").click()
    expect(page.get_by_role("heading", name="It adds 1 and changes 0")).to_be_visible()
    page.get_by_role("button", name="Import all of it").click()
    expect(page.get_by_text("A node file was imported: 1 new, 0 changed")).to_be_visible()
    seen.open("/manage?q=imported")
    expect(page.get_by_role("link", name="imported")).to_be_visible()
    assert (seen.errors, seen.outside) == ([], [])
    page.close()
