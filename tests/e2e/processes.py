"""Programs as a user starts them, ended by their process id whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without settings of LMCache; nothing is kept in the user's folders."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
    return {**inherited, "LMCACHE_FRONTEND_REGISTRY": "memory", **more}


@contextlib.contextmanager
def running(*command: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own; the group is killed in the end."""
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def read_until(child: subprocess.Popen[str], text: str) -> str:
    """What the child prints until a line holds `text`."""
    assert child.stdout is not None
    lines = ""
    for line in child.stdout:
        lines += line
        if text in line:
            return lines
    raise AssertionError(f"{text!r} was never printed; {lines!r}, {child.stderr.read() if child.stderr else ''!r}")


def children_of(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if entry.joinpath("stat").read_text().rpartition(")")[2].split()[1] == str(pid):
                    found.append(int(entry.name))
    return found


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Those of the processes that still run when the seconds have passed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if not pids:
            break
        time.sleep(0.02)
    return pids
