"""`/conf`: the settings of the component, read and changed while it runs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from lmcache_api.app import COMPONENT, POOL
from lmcache_api.operations import attempt
from lmcache_shared import secrets
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.responses import json_response, plain, text_response
from lmcache_shared.schema import parse_query, read_body

router = web.RouteTableDef()


@dataclass(frozen=True)
class ConfQuery:
    names: str | None = None
    show_secrets: bool = False


@router.get("/conf")
@needs(Role.VIEWER, show_secrets=Role.ADMIN)
async def read(request: web.Request) -> web.Response:
    """All settings, or those of the comma list `names` that exist; JSON text as plain text.

    Secrets are `***`, or with `show_secrets=true` as they are, which only an admin may ask for.
    """
    query = parse_query(request, ConfQuery)
    names = query.names.split(",") if query.names else None
    configuration = request.app[COMPONENT].configuration

    def values() -> Any:
        found = configuration.read(names)
        return plain(found) if query.show_secrets else _shown(request, found)

    told = await attempt(request, values, "read the settings", pool=POOL)
    return text_response(json.dumps(told, indent=2))


@router.get("/conf/definitions")
async def definitions(request: web.Request) -> web.Response:
    """Of each setting its type, its default, what it is for and whether it can be changed while the component runs."""
    configuration = request.app[COMPONENT].configuration
    return json_response(await attempt(request, lambda: plain(configuration.definitions()), "read them", pool=POOL))


@router.post("/conf")
async def update(request: web.Request) -> web.Response:
    """Set the settings of a JSON object; what cannot be set is told under `errors`, and the others are set."""
    try:
        values = json.loads(await read_body(request))
    except (ValueError, RecursionError) as error:
        return json_response({"error": "Invalid JSON body", "message": str(error)}, status=400)
    if not isinstance(values, dict):
        return json_response({"error": "Request body must be a JSON object"}, status=400)
    configuration = request.app[COMPONENT].configuration

    def change() -> tuple[Any, Mapping[str, str]]:
        masked = [name for name, value in values.items() if _holds_mask(value)]
        updated, errors = configuration.update({name: value for name, value in values.items() if name not in masked})
        return _shown(request, updated), {**errors, **dict.fromkeys(masked, f"{secrets.MASK} is a mask and no value")}

    updated, errors = await attempt(request, change, "change the settings", pool=POOL)
    answer: dict[str, Any] = {"updated": updated}
    if errors:
        answer["errors"] = errors
    return json_response(answer, status=400 if errors and not updated else 200)


def _holds_mask(value: object) -> bool:
    """Whether it is what `GET /conf` shows for a secret: written back, it would replace it."""
    if isinstance(value, dict):
        return any(_holds_mask(inner) for inner in value.values())
    return value == secrets.MASK


def _shown(request: web.Request, values: object) -> Any:
    names = request.app[COMPONENT].settings.internal_api_server_env_mask or ()
    return secrets.masked_within(plain(values), extra_names=names)
