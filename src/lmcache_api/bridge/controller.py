"""LMCache's own controller manager, started in this process behind our internal API server.

The manager lives in an event loop and a thread of its own: what blocks there blocks no server.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

from lmcache_api.bridge.configuration import HostConfiguration
from lmcache_api.bridge.manager import HostMetrics, host_periodic_threads, host_version
from lmcache_api.bridge.standalone import INSTALL
from lmcache_api.component import (
    Component,
    ControllerError,
    Operation,
    PeriodicThreadStatus,
    Version,
    WorkerReport,
)
from lmcache_shared.address import tcp_address
from lmcache_shared.config import CONFIG_FILE_VARIABLE, load, read_yaml
from lmcache_shared.errors import AddressError, ConfigError, StartError
from lmcache_shared.placement import CONTROLLER_INDEX, Role
from lmcache_shared.settings import Settings

T = TypeVar("T")

START_SECONDS = 15.0
STOP_SECONDS = 5.0

_MESSAGES: Mapping[str, str] = {
    "lookup": "LookupMsg",
    "clear": "ClearMsg",
    "pin": "PinMsg",
    "compress": "CompressMsg",
    "decompress": "DecompressMsg",
    "move": "MoveMsg",
    "health": "HealthMsg",
    "query_instance": "QueryInstMsg",
    "query_worker_info": "QueryWorkerInfoMsg",
}
"""LMCache's message for each operation."""

_EVENT_PREFIXES: Mapping[str, str] = {
    "query_instance": "QueryInst",
    "query_worker_info": "QueryWorkerInfo",
    "health": "health",
}


class ManagerController:
    """The operations of a running `LMCacheControllerManager`, made in the event loop that it lives in.

    Args:
        manager: LMCache's.
        loop: runs in another thread.
    """

    def __init__(self, manager: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._manager = manager
        self._loop = loop

    async def key_stats(self) -> Mapping[str, Any]:
        return await self._ask(self._key_stats())

    async def workers(self, instance_id: str | None, worker_id: int | None) -> Mapping[str, Any]:
        return await self._ask(self._workers(instance_id, worker_id))

    async def report(self, report: WorkerReport, caller: str | None) -> Mapping[str, Any]:
        raise ControllerError(501, "LMCache's workers register by its own protocol (controller_reply_url)")

    async def leave(self, instance_id: str, worker_id: int, caller: str | None) -> None:
        raise ControllerError(501, "LMCache's workers leave by its own protocol")

    async def operate(self, operation: Operation) -> Mapping[str, Any]:
        return await self._ask(self._operate(operation))

    async def close(self) -> None:
        """The manager outlives the server."""

    async def _key_stats(self) -> Mapping[str, Any]:
        registry = self._manager.reg_controller.registry
        instances = [
            {
                "instance_id": instance_id,
                "key_count": sum(worker.get_kv_count() for worker in instance.workers.values()),
                "worker_count": len(instance.workers),
            }
            for instance_id, instance in registry.instances.items()
        ]
        return {
            "total_key_count": registry.get_total_kv_count(),
            "total_instance_count": len(instances),
            "total_worker_count": sum(instance["worker_count"] for instance in instances),
            "instances": instances,
        }

    async def _workers(self, instance_id: str | None, worker_id: int | None) -> Mapping[str, Any]:
        registry = self._manager.reg_controller.registry
        if instance_id is not None and worker_id is not None:
            worker = registry.get_worker(instance_id, worker_id)
            if worker is None:
                raise ControllerError(404, f"Worker ({instance_id}, {worker_id}) not found")
            return _told(worker.to_worker_info(instance_id), worker)
        if instance_id is not None:
            instance = registry.get_instance(instance_id)
            if instance is None:
                raise ControllerError(404, f"No workers found for instance {instance_id}")
            infos = instance.get_all_worker_infos()
        else:
            infos = registry.get_all_worker_infos_cached()
        workers = [_told(info, registry.get_worker(info.instance_id, info.worker_id)) for info in infos]
        return {"workers": workers, "total_count": len(workers)}

    async def _operate(self, operation: Operation) -> Mapping[str, Any]:
        if operation.name == "check_finish":
            raise ControllerError(501, "LMCache's controller follows no events; an operation has ended when it answers")
        from lmcache.v1.cache_controller import message

        fields = dict(operation.fields)
        instance_id = fields.get("instance_id")
        registry = self._manager.reg_controller.registry
        needs_instance = operation.name in ("clear", "pin", "compress", "decompress", "health")
        if needs_instance and registry.get_instance(instance_id) is None:
            raise ControllerError(404, f"No workers found for instance {instance_id}")
        if operation.name == "move":
            fields["copy"] = bool(fields.pop("should_copy"))
            fields["old_position"], fields["new_position"] = (
                _position(fields[name], name) for name in ("old_position", "new_position")
            )
            for instance, _ in (fields["old_position"], fields["new_position"]):
                if registry.get_instance(instance) is None:
                    raise ControllerError(404, f"No workers found for instance {instance}")
        if "tokens" in fields:
            fields["tokens"] = fields["tokens"] or []
        prefix = _EVENT_PREFIXES.get(operation.name, operation.name.capitalize())
        fields["event_id"] = f"{prefix}{uuid.uuid4()}"
        answer = await self._manager.handle_orchestration_message(getattr(message, _MESSAGES[operation.name])(**fields))
        if isinstance(answer, message.ErrorMsg):
            raise ControllerError(500, answer.error or f"LMCache's controller cannot {operation.name}")
        return _fields_of(operation.name, answer)

    async def _ask(self, work: Coroutine[Any, Any, T]) -> T:
        """Await in the server's loop what the manager's loop does; what LMCache raises is told as its failure.

        It goes on when the caller leaves: cut off between question and answer, LMCache's socket to a worker would be
        of no use any more.
        """
        try:
            done = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
            answer: T = await asyncio.shield(done)
        except (ControllerError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise ControllerError(500, f"LMCache's controller: {str(error) or type(error).__name__}") from None
        return answer


class ControllerComponent:
    """A controller manager as a component.

    Args:
        manager: LMCache's `LMCacheControllerManager`.
        loop: the event loop that it lives in, in another thread.
        config: LMCache's configuration of it.
        settings: of our server.
    """

    engine = kv_caches = lookup = lookup_client = inference = None
    index = CONTROLLER_INDEX
    role: Role = "controller"

    def __init__(self, manager: Any, loop: asyncio.AbstractEventLoop, config: Any, settings: Settings) -> None:
        self.settings = settings
        self.configuration = HostConfiguration(config)
        self.metrics = HostMetrics()
        self.controller = ManagerController(manager, loop)
        self.script_adapter: object = SimpleNamespace(config=config, lmcache_controller_manager=manager)

    @property
    def version(self) -> Version:
        return host_version()

    def metadata(self) -> Mapping[str, Any]:
        return {"role": self.role}

    def periodic_threads(self) -> Sequence[PeriodicThreadStatus]:
        return host_periodic_threads()


class StandaloneController:
    """LMCache's controller manager, started in a thread of its own.

    Args:
        path: LMCache's controller configuration, by default what `LMCACHE_CONTROLLER_CONFIG_FILE` names.
        overrides: each `key=value`: a key of that configuration, or a setting of our server.
        log_level: of LMCache's loggers, unless `LMCACHE_LOG_LEVEL` says otherwise.

    Raises:
        StartError: LMCache is not installed, or its controller does not start.
        ConfigError: a setting cannot be used.
    """

    def __init__(self, path: str | None, overrides: Sequence[str], *, log_level: str) -> None:
        os.environ.setdefault("LMCACHE_LOG_LEVEL", log_level.upper())  # it is read when LMCache is imported
        try:
            from lmcache.v1.cache_controller.controller_manager import LMCacheControllerManager
        except ImportError as error:
            raise StartError(f"--engine lmcache: LMCache is not installed here ({error}); {INSTALL}") from None
        config, settings = _configuration(path, overrides)
        urls = urls_of(config.controller_host, config.controller_monitor_ports)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lmcache-controller", daemon=True)
        self._thread.start()

        async def make() -> Any:
            return LMCacheControllerManager(urls, config.health_check_interval, config.lmcache_worker_timeout)

        try:
            self._manager = asyncio.run_coroutine_threadsafe(make(), self._loop).result(START_SECONDS)
        except Exception as error:
            self._end_loop()
            raise StartError(f"LMCache's controller does not start: {type(error).__name__}: {error}") from None
        self._serving = asyncio.run_coroutine_threadsafe(self._manager.start_all(), self._loop)
        self.component = ControllerComponent(self._manager, self._loop, config, settings)

    def stop(self) -> None:
        """End the manager; blocks for a moment."""
        self._serving.cancel()
        self._loop.call_soon_threadsafe(self._manager.close)
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)


def _configuration(path: str | None, overrides: Sequence[str]) -> tuple[Any, Settings]:
    """LMCache's controller configuration, and our server's settings: its host and port, sockets if they are set."""
    from lmcache.v1.cache_controller.config import (
        _CONTROLLER_CONFIG_DEFINITIONS,
        load_controller_config_with_overrides,
    )
    from lmcache.v1.config_base import validate_and_set_config_value

    path = path or os.environ.get("LMCACHE_CONTROLLER_CONFIG_FILE") or os.environ.get(CONFIG_FILE_VARIABLE)
    if path is not None:
        read_yaml(path)
    theirs = [text for text in overrides if text.partition("=")[0].strip() in _CONTROLLER_CONFIG_DEFINITIONS]
    ours = [text for text in overrides if text not in theirs or text.startswith("controller_port=")]
    try:
        config = load_controller_config_with_overrides(config_file_path=path, overrides={})
    except Exception as error:
        raise ConfigError(f"{path or 'environment'}: LMCache cannot use it: {error}") from None
    for override in theirs:
        key, _, value = override.partition("=")
        if not validate_and_set_config_value(config, key.strip(), value):
            raise ConfigError(f"--set {key}: LMCache cannot use {value!r}")
    where = [f"internal_api_server_host={config.controller_host}", f"controller_port={config.controller_port}"]
    settings = load(path, overrides=["internal_api_server_enabled=true", *where, *ours])
    return config, settings


def urls_of(host: str, monitor_ports: object) -> dict[str, str | None]:
    """Where LMCache's controller binds its sockets; it would fail in a thread, or take port 0 for any.

    Raises:
        ConfigError: one is missing, is no port, or is there twice.
    """
    ports = monitor_ports if isinstance(monitor_ports, Mapping) else {}
    if "pull" not in ports or "reply" not in ports:
        raise ConfigError('controller_monitor_ports: expected {"pull": PORT, "reply": PORT}')
    urls: dict[str, str | None] = {}
    for name in ("pull", "reply", "heartbeat"):
        port = ports.get(name)
        if name == "heartbeat" and port is None:
            urls[name] = None
            continue
        try:
            urls[name] = str(tcp_address(host, str(port)))
        except AddressError as error:
            raise ConfigError(f"controller_monitor_ports: {name}: {error}") from None
    found = [url for url in urls.values() if url is not None]
    if len(set(found)) < len(found):
        raise ConfigError(f"controller_monitor_ports: {dict(ports)}: each needs a port of its own")
    return urls


def _position(value: Sequence[str], name: str) -> tuple[str, str]:
    if len(value) != 2:
        raise ControllerError(400, f"{name}: expected an instance and a location")
    return value[0], value[1]


def _told(info: Any, worker: Any) -> dict[str, Any]:
    return {**_worker_info(info), "key_count": worker.get_kv_count() if worker is not None else 0}


def _worker_info(info: Any) -> dict[str, Any]:
    names = (
        "instance_id", "worker_id", "ip", "port", "peer_init_url", "registration_time", "last_heartbeat_time",
    )  # fmt: skip
    return {name: getattr(info, name) for name in names}


def _fields_of(operation: str, answer: Any) -> dict[str, Any]:
    """The fields of LMCache's own answer to the post."""
    told: dict[str, Any] = {"event_id": answer.event_id}
    if operation == "lookup":
        told["layout_info"] = dict(answer.layout_info)
    elif operation == "health":
        told["error_codes"] = {str(worker): code for worker, code in answer.error_codes.items()}
    elif operation == "query_instance":
        if answer.instance_id is None:
            raise ControllerError(404, "no instance is registered at this address")
        told["res"] = answer.instance_id
    elif operation == "query_worker_info":
        told["worker_infos"] = [_worker_info(info) for info in answer.worker_infos]
    else:
        told["num_tokens"] = answer.num_tokens
    return told


def _is_component(component: ControllerComponent) -> Component:
    """So that the type checker holds the class against the seam."""
    return component
