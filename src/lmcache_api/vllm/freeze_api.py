"""`/freeze/enable`, `/freeze/disable` and `/freeze/status`: protect what local CPU holds from changes."""

from aiohttp import web

from lmcache_api.operations import on_engine
from lmcache_shared.responses import json_response

router = web.RouteTableDef()


@router.put("/freeze/enable")
async def enable(request: web.Request) -> web.Response:
    """Skip stores, serve from local CPU alone, admit and evict nothing."""
    return await _freeze(request, True)


@router.put("/freeze/disable")
async def disable(request: web.Request) -> web.Response:
    """Store, admit and evict again."""
    return await _freeze(request, False)


@router.get("/freeze/status")
async def status(request: web.Request) -> web.Response:
    """Whether the engine is frozen."""
    frozen = await on_engine(
        request, lambda engine: engine.is_frozen(), "get freeze mode status", api=f"{request.path} API"
    )
    return _answer(frozen, f"Freeze mode is {'enabled' if frozen else 'disabled'}")


async def _freeze(request: web.Request, frozen: bool) -> web.Response:
    verb = "enable" if frozen else "disable"
    await on_engine(request, lambda engine: engine.freeze(frozen), f"{verb} freeze mode", api=f"{request.path} API")
    return _answer(frozen, f"Freeze mode {verb}d successfully")


def _answer(frozen: bool, message: str) -> web.Response:
    return json_response({"status": "success", "freeze": frozen, "message": message}, indent=2)
