"""The peer of `in_process.py`: an internal API server as LMCache makes its own, of FastAPI and uvicorn.

It has our routes and the same bodies, one periodic thread and the same metrics. Where there was a choice it is the one
that costs less: LMCache builds its application twice and has an access log that is filtered out; here it is built once
and there is no log. The lean variant is the least that one can have of FastAPI: no documentation pages, no WebSockets,
and really on uvloop. LMCache names uvloop in its settings, but `asyncio.run` makes the loop, and that is asyncio's.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import uvicorn  # type: ignore[import-not-found,unused-ignore]
from fastapi import FastAPI, Request  # type: ignore[import-not-found,unused-ignore]
from prometheus_client import REGISTRY, Gauge, generate_latest
from starlette.responses import JSONResponse, PlainTextResponse  # type: ignore[import-not-found,unused-ignore]

from lmcache_shared.version import VERSION

INTERVAL_SECONDS = 30.0
LABELS = {"model_name": "embedded_model", "worker_id": "0", "role": "scheduler"}
LEVELS = ("critical", "high", "medium", "low")
STATES = ("total", "running", "active")
METADATA = {"engine_id": "lmcache_scheduler", "world_size": 1, **LABELS}


class Peer:
    """Serves on `<prefix>_6999` from a thread, the way that LMCache's `InternalAPIServer` does."""

    def __init__(self, prefix: str, *, lean: bool) -> None:
        app = FastAPI(openapi_url=None) if lean else FastAPI()
        for method, path, handler in ROUTES:
            app.add_api_route(path, handler, methods=[method], response_model=None)
        config = uvicorn.Config(
            app, uds=f"{prefix}_6999", loop="uvloop", http="httptools", access_log=False, log_level="warning"
        )
        if lean:
            config.ws = "none"
        self._server = uvicorn.Server(config)
        self._lean = lean

    def start(self) -> None:
        MONITOR.start()
        _make_gauges()
        threading.Thread(target=self._run, name="api-server-thread", daemon=True).start()

    def _run(self) -> None:
        if self._lean:
            import uvloop

            uvloop.new_event_loop().run_until_complete(self._server.serve())
        else:
            asyncio.run(self._server.serve())


class Monitor:
    """The one periodic thread."""

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="health-monitor-thread", daemon=True)
        self._runs = 0
        self._last_run = 0.0

    def start(self) -> None:
        self._thread.start()

    def _loop(self) -> None:
        while True:
            self._last_run = time.time()
            self._runs += 1
            time.sleep(INTERVAL_SECONDS)

    def status(self) -> dict[str, Any]:
        since = time.time() - self._last_run
        return {
            "name": self._thread.name,
            "level": "critical",
            "interval": INTERVAL_SECONDS,
            "is_running": self._thread.is_alive(),
            "is_active": self._thread.is_alive() and since < 3 * INTERVAL_SECONDS,
            "last_run_time": self._last_run,
            "last_run_ago": since,
            "total_runs": self._runs,
            "failed_runs": 0,
        }

    def count(self, level: str | None, state: str) -> int:
        """How many threads there are of the level; those in the state, where one is named."""
        status = self.status()
        return int((level is None or status["level"] == level) and bool(status.get(f"is_{state}", True)))


MONITOR = Monitor()


def _make_gauges() -> None:
    """In the default registry, as LMCache's; each is read at the scrape."""

    def gauge(name: str, help: str, read: Callable[[], float]) -> None:
        Gauge(f"lmcache:{name}", help, list(LABELS)).labels(**LABELS).set_function(read)

    gauge("lmcache_is_healthy", "Whether every important thread is active", lambda: MONITOR.status()["is_active"])
    for level in (None, *LEVELS):
        for state in STATES:
            name = f"periodic_threads_{level}_{state}" if level else f"periodic_threads_{state}_count"
            read = functools.partial(MONITOR.count, level, state)
            gauge(name, f"Number of {level or 'all'} periodic threads, {state}", read)


async def env() -> Any:
    return PlainTextResponse(json.dumps(dict(os.environ), indent=2, sort_keys=True))


async def loglevel(logger_name: str | None = None, level: str | None = None) -> Any:
    if not logger_name:
        loggers = logging.Logger.manager.loggerDict.items()
        lines = [
            f"{name}: {logging.getLevelName(it.level)}\n" for name, it in loggers if isinstance(it, logging.Logger)
        ]
        return PlainTextResponse("=== Loggers and Levels ===\n" + "".join(lines))
    logger = logging.getLogger(logger_name)
    if not level:
        return PlainTextResponse(f"{logger_name}: {logging.getLevelName(logger.level)}")
    number = logging.getLevelName(level.upper())
    if not isinstance(number, int):
        return PlainTextResponse(f"Invalid log level: {level}", status_code=400)
    logger.setLevel(number)
    for handler in logger.handlers:
        handler.setLevel(number)
    return PlainTextResponse(f"Set {logger_name} level to {level.upper()} (including all handlers)")


async def metrics() -> Any:
    return PlainTextResponse(generate_latest(REGISTRY))


async def reset() -> Any:
    return PlainTextResponse("ok")


async def periodic_threads(level: str | None = None, running_only: bool = False, active_only: bool = False) -> Any:
    if level and level.lower() not in LEVELS:
        message = f"Invalid level: {level}. Valid values: {', '.join(LEVELS)}"
        return JSONResponse({"error": message}, status_code=400)
    status = MONITOR.status()
    chosen = (
        (not level or status["level"] == level.lower())
        and (status["is_running"] or not running_only)
        and (status["is_active"] or not active_only)
    )
    summary: dict[str, Any] = {f"{state}_count": MONITOR.count(None, state) for state in STATES}
    summary["by_level"] = {it: {state: MONITOR.count(it, state) for state in STATES} for it in LEVELS}
    return JSONResponse({"summary": summary, "threads": [status] if chosen else []})


async def periodic_thread(thread_name: str) -> Any:
    status = MONITOR.status()
    if status["name"] == thread_name:
        return JSONResponse(status)
    return JSONResponse({"error": f"Thread not found: {thread_name}"}, status_code=404)


async def periodic_threads_health() -> Any:
    status = MONITOR.status()
    unhealthy = [status] if status["is_running"] and not status["is_active"] else []
    content = {"healthy": not unhealthy, "unhealthy_count": len(unhealthy), "unhealthy_threads": unhealthy}
    return JSONResponse(content)


async def run_script(request: Request) -> Any:
    """Off, as both are until the operator turns it on."""
    return PlainTextResponse("The /run_script API is disabled.", status_code=404)


async def threads(name: str | None = None, thread_id: int | None = None) -> Any:
    found = [
        thread
        for thread in threading.enumerate()
        if (name or "").lower() in thread.name.lower() and (not thread_id or thread.ident == thread_id)
    ]
    frames = sys._current_frames()
    told = []
    for thread in found:
        frame = frames.get(thread.ident or 0)
        told.append(f"Thread: {thread}\nStack trace:\n" + "".join(traceback.format_stack(frame) if frame else []))
    return PlainTextResponse("\n\n".join(told) + f"\n\n=== Thread Summary ===\nTotal threads: {len(found)}\n")


async def meta(names: str | None = None) -> Any:
    wanted = names.split(",") if names else METADATA
    return PlainTextResponse(json.dumps({name: METADATA[name] for name in wanted if name in METADATA}, indent=2))


async def version() -> Any:
    return f"{VERSION}-embedded"


async def lmc_version() -> Any:
    return VERSION


async def commit_id() -> Any:
    return "embedded"


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/env", env),
    ("GET", "/loglevel", loglevel),
    ("GET", "/metrics", metrics),
    ("POST", "/metrics/reset", reset),
    ("GET", "/periodic-threads", periodic_threads),
    ("GET", "/periodic-threads/{thread_name}", periodic_thread),
    ("GET", "/periodic-threads-health", periodic_threads_health),
    ("POST", "/run_script", run_script),
    ("GET", "/threads", threads),
    ("GET", "/meta", meta),
    ("GET", "/version", version),
    ("GET", "/lmc_version", lmc_version),
    ("GET", "/commit_id", commit_id),
)
