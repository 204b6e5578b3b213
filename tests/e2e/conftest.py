"""What the tests of pages share."""

import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.e2e.processes import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import chromium

REBOUND = "rebound.example.com"
"""A name of somebody else's that points here, to the browser."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Its loop runs in this thread until the module ends, so that none of its tests can have a loop of its own."""
    with chromium.running([f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1"]) as browser:
        yield browser
