"""`/backends`: the storage backends of the engine, listed, closed, made and made again."""

from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import web

from lmcache_api.component import Backends, Engine
from lmcache_api.operations import on_engine
from lmcache_shared.errors import Failure
from lmcache_shared.responses import json_response

router = web.RouteTableDef()

T = TypeVar("T")

API = "/backends API"


@router.get("/backends")
async def list_backends(request: web.Request) -> web.Response:
    """Each backend's class by its name."""
    return json_response(await _ask(request, lambda backends: backends.classes(), "list backends"))


@router.post("/backends")
async def create(request: web.Request) -> web.Response:
    """Make what the settings ask for and is not there yet."""

    def make(backends: Backends) -> dict[str, Any]:
        return {"status": "success", "created": backends.create(), "backends": backends.classes()}

    return json_response(await _ask(request, make, "create backends"))


@router.delete("/backends/{backend_name}")
async def close(request: web.Request) -> web.Response:
    """Close one; what it held is no longer found."""
    name = request.match_info["backend_name"]
    closed, left = await _ask(request, lambda backends: (backends.close(name), backends.classes()), "close backend")
    if not closed:
        return _not_found(name, left)
    return json_response({"status": "success", "message": f"Backend {name} closed", "backends": left})


@router.post("/backends/{backend_name}/recreate")
async def recreate(request: web.Request) -> web.Response:
    """Close one and make it again by the settings of now, in one step."""
    name = request.match_info["backend_name"]
    made, left = await _ask(request, lambda backends: (backends.recreate(name), backends.classes()), "recreate backend")
    if made is None:
        return _not_found(name, left)
    return json_response({"status": "success", "recreated": made, "backends": left})


async def _ask(request: web.Request, operation: Callable[[Backends], T], what: str) -> T:
    def ask(engine: Engine) -> T:
        if engine.backends is None:
            raise Failure(503, f"{API} is unavailable", "LMCache engine not configured.")
        return operation(engine.backends)

    return await on_engine(request, ask, what, api=API)


def _not_found(name: str, backends: object) -> web.Response:
    answer = {"status": "not_found", "message": f"Backend {name} not found", "backends": backends}
    return json_response(answer, status=404)
