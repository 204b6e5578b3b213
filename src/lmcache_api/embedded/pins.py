"""The watch over pinned chunks: what a lookup holds for too long is let go."""

from __future__ import annotations

from lmcache_api.embedded.engine import EmbeddedEngine
from lmcache_api.embedded.periodic_threads import PeriodicThread


class PinMonitor(PeriodicThread):
    """Named as LMCache's."""

    def __init__(self, engine: EmbeddedEngine, *, interval: float) -> None:
        super().__init__("PinMonitor-thread", interval=interval, level="critical")
        self._engine = engine

    def run_once(self) -> tuple[str, dict[str, str]]:
        cpu = self._engine.backends.cpu
        pinned = cpu.pinned if cpu is not None else 0
        forced = self._engine.unpin_expired()
        details = {"pinned_count": str(pinned), "timeout_count": str(forced), "force_unpin_count": str(forced)}
        return f"Checked {pinned} objects, {forced} timeouts, {forced} force unpinned", details
