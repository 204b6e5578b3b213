"""`/controller/key-stats` and `/controller/workers`: what the controller knows; and how embedded workers report."""

from dataclasses import dataclass

from aiohttp import web

from lmcache_api.component import WorkerReport
from lmcache_api.orchestration import ask, controller_of
from lmcache_shared.responses import json_response
from lmcache_shared.schema import parse_body, parse_query

router = web.RouteTableDef()


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
    controller = controller_of(request)
    query = parse_query(request, WorkersQuery)
    return json_response(await ask(request, controller.workers(query.instance_id, query.worker_id)))


@router.post("/controller/workers")
async def report(request: web.Request) -> web.Response:
    """A worker of the embedded engine tells that it is there and how many keys it holds; the answer says how often."""
    controller = controller_of(request)
    body = await parse_body(request, WorkerReport)
    return json_response(await ask(request, controller.report(body, request.remote or None)))


@router.delete("/controller/workers")
async def leave(request: web.Request) -> web.Response:
    """Such a worker goes."""
    controller = controller_of(request)
    query = parse_query(request, LeaveQuery)
    await ask(request, controller.leave(query.instance_id, query.worker_id))
    return json_response({"status": "success"})
