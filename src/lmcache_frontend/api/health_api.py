"""`GET /health`: whether the frontend serves. `GET /ready`: whether what it serves can be relied on."""

from aiohttp import web

from lmcache_frontend.app import READY
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.responses import json_response

router = web.RouteTableDef()


@router.get("/health")
@needs(Role.NOBODY)
async def health(_: web.Request) -> web.Response:
    """The answer of LMCache's frontend, to the letter."""
    return json_response({"status": "healthy", "service": "lmcache-monitor"})


@router.get("/ready")
@needs(Role.NOBODY)
async def ready(request: web.Request) -> web.Response:
    """200, or 503 with the reason while the nodes are not known yet. That nodes are down is none: the page shows it."""
    reason = request.app[READY]()
    if reason is not None:
        return json_response({"status": "not ready", "reason": reason}, status=503)
    return json_response({"status": "ready"})
