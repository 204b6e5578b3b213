"""`/bypass/list`, `/bypass/add` and `/bypass/remove`: backends that are neither stored to nor looked up in."""

from typing import Any

from aiohttp import web

from lmcache_api.component import Backends, Engine
from lmcache_api.operations import engine_of, on_engine
from lmcache_shared.errors import Failure
from lmcache_shared.responses import json_response

router = web.RouteTableDef()

API = "Bypass API"


@router.get("/bypass/list")
async def list_bypassed(request: web.Request) -> web.Response:
    """The backends that are bypassed, and all there are."""

    def ask(engine: Engine) -> dict[str, Any]:
        backends = _backends(engine)
        return {"bypassed_backends": backends.bypassed(), "all_backends": list(backends.classes())}

    answer = await on_engine(request, ask, "list bypassed backends", api=API)
    return json_response({"status": "success", **answer})


@router.put("/bypass/add")
async def add(request: web.Request) -> web.Response:
    """Bypass the backend `backend_name`."""
    return await _set(request, True)


@router.put("/bypass/remove")
async def remove(request: web.Request) -> web.Response:
    """Use the backend `backend_name` again."""
    return await _set(request, False)


async def _set(request: web.Request, bypass: bool) -> web.Response:
    engine_of(request, API)
    name = request.query.getall("backend_name", [""])[-1]
    if not name:
        raise Failure(400, "Missing parameter", "backend_name is required")

    def set_bypass(engine: Engine) -> dict[str, Any]:
        backends = _backends(engine)
        names = list(backends.classes())
        if name not in names and (bypass or name not in backends.bypassed()):  # a bypass outlives its backend
            raise Failure(400, "Unknown backend", f"Backend '{name}' not found. Available: {names}")
        before = backends.set_bypass(name, bypass)
        return {
            "status": "success",
            "backend_name": name,
            "bypassed": bypass,
            "was_already_bypassed" if bypass else "was_bypassed": before,
            "bypassed_backends": backends.bypassed(),
        }

    what = "add bypass backend" if bypass else "remove bypass backend"
    return json_response(await on_engine(request, set_bypass, what, api=API))


def _backends(engine: Engine) -> Backends:
    if engine.backends is None:
        raise Failure(503, f"{API} is unavailable", "StorageManager not initialized.")
    return engine.backends
