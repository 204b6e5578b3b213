"""`GET /compare`: where nodes differ in their settings, versions, metadata and environment, the differences first.

What a caller needs is told by what the nodes are asked (`asking.py`), and not by these routes.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from urllib.parse import urlencode

from aiohttp import web

from lmcache_frontend.pages import rendering
from lmcache_frontend.pages.asking import Outcome
from lmcache_frontend.pages.comparing import Member, compare
from lmcache_frontend.pages.confirming import read_form
from lmcache_frontend.pages.gathering import GATHERER, SUBJECTS, Gathered, Subject, gatherer
from lmcache_frontend.pages.listing import MAX_TEXT, Choice
from lmcache_frontend.pages.paths import node_path
from lmcache_frontend.pages.selecting import chosen, roles
from lmcache_shared.access.gate import caller_of
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.access.table import of_proxied

FIRST_SECONDS = 0.6
"""A page that is opened waits so long for the answers; then it shows those that are there, and how many are not."""

PAGE_LINES = 150
"""Of one kind; a search finds the others."""

MAX_PROBLEMS = 20

router = web.RouteTableDef()


def setup(app: web.Application) -> None:
    rendering.setup(app)
    app.cleanup_ctx.append(gatherer)


@router.get("/compare")
async def page(request: web.Request) -> web.Response:
    """The differences between the nodes that the address chooses."""
    subject, choice = _subject(request.query.get("what", "")), Choice.of(request)
    words = request.query.get("key", "").strip()[:MAX_TEXT]
    context: dict[str, object] = {
        "subject": subject,
        "subjects": SUBJECTS.values(),
        "choice": choice,
        "words": words,
        "roles": roles(request.app),
        "now": datetime.datetime.now().astimezone(),
        "back": f"?{request.rel_url.raw_query_string}",
        "query_of": lambda name, **other: _query(request, name, other),
    }
    needed = max(of_proxied("GET", path).role for path in subject.paths)
    if caller_of(request).role < needed:
        context["outcome"] = Outcome("refused", 401, needs=needed)
    else:
        nodes = chosen(request.app, choice)
        seconds = 0.0 if rendering.wants_part(request) else FIRST_SECONDS
        gathered = await request.app[GATHERER].gather(request, subject, nodes, seconds)
        context |= await _compared(gathered, words)
    part = await rendering.text_in_slices(request.app, "compare_part.html", context)
    return await rendering.show(request, "compare.html", context, part=part)


@router.post("/compare")
@needs(Role.VIEWER)
async def again(request: web.Request) -> web.Response:
    """Ask the nodes anew."""
    form = await read_form(request)
    request.app[GATHERER].forget(request, _subject(form.get("what")))
    raise web.HTTPSeeOther(f"/compare{form.get('back')}" if form.get("back").startswith("?") else "/compare")


def _subject(name: str) -> Subject:
    return SUBJECTS.get(name) or SUBJECTS["conf"]


def _query(request: web.Request, subject: str, other: Mapping[str, str]) -> str:
    """The address of the same nodes with something else compared."""
    asked = {
        "what": subject,
        **{name: request.query[name] for name in ("key", "q", "role", "state") if name in request.query},
    }
    return "?" + urlencode({**asked, **other})


async def _compared(gathered: Gathered, words: str) -> dict[str, object]:
    members = [
        Member(health.node.name, node_path(health.proxy, health.node.name), health.role or "", told.values)
        for health, told in gathered.told
        if told.kind == "ok"
    ]
    problems: dict[tuple[str, str], list[Member]] = {}
    for health, told in gathered.told:
        if told.kind != "ok":
            member = Member(health.node.name, node_path(health.proxy, health.node.name), health.role or "", {})
            problems.setdefault((told.kind, told.problem), []).append(member)
    lines = await compare(members, words)
    return {
        "gathered": gathered,
        "members": members,
        "silent": sum(map(len, problems.values())),
        "problems": sorted(problems.items(), key=lambda it: -len(it[1]))[:MAX_PROBLEMS],
        "more_problems": max(0, len(problems) - MAX_PROBLEMS),
        "lines": {kind: found[:PAGE_LINES] for kind, found in lines.items()},
        "counts": {kind: len(found) for kind, found in lines.items()},
        "asked": gathered.asked,
    }
