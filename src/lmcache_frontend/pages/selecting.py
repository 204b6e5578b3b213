"""The nodes that a page works on: all that fit the choice of its address, in the order of their names."""

from __future__ import annotations

from aiohttp import web

from lmcache_frontend.app import HEALTH
from lmcache_frontend.pages.listing import Choice, Row, natural
from lmcache_frontend.telemetry.health.states import NodeHealth


def chosen(app: web.Application, choice: Choice) -> list[NodeHealth]:
    """Those that fit; proxies in the registry's order."""
    found = []
    for proxy, healths in app[HEALTH].by_proxy():
        rows = [Row(health, proxy.stale or health.node.stale, {}) for health in healths]
        found += sorted((row.health for row in rows if choice.takes(row)), key=lambda it: natural(it.node.name))
    return found


def roles(app: web.Application) -> list[tuple[str, str]]:
    """What nodes are, for a choice."""
    known = sorted({health.role or "unknown" for health in app[HEALTH].all()})
    return [("", "All"), *((role, role) for role in known)]
