"""The frontend's application: its endpoints and pages found by themselves, around one registry of nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from aiohttp import web

from lmcache_frontend.audit import AUDIT, AuditLog, audited
from lmcache_frontend.cluster import Cluster
from lmcache_frontend.discovery.service import DiscoveryService
from lmcache_frontend.nodes.by_hand import ByHand
from lmcache_frontend.nodes.neighbours import Neighbours
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.nodes.sources import Sources
from lmcache_frontend.options import Options
from lmcache_frontend.pages.refusing import shown_to_browsers
from lmcache_frontend.proxy.paths import Paths
from lmcache_frontend.proxy.policy import Policy
from lmcache_frontend.proxy.rules import read_rules
from lmcache_frontend.proxy.transport import Targets
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_frontend.telemetry.history.history import History
from lmcache_frontend.telemetry.history.timeline import TIMELINE, Timeline
from lmcache_frontend.telemetry.metrics.own import OWN_METRICS, OwnMetrics
from lmcache_shared import routes
from lmcache_shared.access.browser import own_site_only
from lmcache_shared.access.caller import COOKIE_PREFIX
from lmcache_shared.access.gate import GATE, Gate, Names, admitted
from lmcache_shared.access.hosts import HOSTS, Hosts, own_host_only
from lmcache_shared.access.tokens import Tokens
from lmcache_shared.errors import refusals

OPTIONS: web.AppKey[Options] = web.AppKey("options", Options)
REGISTRY: web.AppKey[Registry] = web.AppKey("registry", Registry)
SOURCES: web.AppKey[Sources] = web.AppKey("sources", Sources)
BY_HAND: web.AppKey[ByHand] = web.AppKey("by hand", ByHand)
NEIGHBOURS: web.AppKey[Neighbours] = web.AppKey("neighbours", Neighbours)
DISCOVERY: web.AppKey[DiscoveryService] = web.AppKey("discovery", DiscoveryService)
POLICY: web.AppKey[Policy] = web.AppKey("policy", Policy)
PATHS: web.AppKey[Paths] = web.AppKey("paths", Paths)
TARGETS: web.AppKey[Targets] = web.AppKey("targets", Targets)
HEALTH: web.AppKey[HealthBoard] = web.AppKey("health", HealthBoard)
HISTORY: web.AppKey[History] = web.AppKey("history", History)

READY: web.AppKey[Callable[[], str | None]] = web.AppKey("ready")
"""Why the frontend is not ready to be asked, or `None`. Who knows a reason replaces it."""

ENTRY_POINTS = "lmcache_frontend.routes"
"""Installed packages declare modules with routes under this entry point."""


def create_app(options: Options, cluster: Cluster) -> web.Application:
    """The frontend of a cluster.

    Raises:
        ConfigError: its tokens or its audit log cannot be used.
        RouteError: a route module is broken, or two claim one route.
    """
    app = proxying_app(options, cluster.registry, cluster.health, cluster.timeline)
    app.middlewares.insert(1, shown_to_browsers)
    app[SOURCES] = cluster.sources
    app[BY_HAND] = cluster.by_hand
    app[NEIGHBOURS] = cluster.neighbours
    app[DISCOVERY] = cluster.discovery
    app[HEALTH] = cluster.health
    app[HISTORY] = cluster.history
    app[READY] = cluster.not_ready
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


def proxying_app(options: Options, registry: Registry, health: HealthBoard, timeline: Timeline) -> web.Application:
    """What serves proxied requests, and no route: what `proxy/passing.py` asks an application for.

    Raises:
        ConfigError: its tokens or its audit log cannot be used.
    """
    app = web.Application(middlewares=[refusals, own_host_only, own_site_only, admitted, audited])
    app[OPTIONS] = options
    app[HOSTS] = Hosts(options.allow_host, option="--allow-host", own=(options.host, options.report_host or ""))
    app[GATE] = _gate(options)
    app[REGISTRY] = registry
    app[TIMELINE] = timeline
    app[POLICY] = Policy(registry, read_rules(options.socket_prefix, options.allow_target))
    app[PATHS] = Paths(registry)
    app[OWN_METRICS] = OwnMetrics(registry, health)
    app.cleanup_ctx.append(_targets)
    if options.audit_log:
        app[AUDIT] = AuditLog(options.audit_log)
        app.cleanup_ctx.append(_audit_log)
    return app


def _gate(options: Options) -> Gate:
    return Gate(
        Tokens(options.token, options.token_file, place=options.place_of("token")),
        Names("--token (LMCACHE_FRONTEND_TOKEN)", "--token-file", "--no-auth", "/sign-in"),
        trust_local=not options.no_trust_local,
        open_to_viewers=options.viewers == "open",
        no_auth=options.no_auth,
        cookie=f"{COOKIE_PREFIX}{options.port}",
    )


async def _targets(app: web.Application) -> AsyncIterator[None]:
    app[TARGETS] = Targets(app[REGISTRY].has)
    yield
    await app[TARGETS].close()


async def _audit_log(app: web.Application) -> AsyncIterator[None]:
    app[AUDIT].start()
    yield
    await app[AUDIT].close()
