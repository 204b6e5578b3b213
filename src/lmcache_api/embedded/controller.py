"""The embedded controller: workers report to it over HTTP, and it asks them over their internal APIs.

A worker that has not reported for `controller_worker_seconds` is forgotten. An operation goes to every worker of an
instance at once; the answer comes when all are done or after `controller_answer_seconds`, names each worker with what
it said, and the operation goes on for those that were not done, as an event that `check_finish` follows.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lmcache_api.component import PART_OF_A_CALL, ControllerError, Operation, WorkerReport, nobody_at
from lmcache_api.embedded.fan_out import OUT_OF_FILES, Cleared, FanOut, Found, Healthy, Question
from lmcache_shared.address import (
    Address,
    TcpAddress,
    is_loopback_host,
    tcp_address,
    unix_address,
    without_brackets,
)
from lmcache_shared.errors import AddressError
from lmcache_shared.placement import MAX_WORKERS
from lmcache_shared.settings import Settings

logger = logging.getLogger(__name__)

MAX_REPORTED = 4 * MAX_WORKERS
"""Workers that are kept; further ones are refused."""

MAX_OF_A_HOST = MAX_WORKERS
"""Of those, workers of one host: a caller that makes them up leaves room for everybody else's."""

MAX_KEYS = 1 << 40
"""Chunks of a worker; more is no number to add up."""

MAX_EVENTS = 1000
"""Operations that are remembered; of those that are done the oldest are forgotten first."""

MAX_EVENT_WORKERS = 1 << 16
"""Workers in all events together, each with what it answered."""

MAX_NAME = 256
MAX_NAMED = 5
"""Workers that one line of the log names."""

LOOKS_A_TIMEOUT = 10
"""How often in `controller_worker_seconds` silent workers are looked for."""

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
    host: str
    """One name for its machine, whichever of its addresses it reports."""

    @property
    def name(self) -> str:
        return f"{self.instance_id} worker {self.worker_id} at {self.address}"

    def told(self) -> dict[str, Any]:
        """The fields of LMCache's worker info, and where it is asked: a socket has no port."""
        return {
            "instance_id": self.instance_id,
            "worker_id": self.worker_id,
            "ip": self.ip,
            "port": self.address.port if isinstance(self.address, TcpAddress) else 0,
            "peer_init_url": None,
            "registration_time": self.registered_at,
            "last_heartbeat_time": self.reported_at,
            "address": str(self.address),
        }


@dataclass
class Event:
    """An operation on workers: what each has answered so far, or why it has not."""

    event_id: str
    waiting: set[str]
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    @property
    def size(self) -> int:
        return len(self.waiting) + len(self.answers)

    def workers(self) -> list[dict[str, Any]]:
        pending = [{"worker": name, "status": "pending"} for name in sorted(self.waiting)]
        return [*(self.answers[name] for name in sorted(self.answers)), *pending]


class EmbeddedController:
    """Registry and operations. Used in one event loop; `close` ends what goes on."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self._workers: dict[tuple[str, int], Registered] = {}
        self._events: OrderedDict[str, Event] = OrderedDict()
        self._fan_out = FanOut()
        self._looking: asyncio.TimerHandle | None = None
        """The next look for silent workers."""
        self._forgot = 0.0
        """When silent workers were last forgotten, by the monotonic clock."""

    async def key_stats(self) -> Mapping[str, Any]:
        present = self._present()
        of_each = {name: list(of_one) for name, of_one in itertools.groupby(present, lambda worker: worker.instance_id)}
        return {
            "total_key_count": sum(worker.key_count for worker in present),
            "total_instance_count": len(of_each),
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
        if instance_id is not None and worker_id is not None:
            worker = self._known(instance_id, worker_id)
            if worker is not None:
                return {**worker.told(), "key_count": worker.key_count}
            raise ControllerError(404, f"Worker ({instance_id[:MAX_NAME]}, {worker_id}) not found")
        present = self._present() if instance_id is None else self._of_instance(instance_id)
        asked = [worker for worker in present if worker_id in (None, worker.worker_id)]
        told = [{**worker.told(), "key_count": worker.key_count} for worker in asked]
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
        if not report.instance_id.isprintable():
            raise ControllerError(400, "instance_id: a name has no control characters and no half ones")
        if report.instance_id == ALL:
            raise ControllerError(400, f"instance_id: {ALL!r} means all instances; choose another lmcache_instance_id")
        if not 0 <= report.key_count <= MAX_KEYS:
            raise ControllerError(400, f"key_count {report.key_count}: expected a number from 0 to {MAX_KEYS}")
        address = self._address_of(report, caller)
        key = (report.instance_id, report.worker_id)
        known = self._known(*key)
        ip = address.host if isinstance(address, TcpAddress) else "localhost"
        host = _machine(ip)
        if known is not None and not _same_place(known, address, host):
            raise ControllerError(
                409,
                f"worker {known.worker_id} of {known.instance_id} is at {known.address}, and this one is at {address}:"
                " each deployment needs an lmcache_instance_id of its own; one that moved is taken when the other is"
                f" silent for {self._settings().controller_worker_seconds:g} seconds",
            )
        if known is None and self._too_many(host):
            self._forget_the_silent()
            if problem := self._too_many(host):
                raise ControllerError(503, f"{problem}; no further one is taken")
        now = time.time()
        registered_at = known.registered_at if known is not None else now
        reported = time.monotonic()
        self._workers[key] = Registered(*key, address, ip, registered_at, now, reported, report.key_count, host)
        if known is None:
            logger.info("%s is here", self._workers[key].name)
        if self._looking is None:
            self._look_again()
        return {"status": "success", "timeout_seconds": self._settings().controller_worker_seconds}

    async def leave(self, instance_id: str, worker_id: int, caller: str | None) -> None:
        known = self._known(instance_id, worker_id)
        if known is None:
            raise ControllerError(404, f"Worker ({instance_id[:MAX_NAME]}, {worker_id}) not found")
        if not _same_host(known.ip, caller):
            raise ControllerError(403, f"a worker leaves by itself; it is at {known.ip}, and this is {caller}")
        del self._workers[known.instance_id, known.worker_id]
        logger.info("%s has left", known.name)

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
        raise ControllerError(
            501, f"{operation.name} is not possible on embedded workers: their engine has no such operation"
        )

    async def close(self) -> None:
        """End the operations that go on."""
        if self._looking is not None:
            self._looking.cancel()
        tasks = [event.task for event in self._events.values() if event.task is not None and not event.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _lookup(self, tokens: Sequence[int]) -> Mapping[str, Any]:
        present = self._present() if tokens else []
        # in a thread: a million tokens take a while
        body = await asyncio.get_running_loop().run_in_executor(None, msgspec.json.encode, {"tokens": tokens})
        event = await self._ask_all("Lookup", present, Question("POST", "/cache/lookup", Found, body=body))
        found: dict[str, list[tuple[int, str]]] = {}
        for worker in present:
            answer = event.answers.get(worker.name, {})
            hit = min(answer.get("num_hit_tokens", 0), len(tokens))
            found.setdefault(worker.instance_id, []).append((hit, answer.get("location", "")))
        fewest = {name: min(of_workers) for name, of_workers in found.items()}
        layout = {name: (location, hit) for name, (hit, location) in fewest.items() if hit}
        return {"event_id": event.event_id, "layout_info": layout, "workers": event.workers()}

    async def _clear(self, instance_id: str, location: str) -> Mapping[str, Any]:
        present = self._of_instance(instance_id)
        question = Question("DELETE", "/cache/clear", Cleared, query={"locations": location})
        event = await self._ask_all("Clear", present, question)
        cleared = [answer["num_tokens"] for answer in event.answers.values() if "num_tokens" in answer]
        return {"event_id": event.event_id, "num_tokens": max(cleared, default=0), "workers": event.workers()}

    async def _health(self, instance_id: str) -> Mapping[str, Any]:
        present = self._of_instance(instance_id)
        event = await self._ask_all("health", present, Question("GET", "/periodic-threads-health", Healthy))
        codes = {}
        for worker in present:
            healthy = event.answers.get(worker.name, {}).get("healthy")
            codes[str(worker.worker_id)] = SILENT if healthy is None else HEALTHY if healthy else UNHEALTHY
        return {"event_id": event.event_id, "error_codes": codes, "workers": event.workers()}

    def _query_instance(self, ip: str) -> Mapping[str, Any]:
        found = next((worker.instance_id for worker in self._present() if worker.host == _machine(ip)), None)
        if found is None:
            raise ControllerError(404, nobody_at(ip))
        return {"event_id": _event_id("QueryInst"), "res": found}

    def _query_worker_info(self, instance_id: str, worker_ids: Sequence[int] | None) -> Mapping[str, Any]:
        wanted = frozenset(worker_ids or ())
        found = [
            worker.told()
            for worker in self._present()
            if instance_id in (ALL, worker.instance_id) and (not wanted or worker.worker_id in wanted)
        ]
        return {"event_id": _event_id("QueryWorkerInfo"), "worker_infos": found}

    def _check_finish(self, event_id: str) -> Mapping[str, Any]:
        event = self._events.get(event_id)
        if event is None:
            raise ControllerError(404, f"no event {event_id[:MAX_NAME]}; the last {MAX_EVENTS} are remembered")
        return {"status": "running" if event.waiting else "finished", "workers": event.workers()}

    def _present(self) -> list[Registered]:
        """The workers that have reported of late, by instance and id; metrics ask from another thread."""
        found = [worker for worker in tuple(self._workers.values()) if self._is_present(worker)]
        return sorted(found, key=lambda worker: (worker.instance_id, worker.worker_id))

    def _too_many(self, host: str) -> str | None:
        """Why there is no room for one more worker of this host."""
        if len(self._workers) >= MAX_REPORTED:
            return f"{MAX_REPORTED} workers are registered"
        if [worker.host for worker in self._workers.values()].count(host) >= MAX_OF_A_HOST:
            return f"{MAX_OF_A_HOST} workers of {host} are registered"
        return None

    def _look_again(self) -> None:
        """As long as there is anybody: a worker that is gone is told of when nobody asks, too."""
        self._looking = None
        if self._workers:
            seconds = self._settings().controller_worker_seconds / LOOKS_A_TIMEOUT
            self._looking = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        self._forget_the_silent()
        self._look_again()

    def _forget_the_silent(self) -> None:
        """Make room, and log one line; not at every report of a flood, as it looks at every worker."""
        now, seconds = time.monotonic(), self._settings().controller_worker_seconds
        if now - self._forgot < seconds / LOOKS_A_TIMEOUT / 2:
            return
        self._forgot = now
        silent = [worker for worker in self._workers.values() if not self._is_present(worker)]
        for worker in silent:
            del self._workers[worker.instance_id, worker.worker_id]
        if silent:
            names = ", ".join(worker.name for worker in silent[:MAX_NAMED])
            more = f" and {len(silent) - MAX_NAMED} more" if len(silent) > MAX_NAMED else ""
            logger.warning("no report for %g seconds, forgotten: %s%s", seconds, names, more)

    def _is_present(self, worker: Registered) -> bool:
        return time.monotonic() - worker.reported <= self._settings().controller_worker_seconds

    def _known(self, instance_id: str, worker_id: int) -> Registered | None:
        worker = self._workers.get((instance_id, worker_id))
        return worker if worker is not None and self._is_present(worker) else None

    def _of_instance(self, instance_id: str) -> list[Registered]:
        found = [worker for worker in self._present() if worker.instance_id == instance_id]
        if not found:
            raise ControllerError(404, f"No workers found for instance {instance_id[:MAX_NAME]}")
        return found

    def _address_of(self, report: WorkerReport, caller: str | None) -> Address:
        try:
            if report.port.startswith("/"):
                prefix = self._settings().internal_api_server_socket_path_prefix
                if not prefix or not re.fullmatch(re.escape(prefix) + "_[0-9]{1,5}", report.port, re.ASCII):
                    raise ControllerError(403, f"port: a socket is {prefix}_<port>" if prefix else "port: no socket")
                if not _same_host("localhost", caller):
                    raise ControllerError(403, f"port: a socket is on this machine, and this is {caller}")
                return unix_address(report.port)
            host = report.host or caller or "127.0.0.1"
            if not _same_host(host, caller):
                raise ControllerError(403, f"host {host[:MAX_NAME]}: a worker reports itself, and this is {caller}")
            if caller is not None and not is_loopback_host(caller):
                host = caller  # with its IPv6 scope, which is a name of this machine's
            has_scope = "%" in host and not is_loopback_host(host)
            return tcp_address(host if has_scope else _bare(host), report.port)
        except AddressError as error:
            raise ControllerError(400, f"port: {error}") from None

    async def _ask_all(self, prefix: str, workers: Sequence[Registered], question: Question) -> Event:
        """Ask every worker; wait for all, or for as long as an answer may take, and go on in the background.

        When the caller leaves before, nobody knows the event: what changes nothing ends with it.
        """
        settings = self._settings()
        event = Event(_event_id(prefix), {worker.name for worker in workers})
        self._make_room(len(workers))

        async def ask(worker: Registered) -> None:
            token = _token_for(worker.address, settings)
            answer = await self._fan_out.ask(worker.address, question, settings.controller_operation_seconds, token)
            event.answers[worker.name] = {"worker": worker.name, **answer}
            event.waiting.discard(worker.name)

        event.task = asyncio.create_task(_gathered(ask(worker) for worker in workers), name=event.event_id)
        self._events[event.event_id] = event
        seconds = min(settings.controller_answer_seconds, settings.internal_api_server_call_seconds * PART_OF_A_CALL)
        try:
            await asyncio.wait({event.task}, timeout=seconds)
        except asyncio.CancelledError:
            if question.method != "DELETE":
                event.task.cancel()
                self._events.pop(event.event_id, None)
            raise
        not_asked = sum(answer.get("error") == OUT_OF_FILES for answer in event.answers.values())
        if not_asked:
            raise ControllerError(503, f"{not_asked} of {len(workers)} workers were not asked: {OUT_OF_FILES}")
        return event

    def _make_room(self, workers: int) -> None:
        """Forget the oldest events that are done, for one with so many workers."""
        kept = sum(event.size for event in self._events.values())
        for event_id, event in [*self._events.items()]:
            if len(self._events) < MAX_EVENTS and kept + workers <= MAX_EVENT_WORKERS:
                return
            if not event.waiting:
                kept -= event.size
                del self._events[event_id]
        if len(self._events) >= MAX_EVENTS or kept + workers > MAX_EVENT_WORKERS:
            raise ControllerError(503, "too many operations wait for workers that do not answer; try again later")


async def _gathered(calls: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*calls)


def _same_host(host: str, caller: str | None) -> bool:
    """Whether `host` is where the call comes from; over a Unix socket it comes from this machine."""
    is_here = caller is None or is_loopback_host(caller)
    return _bare(host) == _bare(caller or "") or (is_here and is_loopback_host(host))


def _machine(host: str) -> str:
    """One name for all spellings of a host."""
    return "localhost" if is_loopback_host(host) else _bare(host)


def _same_place(known: Registered, address: Address, host: str) -> bool:
    """Whether it is the worker that is known: another spelling of its host is, another port is not."""
    if isinstance(known.address, TcpAddress) and isinstance(address, TcpAddress):
        return (known.host, known.address.port) == (host, address.port)
    return known.address == address


def _bare(host: str) -> str:
    """A number in its one spelling, without an IPv6 scope; an IPv4 number inside IPv6 is that IPv4 number."""
    try:
        number = ipaddress.ip_address(without_brackets(host).partition("%")[0])
    except ValueError:
        return host
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return str(mapped or number)


def _event_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4()}"


def _token_for(address: Address, settings: Settings) -> str | None:
    """The deployment's token, for workers that ask for it: they had to show an admin's to be registered.

    A worker on this machine that trusts its callers needs none, and may be somebody else's process.
    """
    is_near = not isinstance(address, TcpAddress) or address.is_loopback
    return None if is_near and settings.internal_api_server_trust_local else settings.internal_api_server_token
