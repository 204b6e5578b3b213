"""`GET /health`: whether the frontend serves."""

from aiohttp import web

from lmcache_shared.responses import json_response

router = web.RouteTableDef()


@router.get("/health")
async def health(_: web.Request) -> web.Response:
    """The answer of LMCache's frontend, to the letter."""
    return json_response({"status": "healthy", "service": "lmcache-monitor"})
