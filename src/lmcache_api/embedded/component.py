"""The embedded scheduler or worker: real settings, metrics, periodic threads and an engine, no LMCache needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace, TracebackType
from typing import Any

from lmcache_api.component import Component, Controller, KVCaches, Lookup, PeriodicThreadStatus, Unavailable, Version
from lmcache_api.embedded.configuration import EmbeddedConfiguration
from lmcache_api.embedded.disk import DiskError
from lmcache_api.embedded.engine import EmbeddedEngine
from lmcache_api.embedded.health import HealthMonitor
from lmcache_api.embedded.keys import ChunkKeys
from lmcache_api.embedded.layout import KVLayout
from lmcache_api.embedded.load import ConversationLoad
from lmcache_api.embedded.lookup import EmbeddedLookupClient, RemoteWorker, SchedulerLookup, Worker, WorkerLookup
from lmcache_api.embedded.metrics import EmbeddedMetrics, of_threads
from lmcache_api.embedded.periodic_threads import PeriodicThread
from lmcache_api.embedded.pins import PinMonitor
from lmcache_api.embedded.reporter import REPORTS_A_TIMEOUT, ControllerReporter, controller_address
from lmcache_api.embedded.statistics import NO_STATISTICS
from lmcache_shared.errors import ConfigError
from lmcache_shared.placement import DEFAULT_INSTANCE, SCHEDULER_INDEX, Role, place, serves
from lmcache_shared.settings import Settings
from lmcache_shared.version import VERSION


class EmbeddedComponent:
    """A scheduler (index 0) or worker n (index 1 + n). Its threads run between `start` and `stop`.

    Args:
        settings: of the deployment.
        index: which component it is.
        world_size: how many workers there are.
        workers: for a scheduler, the workers of this process; the others it asks over their internal APIs.

    Raises:
        ConfigError: the settings ask for an engine that cannot be made.
    """

    controller: Controller | None = None

    def __init__(
        self,
        settings: Settings,
        index: int = SCHEDULER_INDEX,
        *,
        world_size: int = 1,
        workers: Sequence[EmbeddedComponent] = (),
    ) -> None:
        self.index = index
        self.role: Role = "scheduler" if index == SCHEDULER_INDEX else "worker"
        self.configuration = EmbeddedConfiguration(settings, self.role)
        self.name = place(settings, index).name
        self.version = Version(VERSION, "embedded", f"{VERSION}-embedded")
        self.inference = EmbeddedInference()
        self._world_size = world_size
        self._layout = KVLayout.of(settings)
        labels = {"model_name": settings.engine_model_name, "role": self.role, "served_model_name": ""}
        self.metrics = EmbeddedMetrics({**labels, "worker_id": str(self.worker_id)})
        self.engine: EmbeddedEngine | None = None
        self.lookup: Lookup
        self._client_of: SchedulerLookup | None = None
        self._threads: list[PeriodicThread] = []
        self._health = HealthMonitor(self.periodic_threads)
        self._threads.append(self._health)
        if self.role == "worker":
            self.lookup = WorkerLookup()
            self._make_engine()
        else:
            self.lookup = self._client_of = self._make_lookup(workers)
        self.metrics.refresh_with(self._gauges)
        self.script_adapter: object = _ScriptAdapter(self)

    @property
    def settings(self) -> Settings:
        return self.configuration.settings

    @property
    def worker_id(self) -> int:
        """The scheduler is its own worker 0, as in LMCache's metadata."""
        return max(0, self.index - 1)

    @property
    def kv_caches(self) -> KVCaches | None:
        return None if self.engine is None else self.engine.kv_caches

    @property
    def lookup_client(self) -> EmbeddedLookupClient | None:
        return None if self._client_of is None else self._client_of.client

    def metadata(self) -> Mapping[str, Any]:
        """The fields of LMCache's."""
        return {
            "chunk_size": self.settings.chunk_size,
            "engine_id": None,
            "first_rank": 0,
            "kv_connector_extra_config": None,
            "kv_dtype": f"torch.{self._layout.dtype}",
            "kv_layer_groups_manager": None,
            "kv_shape": self._layout.chunk_shape,
            "local_worker_id": self.worker_id,
            "local_world_size": self._world_size,
            "model_name": self.settings.engine_model_name,
            "role": self.role,
            "served_model_name": None,
            "use_mla": self._layout.mla,
            "worker_id": self.worker_id,
            "world_size": self._world_size,
        }

    def periodic_threads(self) -> Sequence[PeriodicThreadStatus]:
        return [thread.status() for thread in self._threads]

    def start(self) -> None:
        for thread in reversed(self._threads):  # the health monitor last: it looks whether the others run
            thread.start()

    def stop(self) -> None:
        for thread in self._threads:
            thread.stop()
        if self.engine is not None:
            self.engine.close()

    def __enter__(self) -> EmbeddedComponent:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _make_engine(self) -> None:
        try:
            self.engine = EmbeddedEngine(
                lambda: self.settings,
                self.metrics,
                owner=self.name,
                worker_id=self.worker_id,
                world_size=self._world_size,
            )
        except DiskError as error:
            raise ConfigError(f"local_disk: {error}") from None
        self.metrics.refresh_with(self.engine.gauges)
        if self.settings.enable_controller and serves(self.settings, self.index):  # or nobody could ask it
            self._threads.append(self._make_reporter(self.engine))
        self._threads.append(PinMonitor(self.engine, interval=self.settings.pin_check_interval_sec))

    def _make_reporter(self, engine: EmbeddedEngine) -> ControllerReporter:
        return ControllerReporter(
            controller_address(self.settings),
            instance_id=self.settings.lmcache_instance_id or DEFAULT_INSTANCE,
            worker_id=self.worker_id,
            address=place(self.settings, self.index).address,
            engine=engine,
            interval=self.settings.controller_worker_seconds / REPORTS_A_TIMEOUT,
            token=self.settings.internal_api_server_token,
        )

    def _make_lookup(self, workers: Sequence[EmbeddedComponent]) -> SchedulerLookup:
        here = {worker.worker_id: worker.engine for worker in workers if worker.engine is not None}
        all_workers: dict[int, Worker] = {}
        for number in range(self._world_size):
            address = place(self.settings, 1 + number).address
            all_workers[number] = here.get(number) or RemoteWorker(address, lambda: self.settings)
        keys = ChunkKeys(self.settings, self._layout, worker_id=0, world_size=self._world_size)
        lookup = SchedulerLookup(lambda: self.settings, all_workers, keys)
        if here:
            engines = list(here.values())
            self._threads.append(ConversationLoad(lambda: self.settings, self.metrics, lookup, engines))
        return lookup

    def _gauges(self) -> dict[str, float]:
        client = self.lookup_client
        statistics = None if client is None else client.statistics
        return {
            "lmcache_is_healthy": self._health.is_healthy(),
            **of_threads(self.periodic_threads()),
            **(statistics.gauges() if statistics is not None else NO_STATISTICS),
        }


class _ScriptAdapter:
    """What a script finds in the place of LMCache's manager."""

    def __init__(self, component: EmbeddedComponent) -> None:
        self.lmcache_engine = component.engine
        self.lmcache_engine_metadata = SimpleNamespace(**component.metadata())
        self._configuration = component.configuration

    @property
    def config(self) -> Settings:
        """Of now."""
        return self._configuration.settings


class EmbeddedInference:
    """There is no inference engine around an embedded component."""

    def info(self) -> Mapping[str, Any]:
        return {}

    def version(self) -> str:
        raise Unavailable("there is no inference engine around an embedded component")


def _is_component(component: EmbeddedComponent) -> Component:
    """So that the type checker holds the class against the seam."""
    return component
