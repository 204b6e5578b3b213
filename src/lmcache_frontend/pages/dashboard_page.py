"""`GET /`: the nodes, each with its state, role and version; what is down comes first."""

import asyncio
import datetime
import time
from typing import Any

from aiohttp import web

from lmcache_frontend.app import HEALTH
from lmcache_frontend.pages import rendering
from lmcache_frontend.telemetry.health import HealthBoard, NodeHealth
from lmcache_frontend.telemetry.states import STATES

FIRST_SECONDS = 1.0
"""A page that is opened while nodes wait for their first check waits for it so long: they are unknown else."""

REST = 10
"""A page is made anew after so many times the seconds that making it took: thousands of nodes change all the time."""

_RANK = {state: rank for rank, state in enumerate(STATES)}

router = web.RouteTableDef()


class LastPage:
    """The page that was made last, for everybody who asks until something has changed; one is made at a time."""

    def __init__(self) -> None:
        self._html = ""
        self._revision = -1
        self._not_before = 0.0
        self._making: asyncio.Task[str] | None = None

    async def get(self, request: web.Request, board: HealthBoard) -> str:
        if self._making is None:
            if self._revision == board.revision or time.monotonic() < self._not_before:
                return self._html
            self._making = asyncio.create_task(self._make(request, board), name="make the dashboard")
        return await asyncio.shield(self._making)  # a reader who leaves stops it for nobody else

    async def _make(self, request: web.Request, board: HealthBoard) -> str:
        begun, revision = time.monotonic(), board.revision
        try:
            self._html = await rendering.html_in_slices(request, "dashboard.html", _context(board))
            self._revision = revision
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
    return rendering.page(await request.app[LAST].get(request, board))


def _context(board: HealthBoard) -> dict[str, Any]:
    groups = [(proxy, sorted(found, key=_rank)) for proxy, found in board.by_proxy()]
    counts = dict.fromkeys(reversed(STATES), 0)
    for _, found in groups:
        for entry in found:
            counts[entry.state] += 1
    return {
        "groups": groups,
        "counts": counts,
        "total": sum(counts.values()),
        "shown_time": _shown_time,
        "now": datetime.datetime.now().astimezone(),
    }


def _rank(entry: NodeHealth) -> int:
    return _RANK[entry.state]


def _shown_time(moment: datetime.datetime, now: datetime.datetime) -> str:
    """In the reader's eyes: the frontend's time zone, and the day where it is another one."""
    local = moment.astimezone(now.tzinfo)
    return f"{local:%H:%M:%S}" if local.date() == now.date() else f"{local:%Y-%m-%d %H:%M}"
