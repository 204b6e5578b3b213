"""`GET /periodic-threads`, `/periodic-threads/{thread_name}` and `/periodic-threads-health`."""

import typing
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from lmcache_api.app import COMPONENT, call
from lmcache_api.component import Level, PeriodicThreadStatus
from lmcache_shared.responses import json_response
from lmcache_shared.schema import parse_query

router = web.RouteTableDef()

LEVELS: tuple[Level, ...] = typing.get_args(Level)


@dataclass(frozen=True)
class PeriodicThreadsQuery:
    level: str | None = None
    running_only: bool = False
    active_only: bool = False


@router.get("/periodic-threads")
async def periodic_threads(request: web.Request) -> web.Response:
    """The threads asked for, and a summary of all of them whatever was asked for."""
    query = parse_query(request, PeriodicThreadsQuery)
    level = (query.level or "").lower()
    if level and level not in LEVELS:
        message = f"Invalid level: {query.level}. Valid values: {', '.join(LEVELS)}"
        return json_response({"error": message}, status=400)
    threads = await _threads(request)
    chosen = [
        thread
        for thread in threads
        if (not level or thread["level"] == level)
        and (thread["is_running"] or not query.running_only)
        and (thread["is_active"] or not query.active_only)
    ]
    return json_response({"summary": _summary(threads), "threads": chosen})


@router.get("/periodic-threads/{thread_name}")
async def periodic_thread(request: web.Request) -> web.Response:
    """One thread's status."""
    name = request.match_info["thread_name"]
    for thread in await _threads(request):
        if thread["name"] == name:
            return json_response(thread)
    return json_response({"error": f"Thread not found: {name}"}, status=404)


@router.get("/periodic-threads-health")
async def periodic_threads_health(request: web.Request) -> web.Response:
    """Whether every critical or high thread that runs is active."""
    unhealthy = [
        {key: thread[key] for key in ("name", "level", "last_run_ago", "interval")}
        for level in LEVELS[:2]
        for thread in await _threads(request)
        if thread["level"] == level and thread["is_running"] and not thread["is_active"]
    ]
    content = {"healthy": not unhealthy, "unhealthy_count": len(unhealthy), "unhealthy_threads": unhealthy}
    return json_response(content)


async def _threads(request: web.Request) -> Sequence[PeriodicThreadStatus]:
    """Asked off the loop: a thread's status waits for its lock."""
    return await call(request, request.app[COMPONENT].periodic_threads, "reading the periodic threads")


def _summary(threads: Sequence[PeriodicThreadStatus]) -> dict[str, object]:
    total, running, active = _counts(threads)
    by_level = {}
    for level in LEVELS:
        counts = _counts([thread for thread in threads if thread["level"] == level])
        by_level[level] = dict(zip(("total", "running", "active"), counts, strict=True))
    return {"total_count": total, "running_count": running, "active_count": active, "by_level": by_level}


def _counts(threads: Sequence[PeriodicThreadStatus]) -> tuple[int, int, int]:
    return len(threads), sum(t["is_running"] for t in threads), sum(t["is_active"] for t in threads)
