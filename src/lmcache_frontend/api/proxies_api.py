"""`/api/proxies`: the frontends of other hosts; add one, add a node to one, ask one for its nodes again."""

from __future__ import annotations

from aiohttp import web

from lmcache_frontend.app import BY_HAND, NEIGHBOURS, REGISTRY
from lmcache_frontend.nodes.form import InvalidForm, read_form
from lmcache_frontend.nodes.neighbours import NeighbourError
from lmcache_frontend.nodes.node import Node, Proxy
from lmcache_shared.errors import Refusal
from lmcache_shared.responses import json_response

router = web.RouteTableDef()


@router.get("/api/proxies")
async def proxies(request: web.Request) -> web.Response:
    """`{"proxies": [{name, host, port}, …]}`."""
    return json_response({"proxies": [_short(proxy) for proxy in request.app[REGISTRY].proxies()]})


@router.post("/api/proxies")
async def add_proxy(request: web.Request) -> web.Response:
    """Add a proxy; its nodes are asked for at once."""
    entry = await read_form(request, "Invalid proxy format")
    if isinstance(entry, Node):
        entry = Proxy(entry.name, entry.host, entry.port, entry.address, token=entry.token)
    await request.app[BY_HAND].add_proxy(entry)
    return json_response({"status": "success", "message": "Proxy added"})


@router.get("/api/proxies/{proxy}/nodes")
async def proxy_nodes(request: web.Request) -> web.Response:
    """`{"nodes": [{name, host, port}, …]}`."""
    return json_response({"nodes": [_short(node) for node in _proxy(request).nodes]})


@router.post("/api/proxies/{proxy}/nodes")
async def add_node(request: web.Request) -> web.Response:
    """Add a node to a proxy; `local_proxy` is this frontend itself."""
    entry = await read_form(request, "Invalid node format")
    if isinstance(entry, Proxy):
        raise InvalidForm("Invalid node format", f"{entry.name!r} has nodes of its own; a proxy's nodes are leaves")
    await request.app[BY_HAND].add_node(request.match_info["proxy"], entry)
    return json_response({"status": "success", "message": "Node added to proxy"})


@router.get("/api/proxies/{proxy}/refresh")
async def refresh(request: web.Request) -> web.Response:
    """Ask a proxy for its nodes now."""
    registry, name = request.app[REGISTRY], request.match_info["proxy"]
    head = registry.head(name)
    if head is not None:
        try:
            await request.app[NEIGHBOURS].refresh(head)
        except NeighbourError as error:
            raise Refusal(502, f"{name} ({head.address}) does not tell of its nodes: {error}") from None
    proxy = _proxy(request)
    return json_response({"status": "success", "nodes": [_child(node, proxy.name) for node in proxy.nodes]})


def _proxy(request: web.Request) -> Proxy:
    proxy = request.app[REGISTRY].proxy(request.match_info["proxy"])
    if proxy is None:
        raise Refusal(404, "Proxy not found")
    return proxy


def _short(entry: Node | Proxy) -> dict[str, object]:
    return {"name": entry.name, "host": entry.host, "port": entry.port}


def _child(node: Node, proxy_name: str) -> dict[str, object]:
    return {"id": f"node_{node.name}", **_short(node), "is_proxy": False, "proxy_id": proxy_name}
