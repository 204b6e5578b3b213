"""Any object with the attributes of LMCache's `LMCacheManager` is a component.

The host process made it; we only look. What the manager or the installed `lmcache` lacks, this component lacks, and no
attribute error of theirs becomes a 500 of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.exposition import generate_latest

from lmcache_api.component import PeriodicThreadStatus, Version
from lmcache_shared.config import from_object
from lmcache_shared.errors import ConfigError, Refusal
from lmcache_shared.placement import SCHEDULER_INDEX, Role

_PLAIN = (str, int, float, bool, list, tuple, dict, type(None))


class ManagerComponent:
    """A scheduler when the manager has no engine, otherwise the worker that the engine's metadata name.

    Raises:
        ConfigError: the object is no manager, or its configuration cannot be used.
    """

    def __init__(self, manager: Any) -> None:
        engine = getattr(manager, "lmcache_engine", None)
        config = getattr(manager, "config", None) if engine is None else getattr(engine, "config", None)
        if config is None:
            raise ConfigError(
                f"{type(manager).__name__}: expected an object with the attributes of LMCache's manager"
                " (config, lmcache_engine) or a Component"
            )
        self.settings = from_object(config, f"{type(config).__name__} of the host process")
        self.script_adapter: object = manager
        self._manager = manager
        # LMCache's own rule: without an engine the component is the scheduler.
        worker_id = None if engine is None else getattr(getattr(engine, "metadata", None), "worker_id", 0)
        self.index = SCHEDULER_INDEX if worker_id is None else 1 + int(worker_id)
        self.role: Role = "scheduler" if self.index == SCHEDULER_INDEX else "worker"
        self.metrics = HostMetrics()

    @property
    def version(self) -> Version:
        utils = sys.modules.get("lmcache.utils")
        return Version(str(getattr(utils, "VERSION", "unknown")), str(getattr(utils, "COMMIT_ID", "")))

    def metadata(self) -> Mapping[str, Any] | None:
        """What LMCache tells: every public attribute that is no method; torch's types as texts."""
        metadata = getattr(self._manager, "lmcache_engine_metadata", None)
        if metadata is None:
            return None
        names = [name for name in dir(metadata) if not name.startswith("__")]
        values = {name: getattr(metadata, name, None) for name in names}
        return {name: _plain(value) for name, value in values.items() if not callable(value)}

    def periodic_threads(self) -> Sequence[PeriodicThreadStatus]:
        module = sys.modules.get("lmcache.v1.periodic_thread")
        if module is None:
            return []
        return [thread.get_status() for thread in module.PeriodicThreadRegistry.get_instance().get_all()]


class HostMetrics:
    """The host's default Prometheus registry: there LMCache, and whatever else runs in the process, counts."""

    def exposition(self) -> bytes:
        return generate_latest(REGISTRY)

    def reset(self) -> None:
        """LMCache's own reset.

        Raises:
            Refusal: 503, when the host has not loaded LMCache's metrics.
        """
        module = sys.modules.get("lmcache.observability")
        if module is None:
            raise Refusal(503, "this process has no LMCache metrics to reset")
        module.reset_observability_metrics()


def _plain(value: Any) -> Any:
    """A torch dtype or size as its text, as LMCache tells it; what JSON knows as it is."""
    return value if type(value) in _PLAIN else str(value)
