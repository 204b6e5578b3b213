"""`GET /meta`: the engine's metadata."""

import json
from dataclasses import dataclass

from aiohttp import web

from lmcache_api.app import COMPONENT, call
from lmcache_shared.responses import text_response
from lmcache_shared.schema import parse_query

router = web.RouteTableDef()


@dataclass(frozen=True)
class MetaQuery:
    names: str | None = None


@router.get("/meta")
async def meta(request: web.Request) -> web.Response:
    """The metadata, or those of the comma list `names` that exist; JSON text as plain text."""
    query = parse_query(request, MetaQuery)
    metadata = await call(request, request.app[COMPONENT].metadata, "reading the metadata") or {}
    if query.names:
        metadata = {name: metadata[name] for name in query.names.split(",") if name in metadata}
    return text_response(json.dumps(metadata, indent=2, default=str))
