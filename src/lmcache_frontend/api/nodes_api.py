"""`/api/nodes`: the proxies and their nodes; change one, remove one, let one that was removed be seen again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace

from aiohttp import web

from lmcache_frontend.app import BY_HAND, HEALTH, NEIGHBOURS, REGISTRY, SOURCES
from lmcache_frontend.nodes.form import read_form
from lmcache_frontend.nodes.node import LOCAL_PROXY, Node, Proxy
from lmcache_frontend.nodes.registry import Name
from lmcache_shared.responses import json_response, json_text
from lmcache_shared.schema import parse_query

router = web.RouteTableDef()

NODES_AT_ONCE = 200
"""Made into JSON between two turns of the event loop."""


@dataclass(frozen=True)
class NodesQuery:
    detail: bool = False


@dataclass(frozen=True)
class NodeQuery:
    proxy: str | None = None


@router.get("/api/nodes")
async def nodes(request: web.Request) -> web.StreamResponse:
    """`{"nodes": [proxy with its children, …]}`; `?detail=true` tells of each where it comes from and how it is."""
    registry = request.app[REGISTRY]
    if not parse_query(request, NodesQuery).detail:
        return json_response({"nodes": [_proxy(proxy) for proxy in registry.proxies()]})
    # Thousands of nodes are told in pieces, so that others have their turn between them.
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    if request.method != "HEAD":
        for piece in _detailed(request.app):
            await response.write(piece.encode())
            await asyncio.sleep(0)
    return response


@router.put("/api/nodes/{name}")
async def change(request: web.Request) -> web.Response:
    """Put another in the place of a proxy or node; of several nodes of one name `?proxy=` says which."""
    entry = await read_form(request, "Invalid node format")
    by_hand, query = request.app[BY_HAND], parse_query(request, NodeQuery)
    was_proxy = await by_hand.change(request.match_info["name"], entry, proxy=query.proxy)
    return json_response({"status": "success", "message": "Node updated" if was_proxy else "Child node updated"})


@router.delete("/api/nodes/{name}")
async def remove(request: web.Request) -> web.Response:
    """Remove a proxy with its nodes, or a node. A discovered one stays away until `restore`."""
    by_hand, query = request.app[BY_HAND], parse_query(request, NodeQuery)
    was_proxy = await by_hand.remove(request.match_info["name"], proxy=query.proxy)
    return json_response({"status": "success", "message": "Node deleted" if was_proxy else "Child node deleted"})


@router.post("/api/nodes/{name}/restore")
async def restore(request: web.Request) -> web.Response:
    """Let a discovered proxy or node that was removed be seen again."""
    query = parse_query(request, NodeQuery)
    await request.app[BY_HAND].restore(request.match_info["name"], proxy=query.proxy)
    return json_response({"status": "success", "message": "Node restored"})


@router.get("/api/sources")
async def sources(request: web.Request) -> web.Response:
    """Where the nodes come from, what is wrong there, and what of it was changed or removed by hand."""
    by_hand = request.app[BY_HAND]
    changed, removed = ([_named(name) for name in names] for names in (by_hand.changed(), by_hand.hidden()))
    return json_response({"sources": told_of_sources(request.app), "changed": changed, "removed": removed})


def told_of_sources(app: web.Application) -> list[dict[str, object]]:
    """Each source with its name, its place and its problems; proxies that do not tell of their nodes last."""
    by_hand = app[BY_HAND]
    told: list[dict[str, object]] = [
        {"name": it.name, "place": it.place, "problems": list(it.problems)} for it in app[SOURCES]
    ]
    problems = [] if by_hand.problem is None else [by_hand.problem]
    told.append({"name": "hand", "place": by_hand.place, "problems": problems})
    told += [{"name": "proxy", "place": place, "problems": [why]} for place, why in app[NEIGHBOURS].problems()]
    return told


def _named(name: Name) -> dict[str, str]:
    return {"proxy": name} if isinstance(name, str) else {"proxy": name[0], "node": name[1]}


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


def _detailed(app: web.Application) -> Iterator[str]:
    """`{"frontend": …, "nodes": [proxy with its children, …]}`, some nodes at a time."""
    registry = app[REGISTRY]
    yield f'{{"frontend":{json_text(registry.identity)},"nodes":['
    for number, proxy in enumerate(list(registry.proxies())):
        head = {
            **_proxy(replace(proxy, nodes=())),
            "source": proxy.source,
            "stale": proxy.stale,
            "problem": None if proxy.name == LOCAL_PROXY else app[NEIGHBOURS].problem(proxy.name),
        }
        del head["children"]
        yield f'{"," * bool(number)}{json_text(head)[:-1]},"children":['
        for start in range(0, len(proxy.nodes), NODES_AT_ONCE):
            some = proxy.nodes[start : start + NODES_AT_ONCE]
            told = json_text([_detailed_node(app, node, proxy.name) for node in some])
            yield f"{',' * bool(start)}{told[1:-1]}"
        yield "]}"
    yield "]}"


def _detailed_node(app: web.Application, node: Node, proxy_name: str) -> dict[str, object]:
    registry = app[REGISTRY]
    path = registry.path_of(proxy_name, node)
    try:
        health = app[HEALTH].of(proxy_name, node.name).as_json()
    except KeyError:  # it has gone between two pieces
        health = None
    return {
        **_node(node, proxy_name),
        "source": node.source,
        "stale": node.stale,
        "path": path,
        "origin": node.origin or (registry.identity, path),
        "through": node.through,
        "health": health,
    }
