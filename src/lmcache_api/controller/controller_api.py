"""`/controller/key-stats` and `/controller/workers`: a scheduler and a worker have no controller, and say so."""

from typing import NoReturn

from aiohttp import web

from lmcache_shared.errors import Refusal

router = web.RouteTableDef()


@router.get("/controller/key-stats")
async def key_stats(request: web.Request) -> NoReturn:
    """How many keys each instance holds."""
    raise _no_controller()


@router.get("/controller/workers")
async def workers(request: web.Request) -> NoReturn:
    """The workers that are registered."""
    raise _no_controller()


def _no_controller() -> Refusal:
    return Refusal(503, "Controller manager not available")
