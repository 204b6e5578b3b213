"""`/chunk_statistics`: how many chunks the scheduler's requests have, and how many of them are new."""

import time
from typing import Any

from aiohttp import web

from lmcache_api.app import COMPONENT
from lmcache_api.component import ChunkStatistics
from lmcache_api.operations import attempt
from lmcache_shared.errors import Failure
from lmcache_shared.responses import json_response

router = web.RouteTableDef()


@router.post("/chunk_statistics/start")
async def start(request: web.Request) -> web.Response:
    """Count from now on."""
    await attempt(request, _statistics(request).start, "start")
    return _done("Started")


@router.post("/chunk_statistics/stop")
async def stop(request: web.Request) -> web.Response:
    """Count no longer; what was counted stays."""
    await attempt(request, _statistics(request).stop, "stop")
    return _done("Stopped")


@router.post("/chunk_statistics/reset")
async def reset(request: web.Request) -> web.Response:
    """Begin at zero."""
    await attempt(request, _statistics(request).reset, "reset")
    return _done("Reset")


@router.get("/chunk_statistics/status")
async def status(request: web.Request) -> web.Response:
    """What was counted, and when counting ends by itself."""
    counted = await attempt(request, _statistics(request).status, "get status")
    names = ("chunk_statistics_auto_exit_timeout_hours", "chunk_statistics_auto_exit_target_unique_chunks")
    settings = request.app[COMPONENT].configuration.read(names)
    hours, target = (settings.get(name) for name in names)
    answer: dict[str, Any] = {
        **counted,
        "timestamp": time.time(),
        "auto_exit_enabled": bool(hours or target),
        "auto_exit_timeout_hours": hours,
        "auto_exit_target_unique_chunks": target,
    }
    return json_response(answer, indent=2)


def _statistics(request: web.Request) -> ChunkStatistics:
    client = request.app[COMPONENT].lookup_client
    if client is None:
        raise Failure(503, "API unavailable", "Lookup client not configured.")
    if client.statistics is None:
        raise Failure(
            400,
            "Not available",
            "Client does not support statistics. Set enable_chunk_statistics, then POST /lookup/recreate.",
        )
    return client.statistics


def _done(message: str) -> web.Response:
    return json_response({"status": "success", "message": message}, indent=2)
