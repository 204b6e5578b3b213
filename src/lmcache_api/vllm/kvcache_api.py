"""`/cache/kvcache/info`, `/check` and `/record_slot`: the paged KV cache that chunks come from and go to."""

import functools
import time
from dataclasses import dataclass

from aiohttp import web

from lmcache_api import checksums
from lmcache_api.app import COMPONENT, call
from lmcache_api.component import Engine, KVCaches
from lmcache_api.operations import attempt, engine_of, on_engine
from lmcache_shared.errors import Failure
from lmcache_shared.responses import json_response
from lmcache_shared.schema import parse_query

router = web.RouteTableDef()


@dataclass(frozen=True)
class CheckQuery:
    slot_mapping: str | None = None
    chunk_size: int | None = None
    layerwise: bool = False


@router.get("/cache/kvcache/info")
async def info(request: web.Request) -> web.Response:
    """Each layer's shape, type and device."""
    layers = await attempt(request, _kv_caches(request).layers, "get kvcache info")
    if not layers:
        raise _no_kv_caches()
    told = {
        name: {"shape": layer.shape, "dtype": layer.dtype, "device": layer.device} for name, layer in layers.items()
    }
    return json_response({"status": "success", "num_layers": len(told), "layers": told}, indent=2)


@router.get("/cache/kvcache/check")
async def check(request: web.Request) -> web.Response:
    """An MD5 of each chunk of the slots, over all layers or of each: alike where the KV is alike."""
    query = parse_query(request, CheckQuery)
    if not query.slot_mapping:
        raise Failure(400, "Missing parameters", "slot_mapping parameter is required")
    settings = request.app[COMPONENT].settings
    read = functools.partial(checksums.parse_slots, query.slot_mapping, settings.internal_api_server_max_tokens)
    slots = await call(request, read, "reading the slots")
    caches = _kv_caches(request)
    until = time.monotonic() + settings.internal_api_server_call_seconds
    work = functools.partial(
        checksums.of_chunks, caches, slots, query.chunk_size, layerwise=query.layerwise, until=until
    )
    found = await attempt(request, work, "compute checksums")
    if found is None:
        raise _no_kv_caches()
    ranges = await call(request, lambda: checksums.ranges_of(slots), "writing the slots")
    answer = {
        "status": "success",
        "slot_mapping_ranges": ranges,
        "chunk_size": query.chunk_size,
        "num_chunks": found.chunks,
        "chunk_checksums": found.by_layer if query.layerwise and query.chunk_size else found.together,
        "layerwise": query.layerwise,
    }
    return json_response(answer, indent=2)


@router.post("/cache/kvcache/record_slot")
async def record_slot(request: web.Request) -> web.Response:
    """Whether store and retrieve log their slots; `enabled` (`true` or `false`) sets it."""
    engine_of(request, "LMCache API")
    text = request.query.getall("enabled", [None])[-1]
    word = None if text is None else text.lower()
    if word not in (None, "true", "false"):
        raise Failure(400, "Invalid parameter", "enabled must be 'true' or 'false'")

    def set_and_look(engine: Engine) -> bool:
        if word is not None:
            engine.record_slots(word == "true")
        return engine.records_slots()

    recorded = await on_engine(request, set_and_look, "set record slot status", api="LMCache API")
    return json_response({"status": "success", "kvcache_check_log_enabled": recorded}, indent=2)


def _kv_caches(request: web.Request) -> KVCaches:
    caches = request.app[COMPONENT].kv_caches
    if caches is None:
        raise _no_kv_caches()
    return caches


def _no_kv_caches() -> Failure:
    return Failure(404, "kv_caches not available", "kv_caches is empty or not initialized")
