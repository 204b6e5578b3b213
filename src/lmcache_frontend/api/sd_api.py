"""`GET /sd/prometheus`: the nodes as targets of Prometheus' HTTP service discovery, each through the proxy.

So Prometheus reaches nodes that it cannot connect to itself: those on Unix sockets, and those behind other frontends.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from aiohttp import web

from lmcache_frontend.app import HEALTH, REGISTRY
from lmcache_frontend.telemetry.metrics.scrape import Leaf, leaves_of
from lmcache_shared.errors import Refusal
from lmcache_shared.responses import json_response

router = web.RouteTableDef()

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


@router.get("/sd/prometheus")
async def targets(request: web.Request) -> web.Response:
    """One target for each node; its address is this frontend's, as the caller knows it."""
    host = request.host
    if not _HOST.fullmatch(host):
        raise Refusal(400, f"Host: {host[:300]!r} is no host that Prometheus could be sent to")
    health = request.app[HEALTH]
    leaves = leaves_of(list(request.app[REGISTRY].proxies()))
    return json_response([_target(leaf, host, health.of(leaf.proxy, leaf.node.name).role) for leaf in leaves])


def _target(leaf: Leaf, host: str, role: str | None) -> dict[str, object]:
    labels = {"__metrics_path__": as_prometheus_takes_it(f"{leaf.node.reach.proxy_path}/metrics"), **leaf.labels}
    if role is not None:
        labels["role"] = role
    return {"targets": [host], "labels": labels}


def as_prometheus_takes_it(path: str) -> str:
    """The `__metrics_path__` with which Prometheus asks for `path`.

    It takes the label for a decoded path and encodes it once (Go's `url.URL.EscapedPath`): `%252F` on the wire is
    `%2F` here. A slash inside a segment cannot be told so; it stays encoded and arrives encoded twice, which the proxy
    reads as well.
    """
    return unquote(re.sub("%2[Ff]", "%252F", path))
