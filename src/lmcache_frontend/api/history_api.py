"""`/api/history`, `/api/history/latest` and `/api/timeline`: the main series, and what happened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from lmcache_frontend.app import HISTORY, REGISTRY
from lmcache_frontend.telemetry.history.history import History, NodeKey, NoPast
from lmcache_frontend.telemetry.history.ranges import range_of, refused, stamp_of
from lmcache_frontend.telemetry.history.series import OF_NODES, SERIES
from lmcache_frontend.telemetry.history.timeline import MAX_EVENTS, TIMELINE
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.errors import Refusal
from lmcache_shared.responses import json_response, json_text
from lmcache_shared.schema import parse_query

router = web.RouteTableDef()

MAX_POINTS = 1440
SPARKLINE_POINTS = 60
NODES_AT_ONCE = 50
"""Made into JSON between two turns of the event loop."""


@dataclass(frozen=True)
class HistoryQuery:
    series: str = "requested_tokens,hit_tokens,hit_rate"
    proxy: str | None = None
    node: str | None = None
    range: str = "1h"
    since: str | None = None
    until: str | None = None
    points: int = 300


@dataclass(frozen=True)
class LatestQuery:
    series: str = ",".join(series.key for series in OF_NODES)
    sparklines: str | None = None


@dataclass(frozen=True)
class TimelineQuery:
    limit: int = 100
    before: int | None = None


@router.get("/api/history")
@needs(Role.VIEWER)
async def history(request: web.Request) -> web.Response:
    """Some series of a node, or without `node` of the cluster, in columns."""
    query = parse_query(request, HistoryQuery)
    kept = request.app[HISTORY]
    key = node_of(request.app, query.proxy, query.node)
    names = series_of(query.series, is_node=key is not None)
    if not 1 <= query.points <= MAX_POINTS:
        raise refused("points", f"Input should be from 1 to {MAX_POINTS}", query.points)
    end = kept.clock.wall() if query.until is None else stamp_of("until", query.until)
    start = end - range_of(query.range) if query.since is None else stamp_of("since", query.since)
    if start > end:
        raise refused("since", "Input should not be later than until", query.since)
    now = kept.row(key, ())
    told: dict[str, object] = {
        "proxy": key and key[0],
        "node": key and key[1],
        "units": {name: SERIES[name].unit for name in names},
        "time": now["time"],
        "age": now["age"],
        "problem": now["problem"] if key is not None else kept.problem,
        "interval": kept.interval,
        "recording": kept.recording,
    }
    try:
        frame = kept.frame(key, names, start, end, query.points)
    except NoPast as error:
        return json_response({**told, "problem": str(error), **_columns(start, end, 0, [], {n: [] for n in names})})
    return json_response({**told, **_columns(frame.start, frame.end, frame.step, frame.times, frame.values)})


@router.get("/api/history/latest")
@needs(Role.VIEWER)
async def latest(request: web.Request) -> web.StreamResponse:
    """The latest values of the cluster and of every node, with a sparkline if one is asked for; in pieces."""
    query = parse_query(request, LatestQuery)
    kept = request.app[HISTORY]
    names = series_of(query.series, is_node=True)
    line = series_of(query.sparklines, is_node=True)[0] if query.sparklines else None
    keys = [(proxy.name, node.name) for proxy in request.app[REGISTRY].proxies() for node in proxy.nodes]
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    head = {
        "time": kept.clock.wall(),
        "interval": kept.interval,
        "problem": kept.problem,
        "recording": kept.recording,
        "series": names,
        "totals": kept.row(None, SERIES)["values"],
    }
    await response.write(f'{json_text(head)[:-1]},"nodes":['.encode())
    for start in range(0, len(keys), NODES_AT_ONCE):
        some = keys[start : start + NODES_AT_ONCE]
        lines = kept.sparklines(line, some, SPARKLINE_POINTS) if line is not None else {}
        rows = [_node(kept, key, names, None if line is None else lines.get(key, [])) for key in some]
        await response.write(f"{',' * bool(start)}{json_text(rows)[1:-1]}".encode())
        await asyncio.sleep(0)
    await response.write(b"]}")
    return response


@router.get("/api/timeline")
@needs(Role.VIEWER)
async def timeline(request: web.Request) -> web.Response:
    """What happened lately, the newest first; `before` goes on behind an event's number."""
    query = parse_query(request, TimelineQuery)
    if not 1 <= query.limit <= MAX_EVENTS:
        raise refused("limit", f"Input should be from 1 to {MAX_EVENTS}", query.limit)
    events = request.app[TIMELINE].newest(query.limit, query.before)
    return json_response({"time": time.time(), "events": [event.as_json() for event in events]})


def node_of(app: web.Application, proxy: str | None, node: str | None) -> NodeKey | None:
    """The node that is meant, or `None` for the cluster.

    Raises:
        Refusal: 404 when there is none; 409 when several have the name and no proxy is given.
    """
    if node is None:
        if proxy is not None:
            raise refused("node", "proxy says whose node is meant; give node too", None)
        return None
    if proxy is not None:
        if app[REGISTRY].node(proxy, node) is None:
            raise Refusal(404, f"Node with name '{node}' of proxy '{proxy}' not found")
        return proxy, node
    found = app[REGISTRY].nodes_named(node)
    if not found:
        raise Refusal(404, f"Node with name '{node}' not found")
    if len(found) > 1:
        raise Refusal(409, f"{len(found)} nodes are named '{node}'; say which with proxy={found[0].proxy}, …")
    return found[0].proxy, node


def series_of(text: str, *, is_node: bool) -> list[str]:
    """The series of a list with commas, each once.

    Raises:
        Refusal: 422, when one is not known, or nodes have none such.
    """
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in SERIES:
            raise refused("series", f"Input should be of {', '.join(SERIES)}", name[:100])
        if is_node and SERIES[name].is_of_cluster:
            raise refused("series", "Input is of the cluster alone; leave node out", name)
    return names


def _node(kept: History, key: NodeKey, names: Sequence[str], line: list[float | None] | None) -> dict[str, Any]:
    row = kept.row(key, names)
    told = {"proxy": key[0], "node": key[1], "age": row["age"], "problem": row["problem"]}
    told["values"] = list(row["values"].values())
    return told if line is None else {**told, "sparkline": line}


def _columns(
    start: float, end: float, step: float, times: list[float], values: dict[str, list[float | None]]
) -> dict[str, object]:
    return {"from": start, "to": end, "step": step, "times": times, "series": values}
