"""`--audit-log`: a line in JSON for every change that passes: who, what, where, and how it ended.

A change is what needs an operator or an admin. Lines are written by a thread, some at a time; a request whose line
finds no room waits for it, so that no change goes by unwritten while the disk is slow. The file is kept to a size, and
a few former ones beside it (`FILE.1` is the newest).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from datetime import datetime, timezone
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import web

from lmcache_shared import secrets
from lmcache_shared.access.asking import Asking, HandlerOf, R
from lmcache_shared.access.caller import seen_address
from lmcache_shared.access.gate import caller_of
from lmcache_shared.access.roles import Role, needed
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

CHANGE: Any = web.RequestKey("change", tuple) if hasattr(web, "RequestKey") else "lmcache_change"
"""Of a proxied request its target and the role that it needs; aiohttp before 3.14 knows texts alone."""


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
    """Have a line written for each change, when its answer has gone or is about to; behind `admitted`."""
    log = request.app.get(AUDIT)
    if log is None:
        return await handler(request)
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
        node, role = request.get(CHANGE) or ("", needed(request))
        if role >= Role.OPERATOR:
            await log.add(_line(request, str(node), status, time.monotonic() - began))


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
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
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
