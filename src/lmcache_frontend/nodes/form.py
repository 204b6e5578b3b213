"""A proxy or node that a request's body holds."""

from __future__ import annotations

from aiohttp import web

from lmcache_frontend.nodes.node import Node, Proxy, read_one
from lmcache_shared.errors import ConfigError, Refusal
from lmcache_shared.schema import read_body


class InvalidForm(Refusal):
    """A body that is none: LMCache's words as `detail`, and why as `reason`."""

    def __init__(self, detail: str, reason: str) -> None:
        super().__init__(400, detail, reason=reason)


async def read_form(request: web.Request, otherwise: str) -> Node | Proxy:
    """The body's proxy or node.

    Args:
        otherwise: what is answered when it is none.

    Raises:
        InvalidForm: 400.
    """
    try:
        return read_one(await read_body(request), "body")
    except ConfigError as error:
        raise InvalidForm(otherwise, str(error)) from None
