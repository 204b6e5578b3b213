"""`POST /cache/load-fs-chunks`: chunk files from a folder into local CPU."""

from dataclasses import dataclass

from aiohttp import web

from lmcache_api.component import Engine, LoadedChunks, LoadError
from lmcache_api.operations import attempt, engine_of
from lmcache_shared.errors import Refusal
from lmcache_shared.responses import json_response
from lmcache_shared.schema import parse_body

router = web.RouteTableDef()

MAX_FAILED_KEYS = 1000


@dataclass(frozen=True)
class LoadBody:
    config_path: str
    max_chunks: int | None = None
    max_failed_keys: int = 10


@router.post("/cache/load-fs-chunks")
async def load_fs_chunks(request: web.Request) -> web.Response:
    """Load the chunk files that the configuration at `config_path` leads to, at most `max_chunks` of them."""
    body = await parse_body(request, LoadBody)
    for name, value in (("max_chunks", body.max_chunks), ("max_failed_keys", body.max_failed_keys)):
        if value is not None and value < 0:
            raise Refusal(400, f"{name} {value}: expected a number from 0")
    engine = engine_of(request, "/cache/load-fs-chunks API")
    loaded = await attempt(request, lambda: _load(engine, body), "load chunks from FSConnector")
    answer = {
        "status": "success",
        "loaded_chunks": loaded.loaded,
        "total_files": loaded.total,
        "failed_keys": loaded.failed_keys,
        "config_path": body.config_path,
    }
    return json_response(answer, indent=2)


def _load(engine: Engine, body: LoadBody) -> LoadedChunks:
    failed_keys = min(body.max_failed_keys, MAX_FAILED_KEYS)
    try:
        return engine.load_chunks(body.config_path, body.max_chunks or None, failed_keys)
    except LoadError as error:
        raise Refusal(400, str(error)) from None
