"""The dashboard before a real LMCache engine behind our bridge, LMCache's multiprocess server and its controller."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.request
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.pages import Seen
from tests.lmcache.processes import (
    Controllers,
    node_at,
    running_controllers,
    running_frontend,
    running_multiprocess,
    short_folder,
)

NODE = "/nodes/local_proxy"
UP_SECONDS = 30.0

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def frontend_port(lmcache_python: str) -> Iterator[int]:
    """Our frontend before all of them."""
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(short_folder()) for _ in range(3)]
        controllers: Controllers = stack.enter_context(running_controllers(lmcache_python, folders[0]))
        server = stack.enter_context(running_multiprocess(lmcache_python, folders[1]))
        nodes: list[dict[str, str | int]] = [
            {**node_at(controllers.workers[0]), "name": "engine"},
            {**node_at(controllers.workers[1]), "name": "other"},
            {**node_at(controllers.ours), "name": "controller"},
            {**node_at(controllers.theirs), "name": "their controller"},
            {"name": "server", "host": "127.0.0.1", "port": server},
        ]
        url = stack.enter_context(running_frontend(folders[2], nodes))
        until = time.monotonic() + UP_SECONDS
        while True:
            with urllib.request.urlopen(f"{url}/api/nodes?detail=true", timeout=10) as answer:
                states = [it["health"]["state"] for it in json.load(answer)["nodes"][0]["children"]]
            if all(state in ("up", "slow") for state in states):
                break
            assert time.monotonic() < until, states
            time.sleep(0.1)
        yield int(url.rpartition(":")[2])


def tabs_of(page: Page) -> list[str]:
    return page.locator(".tabs a").all_inner_texts()


@pytest.mark.parametrize(
    ("name", "there", "not_there"),
    [
        ("engine", {"Overview", "Metrics", "Threads", "Switches", "Cache"}, {"Controller", "Multiprocess server"}),
        ("controller", {"Overview", "Controller", "Metrics"}, {"Switches", "Cache", "Multiprocess server"}),
        ("their%20controller", {"Overview", "Controller", "Metrics"}, {"Switches", "Cache", "Multiprocess server"}),
        ("server", {"Overview", "Multiprocess server", "Metrics", "Threads"}, {"Switches", "Cache", "Controller"}),
    ],
)
def test_each_node_has_the_tabs_that_it_can_fill(
    browser: Browser, frontend_port: int, name: str, there: set[str], not_there: set[str]
) -> None:
    seen = Seen(browser, frontend_port)
    page = seen.page
    seen.open(f"{NODE}/{name}")
    shown = tabs_of(page)
    assert there <= set(shown)
    assert not not_there & set(shown)
    for title in shown:
        page.locator(".tabs").get_by_role("link", name=title, exact=True).click()
        expect(page.locator(".tabs a[aria-current]")).to_have_text(title)
        assert page.locator(".outcome").count() == 0, (title, page.locator(".outcome").first.inner_text())
        assert seen.problems() == [], title
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_a_real_engine_is_switched_filled_and_compared(browser: Browser, frontend_port: int) -> None:
    seen = Seen(browser, frontend_port)
    page, dialog = seen.page, seen.page.get_by_role("dialog")
    seen.open(f"{NODE}/engine/switches")
    for title, word in (("Freeze the cache", "on"), ("Unfreeze the cache", "off")):
        page.get_by_role("button", name=title, exact=False).click()
        dialog.get_by_role("button", name=title).click()
        expect(dialog.get_by_role("status")).to_contain_text(f"the node says that it is {word}")
        dialog.get_by_role("link", name="Back").click()
    seen.open(f"{NODE}/engine/cache?start=0&end=512")
    page.get_by_role("button", name="Store 0 to 512").click()
    dialog.get_by_role("button", name="Store tokens").click()
    expect(dialog.get_by_role("status")).to_contain_text("knows 512 of 512 tokens")
    for path in (
        "view=layout",
        "view=checksums&slots=[0,511]&chunk_size=64&layers=yes&with=%2Fnodes%2Flocal_proxy%2Fother",
    ):
        seen.open(f"{NODE}/engine/cache?{path}")
        assert page.locator("svg.layout").count() == 1
        assert page.locator(".outcome, .problem").count() == 0
    assert page.locator("svg.sums[role=img]").count() == 1
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_a_real_multiprocess_server_keeps_quotas(browser: Browser, frontend_port: int) -> None:
    seen = Seen(browser, frontend_port)
    page, dialog = seen.page, seen.page.get_by_role("dialog")
    seen.open(f"{NODE}/server/multiprocess")
    expect(page.get_by_text("Healthy", exact=True)).to_be_visible()
    page.get_by_role("button", name="Clear L1").click()
    dialog.get_by_role("button", name="Clear L1").click()
    expect(dialog.get_by_role("status")).to_contain_text("0 objects")
    seen.open(f"{NODE}/server/multiprocess?view=quotas")
    page.get_by_label("Salt").fill("tenant")
    page.get_by_label("Limit in GiB").fill("0.5")
    page.get_by_role("button", name="Set …").click()
    dialog.get_by_role("button", name="Set the quota of tenant").click()
    expect(dialog.get_by_role("status")).to_contain_text("512 MiB")
    dialog.get_by_role("link", name="Back").click()
    seen.open(f"{NODE}/server/multiprocess?view=quotas")
    page.get_by_role("button", name="Remove … tenant").click()
    dialog.get_by_role("button", name="Remove the quota of tenant").click()
    expect(dialog.get_by_role("status")).to_contain_text("It is removed.")
    seen.open(f"{NODE}/server/multiprocess?view=config&q=chunk_size")
    assert page.locator("#settings tr:not([hidden])").count() >= 1
    assert (seen.errors, seen.outside) == ([], [])
    page.close()


def test_a_real_controller_pins(browser: Browser, frontend_port: int) -> None:
    seen = Seen(browser, frontend_port)
    page, dialog = seen.page, seen.page.get_by_role("dialog")
    seen.open(f"{NODE}/controller/controller?instance=one&start=0&end=512")
    expect(page.get_by_text("worker 0 well")).to_be_visible()
    page.get_by_text("Pin tokens").click()
    page.get_by_role("button", name="Pin …").click()
    dialog.get_by_role("button", name="Pin tokens 0 to 512").click()
    expect(dialog.get_by_role("status")).to_contain_text("tokens pinned")
    assert (seen.errors, seen.outside) == ([], [])
    page.close()
