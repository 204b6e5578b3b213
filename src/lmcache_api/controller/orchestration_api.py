"""The posts of LMCache's controller: operations on the workers of an instance, each with an `event_id`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from lmcache_api.app import COMPONENT, call
from lmcache_api.component import Operation
from lmcache_api.orchestration import ask, controller_of
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.errors import Refusal
from lmcache_shared.responses import json_response, plain
from lmcache_shared.schema import MAX_BODY_BYTES, body_of, read_body

router = web.RouteTableDef()

BYTES_A_TOKEN = 12
BYTES_AROUND = 4096


@dataclass(frozen=True)
class Lookup:
    tokens: list[int]


@dataclass(frozen=True)
class Clear:
    instance_id: str
    location: str


@dataclass(frozen=True)
class Pin:
    instance_id: str
    location: str
    tokens: list[int]


@dataclass(frozen=True)
class Compress:
    instance_id: str
    method: str
    location: str
    tokens: list[int] | None = None


@dataclass(frozen=True)
class Move:
    old_position: list[str]
    new_position: list[str]
    tokens: list[int] | None = None
    should_copy: bool | None = False


@dataclass(frozen=True)
class Health:
    instance_id: str


@dataclass(frozen=True)
class QueryInstance:
    event_id: str
    ip: str


@dataclass(frozen=True)
class CheckFinish:
    event_id: str


@dataclass(frozen=True)
class QueryWorkerInfo:
    instance_id: str
    worker_ids: list[int] | None = None


async def _operate(request: web.Request, name: str, model: type[Any]) -> web.Response:
    controller = controller_of(request)
    most = request.app[COMPONENT].settings.internal_api_server_max_tokens
    names = {field.name for field in dataclasses.fields(model)}
    content = await read_body(request, BYTES_AROUND + BYTES_A_TOKEN * most if "tokens" in names else MAX_BODY_BYTES)
    body = await call(request, lambda: body_of(content, model), "reading the body")
    fields = {name: getattr(body, name) for name in names}
    if len(fields.get("tokens") or ()) > most:
        raise Refusal(400, f"{len(fields['tokens'])} tokens, but internal_api_server_max_tokens allows {most} at once")
    return json_response(plain(await ask(request, controller.operate(Operation(name, fields)))))


@router.post("/lookup")
@needs(Role.VIEWER)
async def lookup(request: web.Request) -> web.Response:
    """Which instance knows how many of the tokens, and where: `layout_info`."""
    return await _operate(request, "lookup", Lookup)


@router.post("/clear")
async def clear(request: web.Request) -> web.Response:
    """Forget an instance's chunks in a backend: `num_tokens`."""
    return await _operate(request, "clear", Clear)


@router.post("/pin")
async def pin(request: web.Request) -> web.Response:
    """Keep an instance's chunks from leaving: `num_tokens`."""
    return await _operate(request, "pin", Pin)


@router.post("/compress")
async def compress(request: web.Request) -> web.Response:
    """Compress an instance's chunks: `num_tokens`."""
    return await _operate(request, "compress", Compress)


@router.post("/decompress")
async def decompress(request: web.Request) -> web.Response:
    """Decompress them: `num_tokens`."""
    return await _operate(request, "decompress", Compress)


@router.post("/move")
async def move(request: web.Request) -> web.Response:
    """Bring chunks from one instance and backend to another: `num_tokens`."""
    return await _operate(request, "move", Move)


@router.post("/health")
@needs(Role.VIEWER)
async def health(request: web.Request) -> web.Response:
    """Each worker of an instance: `error_codes`, 0 is well."""
    return await _operate(request, "health", Health)


@router.post("/query_instance")
@needs(Role.VIEWER)
async def query_instance(request: web.Request) -> web.Response:
    """The instance at an IP address: `res`."""
    return await _operate(request, "query_instance", QueryInstance)


@router.post("/check_finish")
@needs(Role.VIEWER)
async def check_finish(request: web.Request) -> web.Response:
    """How far an operation is: `status`."""
    return await _operate(request, "check_finish", CheckFinish)


@router.post("/query_worker_info")
@needs(Role.VIEWER)
async def query_worker_info(request: web.Request) -> web.Response:
    """An instance's workers (`all`: everyone's): `worker_infos`."""
    return await _operate(request, "query_worker_info", QueryWorkerInfo)
