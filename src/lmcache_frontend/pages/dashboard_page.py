"""`GET /`: the nodes, each with its state, role and version; what is down comes first.

What may be missing there is told too: a proxy that does not tell of its nodes, a source that knows nothing new, and
what is only still shown because nobody reports it any longer.
"""

import asyncio
import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from lmcache_frontend.app import BY_HAND, HEALTH, NEIGHBOURS, REGISTRY, SOURCES
from lmcache_frontend.nodes.node import LOCAL_PROXY, Proxy
from lmcache_frontend.pages import rendering
from lmcache_frontend.telemetry.health.board import NodeHealth
from lmcache_frontend.telemetry.health.states import STATES

FIRST_SECONDS = 1.0
"""A page that is opened while nodes wait for their first check waits for it so long: they are unknown else."""

REST = 10
"""A page is made anew after so many times the seconds that making it took: thousands of nodes change all the time."""

_RANK = {state: rank for rank, state in enumerate(STATES)}

router = web.RouteTableDef()


@dataclass(frozen=True)
class Group:
    """A proxy, why it does not tell of its nodes, and the nodes that are known."""

    proxy: Proxy
    problem: str | None
    nodes: Sequence[NodeHealth]

    @property
    def is_itself(self) -> bool:
        """Whether these are this frontend's own nodes."""
        return self.proxy.name == LOCAL_PROXY

    @property
    def stale(self) -> int:
        """How many nodes nobody reports any longer; behind a proxy that nobody reports these are all."""
        return sum(self.proxy.stale or entry.node.stale for entry in self.nodes)


@dataclass(frozen=True)
class Notice:
    """What is wrong with a source, in short; `more` problems are told by `/api/sources`."""

    source: str
    place: str
    problem: str
    more: int


class LastPage:
    """The page that was made last, for everybody who asks until something has changed; one is made at a time."""

    def __init__(self) -> None:
        self._html = ""
        self._shows: object = None
        self._not_before = 0.0
        self._making: asyncio.Task[str] | None = None

    async def get(self, request: web.Request) -> str:
        if self._making is None:
            if time.monotonic() < self._not_before or self._shows == _revisions(request.app):
                return self._html
            self._making = asyncio.create_task(self._make(request), name="make the dashboard")
        return await asyncio.shield(self._making)  # a reader who leaves stops it for nobody else

    async def _make(self, request: web.Request) -> str:
        begun, shows = time.monotonic(), _revisions(request.app)
        try:
            self._html = await rendering.html_in_slices(request, "dashboard.html", _context(request.app))
            self._shows = shows
            self._not_before = time.monotonic() + REST * (time.monotonic() - begun)
            return self._html
        finally:
            self._making = None


LAST: web.AppKey[LastPage] = web.AppKey("last page", LastPage)


def setup(app: web.Application) -> None:
    rendering.setup(app)
    app[LAST] = LastPage()


@router.get("/")
async def dashboard(request: web.Request) -> web.Response:
    """The dashboard; its list of nodes is asked for again by the page itself."""
    board = request.app[HEALTH]
    await board.settled(FIRST_SECONDS)
    return rendering.page(await request.app[LAST].get(request))


def _revisions(app: web.Application) -> object:
    """Another one whenever the page would show something else."""
    problems = [app[NEIGHBOURS].problem(proxy.name) for proxy in app[REGISTRY].proxies()]
    return app[HEALTH].revision, app[REGISTRY].revision, problems, _notices(app)


def _context(app: web.Application) -> dict[str, Any]:
    problem_of = app[NEIGHBOURS].problem
    groups = [Group(proxy, problem_of(proxy.name), sorted(found, key=_rank)) for proxy, found in app[HEALTH].by_proxy()]
    counts = dict.fromkeys(reversed(STATES), 0)
    for group in groups:
        for entry in group.nodes:
            counts[entry.state] += 1
    return {
        "groups": groups,
        "counts": counts,
        "total": sum(counts.values()),
        "stale": sum(group.stale for group in groups),
        "silent": sum(group.problem is not None for group in groups),
        "notices": _notices(app),
        "shown_time": _shown_time,
        "now": datetime.datetime.now().astimezone(),
    }


def _notices(app: web.Application) -> list[Notice]:
    told = [(source.name, source.place, source.problems) for source in app[SOURCES]]
    by_hand = app[BY_HAND]
    if by_hand.problem is not None:
        told.append(("hand", by_hand.place, [by_hand.problem]))
    return [Notice(name, place, problems[0], len(problems) - 1) for name, place, problems in told if problems]


def _rank(entry: NodeHealth) -> int:
    return _RANK[entry.state]


def _shown_time(moment: datetime.datetime, now: datetime.datetime) -> str:
    """In the reader's eyes: the frontend's time zone, and the day where it is another one."""
    local = moment.astimezone(now.tzinfo)
    return f"{local:%H:%M:%S}" if local.date() == now.date() else f"{local:%Y-%m-%d %H:%M}"
