"""`GET /`: the nodes, each with its role, version and whether it is up."""

import datetime

from aiohttp import web

from lmcache_frontend.app import HEALTH, REGISTRY
from lmcache_frontend.pages import rendering
from lmcache_frontend.pages.rendering import setup
from lmcache_frontend.telemetry.health import NodeHealth

__all__ = ["router", "setup"]

router = web.RouteTableDef()


@router.get("/")
async def dashboard(request: web.Request) -> web.Response:
    """The dashboard; its list of nodes is asked for again by the page itself."""
    health = await request.app[HEALTH].read()
    by_node = {id(entry.node): entry for entry in health}
    groups = [
        (proxy, sorted((by_node[id(node)] for node in proxy.nodes if id(node) in by_node), key=_is_up))
        for proxy in request.app[REGISTRY].proxies()
    ]
    context = {
        "groups": groups,
        "total": len(health),
        "up": sum(entry.up is True for entry in health),
        "down": sum(entry.up is False for entry in health),
        "now": datetime.datetime.now().astimezone(),
    }
    return rendering.render(request, "dashboard.html", context)


def _is_up(entry: NodeHealth) -> int:
    """What is down comes first, what could not be asked next."""
    return {False: 0, None: 1, True: 2}[entry.up]
