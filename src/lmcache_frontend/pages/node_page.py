"""`/nodes/{proxy}/{name}/{tab}`: one node. Its tabs are found by themselves (`tabs/`); those it can fill show.

What a caller needs is told by what a tab asks the node (`asking.py`), as with the proxy, and not by these routes.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence

from aiohttp import web

from lmcache_frontend.app import HEALTH, REGISTRY
from lmcache_frontend.pages import rendering, tabs
from lmcache_frontend.pages.abilities import ABILITIES, Abilities
from lmcache_frontend.pages.changed_levels import CHANGED_LEVELS, ChangedLevels
from lmcache_frontend.pages.confirming import plan_page, read_form, result_page
from lmcache_frontend.pages.figures import Figures
from lmcache_frontend.pages.paths import name_of
from lmcache_frontend.pages.tabs import Tab, View
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.errors import Refusal

TABS: web.AppKey[Sequence[Tab]] = web.AppKey("tabs")

router = web.RouteTableDef()


def setup(app: web.Application) -> None:
    rendering.setup(app)
    app[TABS] = tabs.found()
    app[ABILITIES] = Abilities()
    app[CHANGED_LEVELS] = ChangedLevels()


@router.get("/nodes/{proxy}/{name}")
async def first(request: web.Request) -> web.Response:
    """The first tab."""
    return await _tab_page(request, request.app[TABS][0])


@router.get("/nodes/{proxy}/{name}/{tab}")
async def one(request: web.Request) -> web.Response:
    """This tab."""
    return await _tab_page(request, _tab(request))


@router.post("/nodes/{proxy}/{name}/{tab}/{action}")
@needs(Role.VIEWER)
async def act(request: web.Request) -> web.Response:
    """Say what an action will do; do it where the form says that this was seen."""
    view, tab = _view(request), _tab(request)
    action = tab.actions.get(request.match_info["action"])
    if action is None:
        raise Refusal(404, f"{tab.title} has no action {request.match_info['action'][:100]!r}")
    form = await read_form(request)
    plan = await action.plan(view, form)
    back = view.path(tab.name)
    if plan.problem or not form.is_confirmed:
        return await plan_page(request, plan, form, back)
    return await result_page(request, plan, await action.run(view, form), back)


async def _tab_page(request: web.Request, tab: Tab) -> web.Response:
    view = _view(request)
    known = request.app[TABS]
    context = {
        "view": view,
        "tab": tab,
        "tabs": await request.app[ABILITIES].tabs(view, known),
        "query": request.query,
        "process_seconds": _process_seconds(view),
        "address": request.path_qs,
        "now": datetime.datetime.now().astimezone(),
        **await tab.show(view),
    }
    part = await rendering.text_in_slices(request.app, "node_part.html", context)
    return await rendering.show(request, "node.html", context, part=part)


def _process_seconds(view: View) -> float | None:
    """How long the node's process has been running, where that is known and it answers."""
    started = Figures(view.request.app).started(view.proxy, view.node.name) if view.health.answers else None
    return None if started is None else max(0.0, time.time() - started)


def _view(request: web.Request) -> View:
    proxy, name = (name_of(request.match_info[part]) for part in ("proxy", "name"))
    node = request.app[REGISTRY].node(proxy, name)
    if node is None:
        raise Refusal(404, f"{proxy!r} has no node {name!r}; it may have gone, or its frontend no longer tells of it")
    return View(request, proxy, node, request.app[HEALTH].of(proxy, name))


def _tab(request: web.Request) -> Tab:
    name = request.match_info["tab"]
    found = next((tab for tab in request.app[TABS] if tab.name == name), None)
    if found is None:
        raise Refusal(404, f"there is no tab {name[:100]!r}")
    return found
