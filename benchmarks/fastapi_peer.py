"""The peer of `in_process.py`: an internal API server as LMCache makes its own, of FastAPI and uvicorn.

It has our routes, with the parameters and the ways of LMCache's handlers, one periodic thread, and the families of
metrics that `in_process.py` reads off ours and hands on. Both sides are a scheduler without a cache engine: what asks
the engine answers 503, as at LMCache. Where there was a choice it is the one that costs less: there is no lookup client
either, LMCache builds its application twice and has an access log that is filtered out; here it is built once and there
is no log. The lean variant is the least that one can have of FastAPI: no documentation pages, no WebSockets,
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
from types import SimpleNamespace
from typing import Annotated, Any

import uvicorn  # type: ignore[import-not-found,unused-ignore]
from fastapi import FastAPI, HTTPException, Query, Request  # type: ignore[import-not-found,unused-ignore]
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel  # type: ignore[import-not-found,unused-ignore]
from starlette.responses import JSONResponse, PlainTextResponse  # type: ignore[import-not-found,unused-ignore]

from lmcache_shared.version import VERSION

INTERVAL_SECONDS = 30.0
LEVELS = ("critical", "high", "medium", "low")
STATES = ("total", "running", "active")
METADATA = {"engine_id": None, "model_name": "standalone_model", "role": "scheduler", "worker_id": 0, "world_size": 1}
CONFIGURATION = {"chunk_size": 256, "local_cpu": True, "max_local_cpu_size": 5.0, "internal_api_server_enabled": True}


class Peer:
    """Serves on `<prefix>_6999` from a thread, the way that LMCache's `InternalAPIServer` does.

    Args:
        prefix: of the socket.
        families: a JSON file with `[kind, name, help, labels, bounds]` of each metric.
        lean: the least of FastAPI.
    """

    def __init__(self, prefix: str, families: str, *, lean: bool) -> None:
        app = FastAPI(openapi_url=None) if lean else FastAPI()
        for method, path, handler in ROUTES:
            app.add_api_route(path, handler, methods=[method], response_model=None)
        app.state.lmcache_adapter = SimpleNamespace(
            lmcache_engine=None, lookup_client=None, lookup_server=None, config=dict(CONFIGURATION), kv_caches={}
        )
        self._families = families
        config = uvicorn.Config(
            app, uds=f"{prefix}_6999", loop="uvloop", http="httptools", access_log=False, log_level="warning"
        )
        if lean:
            config.ws = "none"
        self._server = uvicorn.Server(config)
        self._lean = lean

    def start(self) -> None:
        MONITOR.start()
        _make_metrics(self._families)
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


def _make_metrics(families: str) -> None:
    """In the default registry, as LMCache's; what tells of threads is read at the scrape, also as there."""
    read: dict[str, Callable[[], float]] = {"lmcache:lmcache_is_healthy": lambda: MONITOR.status()["is_active"]}
    for level in (None, *LEVELS):
        for state in STATES:
            name = f"periodic_threads_{level}_{state}" if level else f"periodic_threads_{state}_count"
            read[f"lmcache:{name}"] = functools.partial(MONITOR.count, level, state)
    with open(families, encoding="utf-8") as file:
        rows = json.load(file)
    for kind, name, text, labels, bounds in rows:
        if kind == "histogram":
            Histogram(name, text, list(labels), buckets=bounds).labels(**labels)
        elif kind == "counter":
            Counter(name, text, list(labels)).labels(**labels)
        else:
            gauge = Gauge(name, text, list(labels)).labels(**labels)
            if name in read:
                gauge.set_function(read[name])


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


def _json(content: Any, status: int = 200) -> Any:
    return PlainTextResponse(json.dumps(content, indent=2), media_type="application/json", status_code=status)


def _on(request: Request, owner: str, what: str, act: Callable[[Any], Any]) -> Any:
    """What `act` answers of the adapter's engine, storage manager or lookup client; LMCache's errors otherwise."""
    adapter = request.app.state.lmcache_adapter
    engine = adapter.lmcache_engine
    found = getattr(engine, "storage_manager", None) if owner == "storage_manager" else getattr(adapter, owner)
    if not found:
        return _json({"error": f"{what} is unavailable", "message": "LMCache engine not configured."}, 503)
    try:
        return _json({"status": "success", **act(found)})
    except Exception as error:
        return _json({"error": f"Failed: {what}", "message": str(error)}, 500)


def _on_engine(request: Request, what: str, act: Callable[[Any], Any]) -> Any:
    return _on(request, "lmcache_engine", what, act)


def _on_storage(request: Request, what: str, act: Callable[[Any], Any]) -> Any:
    return _on(request, "storage_manager", what, act)


def _on_client(request: Request, what: str, act: Callable[[Any], Any]) -> Any:
    return _on(request, "lookup_client", what, act)


def _tokens(tokens_mock: str | None) -> list[int]:
    start, end = (int(part) for part in (tokens_mock or "").split(","))
    return list(range(start, end))


async def list_backends(request: Request) -> Any:
    return _on_storage(request, "Backend API", lambda it: it.list_backends())


async def create_backends(request: Request) -> Any:
    return _on_storage(request, "Backend API", lambda it: {"created": it.create_backends()})


async def close_backend(request: Request, backend_name: str) -> Any:
    return _on_storage(request, "Backend API", lambda it: {"closed": it.close_backend(backend_name)})


async def recreate_backend(request: Request, backend_name: str) -> Any:
    return _on_storage(request, "Backend API", lambda it: {"created": it.recreate_backend(backend_name)})


async def bypassed(request: Request) -> Any:
    return _on_storage(request, "Bypass API", lambda it: {"bypassed_backends": it.get_bypassed_backends()})


def _bypass(request: Request, bypass: bool) -> Any:
    name = request.query_params.get("backend_name", "")
    return _on_storage(request, "Bypass API", lambda it: {"was": it.set_backend_bypass(name, bypass), "name": name})


async def bypass_add(request: Request) -> Any:
    return _bypass(request, True)


async def bypass_remove(request: Request) -> Any:
    return _bypass(request, False)


async def store(request: Request, tokens_mock: str | None = None) -> Any:
    return _on_engine(request, "LMCache API", lambda it: {"stored": it.store(tokens=_tokens(tokens_mock))})


async def retrieve(request: Request, tokens_mock: str | None = None) -> Any:
    return _on_engine(request, "LMCache API", lambda it: {"retrieved": it.retrieve(tokens=_tokens(tokens_mock))})


async def lookup(request: Request, tokens_mock: str | None = None) -> Any:
    return _on_engine(request, "LMCache API", lambda it: {"found": it.lookup(tokens=_tokens(tokens_mock))})


async def clear(request: Request, locations: Annotated[list[str] | None, Query()] = None) -> Any:
    return _on_engine(request, "LMCache API", lambda it: {"num_removed": it.clear(locations=locations)})


async def chunk_statistics_start(request: Request) -> Any:
    return _on_client(request, "Chunk statistics", lambda it: {"message": it.start_statistics()})


async def chunk_statistics_stop(request: Request) -> Any:
    return _on_client(request, "Chunk statistics", lambda it: {"message": it.stop_statistics()})


async def chunk_statistics_reset(request: Request) -> Any:
    return _on_client(request, "Chunk statistics", lambda it: {"message": it.reset_statistics()})


async def chunk_statistics_status(request: Request) -> Any:
    return _on_client(request, "Chunk statistics", lambda it: it.get_statistics())


async def get_conf(request: Request, names: str | None = None) -> Any:
    config = request.app.state.lmcache_adapter.config
    wanted = names.split(",") if names else config
    return PlainTextResponse(json.dumps({name: config[name] for name in wanted if name in config}, indent=2))


async def set_conf(request: Request) -> Any:
    config = request.app.state.lmcache_adapter.config
    values = await request.json()
    known = {name: value for name, value in values.items() if name in config}
    config.update(known)
    return JSONResponse({"updated": known}, status_code=200 if len(known) == len(values) else 400)


async def freeze_enable(request: Request) -> Any:
    return _on_engine(request, "/freeze/enable API", lambda it: {"freeze": it.freeze(True)})


async def freeze_disable(request: Request) -> Any:
    return _on_engine(request, "/freeze/disable API", lambda it: {"freeze": it.freeze(False)})


async def freeze_status(request: Request) -> Any:
    return _on_engine(request, "/freeze/status API", lambda it: {"freeze": it.is_frozen()})


async def hot_cache_enable(request: Request) -> Any:
    return _on_engine(request, "/hot_cache/enable API", lambda it: {"hot_cache": it.set_hot_cache(True)})


async def hot_cache_disable(request: Request) -> Any:
    return _on_engine(request, "/hot_cache/disable API", lambda it: {"hot_cache": it.set_hot_cache(False)})


async def hot_cache_status(request: Request) -> Any:
    return _on_engine(request, "/hot_cache/status API", lambda it: {"hot_cache": it.is_hot_cache_enabled()})


async def inference_info(request: Request, format: str | None = None) -> Any:
    return _json({})


async def inference_version(request: Request) -> Any:
    return _json({"error": "Failed to get inference version", "message": "there is no inference engine"}, 500)


async def kvcache_info(request: Request) -> Any:
    return _on(request, "kv_caches", "KV cache API", lambda it: {"layers": list(it)})


async def kvcache_check(
    request: Request, slot_mapping: str | None = None, chunk_size: int | None = None, layerwise: bool = False
) -> Any:
    told = {"slot_mapping": slot_mapping, "chunk_size": chunk_size, "layerwise": layerwise}
    return _on(request, "kv_caches", "KV cache API", lambda it: {**told, "layers": list(it)})


async def kvcache_record_slot(request: Request, enabled: str | None = None) -> Any:
    return _on_engine(request, "KV cache API", lambda it: {"enabled": it.kvcache_check_log_enabled or enabled})


class LoadFSChunksRequest(BaseModel):  # type: ignore[misc,unused-ignore]
    config_path: str
    max_chunks: int | None = None
    max_failed_keys: int = 10


async def load_fs_chunks(request: Request, body: LoadFSChunksRequest) -> Any:
    if request.app.state.lmcache_adapter.lmcache_engine is None:
        raise HTTPException(503, {"error": "API unavailable", "message": "LMCache engine not configured."})
    return _on_engine(request, "load-fs-chunks", lambda it: it.load(body.config_path, body.max_chunks))


async def lookup_info(request: Request) -> Any:
    adapter = request.app.state.lmcache_adapter
    return _json({"lookup_client": str(adapter.lookup_client), "lookup_server": str(adapter.lookup_server)})


async def lookup_close(request: Request) -> Any:
    return _on_client(request, "Lookup API", lambda it: {"closed": it.close()})


async def lookup_create(request: Request, dryrun: bool = False) -> Any:
    return _on_client(request, "Lookup API", lambda it: {"created": it.create(dryrun=dryrun)})


async def lookup_recreate(request: Request) -> Any:
    return _on_client(request, "Lookup API", lambda it: {"created": it.recreate()})


async def key_stats(request: Request) -> Any:
    return _json({"error": "Controller API is unavailable", "message": "Controller not configured."}, 503)


async def workers(
    request: Request,
    instance_id: Annotated[str | None, Query()] = None,
    worker_id: Annotated[int | None, Query()] = None,
) -> Any:
    return _json({"error": "Controller API is unavailable", "message": "Controller not configured."}, 503)


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
    ("GET", "/backends", list_backends),
    ("POST", "/backends", create_backends),
    ("DELETE", "/backends/{backend_name}", close_backend),
    ("POST", "/backends/{backend_name}/recreate", recreate_backend),
    ("GET", "/bypass/list", bypassed),
    ("PUT", "/bypass/add", bypass_add),
    ("PUT", "/bypass/remove", bypass_remove),
    ("POST", "/cache/store", store),
    ("POST", "/cache/retrieve", retrieve),
    ("GET", "/cache/lookup", lookup),
    ("POST", "/cache/lookup", lookup),
    ("DELETE", "/cache/clear", clear),
    ("POST", "/chunk_statistics/start", chunk_statistics_start),
    ("POST", "/chunk_statistics/stop", chunk_statistics_stop),
    ("POST", "/chunk_statistics/reset", chunk_statistics_reset),
    ("GET", "/chunk_statistics/status", chunk_statistics_status),
    ("GET", "/conf", get_conf),
    ("POST", "/conf", set_conf),
    ("PUT", "/freeze/enable", freeze_enable),
    ("PUT", "/freeze/disable", freeze_disable),
    ("GET", "/freeze/status", freeze_status),
    ("PUT", "/hot_cache/enable", hot_cache_enable),
    ("PUT", "/hot_cache/disable", hot_cache_disable),
    ("GET", "/hot_cache/status", hot_cache_status),
    ("GET", "/inference_info", inference_info),
    ("GET", "/inference_version", inference_version),
    ("GET", "/cache/kvcache/info", kvcache_info),
    ("GET", "/cache/kvcache/check", kvcache_check),
    ("POST", "/cache/kvcache/record_slot", kvcache_record_slot),
    ("POST", "/cache/load-fs-chunks", load_fs_chunks),
    ("GET", "/lookup/info", lookup_info),
    ("POST", "/lookup/close", lookup_close),
    ("POST", "/lookup/create", lookup_create),
    ("POST", "/lookup/recreate", lookup_recreate),
    ("GET", "/controller/key-stats", key_stats),
    ("GET", "/controller/workers", workers),
)
