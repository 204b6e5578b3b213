"""`/operations`: one change on many nodes, planned, confirmed, carried out while one looks, and its results.

What a caller needs is told by what the nodes are asked (`asking.py`); an operation is its own.
"""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Mapping
from urllib.parse import quote, unquote, urlencode

from aiohttp import web

from lmcache_frontend.app import HEALTH
from lmcache_frontend.pages import rendering
from lmcache_frontend.pages.asking import Outcome
from lmcache_frontend.pages.confirming import Form, read_form
from lmcache_frontend.pages.figures import Figures
from lmcache_frontend.pages.listing import Choice, listing
from lmcache_frontend.pages.operations.kinds import KINDS, Kind, Values
from lmcache_frontend.pages.operations.running import OPERATIONS, ORDER, Operation, Status, operations
from lmcache_frontend.pages.selecting import chosen, roles
from lmcache_frontend.telemetry.health.states import NodeHealth
from lmcache_shared.access.gate import GATE, caller_of
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.access.table import of_proxied
from lmcache_shared.errors import Refusal
from lmcache_shared.responses import json_response

PAGE_ROWS = 200
"""Of an operation's nodes; all of them are in what is exported."""

NEWEST = 20

STATUSES: Mapping[Status, tuple[str, str]] = {
    "changes": ("will change", "up"),
    "same": ("as wanted already", "unknown"),
    "unable": ("cannot do it", "unknown"),
    "silent": ("without an answer", "down"),
    "waiting": ("waiting", "unknown"),
    "doing": ("under way", "slow"),
    "ok": ("done", "up"),
    "failed": ("failed", "down"),
    "left": ("left out", "unknown"),
    "cancelled": ("not begun", "slow"),
}
"""What each status is called, and the state whose shape and colour it has."""

router = web.RouteTableDef()


def setup(app: web.Application) -> None:
    rendering.setup(app)
    app.cleanup_ctx.append(operations)


@router.get("/operations")
async def page(request: web.Request) -> web.Response:
    """What can be done, on which nodes, and what was done lately."""
    kind = KINDS.get(request.query.get("kind", "")) or next(iter(KINDS.values()))
    choice = Choice.of(request)
    context: dict[str, object] = {
        "kind": kind,
        "kinds": KINDS.values(),
        "choice": choice,
        "roles": roles(request.app),
        "query": request.query,
        "statuses": STATUSES,
    }
    if caller_of(request).role < Role.OPERATOR:
        context["outcome"] = Outcome("refused", 401, needs=Role.OPERATOR)
        return await rendering.show(request, "operations.html", context)
    await request.app[HEALTH].settled(0.5)
    context |= {
        "listing": listing(request.app, choice, Figures(request.app)),
        "key_of": key_of,
        "ticked": set(request.query.getall("node", [])),
        "query_of": lambda **other: _query(request, other),
        "newest": list(request.app[OPERATIONS].newest(caller_of(request)))[:NEWEST],
    }
    return await rendering.show(request, "operations.html", context)


@router.post("/operations")
@needs(Role.VIEWER)
async def plan(request: web.Request) -> web.Response:
    """Plan an operation: its nodes are read, and nothing is changed."""
    request.app[GATE].require(request, Role.OPERATOR)
    form = await read_form(request)
    kind = KINDS.get(form.get("kind"))
    if kind is None:
        raise Refusal(400, f"there is no operation {form.get('kind')[:100]!r}")
    values = kind.values(form.get)
    _admit(request, kind, values)
    made = await request.app[OPERATIONS].plan(request, kind, values, _nodes(request.app, form))
    raise web.HTTPSeeOther(f"/operations/{made.number}")


@router.get("/operations/{number}")
async def one(request: web.Request) -> web.Response:
    """An operation: its plan, how far it is, its results."""
    operation = _operation(request)
    only = request.query.get("show", "")
    rows = [row for row in operation.rows if not only or row.status == only]
    rows.sort(key=lambda row: ORDER.index(row.status))
    caller = caller_of(request)
    context = {
        "operation": operation,
        "rows": rows[:PAGE_ROWS],
        "matched": len(rows),
        "only": only,
        "counts": operation.counts,
        "statuses": STATUSES,
        "is_own": operation.is_of(caller),
        "may_cancel": operation.is_of(caller) or caller.role >= Role.ADMIN,
        "now": datetime.datetime.now().astimezone(),
    }
    part = await rendering.text_in_slices(request.app, "operation_part.html", context)
    return await rendering.show(request, "operation.html", context, part=part)


@router.post("/operations/{number}/start")
@needs(Role.VIEWER)
async def start(request: web.Request) -> web.Response:
    """Carry out what was planned."""
    request.app[GATE].require(request, Role.OPERATOR)
    operation, form = _operation(request), await read_form(request)
    _admit(request, operation.kind, operation.values)
    also: list[Status] = [it for it in ("same", "silent", "unable") if it in form.all("also")]
    await request.app[OPERATIONS].start(request, operation, also)
    raise web.HTTPSeeOther(f"/operations/{operation.number}")


@router.post("/operations/{number}/cancel")
@needs(Role.VIEWER)
async def cancel(request: web.Request) -> web.Response:
    """Begin with no further node."""
    request.app[GATE].require(request, Role.OPERATOR)
    operation = _operation(request)
    request.app[OPERATIONS].cancel(request, operation)
    raise web.HTTPSeeOther(f"/operations/{operation.number}")


@router.post("/operations/{number}/again")
@needs(Role.VIEWER)
async def again(request: web.Request) -> web.Response:
    """Plan the same for those nodes on which it failed or did not begin."""
    request.app[GATE].require(request, Role.OPERATOR)
    operation = _operation(request)
    _admit(request, operation.kind, operation.values)
    failed = {(row.proxy, row.name) for row in operation.rows if row.status in ("failed", "cancelled")}
    nodes = [it for it in request.app[HEALTH].all() if (it.proxy, it.node.name) in failed]
    made = await request.app[OPERATIONS].plan(request, operation.kind, operation.values, nodes)
    raise web.HTTPSeeOther(f"/operations/{made.number}")


@router.get("/operations/{number}/results.json")
async def as_json(request: web.Request) -> web.Response:
    """An operation with all its nodes."""
    operation = _operation(request)
    return json_response(operation.as_json(), headers=_download(operation, "json"))


@router.get("/operations/{number}/results.csv")
async def as_csv(request: web.Request) -> web.Response:
    """Its nodes as a table."""
    operation = _operation(request)
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["proxy", "node", "status", "old", "wanted", "result", "seconds"])
    for row in operation.rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.3f}"
        cells = (row.proxy, row.name, row.status, row.old, operation.new, row.text, seconds)
        table.writerow([cell_of(cell) for cell in cells])
    body = text.getvalue().encode("utf-8", "replace")
    return web.Response(body=body, content_type="text/csv", charset="utf-8", headers=_download(operation, "csv"))


def key_of(proxy: str, name: str) -> str:
    """A node in a form."""
    return f"{quote(proxy, safe='')}/{quote(name, safe='')}"


def _nodes(app: web.Application, form: Form) -> list[NodeHealth]:
    """Those that the form ticks, or all that fit its choice."""
    if form.get("scope") == "ticked":
        ticked = {tuple(map(unquote, key.partition("/")[::2])) for key in form.all("node")}
        return [it for it in app[HEALTH].all() if (it.proxy, it.node.name) in ticked]
    return chosen(app, Choice.from_query(form.get))


def _admit(request: web.Request, kind: Kind, values: Values) -> None:
    """What each node's route needs, before any of them is asked.

    Raises:
        Refusal: 401 or 403.
    """
    question = kind.ask(values)
    request.app[GATE].require(request, of_proxied(question.method, question.path).role)


def _operation(request: web.Request) -> Operation:
    return request.app[OPERATIONS].of(request.match_info["number"], caller_of(request))


def _query(request: web.Request, other: Mapping[str, str]) -> str:
    kept = {name: request.query[name] for name in ("kind", "q", "role", "state") if name in request.query}
    return "?" + urlencode({**kept, **other})


def _download(operation: Operation, ending: str) -> dict[str, str]:
    name = f"{operation.kind.name}-{operation.number}.{ending}"
    return {"Content-Disposition": f'attachment; filename="{name}"', **rendering.SECURITY_HEADERS}


def cell_of(text: str) -> str:
    """A table program takes a cell that begins like this for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text
