"""`/controller/key-stats` and `/controller/workers`: what the controller knows; and how embedded workers report."""

from dataclasses import dataclass

from aiohttp import web

from lmcache_api.component import WorkerReport
from lmcache_api.orchestration import ask, controller_of
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.errors import Refusal
from lmcache_shared.responses import json_response
from lmcache_shared.schema import parse_body, parse_query

router = web.RouteTableDef()

MAX_REPORT_BYTES = 4096
PROXIED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")
"""Fields that a proxy adds."""


@dataclass(frozen=True)
class WorkersQuery:
    instance_id: str | None = None
    worker_id: int | None = None


@dataclass(frozen=True)
class LeaveQuery:
    instance_id: str
    worker_id: int


@router.get("/controller/key-stats")
async def key_stats(request: web.Request) -> web.Response:
    """How many keys each instance holds, and all of them."""
    return json_response(await ask(request, controller_of(request).key_stats()))


@router.get("/controller/workers")
async def workers(request: web.Request) -> web.Response:
    """The workers that are registered, those of `instance_id`, or with `worker_id` the one."""
    query = parse_query(request, WorkersQuery)
    controller = controller_of(request)
    return json_response(await ask(request, controller.workers(query.instance_id, query.worker_id)))


@router.post("/controller/workers")
@needs(Role.ADMIN)
async def report(request: web.Request) -> web.Response:
    """A worker of the embedded engine tells that it is there and how many keys it holds; the answer says how often.

    For an admin: whoever is registered is shown the deployment's token when it is asked something.
    """
    controller = controller_of(request)
    body = await parse_body(request, WorkerReport, max_bytes=MAX_REPORT_BYTES)
    return json_response(await ask(request, controller.report(body, _caller(request))))


@router.delete("/controller/workers")
async def leave(request: web.Request) -> web.Response:
    """Such a worker goes."""
    query = parse_query(request, LeaveQuery)
    controller = controller_of(request)
    await ask(request, controller.leave(query.instance_id, query.worker_id, _caller(request)))
    return json_response({"status": "success"})


def _caller(request: web.Request) -> str | None:
    """Where the worker calls from, `None` on a Unix socket.

    Raises:
        Refusal: 403, when a proxy stands between: its address is not the worker's.
    """
    if any(name in request.headers for name in PROXIED):
        raise Refusal(
            403, "a worker reports by itself, not through a proxy (Forwarded, X-Forwarded-For, X-Real-IP, Via)"
        )
    return request.remote or None
