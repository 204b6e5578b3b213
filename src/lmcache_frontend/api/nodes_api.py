"""`GET /api/nodes`: the proxies and their nodes."""

from aiohttp import web

from lmcache_frontend.app import REGISTRY
from lmcache_frontend.nodes.node import Node, Proxy
from lmcache_shared.responses import json_response

router = web.RouteTableDef()


@router.get("/api/nodes")
async def nodes(request: web.Request) -> web.Response:
    """`{"nodes": [proxy with its children, …]}`."""
    return json_response({"nodes": [_proxy(proxy) for proxy in request.app[REGISTRY].proxies()]})


def _proxy(proxy: Proxy) -> dict[str, object]:
    return {
        "id": f"proxy_{proxy.name}",
        "name": proxy.name,
        "host": proxy.host,
        "port": proxy.port,
        "is_proxy": True,
        "children": [_node(node, proxy.name) for node in proxy.nodes],
    }


def _node(node: Node, proxy_name: str) -> dict[str, object]:
    return {
        "id": f"node_{node.name}",
        "name": node.name,
        "host": node.host,
        "port": node.port,
        "is_proxy": False,
        "proxy_id": proxy_name,
    }
