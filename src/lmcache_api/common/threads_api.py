"""`GET /threads`: what every thread of the process, and every asyncio task of this server, is doing now."""

import asyncio
import sys
import threading
import traceback
from dataclasses import dataclass
from types import FrameType

from aiohttp import web

from lmcache_api.app import DIAGNOSTICS, call
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.responses import text_response
from lmcache_shared.schema import parse_query

router = web.RouteTableDef()

MAX_FRAMES = 200
"""Innermost frames told of each stack."""

MAX_TASKS = 1000
"""Tasks told of; the rest is counted."""


@dataclass(frozen=True)
class ThreadsQuery:
    name: str | None = None
    thread_id: int | None = None


@router.get("/threads")
@needs(Role.OPERATOR)
async def threads(request: web.Request) -> web.Response:
    """Threads and tasks with their stacks, then a summary that counts the threads.

    `name` keeps those with this text in their name, in any case; `thread_id` keeps that thread, and no task.
    """
    query = parse_query(request, ThreadsQuery)
    part = (query.name or "").lower()
    tasks = [] if query.thread_id else _tasks(part)
    report = await call(request, lambda: _report(part, query.thread_id, tasks), "reading the threads", pool=DIAGNOSTICS)
    return text_response(report)


def _report(part: str, thread_id: int | None, tasks: list[str]) -> str:
    found = [
        thread
        for thread in threading.enumerate()
        if part in thread.name.lower() and (not thread_id or thread.ident == thread_id)
    ]
    frames = sys._current_frames()
    told = [_thread(thread, frames.get(thread.ident or 0)) for thread in found]
    return "\n\n".join(told + tasks) + f"\n\n=== Thread Summary ===\nTotal threads: {len(found)}\n"


def _thread(thread: threading.Thread, frame: FrameType | None) -> str:
    if frame is None:
        return f"Thread: {thread}\nNo stack trace available\n"
    return f"Thread: {thread}\nStack trace:\n" + "".join(traceback.format_stack(frame, MAX_FRAMES))


def _tasks(part: str) -> list[str]:
    """Collected in the loop, where tasks stand still meanwhile."""
    tasks = [task for task in asyncio.all_tasks() if part in task.get_name().lower()]
    told = [_task(task) for task in sorted(tasks, key=lambda task: task.get_name())[:MAX_TASKS]]
    if len(tasks) > MAX_TASKS:
        told.append(f"... and {len(tasks) - MAX_TASKS} more tasks\n")
    return told


def _task(task: "asyncio.Task[object]") -> str:
    coroutine = task.get_coro()
    what = getattr(coroutine, "__qualname__", coroutine)
    lines: list[str] = []
    waiting: object = coroutine
    while (frame := getattr(waiting, "cr_frame", None)) is not None and len(lines) < MAX_FRAMES:
        lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}\n')
        waiting = getattr(waiting, "cr_await", None)  # what it waits for, down to the innermost coroutine
    return f"Task: {task.get_name()} ({what})\nStack trace:\n" + "".join(lines)
