"""What the tests of pages share."""

import sys
from collections.abc import Iterator
from inspect import iscoroutinefunction

import pytest
from playwright.sync_api import Browser

from tests.e2e.processes import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import chromium

REBOUND = "rebound.example.com"
"""A name of somebody else's that points here, to the browser."""


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """Its loop runs in this thread until the module ends; in other modules tests have loops of their own again."""
    others = [name for name, it in vars(request.module).items() if name[:5] == "test_" and iscoroutinefunction(it)]
    assert not others, f"asynchronous tests cannot stand beside a browser's: {others}"
    with chromium.running([f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1"]) as browser:
        yield browser
