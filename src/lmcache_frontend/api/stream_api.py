"""`GET /api/stream`: what changes, as server-sent events, for as long as a page is open.

    curl -N "http://localhost:8080/api/stream?topics=totals,timeline"

Each topic is told at most once a second, whatever happens. A reader that does not keep up is cut off, and asks again:
at first each topic tells all that there is, and the timeline what came behind `after`, or `Last-Event-ID`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from aiohttp import web

from lmcache_frontend.api.history_api import node_of, series_of
from lmcache_frontend.app import HEALTH, HISTORY, REGISTRY
from lmcache_frontend.telemetry.history.ranges import refused
from lmcache_frontend.telemetry.history.series import OF_NODES
from lmcache_frontend.telemetry.history.timeline import TIMELINE
from lmcache_frontend.telemetry.history.topics import TOPICS, Reader
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.errors import Refusal
from lmcache_shared.schema import parse_query

router = web.RouteTableDef()

MAX_STREAMS = 64
PUSH_SECONDS = 1.0
HEARTBEAT_SECONDS = 15.0
"""After so long without an event a comment tells the reader, and who is between, that the stream lives."""

WRITE_SECONDS = 10.0
"""A reader that has not taken an event by then is cut off."""

MAX_STREAM_SECONDS = 3600.0
"""Then it ends, and the page asks anew: who may look may have changed."""

RETRY_MILLISECONDS = 2000
MAX_NUMBER_DIGITS = 15


@dataclass(frozen=True)
class StreamQuery:
    topics: str = "totals,timeline"
    series: str = ",".join(series.key for series in OF_NODES)
    proxy: str | None = None
    node: str | None = None
    after: int | None = None


class Streams:
    """All that are open: how many there are, and that they end when the frontend does."""

    def __init__(self) -> None:
        self.count = 0
        self.ended = asyncio.Event()


STREAMS: web.AppKey[Streams] = web.AppKey("streams", Streams)


def setup(app: web.Application) -> None:
    app.cleanup_ctx.append(_streams)
    app.on_shutdown.append(_end)


async def _streams(app: web.Application) -> AsyncIterator[None]:
    app[STREAMS] = Streams()
    yield


async def _end(app: web.Application) -> None:
    app[STREAMS].ended.set()


@router.get("/api/stream", allow_head=False)
@needs(Role.VIEWER)
async def stream(request: web.Request) -> web.StreamResponse:
    """Events of the topics that are asked for."""
    app, query = request.app, parse_query(request, StreamQuery)
    key = node_of(app, query.proxy, query.node)
    series = series_of(query.series, is_node=True)
    topics = list(dict.fromkeys(query.topics.split(",")))
    for topic in topics:
        if topic not in TOPICS:
            raise refused("topics", f"Input should be of {', '.join(TOPICS)}", topic[:100])
    if "node" in topics and key is None:
        raise refused("node", "the topic node is of one node; say which", None)
    streams = app[STREAMS]
    if streams.count >= MAX_STREAMS:
        raise Refusal(503, f"{MAX_STREAMS} streams are open already; close a page", {"Retry-After": "5"})
    reader = Reader(
        app[HISTORY],
        app[TIMELINE],
        app[HEALTH],
        app[REGISTRY],
        key=key,
        series=series,
        number=query.after if (seen := _last_number(request)) is None else seen,
    )
    streams.count += 1
    try:
        return await _send(request, reader, topics, streams.ended)
    finally:
        streams.count -= 1


def _last_number(request: web.Request) -> int | None:
    """Of the last event that a page which asks again has seen."""
    text = request.headers.get("Last-Event-ID", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_NUMBER_DIGITS else None


async def _send(
    request: web.Request, reader: Reader, topics: Sequence[str], ended: asyncio.Event
) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )
    await response.prepare(request)
    now = asyncio.get_running_loop().time
    end, quiet_until = now() + MAX_STREAM_SECONDS, now() + HEARTBEAT_SECONDS
    text = f"retry: {RETRY_MILLISECONDS}\n\n"
    ending = asyncio.ensure_future(ended.wait())
    try:
        while not ending.done() and now() < end:
            for topic in topics:
                for event in reader.news(topic):
                    text += event
                    await asyncio.sleep(0)
            if not text and now() >= quiet_until:
                text = ": \n\n"
            if text:
                await asyncio.wait_for(response.write(text.encode()), WRITE_SECONDS)
                text, quiet_until = "", now() + HEARTBEAT_SECONDS
            await asyncio.wait({ending}, timeout=PUSH_SECONDS)
    except asyncio.TimeoutError:
        if request.transport is not None:
            request.transport.abort()
    finally:
        ending.cancel()
    return response
