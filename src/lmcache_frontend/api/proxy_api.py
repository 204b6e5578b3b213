"""`/proxy/{host}/{port or socket}/{path}` and `/proxy2/{node name}/{path}`, for every method.

What a caller needs is told by what it asks the target for (`proxy/vouching.py`), not by these routes.
"""

from aiohttp import web

from lmcache_frontend.app import POLICY, REGISTRY, TARGETS
from lmcache_frontend.audit import CHANGE, Change
from lmcache_frontend.proxy import target
from lmcache_frontend.proxy.headers import refuse_loops
from lmcache_frontend.proxy.transport import forward
from lmcache_frontend.proxy.vouching import admitted, introduction
from lmcache_frontend.telemetry.metrics.own import OWN_METRICS
from lmcache_shared.access.roles import Role, needs

router = web.RouteTableDef()


@router.route("*", "/proxy/{host}/{target}{path:(/.*)?}")
@needs(Role.NOBODY)
async def by_address(request: web.Request) -> web.StreamResponse:
    """To the target that the path names, if it is registered or otherwise allowed."""
    return await _proxied(request, target.by_address(request.raw_path, request.app[REGISTRY]))


@router.route("*", "/proxy2/{name}{path:(/.*)?}")
@needs(Role.NOBODY)
async def by_name(request: web.Request) -> web.StreamResponse:
    """To the node with this name."""
    return await _proxied(request, target.by_name(request.raw_path, request.app[REGISTRY]))


async def _proxied(request: web.Request, wanted: target.ProxiedPath) -> web.StreamResponse:
    refuse_loops(request)
    asked = admitted(request, wanted.path)
    request[CHANGE] = Change(wanted.address, wanted.path, len(wanted.skipped), asked.role)
    caller = introduction(request, asked, request.app[REGISTRY].token_of(wanted.address))
    with request.app[OWN_METRICS].watching(wanted.address, wanted.path) as watched:
        allowed = request.app[POLICY].allowed(request, wanted.address)
        found = await request.app[TARGETS].get(allowed)
        return watched.answered(await forward(request, found, wanted, caller, watched.traffic))
