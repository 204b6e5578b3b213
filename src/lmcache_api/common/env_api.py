"""`GET /env`: the environment of the process, secrets masked."""

import functools
import json
import os

from aiohttp import web

from lmcache_api.app import COMPONENT, DIAGNOSTICS, call
from lmcache_shared import secrets
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.responses import text_response

router = web.RouteTableDef()


@router.get("/env")
@needs(Role.ADMIN)
async def env(request: web.Request) -> web.Response:
    """A JSON object of the environment, sorted, as plain text; what looks like a secret is `***`."""
    extra_names = request.app[COMPONENT].settings.internal_api_server_env_mask or []
    masked = functools.partial(secrets.masked, os.environ, extra_names)
    values = await call(request, masked, "reading the environment", pool=DIAGNOSTICS)
    return text_response(json.dumps(values, indent=2, sort_keys=True))
