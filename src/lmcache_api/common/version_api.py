"""`GET /version`, `/lmc_version` and `/commit_id`: what runs."""

from aiohttp import web

from lmcache_api.app import COMPONENT
from lmcache_shared.responses import json_response

router = web.RouteTableDef()


@router.get("/version")
async def version(request: web.Request) -> web.Response:
    """Number and commit, as one JSON string."""
    return json_response(request.app[COMPONENT].version.whole)


@router.get("/lmc_version")
async def lmc_version(request: web.Request) -> web.Response:
    """The number, as a JSON string."""
    return json_response(request.app[COMPONENT].version.number)


@router.get("/commit_id")
async def commit_id(request: web.Request) -> web.Response:
    """The commit, as a JSON string."""
    return json_response(request.app[COMPONENT].version.commit)
