"""The frontend's application: its endpoints and pages found by themselves, around one registry of nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web

from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.options import Options
from lmcache_frontend.proxy.policy import Policy
from lmcache_frontend.proxy.transport import Targets
from lmcache_frontend.telemetry.health import HealthBoard
from lmcache_frontend.telemetry.own import CLUSTER_HEALTH, OWN_METRICS, ClusterHealth, OwnMetrics
from lmcache_shared import routes
from lmcache_shared.access import own_site_only
from lmcache_shared.errors import refusals

OPTIONS: web.AppKey[Options] = web.AppKey("options", Options)
REGISTRY: web.AppKey[Registry] = web.AppKey("registry", Registry)
POLICY: web.AppKey[Policy] = web.AppKey("policy", Policy)
TARGETS: web.AppKey[Targets] = web.AppKey("targets", Targets)
HEALTH: web.AppKey[HealthBoard] = web.AppKey("health", HealthBoard)

ENTRY_POINTS = "lmcache_frontend.routes"
"""Installed packages declare modules with routes under this entry point."""


def create_app(options: Options, registry: Registry) -> web.Application:
    """The frontend for the nodes of `registry`.

    Raises:
        RouteError: a route module is broken, or two claim one route.
    """
    app = web.Application(middlewares=[refusals, own_site_only])
    app[OPTIONS] = options
    app[REGISTRY] = registry
    app[CLUSTER_HEALTH] = ClusterHealth()
    app[OWN_METRICS] = OwnMetrics(registry, app[CLUSTER_HEALTH])
    app[POLICY] = Policy(registry, options.socket_prefix)
    app.cleanup_ctx.append(_targets)
    folders = options.route_folder or []
    routes.add_routes(
        app,
        [
            *routes.from_packages(["lmcache_frontend.api"], "_api"),
            *routes.from_packages(["lmcache_frontend.pages"], "_page"),
            *routes.from_entry_points(ENTRY_POINTS),
            *routes.from_folders(folders, "_api"),
            *routes.from_folders(folders, "_page"),
        ],
    )
    return app


async def _targets(app: web.Application) -> AsyncIterator[None]:
    app[TARGETS] = Targets(app[REGISTRY].has)
    app[HEALTH] = HealthBoard(app[REGISTRY])
    yield
    await app[HEALTH].close()
    await app[TARGETS].close()
