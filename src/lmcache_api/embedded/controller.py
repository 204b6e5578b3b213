"""The embedded controller: workers report to it over HTTP, and it asks them over their internal APIs.

A worker that has not reported for `controller_worker_seconds` is forgotten. An operation goes to every worker of an
instance at once; the answer comes when all are done or after `controller_answer_seconds`, names each worker with what
it said, and the operation goes on for those that were not done, as an event that `check_finish` follows.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from lmcache_api.component import ControllerError, Operation, WorkerReport
from lmcache_shared.address import Address, TcpAddress, tcp_address, unix_address
from lmcache_shared.errors import AddressError
from lmcache_shared.placement import MAX_WORKERS
from lmcache_shared.settings import Settings

MAX_REPORTED = 4 * MAX_WORKERS
"""Workers that are kept; further ones are refused."""

MAX_EVENTS = 1000
"""Operations that are remembered; the oldest are forgotten first."""

MAX_NAME = 256
MAX_ANSWER_BYTES = 1 << 20
ALL = "all"

HEALTHY, UNHEALTHY, SILENT = 0, 1, 2
"""Error codes of a worker's health."""


@dataclass
class Registered:
    """A worker, where it is asked, and when it last reported."""

    instance_id: str
    worker_id: int
    address: Address
    ip: str
    registered_at: float
    reported_at: float
    reported: float
    """The same by the monotonic clock, which no administrator sets."""
    key_count: int

    @property
    def name(self) -> str:
        return f"{self.instance_id} worker {self.worker_id} at {self.address}"

    def told(self) -> dict[str, Any]:
        """The fields of LMCache's worker info."""
        return {
            "instance_id": self.instance_id,
            "worker_id": self.worker_id,
            "ip": self.ip,
            "port": self.address.port if isinstance(self.address, TcpAddress) else 0,
            "peer_init_url": None,
            "registration_time": self.registered_at,
            "last_heartbeat_time": self.reported_at,
        }


@dataclass
class Event:
    """An operation on workers: what each has answered so far, or why it has not."""

    event_id: str
    waiting: set[str]
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    def workers(self) -> list[dict[str, Any]]:
        pending = [{"worker": name, "status": "pending"} for name in sorted(self.waiting)]
        return [*(self.answers[name] for name in sorted(self.answers)), *pending]


class EmbeddedController:
    """Registry and operations. Used in one event loop; `close` ends what goes on."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self._workers: dict[tuple[str, int], Registered] = {}
        self._events: OrderedDict[str, Event] = OrderedDict()

    async def key_stats(self) -> Mapping[str, Any]:
        present = self._present()
        instances = sorted({worker.instance_id for worker in present})
        of_each = {name: [worker for worker in present if worker.instance_id == name] for name in instances}
        return {
            "total_key_count": sum(worker.key_count for worker in present),
            "total_instance_count": len(instances),
            "total_worker_count": len(present),
            "instances": [
                {
                    "instance_id": name,
                    "key_count": sum(worker.key_count for worker in workers),
                    "worker_count": len(workers),
                }
                for name, workers in of_each.items()
            ],
        }

    async def workers(self, instance_id: str | None, worker_id: int | None) -> Mapping[str, Any]:
        present = self._present()
        if instance_id is not None and worker_id is not None:
            for worker in present:
                if (worker.instance_id, worker.worker_id) == (instance_id, worker_id):
                    return {**worker.told(), "key_count": worker.key_count}
            raise ControllerError(404, f"Worker ({instance_id[:MAX_NAME]}, {worker_id}) not found")
        if instance_id is not None:
            present = [worker for worker in present if worker.instance_id == instance_id]
            if not present:
                raise ControllerError(404, f"No workers found for instance {instance_id[:MAX_NAME]}")
        told = [{**worker.told(), "key_count": worker.key_count} for worker in present]
        return {"workers": told, "total_count": len(told)}

    def gauges(self) -> dict[str, float]:
        """The present, by the names of LMCache's gauges."""
        present = self._present()
        return {
            "cache_controller_registered_workers_count": len(present),
            "cache_controller_kv_pool_keys_count": sum(worker.key_count for worker in present),
        }

    async def report(self, report: WorkerReport, caller: str | None) -> Mapping[str, Any]:
        """Only a worker itself may report: its host is where the report comes from, a socket is on this machine."""
        if not 0 < len(report.instance_id) <= MAX_NAME or not 0 <= report.worker_id < MAX_WORKERS:
            raise ControllerError(
                400, f"instance_id: 1 to {MAX_NAME} characters, worker_id: a number from 0 to {MAX_WORKERS - 1}"
            )
        if report.key_count < 0:
            raise ControllerError(400, f"key_count {report.key_count}: expected a number from 0")
        address = self._address_of(report, caller)
        key = (report.instance_id, report.worker_id)
        self._workers = {(worker.instance_id, worker.worker_id): worker for worker in self._present()}
        if key not in self._workers and len(self._workers) >= MAX_REPORTED:
            raise ControllerError(503, f"{MAX_REPORTED} workers are registered; no further one is taken")
        now = time.time()
        known = self._workers.get(key)
        ip = address.host if isinstance(address, TcpAddress) else "localhost"
        registered_at = known.registered_at if known is not None else now
        self._workers[key] = Registered(*key, address, ip, registered_at, now, time.monotonic(), report.key_count)
        return {"status": "success", "timeout_seconds": self._settings().controller_worker_seconds}

    async def leave(self, instance_id: str, worker_id: int) -> None:
        if self._workers.pop((instance_id, worker_id), None) is None:
            raise ControllerError(404, f"Worker ({instance_id[:MAX_NAME]}, {worker_id}) not found")

    async def operate(self, operation: Operation) -> Mapping[str, Any]:
        fields = operation.fields
        if operation.name == "lookup":
            return await self._lookup(fields["tokens"])
        if operation.name == "clear":
            return await self._clear(fields["instance_id"], fields["location"])
        if operation.name == "health":
            return await self._health(fields["instance_id"])
        if operation.name == "query_instance":
            return self._query_instance(fields["ip"])
        if operation.name == "query_worker_info":
            return self._query_worker_info(fields["instance_id"], fields["worker_ids"])
        if operation.name == "check_finish":
            return self._check_finish(fields["event_id"])
        raise ControllerError(501, f"{operation.name} is not possible on embedded workers")

    async def close(self) -> None:
        """End the operations that go on."""
        tasks = [event.task for event in self._events.values() if event.task is not None and not event.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _lookup(self, tokens: Sequence[int]) -> Mapping[str, Any]:
        present = self._present()
        body = {"tokens": list(tokens)}
        event = await self._ask_all("Lookup", present, "POST", "/cache/lookup", body=body)
        layout: dict[str, tuple[str, int]] = {}
        for name in sorted({worker.instance_id for worker in present}):
            found = [event.answers.get(worker.name, {}) for worker in present if worker.instance_id == name]
            hits = [answer.get("num_hit_tokens", 0) if answer.get("status") == "success" else 0 for answer in found]
            if hits and min(hits) > 0:
                layout[name] = (found[hits.index(min(hits))]["location"], min(hits))
        return {"event_id": event.event_id, "layout_info": layout, "workers": event.workers()}

    async def _clear(self, instance_id: str, location: str) -> Mapping[str, Any]:
        present = self._of_instance(instance_id)
        event = await self._ask_all("Clear", present, "DELETE", "/cache/clear", query={"locations": location})
        cleared = [answer["num_tokens"] for answer in event.answers.values() if "num_tokens" in answer]
        return {"event_id": event.event_id, "num_tokens": max(cleared, default=0), "workers": event.workers()}

    async def _health(self, instance_id: str) -> Mapping[str, Any]:
        present = self._of_instance(instance_id)
        event = await self._ask_all("health", present, "GET", "/periodic-threads-health")
        codes = {}
        for worker in present:
            answer = event.answers.get(worker.name, {})
            is_silent = answer.get("status") != "success"
            codes[str(worker.worker_id)] = SILENT if is_silent else HEALTHY if answer.get("healthy") else UNHEALTHY
        return {"event_id": event.event_id, "error_codes": codes, "workers": event.workers()}

    def _query_instance(self, ip: str) -> Mapping[str, Any]:
        found = next((worker.instance_id for worker in self._present() if worker.ip == ip), None)
        if found is None:
            raise ControllerError(404, f"no instance is registered at {ip[:MAX_NAME]}")
        return {"event_id": _event_id("QueryInst"), "res": found}

    def _query_worker_info(self, instance_id: str, worker_ids: Sequence[int] | None) -> Mapping[str, Any]:
        found = [
            worker.told()
            for worker in self._present()
            if instance_id in (ALL, worker.instance_id) and (not worker_ids or worker.worker_id in worker_ids)
        ]
        return {"event_id": _event_id("QueryWorkerInfo"), "worker_infos": found}

    def _check_finish(self, event_id: str) -> Mapping[str, Any]:
        event = self._events.get(event_id)
        if event is None:
            raise ControllerError(404, f"no event {event_id[:MAX_NAME]}; the last {MAX_EVENTS} are remembered")
        return {"status": "running" if event.waiting else "finished", "workers": event.workers()}

    def _present(self) -> list[Registered]:
        """The workers that have reported of late, by instance and id."""
        now, seconds = time.monotonic(), self._settings().controller_worker_seconds
        found = sorted(self._workers.items())
        return [worker for _, worker in found if now - worker.reported <= seconds]

    def _of_instance(self, instance_id: str) -> list[Registered]:
        found = [worker for worker in self._present() if worker.instance_id == instance_id]
        if not found:
            raise ControllerError(404, f"No workers found for instance {instance_id[:MAX_NAME]}")
        return found

    def _address_of(self, report: WorkerReport, caller: str | None) -> Address:
        try:
            if report.port.startswith("/"):
                prefix = self._settings().internal_api_server_socket_path_prefix
                if not prefix or not report.port.startswith(prefix):
                    raise ControllerError(403, f"port: a socket begins with {prefix or 'nothing here'}")
                return unix_address(report.port)
            host = report.host or caller or "127.0.0.1"
            if not _same_host(host, caller):
                raise ControllerError(403, f"host {host[:MAX_NAME]}: a worker reports itself, and this is {caller}")
            return tcp_address(host, report.port)
        except AddressError as error:
            raise ControllerError(400, f"port: {error}") from None

    async def _ask_all(
        self,
        prefix: str,
        workers: Sequence[Registered],
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
    ) -> Event:
        """Ask every worker; wait for all, or for as long as an answer may take, and go on in the background."""
        settings = self._settings()
        event = Event(_event_id(prefix), {worker.name for worker in workers})
        self._remember(event)
        seconds = settings.controller_operation_seconds

        async def ask(worker: Registered) -> None:
            answer = await _ask(worker, method, path, query, body, seconds)
            event.answers[worker.name] = {"worker": worker.name, **answer}
            event.waiting.discard(worker.name)

        event.task = asyncio.create_task(_gathered(ask(worker) for worker in workers))
        await asyncio.wait({event.task}, timeout=settings.controller_answer_seconds)
        return event

    def _remember(self, event: Event) -> None:
        self._events[event.event_id] = event
        while len(self._events) > MAX_EVENTS:
            _, oldest = self._events.popitem(last=False)
            if oldest.task is not None:
                oldest.task.cancel()


async def _gathered(calls: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*calls)


async def _ask(
    worker: Registered,
    method: str,
    path: str,
    query: Mapping[str, str] | None,
    body: object,
    seconds: float,
) -> dict[str, Any]:
    """What a worker answers, or why it has not: `status` is `success` or `error`."""
    base = f"http://{worker.address}" if isinstance(worker.address, TcpAddress) else "http://localhost"
    timeout = aiohttp.ClientTimeout(total=seconds)
    try:
        async with (
            aiohttp.ClientSession(
                base, connector=worker.address.connector(limit=1, keepalive_timeout=1), timeout=timeout
            ) as client,
            client.request(method, path, params=query, json=body, allow_redirects=False) as response,
        ):
            content = await response.content.read(MAX_ANSWER_BYTES)
            answer = json.loads(content)
            if response.status != 200 or not isinstance(answer, dict):
                return {"status": "error", "error": f"it answers {response.status}"}
    except asyncio.TimeoutError:
        return {"status": "error", "error": f"no answer within {seconds:g} seconds"}
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return {"status": "error", "error": str(error) or type(error).__name__}
    return {"status": "success", **_of_interest(answer)}


def _of_interest(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What the controller tells of a worker's answer, by LMCache's names."""
    told: dict[str, Any] = {}
    if isinstance(answer.get("num_removed"), int):
        told["num_tokens"] = answer["num_removed"]
    if isinstance(answer.get("num_hit_tokens"), int):
        told["num_hit_tokens"] = answer["num_hit_tokens"]
        spans = answer.get("spans") or [{}]
        told["location"] = str((spans[0].get("locations") or [""])[0])
    if isinstance(answer.get("healthy"), bool):
        told["healthy"] = answer["healthy"]
    return told


def _same_host(host: str, caller: str | None) -> bool:
    """Whether `host` is where the call comes from; over a Unix socket it comes from this machine."""
    if caller == host:
        return True
    is_local = caller is None or ipaddress.ip_address(caller.partition("%")[0]).is_loopback
    if host == "localhost":
        return is_local
    try:
        return is_local and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _event_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4()}"
