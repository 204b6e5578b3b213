"""A proxied request from the caller's to the target's connection, whichever server has read it.

What a caller needs is told by what it asks the target for (`vouching.py`), not by the routes under which it does.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from aiohttp import web

from lmcache_frontend.app import PATHS, POLICY, REGISTRY, TARGETS
from lmcache_frontend.audit import CHANGE, Change
from lmcache_frontend.proxy import target
from lmcache_frontend.proxy.exchange import Outgoing, Proxying
from lmcache_frontend.proxy.headers import refuse_loops
from lmcache_frontend.proxy.paths import Meant
from lmcache_frontend.proxy.transport import as_outgoing, forward
from lmcache_frontend.proxy.vouching import introduction, require
from lmcache_frontend.telemetry.metrics.own import OWN_METRICS, Watched
from lmcache_shared.access.gate import caller_of
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.address import Address


@needs(Role.NOBODY)
async def by_address(request: Proxying) -> web.StreamResponse:
    """To the target that the path names, if it is registered or otherwise allowed."""
    return await _pass(request, request.app[PATHS].meant(target.by_address, request.method, request.raw_path))


@needs(Role.NOBODY)
async def by_name(request: Proxying) -> web.StreamResponse:
    """To the node with this name."""
    return await _pass(request, request.app[PATHS].meant(target.by_name, request.method, request.raw_path))


async def _pass(request: Proxying, meant: Meant) -> web.StreamResponse:
    app = request.app
    wanted, asked = meant
    refuse_loops(request)
    require(request, asked)
    request[CHANGE] = Change(wanted.address, wanted.path, len(wanted.skipped), asked.role)
    caller = introduction(request, asked, app[REGISTRY].token_of(wanted.address))
    with app[OWN_METRICS].watching(wanted.address, wanted.path) as watched:
        allowed = app[POLICY].allowed(request, wanted.address)
        found = await app[TARGETS].get(allowed)
        outgoing = as_outgoing(request, wanted, caller, watched.traffic)
        if request.get(REPEATED) and asked.role <= Role.VIEWER and not caller_of(request).by_token:
            request[PASSED] = Passed(meant, outgoing, watched, _valid_until(app, allowed), app[REGISTRY].revision)
        reveals = asked.role >= Role.OPERATOR
        answer = await forward(request, found, wanted, outgoing, watched.traffic, reveals=reveals)
        return watched.answered(answer)


def _valid_until(app: web.Application, address: Address) -> float:
    return time.monotonic() + JUDGED_SECONDS if app[REGISTRY].has(address) else 0.0


class Passed(NamedTuple):
    """A request that was let pass: another one with the same head, on the same connection, is let pass as well.

    For so short a time, and only where nothing is changed and no token is shown: then what the rules say hangs on the
    head, on the connection, on the options and on the registry, and they need not be asked a thousand times a second.
    """

    meant: Meant
    outgoing: Outgoing
    watched: Watched
    until: float
    revision: int


async def again(request: Proxying, passed: Passed) -> web.StreamResponse:
    """Pass a request on like the one before."""
    app = request.app
    with app[OWN_METRICS].watching_again(passed.watched) as watched:
        found = await app[TARGETS].get(passed.meant.wanted.address)
        answer = await forward(request, found, passed.meant.wanted, passed.outgoing, watched.traffic)
        return watched.answered(answer)


def may_pass_again(app: web.Application, passed: Passed) -> bool:
    return passed.until > time.monotonic() and passed.revision == app[REGISTRY].revision


REPEATED: Any = web.RequestKey("repeated", bool) if hasattr(web, "RequestKey") else "lmcache_repeated"
"""Under this key a request carries whether it has the same head as the one before it on its connection."""

PASSED: Any = web.RequestKey("passed", Passed) if hasattr(web, "RequestKey") else "lmcache_passed"
"""Under this key a request carries what it was let pass as; aiohttp before 3.14 knows texts alone."""

JUDGED_SECONDS = 1.0
