"""The embedded controller as a component: what it tells beside the controller's own operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace, TracebackType
from typing import Any

from lmcache_api.component import Component, PeriodicThreadStatus, Version
from lmcache_api.embedded.configuration import EmbeddedConfiguration
from lmcache_api.embedded.controller import EmbeddedController
from lmcache_api.embedded.health import HealthMonitor
from lmcache_api.embedded.metrics import CONTROLLER_FAMILIES, EmbeddedMetrics, of_threads
from lmcache_shared.placement import CONTROLLER_INDEX, Role
from lmcache_shared.settings import Settings
from lmcache_shared.version import VERSION


class EmbeddedControllerComponent:
    """A controller that workers of the embedded engine report to. Its thread runs between `start` and `stop`."""

    engine = kv_caches = lookup = lookup_client = inference = None
    index = CONTROLLER_INDEX
    role: Role = "controller"
    version = Version(VERSION, "embedded", f"{VERSION}-embedded")

    def __init__(self, settings: Settings) -> None:
        self.configuration = EmbeddedConfiguration(settings, self.role)
        self.controller = EmbeddedController(lambda: self.settings)
        self._health = HealthMonitor(self.periodic_threads)
        self.metrics = EmbeddedMetrics({"role": self.role}, CONTROLLER_FAMILIES)
        self.metrics.refresh_with(self._gauges)
        self.script_adapter: object = SimpleNamespace(config=settings, lmcache_controller_manager=self.controller)

    @property
    def settings(self) -> Settings:
        return self.configuration.settings

    def metadata(self) -> Mapping[str, Any]:
        return {"role": self.role}

    def periodic_threads(self) -> Sequence[PeriodicThreadStatus]:
        return [self._health.status()]

    def start(self) -> None:
        self._health.start()

    def stop(self) -> None:
        self._health.stop()

    def __enter__(self) -> EmbeddedControllerComponent:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _gauges(self) -> dict[str, float]:
        return {
            "lmcache_is_healthy": self._health.is_healthy(),
            **of_threads(self.periodic_threads()),
            **self.controller.gauges(),
        }


def _is_component(component: EmbeddedControllerComponent) -> Component:
    """So that the type checker holds the class against the seam."""
    return component
