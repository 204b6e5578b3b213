"""LMCache's own controller manager behind our internal API server.

The manager lives in an event loop and a thread of its own: what blocks there blocks no server. Its sockets belong to
that loop alone: whatever touches them, metrics too, is done there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

from lmcache_api.bridge.configuration import ControllerConfiguration
from lmcache_api.bridge.manager import HostMetrics, host_periodic_threads, host_version
from lmcache_api.component import (
    PART_OF_A_CALL,
    Component,
    ControllerError,
    Operation,
    PeriodicThreadStatus,
    Version,
    WorkerReport,
    nobody_at,
)
from lmcache_shared.address import is_loopback_host
from lmcache_shared.errors import Refusal
from lmcache_shared.placement import CONTROLLER_INDEX, Role
from lmcache_shared.settings import Settings

T = TypeVar("T")

FRESH = 0.0
"""How old LMCache's list of workers may be; by itself it tells one of up to 30 seconds ago."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")

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

_OF_AN_INSTANCE = ("clear", "pin", "compress", "decompress", "health")
"""What the workers of `instance_id` are asked; a move is asked of those of its first position."""

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
        settings: how long the workers have.
    """

    def __init__(self, manager: Any, loop: asyncio.AbstractEventLoop, settings: Settings) -> None:
        self._manager = manager
        self._loop = loop
        self._settings = settings
        self._asking: dict[str, asyncio.Task[Any]] = {}
        """What the workers of each instance are asked now: their sockets take one question after the other."""

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
            everyone = registry.get_all_worker_infos_cached(FRESH)
            infos = [info for info in everyone if worker_id in (None, info.worker_id)]
        workers = [_told(info, registry.get_worker(info.instance_id, info.worker_id)) for info in infos]
        return {"workers": workers, "total_count": len(workers)}

    async def _operate(self, operation: Operation) -> Mapping[str, Any]:
        if operation.name == "check_finish":
            raise ControllerError(501, "LMCache's controller follows no events; an operation has ended when it answers")
        from lmcache.v1.cache_controller import message

        fields = dict(operation.fields)
        asked: str | None = None
        if operation.name in _OF_AN_INSTANCE:
            asked = fields["instance_id"]
            self._check_registered(asked)
        elif operation.name == "move":
            fields["copy"] = bool(fields.pop("should_copy"))
            fields["old_position"], fields["new_position"] = (
                _position(fields[name], name) for name in ("old_position", "new_position")
            )
            for instance, _ in (fields["old_position"], fields["new_position"]):
                self._check_registered(instance)
            asked = fields["old_position"][0]
        elif operation.name == "query_instance":
            fields["ip"] = self._registered_ip(fields["ip"])
        elif operation.name == "query_worker_info":
            self._manager.reg_controller.registry.get_all_worker_infos_cached(FRESH)
        if "tokens" in fields:
            fields["tokens"] = fields["tokens"] or []
        prefix = _EVENT_PREFIXES.get(operation.name, operation.name.capitalize())
        fields["event_id"] = f"{prefix}{uuid.uuid4()}"
        question = getattr(message, _MESSAGES[operation.name])(**fields)
        if asked is None:
            answer = await self._manager.handle_orchestration_message(question)
        else:
            answer = await self._of_workers(asked, operation.name, question)
        if isinstance(answer, message.ErrorMsg):
            raise ControllerError(500, answer.error or f"LMCache's controller cannot {operation.name}")
        return _fields_of(operation.name, answer)

    async def _of_workers(self, instance_id: str, name: str, question: Any) -> Any:
        """LMCache's answer when every worker of the instance has answered.

        LMCache waits for a worker that is gone for ever, and its socket to it takes no other question meanwhile. So the
        caller is told after `controller_answer_seconds` who is late, and after `controller_operation_seconds` those
        who still are get a new socket.
        """
        settings, loop = self._settings, asyncio.get_running_loop()
        seconds = min(settings.controller_answer_seconds, settings.internal_api_server_call_seconds * PART_OF_A_CALL)
        until = loop.time() + seconds
        while (earlier := self._asking.get(instance_id)) is not None:
            await asyncio.wait({earlier}, timeout=max(0.0, until - loop.time()))
            if not earlier.done():
                raise ControllerError(
                    503, f"{self._late(instance_id)}: no answer to an earlier operation; try again later"
                )
        asked = asyncio.create_task(self._answer(instance_id, question))
        self._asking[instance_id] = asked

        def ended(done: asyncio.Task[Any]) -> None:
            self._asking.pop(instance_id, None)
            if not done.cancelled():
                done.exception()  # looked at, when nobody waits

        asked.add_done_callback(ended)
        await asyncio.wait({asked}, timeout=max(0.0, until - loop.time()))
        if not asked.done():
            raise ControllerError(
                504, f"{name}: {self._late(instance_id)}: no answer within {seconds:g} seconds; it may still finish"
            )
        return asked.result()

    async def _answer(self, instance_id: str, question: Any) -> Any:
        """What LMCache answers, within `controller_operation_seconds`; then the late workers' sockets are new ones."""
        work = asyncio.ensure_future(self._manager.handle_orchestration_message(question))
        try:
            await asyncio.wait({work}, timeout=self._settings.controller_operation_seconds)
            if work.done():
                return work.result()
            late = self._late(instance_id)
            raise ControllerError(
                504, f"{late}: no answer within {self._settings.controller_operation_seconds:g} seconds"
            )
        finally:
            if not work.done():
                work.cancel()
                self._renew_sockets(instance_id)

    def _owing(self, instance_id: str) -> list[Any]:
        """The workers of the instance that owe an answer: a socket takes a question when none is open."""
        import zmq

        instance = self._manager.reg_controller.registry.get_instance(instance_id)
        workers = list(instance.workers.values()) if instance is not None else []
        return [
            worker
            for worker in workers
            if worker.socket is not None and not worker.socket.get(zmq.EVENTS) & zmq.POLLOUT
        ]

    def _late(self, instance_id: str) -> str:
        """Who owes an answer, for a text."""
        names = [f"worker {worker.worker_id} at {worker.ip}:{worker.port}" for worker in self._owing(instance_id)]
        return f"{instance_id}: {', '.join(names) or 'a worker'}"

    def _renew_sockets(self, instance_id: str) -> None:
        """As LMCache makes and closes them when a worker comes and goes."""
        import zmq
        from lmcache.v1.rpc_utils import close_zmq_socket, get_zmq_context, get_zmq_socket

        for worker in self._owing(instance_id):
            old, url = worker.socket, f"{worker.ip}:{worker.port}"
            worker.socket = get_zmq_socket(get_zmq_context(), url, "tcp", zmq.REQ, "connect")
            close_zmq_socket(old)

    def _check_registered(self, instance_id: str) -> None:
        if self._manager.reg_controller.registry.get_instance(instance_id) is None:
            raise ControllerError(404, f"No workers found for instance {instance_id}")

    def _registered_ip(self, ip: str) -> str:
        """As the worker there spells it, when it is this machine."""
        registry = self._manager.reg_controller.registry
        spellings = (ip, *LOOPBACK) if is_loopback_host(ip) else (ip,)
        for spelling in spellings:
            if registry.get_instance_by_ip(spelling) is not None:
                return spelling
        raise ControllerError(404, nobody_at(ip))

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


class ControllerMetrics(HostMetrics):
    """The host's metrics, rendered in the manager's loop.

    Some of LMCache's gauges look at the manager's sockets, and looking takes away the one signal that a message is
    there: in another thread than theirs it stops LMCache's handlers for good.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        super().__init__()
        self._loop = loop
        self._seconds = seconds

    def exposition(self) -> bytes:
        return self._in_loop(super().exposition)

    def reset(self) -> None:
        self._in_loop(super().reset)

    def _in_loop(self, function: Callable[[], T]) -> T:
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            if done.set_running_or_notify_cancel():  # or nobody waits any more
                try:
                    done.set_result(function())
                except Exception as error:
                    done.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        try:
            return done.result(self._seconds)
        except concurrent.futures.TimeoutError:
            done.cancel()
            raise Refusal(504, f"LMCache's controller: its event loop hangs for {self._seconds:g} seconds") from None


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
        self.configuration = ControllerConfiguration(config, settings)
        self.metrics = ControllerMetrics(loop, settings.internal_api_server_call_seconds * PART_OF_A_CALL)
        self.controller = ManagerController(manager, loop, settings)
        self.script_adapter: object = SimpleNamespace(config=config, lmcache_controller_manager=manager)

    @property
    def version(self) -> Version:
        return host_version()

    def metadata(self) -> Mapping[str, Any]:
        return {"role": self.role}

    def periodic_threads(self) -> Sequence[PeriodicThreadStatus]:
        return host_periodic_threads()


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
        if answer.instance_id is None:  # it has left in between
            raise ControllerError(404, "no instance is registered there any more")
        told["res"] = answer.instance_id
    elif operation == "query_worker_info":
        told["worker_infos"] = [_worker_info(info) for info in answer.worker_infos]
    else:
        told["num_tokens"] = answer.num_tokens
    return told


def _is_component(component: ControllerComponent) -> Component:
    """So that the type checker holds the class against the seam."""
    return component
