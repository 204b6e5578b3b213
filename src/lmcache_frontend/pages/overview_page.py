"""`GET /`: the cluster at a glance. `GET /nodes`: every node in a table. Both by one address for each view.

What may be missing there is told too: a proxy that does not tell of its nodes, a source that knows nothing new, and
what is only still shown because nobody reports it any longer.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import web

from lmcache_frontend.app import BY_HAND, HEALTH, SOURCES
from lmcache_frontend.pages import rendering
from lmcache_frontend.pages.attention import attention
from lmcache_frontend.pages.figures import Figures
from lmcache_frontend.pages.gathering import whose
from lmcache_frontend.pages.labels import SUGGESTED, Labels, labels
from lmcache_frontend.pages.listing import Choice, listing, revision
from lmcache_frontend.pages.views import VIEWS, Views
from lmcache_frontend.telemetry.health.states import STATES
from lmcache_frontend.telemetry.history.ranges import RANGES

FIRST_SECONDS = 1.0
"""A page that is opened while nodes wait for their first check waits for it so long: they are unknown else."""

router = web.RouteTableDef()


@dataclass(frozen=True)
class Notice:
    """What is wrong with a source, in short; `more` problems are told by `/api/sources`."""

    source: str
    place: str
    problem: str
    more: int


def setup(app: web.Application) -> None:
    rendering.setup(app)
    app[VIEWS] = Views()


@router.get("/")
async def overview(request: web.Request) -> web.Response:
    """Totals, nodes by group, and what has changed; renewed by the page itself."""
    return await _shown(request, "overview.html", "overview_part.html")


@router.get("/nodes")
async def nodes(request: web.Request) -> web.Response:
    """Every node, dense."""
    return await _shown(request, "nodes.html", "nodes_part.html")


async def _shown(request: web.Request, template: str, part_template: str) -> web.Response:
    app, choice = request.app, Choice.of(request)
    await app[HEALTH].settled(FIRST_SECONDS)
    figures = Figures(app, choice.range)
    labelled = await labels(request, choice.label) if choice.group == "label" else Labels()
    shows = (revision(app), figures.revision, notices(app), labelled.revision)
    key = (choice, labelled.revision and whose(request), labelled.problem)  # what a role is told is for that role
    part = await app[VIEWS].get(app, part_template, key, shows, lambda: _context(app, choice, figures, labelled))
    return await rendering.show(request, template, {"choice": choice, "counts": app[HEALTH].counts()}, part=part)


def _context(app: web.Application, choice: Choice, figures: Figures, labelled: Labels) -> Mapping[str, object]:
    found = listing(app, choice, figures, labels=labelled.texts)
    sparks = figures.sparklines("load", [row.key for row in found.rows])
    return {
        "listing": found,
        "choice": found.choice,
        "attention": attention(found.everything, figures),
        "states": tuple(reversed(STATES)),
        "total": figures.total(),
        "trends": figures.trends(),
        "events": figures.events(),
        "figures": figures,
        "ranges": tuple(RANGES),
        "sparks": sparks,
        "spark_high": max((value for values in sparks.values() for value in values if value is not None), default=0.0),
        "notices": notices(app),
        "labelled": labelled,
        "suggested": SUGGESTED,
        "now": datetime.datetime.now().astimezone(),
    }


def notices(app: web.Application) -> list[Notice]:
    """What is wrong with the sources of nodes."""
    told = [(source.name, source.place, source.problems) for source in app[SOURCES]]
    by_hand = app[BY_HAND]
    if by_hand.problem is not None:
        told.append(("hand", by_hand.place, [by_hand.problem]))
    return [Notice(name, place, problems[0], len(problems) - 1) for name, place, problems in told if problems]
