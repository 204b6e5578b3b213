"""`/hot_cache/enable`, `/hot_cache/disable` and `/hot_cache/status`: whether LocalCPUBackend keeps chunks."""

from aiohttp import web

from lmcache_api.component import Engine, Unavailable
from lmcache_api.operations import on_engine
from lmcache_shared.responses import json_response

router = web.RouteTableDef()

API = "hot_cache API"


@router.put("/hot_cache/enable")
async def enable(request: web.Request) -> web.Response:
    """Keep chunks in memory."""
    return await _set(request, True)


@router.put("/hot_cache/disable")
async def disable(request: web.Request) -> web.Response:
    """Keep none, and forget those that are there."""
    return await _set(request, False)


@router.get("/hot_cache/status")
async def status(request: web.Request) -> web.Response:
    """Whether chunks are kept in memory."""
    enabled = await on_engine(request, lambda engine: engine.is_hot_cache_enabled(), "get hot cache status", api=API)
    return _answer(enabled, f"Hot cache is {'enabled' if enabled else 'disabled'}")


async def _set(request: web.Request, enabled: bool) -> web.Response:
    verb = "enable" if enabled else "disable"

    def set_and_look(engine: Engine) -> None:
        engine.set_hot_cache(enabled)
        backends = engine.backends
        if enabled and backends is not None and "LocalCPUBackend" not in backends.classes():
            raise Unavailable("there is no LocalCPUBackend; POST /backends makes it again")

    await on_engine(request, set_and_look, f"{verb} hot cache", api=API)
    return _answer(enabled, f"Hot cache {verb}d successfully")


def _answer(enabled: bool, message: str) -> web.Response:
    return json_response({"status": "success", "hot_cache": enabled, "message": message}, indent=2)
