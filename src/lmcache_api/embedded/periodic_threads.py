"""A thread that does one thing at an interval, and tells how it went the way LMCache's periodic threads do."""

from __future__ import annotations

import logging
import threading
import time

from lmcache_api.component import Level, PeriodicThreadStatus, RunSummary
from lmcache_shared.errors import OpsError

logger = logging.getLogger(__name__)


class FailedRun(OpsError):
    """A run failed as runs may; the thread that raises it has logged what there is to say."""


STOP_SECONDS = 1.0
ACTIVE_INTERVALS = 3
"""A thread whose last run is longer ago than this many intervals is no longer active."""


class PeriodicThread:
    """Calls `run_once` at once and then every `interval` seconds, until `stop`.

    A subclass gives `run_once`: a message, and details as texts. What it raises is a failed run; the thread goes on.
    """

    def __init__(self, name: str, *, interval: float, level: Level) -> None:
        self.name = name
        self.interval = interval
        self.level: Level = level
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._started_at = 0.0
        self._total_runs = 0
        self._failed_runs = 0
        self._last: RunSummary | None = None

    def run_once(self) -> tuple[str, dict[str, str]]:
        raise NotImplementedError(f"{type(self).__name__} does not say what it does")

    @property
    def stopping(self) -> bool:
        """Whether it is to end; a run that takes long looks at it."""
        return self._stopping.is_set()

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        self._stopping.clear()
        self._started_at = time.time()
        self._thread = threading.Thread(target=self._loop, name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; waits for a run that is going on, for a second at most."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def status(self) -> PeriodicThreadStatus:
        with self._lock:
            last, total, failed = self._last, self._total_runs, self._failed_runs
        now = time.time()
        running = self.is_running
        last_run_time = last["timestamp"] if last else 0.0
        since = now - (last_run_time or self._started_at)
        return {
            "name": self.name,
            "level": self.level,
            "interval": self.interval,
            "init_wait": 0.0,
            "is_running": running,
            "is_active": running and since < ACTIVE_INTERVALS * self.interval,
            "last_run_time": last_run_time,
            "last_run_ago": since if last else None,
            "total_runs": total,
            "failed_runs": failed,
            "success_rate": (total - failed) / total * 100 if total else None,
            "last_summary": last,
        }

    def _loop(self) -> None:
        while not self._stopping.is_set():
            begun, clock = time.time(), time.perf_counter()
            details: dict[str, str] = {}
            try:
                message, details = self.run_once()
                success = True
            except FailedRun as error:
                message, success = str(error), False
            except Exception as error:
                logger.exception("periodic thread %s failed", self.name)
                message, success = f"{type(error).__name__}: {error}", False
            summary: RunSummary = {
                "timestamp": begun,
                "duration_ms": (time.perf_counter() - clock) * 1000,
                "success": success,
                "message": message,
                "extra_info": details,
            }
            with self._lock:
                self._last = summary
                self._total_runs += 1
                self._failed_runs += not success
            self._stopping.wait(self.interval)
