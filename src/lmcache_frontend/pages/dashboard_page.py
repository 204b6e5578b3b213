"""`GET /`: the nodes, each with its role, version and whether it is up."""

import datetime
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from lmcache_frontend.app import HEALTH, REGISTRY
from lmcache_frontend.pages import rendering
from lmcache_frontend.telemetry.health import NodeHealth

router = web.RouteTableDef()


@dataclass
class LastPage:
    """The page of the last round of probes: with thousands of nodes making one takes longer than sending it."""

    health: list[NodeHealth] | None = None
    html: str = ""


LAST: web.AppKey[LastPage] = web.AppKey("last page", LastPage)


def setup(app: web.Application) -> None:
    rendering.setup(app)
    app[LAST] = LastPage()


@router.get("/")
async def dashboard(request: web.Request) -> web.Response:
    """The dashboard; its list of nodes is asked for again by the page itself."""
    health = await request.app[HEALTH].read()
    last = request.app[LAST]
    if last.health is not health:
        last.health, last.html = health, rendering.html(request, "dashboard.html", _context(request, health))
    return rendering.page(last.html)


def _context(request: web.Request, health: list[NodeHealth]) -> dict[str, Any]:
    by_node = {id(entry.node): entry for entry in health}
    groups = [
        (proxy, sorted((by_node[id(node)] for node in proxy.nodes if id(node) in by_node), key=_is_up))
        for proxy in request.app[REGISTRY].proxies()
    ]
    return {
        "groups": groups,
        "total": len(health),
        "up": sum(entry.up is True for entry in health),
        "down": sum(entry.up is False for entry in health),
        "now": datetime.datetime.now().astimezone(),
    }


def _is_up(entry: NodeHealth) -> int:
    """What is down comes first, what could not be asked next."""
    return {False: 0, None: 1, True: 2}[entry.up]
