"""`/api/heartbeat`: the heartbeats that this frontend sends; how they go, begin and end."""

from __future__ import annotations

import json

from aiohttp import web

from lmcache_frontend.discovery.heartbeat import HEARTBEAT
from lmcache_frontend.options import DEFINITIONS, url_problem
from lmcache_shared.config import convert
from lmcache_shared.errors import ConfigError, Refusal
from lmcache_shared.responses import json_response
from lmcache_shared.schema import read_body

router = web.RouteTableDef()

MAX_BODY_BYTES = 64 << 10
MAX_URL_LENGTH = 4096


@router.get("/api/heartbeat/status")
async def status(request: web.Request) -> web.Response:
    """LMCache's four fields, and where heartbeats go and how the last one went."""
    return json_response(request.app[HEARTBEAT].status())


@router.post("/api/heartbeat/start")
async def start(request: web.Request) -> web.Response:
    """Send heartbeats to `heartbeat_url`, after `initial_delay` seconds, every `interval` seconds."""
    heartbeat = request.app[HEARTBEAT]
    given = _object(await read_body(request, MAX_BODY_BYTES))
    url = given.get("heartbeat_url")
    if not url:
        raise Refusal(400, "heartbeat_url is required")
    if not isinstance(url, str) or len(url) > MAX_URL_LENGTH:
        raise Refusal(400, f"heartbeat_url: expected a URL of at most {MAX_URL_LENGTH} characters")
    if (problem := url_problem(url)) is not None:
        raise Refusal(400, f"heartbeat_url: {problem}")
    initial_delay, interval = _seconds(given, "initial_delay"), _seconds(given, "interval")
    if not heartbeat.start(url, initial_delay=initial_delay, interval=interval) and not heartbeat.sends(url, interval):
        where = heartbeat.status()["heartbeat_url"]
        raise Refusal(409, f"heartbeats go to {where} already; end them first with POST /api/heartbeat/stop")
    return json_response({"status": "success", "message": "Heartbeat service started"})


@router.post("/api/heartbeat/stop")
async def stop(request: web.Request) -> web.Response:
    """Send no more; a success also when none were sent."""
    await request.app[HEARTBEAT].stop()
    return json_response({"status": "success", "message": "Heartbeat service stopped"})


def _object(body: bytes) -> dict[str, object]:
    """The body's object; what is none holds nothing."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return given if isinstance(given, dict) else {}


def _seconds(given: dict[str, object], name: str) -> float:
    """A number within the limits of the option, whose default it has.

    Raises:
        Refusal: 400.
    """
    definition = DEFINITIONS[f"heartbeat_{name}"]
    try:
        return float(convert(given.get(name, definition.default), definition, name))
    except ConfigError as error:
        raise Refusal(400, str(error)) from None
