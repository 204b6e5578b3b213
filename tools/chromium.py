"""The system's Chromium, for what looks at the dashboard: its tests, pictures and benchmark."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


def path() -> str | None:
    """Where it is: what CHROMIUM names, or the first of its usual names."""
    return next(
        (found for name in (os.environ.get("CHROMIUM"), *NAMES) if name and (found := shutil.which(name))), None
    )


@contextlib.contextmanager
def running(flags: Sequence[str] = ()) -> Iterator[Browser]:
    """It, without a window.

    Raises:
        FileNotFoundError: there is none.
    """
    program = path()
    if program is None:
        raise FileNotFoundError("Chromium not found; `make test` installs it where it can, CHROMIUM names it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*FLAGS, *flags])
        try:
            yield browser
        finally:
            browser.close()
