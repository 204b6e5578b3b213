"""`/cache/store`, `/cache/retrieve`, `/cache/lookup` and `/cache/clear`: the engine's chunks."""

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from lmcache_api.app import COMPONENT
from lmcache_api.component import LookupClient
from lmcache_api.operations import attempt, engine_of, on_engine
from lmcache_api.tokens import read_tokens
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.errors import Failure
from lmcache_shared.responses import json_response

router = web.RouteTableDef()

API = "LMCache API"

MAX_SPANS = 1000
"""The most that one answer tells."""


@router.post("/cache/store")
async def store(request: web.Request) -> web.Response:
    """Keep the KV of the tokens."""
    engine = engine_of(request, API)
    tokens = await read_tokens(request)
    await attempt(request, lambda: engine.store(tokens), "store cache")
    return json_response({"status": "success", "num_tokens": len(tokens)}, indent=2)


@router.post("/cache/retrieve")
async def retrieve(request: web.Request) -> web.Response:
    """Bring the KV of the longest known prefix of the tokens back."""
    engine = engine_of(request, API)
    tokens = await read_tokens(request)
    retrieved = await attempt(request, lambda: engine.retrieve(tokens), "retrieve cache")
    return json_response({"status": "success", "num_tokens": len(tokens), "num_retrieved": retrieved}, indent=2)


@router.get("/cache/lookup")
@router.post("/cache/lookup")
@needs(Role.VIEWER)
async def lookup(request: web.Request) -> web.Response:
    """How many of the tokens are known and where they lie; a scheduler asks its workers. Nothing changes by asking."""
    component = request.app[COMPONENT]
    if component.engine is None and component.role == "scheduler":
        return await _lookup_on_workers(request, component.lookup_client)
    engine = engine_of(request, API)
    tokens = await read_tokens(request)
    spans = await attempt(request, lambda: engine.lookup(tokens), "look up cache")
    answer = {
        "status": "success",
        "num_tokens": len(tokens),
        "num_hit_tokens": spans[-1].end if spans else 0,
        "num_hit_chunks": sum(span.chunks for span in spans),
        "num_spans": len(spans),
        "spans": [
            {"start": span.start, "end": span.end, "chunks": span.chunks, "locations": span.locations}
            for span in spans[:MAX_SPANS]
        ],
    }
    return json_response(answer, indent=2)


async def _lookup_on_workers(request: web.Request, client: LookupClient | None) -> web.Response:
    if client is None:
        raise Failure(503, f"{API} is unavailable", "There is no lookup client; POST /lookup/create makes one.")
    tokens = await read_tokens(request)
    hits = await attempt(request, lambda: client.hits(tokens), "look up cache")
    workers = [_told_of_worker(worker, hit) for worker, hit in sorted(hits.items())]
    answer = {
        "status": "success",
        "num_tokens": len(tokens),
        "num_hit_tokens": min((worker["num_hit_tokens"] for worker in workers), default=0),
        "workers": workers,
    }
    return json_response(answer, indent=2)


def _told_of_worker(worker: int, hit: int | OSError) -> dict[str, Any]:
    """A worker that does not answer has nothing, as for a request's lookup, and `error` says why."""
    if isinstance(hit, OSError):
        return {"worker_id": worker, "num_hit_tokens": 0, "error": str(hit)}
    return {"worker_id": worker, "num_hit_tokens": hit}


@router.delete("/cache/clear")
async def clear(request: web.Request) -> web.Response:
    """Forget every chunk, or with `locations` those in the backends named; a name of none is left alone."""
    locations: Sequence[str] | None = request.query.getall("locations", None)
    removed = await on_engine(request, lambda engine: engine.clear(locations), "clear cache", api=API)
    return json_response({"status": "success", "num_removed": removed}, indent=2)
