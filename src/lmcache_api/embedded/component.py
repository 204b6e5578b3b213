"""The embedded scheduler or worker: real settings, metadata, metrics and periodic threads, no LMCache needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace, TracebackType
from typing import Any

from lmcache_api.component import PeriodicThreadStatus, Version
from lmcache_api.embedded.health import HealthMonitor
from lmcache_api.embedded.metrics import EmbeddedMetrics
from lmcache_api.embedded.periodic_threads import PeriodicThread
from lmcache_shared.placement import SCHEDULER_INDEX, Role, place
from lmcache_shared.settings import Settings
from lmcache_shared.version import VERSION

MODEL_NAME = "embedded_model"


class EmbeddedComponent:
    """A scheduler (index 0) or worker n (index 1 + n). Its threads run between `start` and `stop`."""

    def __init__(self, settings: Settings, index: int = SCHEDULER_INDEX, *, world_size: int = 1) -> None:
        self.settings = settings
        self.index = index
        self.role: Role = "scheduler" if index == SCHEDULER_INDEX else "worker"
        self.name = place(settings, index).name
        self.version = Version(VERSION, "embedded", f"{VERSION}-embedded")
        self._world_size = world_size
        self._threads: list[PeriodicThread] = []
        self._health = HealthMonitor(self.periodic_threads)
        self._threads.append(self._health)
        labels = {"model_name": MODEL_NAME, "worker_id": str(self.worker_id), "role": self.role}
        self.metrics = EmbeddedMetrics(labels, self.periodic_threads, self._health.is_healthy)
        self.script_adapter = SimpleNamespace(
            config=settings, lmcache_engine=None, lmcache_engine_metadata=SimpleNamespace(**self.metadata())
        )

    @property
    def worker_id(self) -> int:
        """The scheduler is its own worker 0, as in LMCache's metadata."""
        return max(0, self.index - 1)

    def metadata(self) -> Mapping[str, Any]:
        return {
            "engine_id": self.name,
            "model_name": MODEL_NAME,
            "role": self.role,
            "worker_id": self.worker_id,
            "world_size": self._world_size,
        }

    def periodic_threads(self) -> Sequence[PeriodicThreadStatus]:
        return [thread.status() for thread in self._threads]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        for thread in self._threads:
            thread.stop()

    def __enter__(self) -> EmbeddedComponent:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
