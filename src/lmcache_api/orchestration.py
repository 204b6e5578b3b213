"""How an endpoint asks the component's controller: its refusals as answers, nothing as a 500 that is not one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from aiohttp import web

from lmcache_api.app import COMPONENT
from lmcache_api.component import Controller, ControllerError
from lmcache_shared.errors import Refusal

T = TypeVar("T")


def controller_of(request: web.Request) -> Controller:
    """The component's controller.

    Raises:
        Refusal: 503, when it has none.
    """
    controller = request.app[COMPONENT].controller
    if controller is None:
        raise Refusal(503, "Controller manager not available")
    return controller


async def ask(request: web.Request, answer: Coroutine[Any, Any, T]) -> T:
    """What the controller answers.

    Raises:
        Refusal: the status and text of its `ControllerError`, or 504 past the deadline.
    """
    seconds = request.app[COMPONENT].settings.internal_api_server_call_seconds
    try:
        return await asyncio.wait_for(answer, seconds)
    except ControllerError as error:
        raise Refusal(error.status, str(error)) from None
    except asyncio.TimeoutError:
        raise Refusal(504, f"the controller: not done within {seconds:g} seconds; it may still finish") from None
