"""The two curl lines with which LMCache's frontend shows its proxy, from the host itself: real processes."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_api.pytest_plugin import free_port
from tests.e2e.processes import read_until, running

METRICS = (
    'curl "http://localhost:8080/proxy/localhost/%252Ftmp%252Flmcache_internal_api_server%252Fsocket_8081/metrics"'
)
SCRIPT = 'curl -X POST  http://localhost:9090/proxy/localhost/8081/run_script -F "script=@{script}"'
"""But for the script's path, which is of the machine on which it was written."""


@pytest.fixture
def frontend() -> Iterator[str]:
    """The port of one with no nodes, and without options; ports alone are not those of the lines."""
    port = str(free_port())
    with running("-m", "lmcache_frontend", "--port", port) as child:
        read_until(child, "serves on")
        yield port


@contextlib.contextmanager
def scheduler(*settings: str) -> Iterator[None]:
    with running("-m", "lmcache_api", "--role", "scheduler", *(f"--set={it}" for it in settings)) as child:
        read_until(child, "serves on")
        yield


def run(line: str, **replaced: str) -> str:
    for found, there in {":8080": ":{frontend}", ":9090": ":{frontend}", "8081": "{port}"}.items():
        line = line.replace(found, there)
    line = line.format(**replaced)
    done = subprocess.run(f"{line} -sS --fail-with-body", shell=True, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    return done.stdout


def test_metrics_by_a_socket(frontend: str) -> None:
    port = str(free_port())
    with scheduler(
        "internal_api_server_socket_path_prefix=/tmp/lmcache_internal_api_server/socket",
        f"internal_api_server_port_start={port}",
    ):
        assert "# TYPE lmcache:" in run(METRICS, frontend=frontend, port=port)


def test_a_script_by_a_port(frontend: str) -> None:
    port = str(free_port())
    with (
        tempfile.TemporaryDirectory() as folder,
        scheduler(f"internal_api_server_port_start={port}", "run_script_api_enabled=true"),
    ):
        script = Path(folder) / "scratch.py"
        script.write_text("lmcache_manager = app.state.lmcache_adapter\nresult = 6 * 7\n")
        assert run(SCRIPT, frontend=frontend, port=port, script=str(script)) == "42"
