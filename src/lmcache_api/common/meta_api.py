"""`GET /meta`: the engine's metadata."""

import json
from dataclasses import dataclass

from aiohttp import web

from lmcache_api.app import COMPONENT, call
from lmcache_shared import secrets
from lmcache_shared.responses import plain, text_response
from lmcache_shared.schema import parse_query

router = web.RouteTableDef()


@dataclass(frozen=True)
class MetaQuery:
    names: str | None = None


@router.get("/meta")
async def meta(request: web.Request) -> web.Response:
    """The metadata, or those of the comma list `names` that exist; JSON text as plain text, secrets as `***`."""
    query = parse_query(request, MetaQuery)
    component = request.app[COMPONENT]

    def read() -> object:
        metadata = component.metadata() or {}
        if query.names:
            metadata = {name: metadata[name] for name in query.names.split(",") if name in metadata}
        mask = component.settings.internal_api_server_env_mask or ()
        return secrets.masked_within(plain(metadata), extra_names=mask)

    return text_response(json.dumps(await call(request, read, "reading the metadata"), indent=2))
