"""The overview of 1,000 nodes in a real Chromium: soon there, and renewed without the reader noticing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from lmcache_api.pytest_plugin import free_port
from tests.e2e.pages import Seen
from tests.e2e.processes import read_until, running

NODES = 1000
PAINT_MILLISECONDS = 1000
UPDATE_MILLISECONDS = 50
TRIES = 3
"""The best of them counts: what a page costs is no less, and a busy machine makes it more."""

PAINTED = """() => new Promise(told => new PerformanceObserver(found => {
  const painted = found.getEntriesByName("first-contentful-paint")[0];
  if (painted) told(painted.startTime);
}).observe({type: "paint", buffered: true}))"""

UPDATED = """([tries, enough]) => new Promise(told => {
  const updates = [];
  let begun = 0;
  document.addEventListener("htmx:before:swap", () => (begun = performance.now()));
  document.addEventListener("htmx:after:swap", () => {
    document.body.offsetHeight;  // lays the page out
    updates.push(performance.now() - begun);
    const best = Math.min(...updates);
    if (best < enough || updates.length === tries) told(best);
  });
})"""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A frontend of 1,000 nodes, none of which is there."""
    gone = free_port()
    nodes = [{"name": f"rack{i // 50:02}-worker{i % 50}", "host": "127.0.0.1", "port": gone} for i in range(NODES)]
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--health-interval", "2", "--nodes", json.dumps(nodes)]
    with running("-m", "lmcache_frontend", *options) as frontend:
        read_until(frontend, "serves on")
        yield port


def test_a_thousand_nodes_are_soon_there_and_soon_renewed(browser: Browser, port: int) -> None:
    seen = Seen(browser, port, width=1440)
    page = seen.page
    seen.open("/")
    expect(page.get_by_text("1,000 down")).to_be_visible(timeout=20_000)
    paints = []
    for _ in range(TRIES):
        page.reload()
        paints.append(page.evaluate(PAINTED))
        if paints[-1] < PAINT_MILLISECONDS:
            break
    assert min(paints) < PAINT_MILLISECONDS
    assert page.evaluate(UPDATED, [TRIES, UPDATE_MILLISECONDS]) < UPDATE_MILLISECONDS
    assert page.locator(".tile").count() == 120
    assert page.locator("svg.cells").count() == 1
    page.get_by_role("link", name="Next").click()
    assert page.url.endswith("?page=2")
    assert seen.problems() == []
    assert (seen.errors, seen.outside) == ([], [])
    page.close()
