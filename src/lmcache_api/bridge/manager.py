"""Any object with the attributes of LMCache's `LMCacheManager` is a component.

The host process made it; we only look. What the manager or the installed `lmcache` lacks, this component lacks, and no
attribute error of theirs becomes a 500 of ours.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY

from lmcache_api.bridge.abilities import ability
from lmcache_api.bridge.configuration import HostConfiguration
from lmcache_api.bridge.engine import ManagerEngine, TensorKVCaches
from lmcache_api.bridge.lookup import ManagerLookup, ManagerLookupClient
from lmcache_api.bridge.turns import Turns
from lmcache_api.component import Component, Controller, PeriodicThreadStatus, Version
from lmcache_api.exposition import Exposition
from lmcache_shared.config import attributes_of, from_object
from lmcache_shared.errors import ConfigError, Refusal
from lmcache_shared.placement import SCHEDULER_INDEX, Role
from lmcache_shared.settings import Settings

logger = logging.getLogger(__name__)

_PLAIN = (str, int, float, bool, list, tuple, dict, type(None))


class ManagerComponent:
    """A scheduler when the manager has no engine, otherwise the worker that the engine's metadata name.

    Raises:
        ConfigError: the object is no manager, or its configuration cannot be used.
    """

    def __init__(self, manager: Any) -> None:
        engine = getattr(manager, "lmcache_engine", None)
        owner, name = (manager, "the manager") if engine is None else (engine, "its lmcache_engine")
        config = getattr(owner, "config", None)
        if config is None:
            raise ConfigError(
                f"{type(manager).__name__}: expected a Component or an object with the attributes of LMCache's manager,"
                f" but {name} has no config"
            )
        self._settings = HostSettings(config)
        self._settings.read()
        self.script_adapter: object = manager
        self._manager = manager
        # LMCache's own rules: without an engine it has the scheduler's port; its role is what the metadata say, as a
        # scheduler may have an engine (enable_scheduler_bypass_lookup).
        self.index = SCHEDULER_INDEX if engine is None else 1 + _worker_id(engine)
        told = getattr(getattr(manager, "lmcache_engine_metadata", None), "role", None)
        is_scheduler = told == "scheduler" or (told != "worker" and self.index == SCHEDULER_INDEX)
        self.role: Role = "scheduler" if is_scheduler else "worker"
        self.metrics = HostMetrics()
        self.controller: Controller | None = None
        self.configuration = HostConfiguration(config)
        self.inference = ManagerInference(manager)
        self._turns = Turns()
        self.lookup = ManagerLookup(manager, self.role, self._turns)
        self.kv_caches = TensorKVCaches(lambda: getattr(manager, "kv_caches", None) or {})

    @property
    def engine(self) -> ManagerEngine | None:
        engine = getattr(self._manager, "lmcache_engine", None)
        return None if engine is None else ManagerEngine(engine, self._turns)

    @property
    def lookup_client(self) -> ManagerLookupClient | None:
        client = getattr(self._manager, "lookup_client", None)
        return None if client is None else ManagerLookupClient(client)

    @property
    def settings(self) -> Settings:
        """As they are now: LMCache changes its configuration at run time."""
        return self._settings.read()

    @property
    def version(self) -> Version:
        return host_version()

    def metadata(self) -> Mapping[str, Any] | None:
        """What LMCache tells: every public attribute that is no method; torch's types as texts."""
        metadata = getattr(self._manager, "lmcache_engine_metadata", None)
        if metadata is None:
            return None
        names = [name for name in dir(metadata) if not name.startswith("__")]
        values = {name: getattr(metadata, name, None) for name in names}
        return {name: _plain(value) for name, value in values.items() if not callable(value)}

    def periodic_threads(self) -> Sequence[PeriodicThreadStatus]:
        return host_periodic_threads()


def host_version() -> Version:
    """The version of the LMCache that the host has loaded."""
    utils = sys.modules.get("lmcache.utils")
    number, commit = (str(getattr(utils, name, "unknown")) for name in ("VERSION", "COMMIT_ID"))
    whole = getattr(utils, "get_version", None)
    return Version(number, commit, str(whole()) if whole is not None else number)


def host_periodic_threads() -> Sequence[PeriodicThreadStatus]:
    """The periodic threads of that LMCache."""
    module = sys.modules.get("lmcache.v1.periodic_thread")
    if module is None:
        return []
    return [thread.get_status() for thread in module.PeriodicThreadRegistry.get_instance().get_all()]


class HostSettings:
    """The settings that the host's configuration object holds now, checked anew when it has changed.

    What it holds may be changed into something that cannot be used; then the last settings that could are told.
    """

    def __init__(self, config: object) -> None:
        self._config = config
        self._seen: dict[str, Any] | None = None
        self._settings = Settings()

    def read(self) -> Settings:
        """The settings.

        Raises:
            ConfigError: at the first reading, when a value cannot be used.
        """
        now = attributes_of(self._config)
        if now != self._seen:
            try:
                self._settings = from_object(self._config, f"{type(self._config).__name__} of the host process")
            except ConfigError as error:
                if self._seen is None:
                    raise
                logger.warning("settings stay as they were: %s", error)
            self._seen = _copy(now)
        return self._settings


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    """Deep, so that a change inside `extra_config` is seen; shallow where something cannot be copied."""
    try:
        return copy.deepcopy(values)
    except Exception:
        return {name: copy.copy(value) for name, value in values.items()}


class ManagerInference:
    """What the manager's connector tells of vLLM."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def info(self) -> Mapping[str, Any]:
        return dict(ability(self._manager, "get_inference_info")())

    def version(self) -> str:
        """LMCache's manager passes on what its connector tells, but not the version, which is in there."""
        if getattr(self._manager, "get_inference_version", None) is None:
            told: Mapping[str, Any] = getattr(self._manager, "get_inference_info", dict)() or {}
            if version := told.get("vllm_version"):
                return str(version)
        return str(ability(self._manager, "get_inference_version")())


class HostMetrics:
    """The host's default Prometheus registry: there LMCache, and whatever else runs in the process, counts."""

    def __init__(self) -> None:
        self._exposition = Exposition(REGISTRY)

    def exposition(self) -> bytes:
        return self._exposition.render()

    def reset(self) -> None:
        """LMCache's own reset.

        Raises:
            Refusal: 503, when the host has not loaded LMCache's metrics.
        """
        module = sys.modules.get("lmcache.observability")
        if module is None:
            raise Refusal(503, "this process has no LMCache metrics to reset")
        module.reset_observability_metrics()


def _worker_id(engine: Any) -> int:
    worker_id = getattr(getattr(engine, "metadata", None), "worker_id", None)
    if not isinstance(worker_id, int) or worker_id < 0:
        raise ConfigError(f"lmcache_engine.metadata.worker_id: expected a number from 0, found {worker_id!r}")
    return worker_id


def _plain(value: Any) -> Any:
    """A torch dtype or size as its text, as LMCache tells it; what JSON knows as it is."""
    return value if type(value) in _PLAIN else str(value)


def _is_component(component: ManagerComponent) -> Component:
    """So that the type checker holds the class against the seam."""
    return component
