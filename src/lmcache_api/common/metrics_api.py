"""`GET /metrics` and `POST /metrics/reset`: the component's Prometheus metrics."""

from aiohttp import web

from lmcache_api.app import COMPONENT, call
from lmcache_shared.responses import text_response

router = web.RouteTableDef()

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The Prometheus text format; LMCache's own server leaves the version out."""


@router.get("/metrics")
async def metrics(request: web.Request) -> web.Response:
    """Every family in the Prometheus text format."""
    body = await call(request, request.app[COMPONENT].metrics.exposition, "reading the metrics")
    return web.Response(body=body, headers={"Content-Type": EXPOSITION_TYPE})


@router.post("/metrics/reset")
async def reset(request: web.Request) -> web.Response:
    """Counters and histograms back to zero."""
    await call(request, request.app[COMPONENT].metrics.reset, "resetting the metrics")
    return text_response("ok")
