"""A proxied request from the caller's to the target's connection, whichever server has read it.

What a caller needs is told by what it asks the target for (`vouching.py`), not by the routes under which it does.
"""

from __future__ import annotations

from aiohttp import web

from lmcache_frontend.app import PATHS, POLICY, REGISTRY, TARGETS
from lmcache_frontend.audit import CHANGE
from lmcache_frontend.proxy import target
from lmcache_frontend.proxy.exchange import Proxying
from lmcache_frontend.proxy.headers import refuse_loops
from lmcache_frontend.proxy.paths import Meant
from lmcache_frontend.proxy.transport import forward
from lmcache_frontend.proxy.vouching import introduction, require
from lmcache_frontend.telemetry.metrics.own import OWN_METRICS
from lmcache_shared.access.roles import Role, needs


@needs(Role.NOBODY)
async def by_address(request: Proxying) -> web.StreamResponse:
    """To the target that the path names, if it is registered or otherwise allowed."""
    return await _pass(request, request.app[PATHS].meant(target.by_address, request.method, request.raw_path))


@needs(Role.NOBODY)
async def by_name(request: Proxying) -> web.StreamResponse:
    """To the node with this name."""
    return await _pass(request, request.app[PATHS].meant(target.by_name, request.method, request.raw_path))


async def _pass(request: Proxying, meant: Meant) -> web.StreamResponse:
    app = request.app
    wanted, asked = meant
    refuse_loops(request)
    require(request, asked)
    request[CHANGE] = (wanted.address, asked.role)
    caller = introduction(request, asked, app[REGISTRY].token_of(wanted.address))
    with app[OWN_METRICS].watching(wanted.address, wanted.path) as watched:
        allowed = app[POLICY].allowed(request, wanted.address)
        found = await app[TARGETS].get(allowed)
        return watched.answered(await forward(request, found, wanted, caller, watched.traffic))
