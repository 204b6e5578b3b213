import time
from collections.abc import Callable

import pytest

from lmcache_api.embedded import engine as engine_module
from lmcache_api.embedded.pins import PinMonitor
from tests.api.embedded.making import CHUNK, CPU, Made


def test_each_run_tells_what_is_pinned_and_lets_go_what_is_too_old(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = made(pin_timeout_sec=10).engine
    engine.store(range(3 * CHUNK))
    engine.pin(range(3 * CHUNK), "one")
    monitor = PinMonitor(engine, interval=30)
    counts = {"pinned_count": "3", "timeout_count": "0", "force_unpin_count": "0"}
    assert monitor.run_once() == ("Checked 3 objects, 0 timeouts, 0 force unpinned", counts)
    now = time.monotonic()
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: now + 11.0)
    counts = {"pinned_count": "3", "timeout_count": "3", "force_unpin_count": "3"}
    assert monitor.run_once() == ("Checked 3 objects, 3 timeouts, 3 force unpinned", counts)
    assert monitor.run_once()[0] == "Checked 0 objects, 0 timeouts, 0 force unpinned"
    engine.backends.close(CPU)
    assert monitor.run_once()[0] == "Checked 0 objects, 0 timeouts, 0 force unpinned"


def test_it_is_lmcaches_thread_by_name_and_level(made: Callable[..., Made]) -> None:
    status = PinMonitor(made().engine, interval=7).status()
    assert (status["name"], status["level"], status["interval"]) == ("PinMonitor-thread", "critical", 7)
