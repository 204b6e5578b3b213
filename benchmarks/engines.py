"""The hosts of `engine_host.py` for the programs that measure with an engine: a real LMCache or the embedded worker."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT, BenchmarkError, Child

WORKER_PORT = 7000
"""What every server appends to its socket prefix for worker 0: the port that it would have."""

CHUNK_SIZE = 256
FIND_SECONDS = 60.0

FOUND_BY = "LMCACHE_PYTHON"
HOW_TO_FIND = f"set {FOUND_BY} to the Python that has LMCache, or run `make bench-lmcache`, which installs it"


@dataclass(frozen=True)
class EngineHost:
    """A host that serves, and the sockets of its servers."""

    child: Child
    ours: Path
    theirs: Path


def add_option(parser: argparse.ArgumentParser) -> None:
    text = f"the Python that has LMCache (default: what {FOUND_BY} names)"
    parser.add_argument("--lmcache-python", metavar="FILE", default=os.environ.get(FOUND_BY), help=text)


def check_lmcache(python: str | None) -> str:
    """The Python that has LMCache.

    Raises:
        BenchmarkError: there is none.
    """
    if not python:
        raise BenchmarkError(f"LMCache is not found: {HOW_TO_FIND}")
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lmcache') is None)"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, timeout=FIND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(f"LMCache is not found: {python} does not run ({error}); {HOW_TO_FIND}") from None
    if found.returncode:
        raise BenchmarkError(f"LMCache is not found: {python} has no module lmcache; {HOW_TO_FIND}")
    return python


@contextlib.contextmanager
def running(engine: str, python: str, folder: Path) -> Iterator[EngineHost]:
    """A host with the engine `lmcache` or `embedded`, whose servers answer."""
    folder.mkdir()
    config = _write_config(folder, theirs="lm" if engine == "lmcache" else "ours")
    script = str(Path(__file__).with_name("engine_host.py"))
    command = [python, script, engine, str(config), str(folder / "ours")]
    with Child.started(command, environ=_environ(folder), log=folder / "host.log") as child:
        if child.line() != ["READY"]:
            raise child.ended()
        host = EngineHost(child, *(folder / f"{name}_{WORKER_PORT}" for name in ("ours", "lm")))
        for path in (host.ours, host.theirs) if engine == "lmcache" else (host.ours,):
            child.wait_for_answer(path)
        yield host


@contextlib.contextmanager
def running_lmcache(python: str, folder: Path) -> Iterator[EngineHost]:
    """A real LMCache standalone engine with its own server and ours."""
    with running("lmcache", python, folder / "lmcache") as host:
        yield host


@contextlib.contextmanager
def running_embedded(folder: Path) -> Iterator[EngineHost]:
    """An embedded worker with our server."""
    with running("embedded", sys.executable, folder / "embedded") as host:
        yield host


def versions_text(host: EngineHost) -> str:
    return ", ".join(host.child.ask("versions")).replace("=", " ")


def _environ(folder: Path) -> dict[str, str]:
    """No setting and no secret of the caller's, no usage report to anybody, and a home that goes with the folder."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
    own = {"HOME": str(folder), "TMPDIR": str(folder), "LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0"}
    return {**kept, **own, "PYTHONPATH": str(ROOT / "src")}


def _write_config(folder: Path, *, theirs: str) -> Path:
    """Memory, and disk enough for all that is ever stored, so that LMCache never evicts; all else is at its default."""
    disk = folder / "disk"
    disk.mkdir()
    config = folder / "lmcache.yaml"
    config.write_text(
        f"""chunk_size: {CHUNK_SIZE}
local_cpu: true
max_local_cpu_size: 1
local_disk: "file://{disk}/"
max_local_disk_size: 8
internal_api_server_enabled: true
internal_api_server_port_start: {WORKER_PORT - 1}
internal_api_server_socket_path_prefix: {folder}/{theirs}
""",
        encoding="utf-8",
    )
    return config
