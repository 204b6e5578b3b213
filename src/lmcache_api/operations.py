"""How an endpoint asks an engine: off the event loop, under the deadline, every failure in LMCache's shape."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web

from lmcache_api.app import COMPONENT, ENGINE_POOL, call
from lmcache_api.component import Engine, Unavailable
from lmcache_shared.blocking import BlockingPool
from lmcache_shared.errors import Failure, OpsError, Refusal

logger = logging.getLogger(__name__)

T = TypeVar("T")


def engine_of(request: web.Request, api: str) -> Engine:
    """The component's engine.

    Raises:
        Failure: 503, when it has none; the text names `api`.
    """
    engine = request.app[COMPONENT].engine
    if engine is None:
        raise Failure(503, f"{api} is unavailable", "LMCache engine not configured.")
    return engine


async def attempt(
    request: web.Request,
    function: Callable[[], T],
    what: str,
    *,
    pool: web.AppKey[BlockingPool] = ENGINE_POOL,
) -> T:
    """The result of `function()`.

    Args:
        request: what is being answered.
        function: asks the component.
        what: the operation, as in "Failed to clear cache".
        pool: whose thread it is made in.

    Raises:
        Failure: 503 for what the component lacks, 500 for what its engine could not do.
        Refusal: 503 when too many calls wait, 504 past the deadline.
    """
    try:
        return await call(request, function, what, pool=pool)
    except Refusal:
        raise
    except Unavailable as error:
        raise Failure(503, "API unavailable", str(error)) from None
    except OpsError as error:
        logger.error("failed to %s: %s", what, error)
        raise Failure(500, f"Failed to {what}", str(error)) from None
    except Exception as error:
        logger.exception("failed to %s", what)
        raise Failure(500, f"Failed to {what}", str(error) or type(error).__name__) from None


async def on_engine(request: web.Request, operation: Callable[[Engine], T], what: str, *, api: str) -> T:
    """The result of `operation(engine)`, as `attempt` and `engine_of` give it."""
    return await attempt(request, functools.partial(operation, engine_of(request, api)), what)
