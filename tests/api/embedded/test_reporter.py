"""A worker's reports to a controller that hangs: nobody is stalled by it, and nobody waits for it in the end."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.embedded.reporter import ControllerReporter
from lmcache_shared.settings import Settings
from tests.e2e.processes import read_until, running

WORKERS = 12


@pytest.fixture
def hanging() -> Iterator[str]:
    """The address of one that takes connections and never says a word."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(128)
        yield f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.parametrize("seconds", [1.0, 3.0])
def test_a_controller_that_hangs_makes_no_worker_unhealthy(hanging: str, seconds: float) -> None:
    settings = Settings(
        enable_controller=True, controller_address=hanging, controller_worker_seconds=seconds,
        chunk_size=16, max_local_cpu_size=0.01,
    )  # fmt: skip
    with EmbeddedComponent(settings, 1) as worker:
        (reporter,) = (thread for thread in worker._threads if isinstance(thread, ControllerReporter))
        until = time.monotonic() + 2 * seconds
        while time.monotonic() < until:
            status = reporter.status()
            assert status["is_active"], str(status)
            time.sleep(0.01)
        assert reporter.status()["failed_runs"] >= 2


def test_many_workers_end_together_while_the_controller_hangs(tmp_path: Path) -> None:
    prefix = f"--set=internal_api_server_socket_path_prefix={tmp_path}/s"
    command = [
        "-m", "lmcache_api", "--role", "worker", "--workers", str(WORKERS), "--set=enable_controller=true", prefix,
        "--set=max_local_cpu_size=0.01",
    ]  # fmt: skip
    with running("-m", "lmcache_api", "--role", "controller", prefix) as controller:
        read_until(controller, "serves on")
        with running(*command) as child:
            read_until(child, f"lmcache_worker{WORKERS - 1}")
            time.sleep(0.5)  # every worker has reported
            controller.send_signal(signal.SIGSTOP)
            child.send_signal(signal.SIGTERM)
            clock = time.monotonic()
            assert child.wait(30) == 0
            assert time.monotonic() - clock < 4
