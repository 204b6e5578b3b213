"""Every change that passes is told: an event of the timeline, and with `--audit-log` a line in JSON in a file.

A change is what needs an operator or an admin. The timeline has those that succeed, the file all of them: who, what,
where, and how it ended. Lines are written by a thread, some at a time; a request whose line finds no room waits for it,
so that no change goes by unwritten while the disk is slow. The file is kept to a size, and a few former ones beside it
(`FILE.1` is the newest).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from datetime import datetime, timezone
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

from aiohttp import web

from lmcache_frontend.nodes.node import Node
from lmcache_frontend.telemetry.history.timeline import TIMELINE, Event, Kind
from lmcache_frontend.telemetry.metrics.own import OWN_METRICS, TargetLabels
from lmcache_shared import secrets
from lmcache_shared.access.asking import Asking, HandlerOf, R
from lmcache_shared.access.caller import seen_address
from lmcache_shared.access.gate import caller_of
from lmcache_shared.access.roles import SAFE_METHODS, Role, needed
from lmcache_shared.address import Address
from lmcache_shared.errors import ConfigError, Refusal
from lmcache_shared.responses import json_text

logger = logging.getLogger(__name__)

MAX_BYTES = 16 << 20
KEPT = 4
"""Former files."""

MAX_WAITING = 10_000
MAX_LINES_AT_ONCE = 1000
MAX_TEXT = 1000
"""Characters of a path, or of a query."""

MODE = 0o600

FAILED = 400
"""A status from which on nothing was changed, as far as is known."""

LOG_LEVEL = "/loglevel"
SETTINGS = ("/conf", LOG_LEVEL)
"""What changes settings; every other change is an operation."""


class Change(NamedTuple):
    """A proxied request: what it asks for and where, the length of the way there in that path, the role it needs."""

    address: Address
    path: str
    skipped: int
    role: Role


CHANGE: Any = web.RequestKey("change", Change) if hasattr(web, "RequestKey") else "lmcache_change"
"""Set of a proxied request; aiohttp before 3.14 knows texts alone."""


class AuditLog:
    """Appends lines to a file.

    Args:
        path: the file.
        max_bytes: a file of this size becomes a former one.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: str, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._waiting: asyncio.Queue[str] = asyncio.Queue(MAX_WAITING)
        self._task: asyncio.Task[None] | None = None
        self._failing = False
        try:
            os.close(_open(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--audit-log {path}: cannot be written: {getattr(error, 'strerror', error)}") from None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="audit log")

    async def add(self, line: dict[str, object]) -> None:
        """Have a line written; waits while there is no room."""
        await self._waiting.put(json_text(line) + "\n")

    async def close(self) -> None:
        """Write what waits, and end."""
        if self._task is not None:
            await self._waiting.join()
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            lines = [await self._waiting.get()]
            while len(lines) < MAX_LINES_AT_ONCE and not self._waiting.empty():
                lines.append(self._waiting.get_nowait())
            try:
                await asyncio.to_thread(self._write, "".join(lines).encode("utf-8", "replace"))
                self._failing = False
            except OSError as error:
                if not self._failing:
                    logger.error("audit log %s: cannot be written: %s; changes go on", self._path, error.strerror)
                self._failing = True
            finally:
                for _ in lines:
                    self._waiting.task_done()

    def _write(self, data: bytes) -> None:
        """Append whole lines. Processes that share the file take turns, and find it again when another one moved it."""
        while True:
            handle = _open(self._path)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if not _is_at(handle, self._path):
                    continue
                size = os.fstat(handle).st_size
                if size and size + len(data) > self._max_bytes:
                    self._rotate()
                    continue
                try:
                    while data:
                        data = data[os.write(handle, data) :]
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(handle, size)  # half a line would spoil the next one
                    raise
                return
            finally:
                os.close(handle)

    def _rotate(self) -> None:
        for number in range(KEPT, 0, -1):
            older = self._path if number == 1 else f"{self._path}.{number - 1}"
            with contextlib.suppress(FileNotFoundError):
                os.replace(older, f"{self._path}.{number}")


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, MODE)


def _is_at(handle: int, path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


AUDIT: web.AppKey[AuditLog] = web.AppKey("audit log", AuditLog)


@web.middleware
async def audited(request: R, handler: HandlerOf[R]) -> web.StreamResponse:
    """Have each change told, when its answer has gone or is about to; behind `admitted`."""
    began, status = time.monotonic(), 500
    try:
        response = await handler(request)
        status = response.status
        return response
    except Refusal as refusal:
        status = refusal.status
        raise
    except web.HTTPException as error:
        status = error.status
        raise
    except asyncio.CancelledError:
        status = 499  # the caller has left, as nginx writes it
        raise
    finally:
        change: Change | None = request.get(CHANGE)
        if (change.role if change is not None else needed(request)) >= Role.OPERATOR:
            if status < FAILED:
                request.app[TIMELINE].record(_event(request, change))
            log = request.app.get(AUDIT)
            if log is not None:
                node = "" if change is None else str(change.address)
                await log.add(_line(request, node, status, time.monotonic() - began))


def _event(request: Asking, change: Change | None) -> Event:
    """What viewers may know of a change: of its parameters the names alone."""
    path, target = request.raw_path, TargetLabels("", "")
    if change is not None:
        target = request.app[OWN_METRICS].target_of(change.address, change.path)
        path = change.path[change.skipped :]
    path = unquote(path.partition("?")[0])
    where = "" if change is None else f" at {target.node or target.proxy}"
    names = ", ".join(dict.fromkeys(request.query))
    return Event(
        "setting" if path.startswith(SETTINGS) else "operation",
        f"{request.method} {path}{where}",
        target.proxy,
        target.node,
        who=caller_of(request).name,
        detail=f"parameters: {names}" if names else "",
    )


async def note_own(request: web.Request, what: str, status: int) -> None:
    """Tell of what a page has changed, or failed to, of the frontend's own: `what` in a sentence."""
    if status < FAILED:
        request.app[TIMELINE].record(Event("operation", what, who=caller_of(request).name))
    if AUDIT in request.app:
        await request.app[AUDIT].add({**_line(request, "", status, 0.0), "what": what[:MAX_TEXT]})


class Note:
    """Tells of what a page asks a proxy's node and needs an operator or an admin; its caller may have left by then.

    Args:
        request: the caller's.
        known: the proxy's name, and the node.
        target: path and query, as the node gets them.
        is_event: whether it is an event of its own, and not one of many that have one together.
    """

    def __init__(
        self, request: web.Request, known: tuple[str, Node], method: str, target: str, *, is_event: bool = True
    ) -> None:
        self._app = request.app
        (proxy, node), (path, _, query) = known, target.partition("?")
        asked = _parameters(query) if len(query) <= MAX_TEXT else {}
        self._event: Event | None = None
        sets_level = path == LOG_LEVEL and "level" in asked  # LMCache has it changed by GET
        if is_event and (method not in SAFE_METHODS or sets_level):
            names = f"parameters: {', '.join(asked)}" if asked else ""
            kind: Kind = "setting" if path.startswith(SETTINGS) else "operation"
            text = f"{method} {unquote(path)} at {node.name}"
            self._event = Event(kind, text, proxy, node.name, who=caller_of(request).name, detail=names)
        self._line: dict[str, object] | None = None
        if AUDIT in request.app:
            line = {"method": method, "path": path[:MAX_TEXT], "query": secrets.masked(asked)}
            self._line = {**_line(request, str(node.reach.address), 0, 0.0), **line}

    async def tell(self, status: int, seconds: float) -> None:
        """It has been asked, and this came of it."""
        if self._event is not None and status < FAILED:
            self._app[TIMELINE].record(self._event)
        if self._line is not None:
            line = {**self._line, "time": _now(), "status": status, "ms": round(seconds * 1000, 3)}
            await self._app[AUDIT].add(line)


def _parameters(query: str) -> dict[str, str]:
    """Each with all its values: of repeated ones servers take the first or the last."""
    found: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def _line(request: Asking, node: str, status: int, seconds: float) -> dict[str, object]:
    caller = caller_of(request)
    path, _, query = request.raw_path.partition("?")
    return {
        "time": _now(),
        "who": caller.name,
        "role": caller.role.title,
        "from": seen_address(request),
        "node": node,
        "method": request.method,
        "path": path[:MAX_TEXT],
        "query": secrets.masked(_parameters(query)) if len(query) <= MAX_TEXT else {"...": "too long"},
        "status": status,
        "ms": round(seconds * 1000, 3),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
