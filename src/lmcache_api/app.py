"""The application that serves one component: its endpoints found by themselves, its refusals in one shape."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from aiohttp import web

from lmcache_api.component import Category, Component
from lmcache_shared import routes
from lmcache_shared.access.browser import own_site_only
from lmcache_shared.access.gate import GATE, Gate, Names, admitted
from lmcache_shared.access.hosts import HOSTS, Hosts, own_host_only
from lmcache_shared.access.tokens import Tokens
from lmcache_shared.blocking import BlockingPool
from lmcache_shared.errors import refusals
from lmcache_shared.schema import BODIES, Bodies
from lmcache_shared.settings import Settings

T = TypeVar("T")

COMPONENT: web.AppKey[Component] = web.AppKey("component", Component)
POOL: web.AppKey[BlockingPool] = web.AppKey("pool", BlockingPool)

ENGINE_POOL: web.AppKey[BlockingPool] = web.AppKey("engine pool", BlockingPool)
"""For what the engine does, so that metrics and settings are told while it hangs."""

DIAGNOSTICS: web.AppKey[BlockingPool] = web.AppKey("diagnostics pool", BlockingPool)
"""A thread of its own for what tells why the others hang."""

CATEGORIES: tuple[Category, ...] = ("common", "vllm", "controller")
ENTRY_POINTS = "lmcache_api.routes"
"""Installed packages declare modules with routes under this entry point."""

MAX_BODY_BYTES = 1 << 20
"""Largest body that a handler may read whole."""


def create_app(component: Component, categories: Sequence[Category] | None = None) -> web.Application:
    """The application for `component`.

    Args:
        component: what the handlers ask.
        categories: the folders of endpoints to serve, those of the component's role when `None`; route folders of
            the settings and installed packages are served in any case.

    Raises:
        ConfigError: its tokens, or its names of hosts, cannot be used.
        RouteError: a route module is broken, or two claim one route.
    """
    app = web.Application(
        middlewares=[refusals, own_host_only, own_site_only, admitted, _without_slash], client_max_size=MAX_BODY_BYTES
    )
    app[HOSTS] = _hosts(component.settings)
    app[GATE] = _gate(component.settings)
    app[COMPONENT] = component
    app[POOL] = BlockingPool(f"lmcache-api-{component.index}")
    app[ENGINE_POOL] = BlockingPool(f"lmcache-api-{component.index}-engine")
    app[DIAGNOSTICS] = BlockingPool(f"lmcache-api-{component.index}-diagnostics", threads=1, waiting=16)
    app[BODIES] = Bodies()
    app.cleanup_ctx.append(_close_pools)
    packages = [
        f"lmcache_api.{category}" for category in (categories_of(component) if categories is None else categories)
    ]
    folders = component.settings.internal_api_server_route_folders or []
    routes.add_routes(
        app,
        [
            *routes.from_packages(packages, "_api"),
            *routes.from_entry_points(ENTRY_POINTS),
            *routes.from_folders(folders, "_api"),
        ],
    )
    return app


def _hosts(settings: Settings) -> Hosts:
    own = (settings.internal_api_server_host,)
    return Hosts(settings.internal_api_server_allow_host, option="internal_api_server_allow_host", own=own)


def _gate(settings: Settings) -> Gate:
    name = "internal_api_server_token"
    return Gate(
        Tokens(settings.internal_api_server_token, settings.internal_api_server_token_file, place=name),
        Names(name, f"{name}_file", "internal_api_server_auth: false"),
        trust_local=settings.internal_api_server_trust_local,
        open_to_viewers=settings.internal_api_server_viewers == "open",
        no_auth=not settings.internal_api_server_auth,
    )


def categories_of(component: Component) -> Sequence[Category]:
    """A controller has no engine, and serves the common endpoints and its own."""
    return [category for category in CATEGORIES if component.role != "controller" or category != "vllm"]


_without_slash = web.normalize_path_middleware(
    append_slash=False, remove_slash=True, merge_slashes=False, redirect_class=web.HTTPTemporaryRedirect
)
"""`/metrics/` is sent on to `/metrics`, as by LMCache's own server."""


async def call(
    request: web.Request, function: Callable[[], T], what: str, *, pool: web.AppKey[BlockingPool] = POOL
) -> T:
    """Make a call that may take time, off the event loop and under the settings' deadline.

    Raises:
        Refusal: 503 when too many calls wait, 504 past the deadline; the text names `what`.
    """
    seconds = request.app[COMPONENT].settings.internal_api_server_call_seconds
    return await request.app[pool].run(function, seconds=seconds, what=what)


async def _close_pools(app: web.Application) -> AsyncIterator[None]:
    yield
    controller = app[COMPONENT].controller
    if controller is not None:
        await controller.close()
    for pool in (POOL, ENGINE_POOL, DIAGNOSTICS):
        app[pool].close()
