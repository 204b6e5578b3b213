"""`/lookup`: the scheduler's lookup client or the worker's lookup server, looked at, closed, made and made again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from lmcache_api.app import COMPONENT
from lmcache_api.component import Lookup
from lmcache_api.operations import attempt
from lmcache_shared.errors import Failure
from lmcache_shared.responses import json_response
from lmcache_shared.schema import parse_query

router = web.RouteTableDef()


@dataclass(frozen=True)
class CreateQuery:
    dryrun: bool = False


@router.get("/lookup/info")
async def info(request: web.Request) -> web.Response:
    """The classes of client and server, `None` as a text where there is none."""
    return json_response(await attempt(request, _lookup(request).info, "get lookup info"), indent=2)


@router.post("/lookup/close")
async def close(request: web.Request) -> web.Response:
    """Close it."""
    return await _change(request, _lookup(request).close, "close lookup")


@router.post("/lookup/create")
async def create(request: web.Request) -> web.Response:
    """Make a new one by the settings of now; with `dryrun` only tell what it would be."""
    lookup = _lookup(request)
    dryrun = parse_query(request, CreateQuery).dryrun
    return await _change(request, lambda: lookup.create(dryrun=dryrun), "create lookup")


@router.post("/lookup/recreate")
async def recreate(request: web.Request) -> web.Response:
    """Close it and make it again by the settings of now."""
    return await _change(request, _lookup(request).recreate, "recreate lookup")


def _lookup(request: web.Request) -> Lookup:
    lookup = request.app[COMPONENT].lookup
    if lookup is None:
        raise Failure(503, "API unavailable", "This component has neither a lookup client nor a lookup server.")
    return lookup


async def _change(request: web.Request, change: Callable[[], dict[str, Any]], what: str) -> web.Response:
    result = await attempt(request, change, what)
    role = request.app[COMPONENT].role
    return json_response({**result, "role": role}, status=400 if "error" in result else 200, indent=2)
