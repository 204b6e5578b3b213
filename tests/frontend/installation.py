"""The frontend as it is installed somewhere, and its plugins as LMCache starts them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCHEDULER = "scheduler_lmc_frontend_plugin.py"
MULTIPROCESS = "lmcache_mp_frontend_plugin.py"


def bare_python(folder: Path) -> Path:
    """The Python of a new environment that has nothing."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    return folder / "bin" / "python"


def packages_of(python: Path) -> Path:
    """Where its packages lie."""
    (folder,) = python.parents[1].glob("lib/python3.*/site-packages")
    return folder


def with_dependencies(python: Path) -> None:
    """Let it find what the frontend needs, but not the frontend: this process's packages, without their .pth files."""
    (packages_of(python) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")


def installed_python(folder: Path) -> Path:
    """The Python of a new environment that has the frontend."""
    python = bare_python(folder)
    with_dependencies(python)
    for package in (ROOT / "src").iterdir():
        if package.is_dir():
            target = packages_of(python) / package.name
            shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"))
    return python


def plugin_of(python: Path, name: str = SCHEDULER) -> Path:
    return packages_of(python) / "lmcache_frontend" / "plugins" / name


def plugin_environ(configuration: object, *, workers: object = 1, older: bool = False, **more: str) -> dict[str, str]:
    """What LMCache puts into a plugin's environment, beside nothing else of this process's settings."""
    prefix = "LMCACHE_PLUGIN_" if older else "LMCACHE_RUNTIME_PLUGIN_"
    text = configuration if isinstance(configuration, str) else json.dumps(configuration)
    values = {"ROLE": "scheduler", "CONFIG": text, "WORKER_COUNT": str(workers), "WORKER_ID": "-1"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LMCACHE_") and name not in ("PYTHONPATH", "PYTHONHOME")
    }
    return kept | {"PYTHONUNBUFFERED": "1"} | {prefix + name: value for name, value in values.items()} | more


@contextlib.contextmanager
def started(python: Path | str, file: Path, environ: Mapping[str, str], **how: Any) -> Iterator[subprocess.Popen[str]]:
    """The plugin, as LMCache starts it; killed in the end."""
    child = subprocess.Popen(
        [str(python), str(file)],
        env=dict(environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **how,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def refusal(python: Path | str, file: Path, environ: Mapping[str, str]) -> str:
    """The one line with which it ends."""
    with started(python, file, environ) as child:
        output, _ = child.communicate(timeout=30)
    assert child.returncode == 2, output
    (line,) = output.splitlines()
    return line


@contextlib.contextmanager
def started_by_another(
    python: Path | str, file: Path, environ: Mapping[str, str], *, in_a_thread: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A process that starts the plugin and waits; both write into its output, which ends when both have ended."""
    start = f"subprocess.Popen([{str(python)!r}, {str(file)!r}])"
    if in_a_thread:
        start = f"t = threading.Thread(target=lambda: {start}); t.start(); t.join(); print('the thread is gone')"
    program = f"import subprocess, sys, threading, time\n{start}\nsys.stdin.read()\n"
    child = subprocess.Popen(
        [sys.executable, "-u", "-W", "ignore", "-c", program],
        env=dict(environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
        child.communicate()
