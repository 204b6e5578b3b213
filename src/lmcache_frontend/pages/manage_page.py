"""`/manage`: the own list of nodes: where each comes from, added, changed, removed, tried, imported, exported.

It is the same list as that of `/api/nodes`, changed by the same functions. Looking is for viewers; who changes
something needs an operator's role, and each change is told in the timeline and the audit log.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from aiohttp import web

from lmcache_frontend.api.nodes_api import told_of_sources
from lmcache_frontend.app import BY_HAND, HEALTH, NEIGHBOURS, REGISTRY
from lmcache_frontend.audit import note_own
from lmcache_frontend.nodes.neighbours import NeighbourError
from lmcache_frontend.nodes.node import LOCAL_PROXY, Node, Proxy
from lmcache_frontend.pages import rendering
from lmcache_frontend.pages.confirming import Change, Form, Plan, Result, plan_page, read_form, result_page
from lmcache_frontend.pages.figures import Figures
from lmcache_frontend.pages.listing import Choice, listing
from lmcache_frontend.pages.managing import entries
from lmcache_frontend.pages.managing.entries import Entry, entry_of, entry_path, label
from lmcache_frontend.pages.managing.files import node_file, read_import
from lmcache_frontend.pages.managing.testing import test
from lmcache_shared.access.gate import GATE, caller_of
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.errors import ConfigError, Refusal

Work = Callable[[], Awaitable[Any]]

SHOWN_LINES = 500
"""Of an import; all of them count."""

router = web.RouteTableDef()


def setup(app: web.Application) -> None:
    rendering.setup(app)


@router.get("/manage")
async def page(request: web.Request) -> web.Response:
    """Every entry with its source."""
    app, choice = request.app, Choice.of(request)
    by_hand = app[BY_HAND]
    context = {
        "view": "entries",
        "choice": choice,
        "listing": listing(app, choice, Figures(app)),
        "proxies": list(entries.proxies(app)),
        "changed": set(by_hand.changed()),
        "hidden": [(name, label(name)) for name in by_hand.hidden()],
        "entry_path": entry_path,
        "now": datetime.datetime.now().astimezone(),
        "problems": [it for it in told_of_sources(app) if it["problems"]],
    }
    part = await rendering.text_in_slices(app, "manage_part.html", context)
    return await _show(request, "manage.html", context, part)


@router.get("/manage/sources")
async def sources(request: web.Request) -> web.Response:
    """The sources and what is wrong with them."""
    context = {"view": "sources", "sources": told_of_sources(request.app), "say": entries.SOURCES_SAY}
    return await _show(request, "manage_sources.html", context)


@router.get("/manage/add")
async def form_to_add(request: web.Request) -> web.Response:
    """The form of a new node or proxy."""
    kind = "proxy" if request.query.get("kind") == "proxy" else "node"
    names = [LOCAL_PROXY, *(entry.name for entry in entries.proxies(request.app))]
    context = {"view": "add", "kind": kind, "proxies": names, "query": request.query}
    return await _show(request, "manage_add.html", context)


@router.get("/manage/entry")
async def one(request: web.Request) -> web.Response:
    """An entry: what is known of it, tried with `?test=yes`, and the forms that change it."""
    entry = entry_of(request.app, request.query.get("proxy", ""), request.query.get("name"))
    tested = await test(request.app, entry.proxy, entry.item) if request.query.get("test") else None
    return await _show(request, "manage_entry.html", {"view": "entries", "entry": entry, "tested": tested})


@router.post("/manage/add")
@needs(Role.VIEWER)
async def add(request: web.Request) -> web.Response:
    """Add a node or a proxy; first it is tried."""
    form = await _operators_form(request)
    item, problem = _read(form)
    where = form.get("proxy") or LOCAL_PROXY
    plan = Plan(f"Add the {form.get('kind')}" if form.get("kind") == "proxy" else "Add the node", problem=problem)
    if item is not None:
        tested = await test(request.app, where, item)
        plan = Plan(
            plan.title,
            [f"{item.name} at {item.address}"],
            f"{tested.text} {_then(tested.state)}",
            problem=_taken(request.app, where, item),
        )
        by_hand = request.app[BY_HAND]
        work: Work = lambda: by_hand.add_proxy(item) if isinstance(item, Proxy) else by_hand.add_node(where, item)  # noqa: E731
        if form.is_confirmed and not plan.problem:
            back = entry_path(
                item.name if isinstance(item, Proxy) else where, None if isinstance(item, Proxy) else item.name
            )
            return await _carry_out(request, plan, work, f"{item.name} was added by hand", back)
    return await plan_page(
        request, plan, form, f"/manage/add?kind={'proxy' if form.get('kind') == 'proxy' else 'node'}"
    )


@router.post("/manage/test")
@needs(Role.VIEWER)
async def try_it(request: web.Request) -> web.Response:
    """Try what a form describes; nothing is changed."""
    form = await _operators_form(request)
    known = _entry(request, form) if form.get("of_proxy") else None
    item, problem = _read(form, known)
    if item is None:
        return await result_page(request, Plan("Test the connection"), Result(False, problem), "/manage/add")
    tested = await test(request.app, form.get("proxy") or LOCAL_PROXY, item)
    plan = Plan("Test the connection", [f"{item.name} at {item.address}"])
    return await result_page(request, plan, Result(tested.state in ("up", "slow"), tested.text), "/manage")


@router.post("/manage/entry/change")
@needs(Role.VIEWER)
async def change(request: web.Request) -> web.Response:
    """Put what the form describes in the place of an entry."""
    form = await _operators_form(request)
    entry = _entry(request, form)
    item, problem = _read(form, entry, is_proxy=False)
    if item is None:
        return await plan_page(request, Plan("Change it", [entry.name], problem=problem), form, entry.path)
    changes = [
        Change(what, old, new)
        for what, old, new in (
            ("Name", entry.name, item.name),
            ("Address", str(entry.item.address), str(item.address)),
            ("Token", *_tokens(entry.item, item)),
        )
        if old != new
    ]
    as_proxy = Proxy(item.name, item.host, item.port, item.address, token=item.token) if entry.is_proxy else item
    tested = await test(request.app, entry.proxy, as_proxy)
    plan = Plan(
        "Change it",
        [label(entry.proxy if entry.is_proxy else (entry.proxy, entry.name))],
        f"{tested.text} {entry.effect_of_change}",
        changes,
        problem="" if changes else "Nothing is different.",
    )
    if plan.problem or not form.is_confirmed:
        return await plan_page(request, plan, form, entry.path)
    proxy = None if entry.is_proxy else entry.proxy
    work: Work = lambda: request.app[BY_HAND].change(entry.name, item, proxy=proxy)  # noqa: E731
    back = entry_path(item.name if entry.is_proxy else entry.proxy, None if entry.is_proxy else item.name)
    return await _carry_out(request, plan, work, f"{entry.name} was changed by hand", back)


@router.post("/manage/entry/remove")
@needs(Role.VIEWER)
async def remove(request: web.Request) -> web.Response:
    """Remove an entry."""
    form = await _operators_form(request)
    entry = _entry(request, form)
    title = "Remove the proxy" if entry.is_proxy else "Remove the node"
    plan = Plan(title, [f"{entry.name} at {entry.item.address}"], entry.effect_of_removal, is_danger=True)
    if not form.is_confirmed:
        return await plan_page(request, plan, form, entry.path)
    proxy = None if entry.is_proxy else entry.proxy
    work: Work = lambda: request.app[BY_HAND].remove(entry.name, proxy=proxy)  # noqa: E731
    return await _carry_out(request, plan, work, f"{entry.name} was removed by hand", "/manage")


@router.post("/manage/entry/restore")
@needs(Role.VIEWER)
async def restore(request: web.Request) -> web.Response:
    """Take back what was changed or removed by hand."""
    form = await _operators_form(request)
    proxy, name = form.get("of_proxy"), form.get("of_name")
    what = label((proxy, name) if name else proxy)
    plan = Plan("Restore it", [what], "What was said by hand is taken back; it is as its source tells of it.")
    if not form.is_confirmed:
        return await plan_page(request, plan, form, "/manage")
    work: Work = lambda: request.app[BY_HAND].restore(name or proxy, proxy=proxy if name else None)  # noqa: E731
    return await _carry_out(request, plan, work, f"{name or proxy} was restored", "/manage")


@router.post("/manage/entry/refresh")
@needs(Role.VIEWER)
async def refresh(request: web.Request) -> web.Response:
    """Ask a proxy for its nodes now."""
    form = await _operators_form(request)
    entry = _entry(request, form)
    head = request.app[REGISTRY].head(entry.proxy)
    plan = Plan("Ask for its nodes", [entry.name])
    try:
        if head is not None:
            await request.app[NEIGHBOURS].refresh(head)
    except NeighbourError as error:
        return await result_page(request, plan, Result(False, f"It does not tell of its nodes: {error}"), entry.path)
    told = len(getattr(request.app[REGISTRY].proxy(entry.proxy), "nodes", ()))
    return await result_page(request, plan, Result(True, f"It has {told} nodes."), entry.path)


@router.get("/manage/import")
async def form_to_import(request: web.Request) -> web.Response:
    """The form for a node file, and the way to get one."""
    return await _show(request, "manage_import.html", {"view": "import"})


@router.post("/manage/import")
@needs(Role.VIEWER)
async def import_file(request: web.Request) -> web.Response:
    """Say what a node file would change; confirmed, change it, all or nothing."""
    form = await _operators_form(request)
    text = next((it for it in (form.get("file"), form.get("text")) if it.strip()), "")
    found = read_import(text, request.app[REGISTRY])
    if form.is_confirmed and found.is_good and found.entries:
        changed = f"{found.count('new')} new, {found.count('changed')} changed"
        plan = Plan("Import the file", effect=changed)
        work: Work = lambda: request.app[BY_HAND].put_all(found.entries)  # noqa: E731
        return await _carry_out(request, plan, work, f"A node file was imported: {changed}", "/manage")
    lines = sorted(found.lines, key=lambda line: (line.status != "wrong", line.status == "same", line.number))
    context = {"view": "import", "found": found, "lines": lines[:SHOWN_LINES], "text": text}
    return await _show(request, "manage_import.html", context)


@router.get("/manage/nodes.json")
async def export(request: web.Request) -> web.Response:
    """The node file, of all or, with `?of=hand`, of what was added by hand."""
    text = node_file(request.app[REGISTRY], by_hand=request.query.get("of") == "hand")
    headers = {"Content-Disposition": 'attachment; filename="nodes.json"', **rendering.SECURITY_HEADERS}
    return web.Response(text=text, content_type="application/json", headers=headers)


async def _show(request: web.Request, template: str, context: dict[str, Any], part: str = "") -> web.Response:
    may = caller_of(request).role >= Role.OPERATOR
    return await rendering.show(request, template, {**context, "may_change": may}, part=part)


async def _operators_form(request: web.Request) -> Form:
    """The form, of somebody who may change something.

    Raises:
        Refusal: 401 or 403 for others.
    """
    request.app[GATE].require(request, Role.OPERATOR)
    return await read_form(request)


async def _carry_out(request: web.Request, plan: Plan, work: Work, done: str, back: str) -> web.Response:
    """Do it, have it told, and show what came of it."""
    try:
        await work()
    except Refusal as refusal:
        await note_own(request, f"{plan.title}: {done}", refusal.status)
        return await result_page(request, plan, Result(False, str(refusal.detail)), back)
    await note_own(request, done, 200)
    await request.app[HEALTH].settled(0.5)
    return await result_page(request, plan, Result(True, f"{done}."), back)


def _read(form: Form, known: Entry | None = None, *, is_proxy: bool | None = None) -> tuple[Node | Proxy | None, str]:
    """What the form describes, or why it is none.

    Without a token in the form it is that of the entry, at the same address alone: whoever names an address is not
    shown the token of another one.
    """
    fields = {name: form.get(name) for name in ("name", "host", "port")}
    is_proxy = form.get("kind") == "proxy" if is_proxy is None else is_proxy
    try:
        item = entries.read(fields, form.get("token") or None, is_proxy=is_proxy)
    except ConfigError as error:
        return None, str(error).removeprefix("the form: ")
    keeps = known is not None and item.token is None and not form.get("no_token")
    if known is not None and keeps and item.address == known.item.address:
        item = replace(item, token=known.item.token)
    return item, ""


def _entry(request: web.Request, form: Form) -> Entry:
    return entry_of(request.app, form.get("of_proxy"), form.get("of_name") or None)


def _tokens(old: Node | Proxy, new: Node | Proxy) -> tuple[str, str]:
    """That there is one, never which."""
    was = "one" if old.token else "none"
    return was, "another one" if new.token and old.token and new.token != old.token else "one" if new.token else "none"


def _taken(app: web.Application, where: str, item: Node | Proxy) -> str:
    """Why it cannot be added."""
    registry = app[REGISTRY]
    if isinstance(item, Proxy):
        return f"There is a proxy named {item.name} already." if registry.head(item.name) is not None else ""
    if registry.proxy(where) is None:
        return f"There is no proxy {where}."
    return f"There is a node named {item.name} already." if registry.node(where, item.name) is not None else ""


def _then(state: str) -> str:
    return "" if state in ("up", "slow") else "It can be added all the same, and is shown as it is."
