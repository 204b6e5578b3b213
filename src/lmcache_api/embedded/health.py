"""The embedded component's own check on itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmcache_api.component import PeriodicThreadStatus
from lmcache_api.embedded.periodic_threads import PeriodicThread

INTERVAL_SECONDS = 30.0


class HealthMonitor(PeriodicThread):
    """Looks whether every other critical or high thread still does its work."""

    def __init__(self, threads: Callable[[], Sequence[PeriodicThreadStatus]]) -> None:
        super().__init__("health-monitor-thread", interval=INTERVAL_SECONDS, level="critical")
        self._threads = threads

    def stalled(self) -> list[str]:
        """The critical and high threads that are not active now, itself among them."""
        important = [thread for thread in self._threads() if thread["level"] in ("critical", "high")]
        return [thread["name"] for thread in important if not thread["is_active"]]

    def is_healthy(self) -> bool:
        return not self.stalled()

    def run_once(self) -> tuple[str, dict[str, str]]:
        others = [thread for thread in self._threads() if thread["name"] != self.name]
        stalled = [name for name in self.stalled() if name != self.name]
        details = {"total_checks": str(len(others)), "failed_checks": str(len(stalled))}
        message = f"Stalled threads: {', '.join(stalled)}" if stalled else f"Checked {len(others)} threads, all active"
        return message, details
