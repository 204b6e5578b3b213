"""Recorded exchanges with LMCache 0.5.6, one JSON object a line: the request, then status, media type and body.

Status, media type and parsed JSON must be alike. What varies by run or by engine is compared by type: fields named in
`VARYING`, and what stands under `threads` of `/periodic-threads`, whose names are an engine's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

HERE = Path(__file__).parent

VARYING = frozenset(
    {
        "total_count", "running_count", "active_count", "total", "running", "active", "unhealthy_count",
        "name", "level", "interval", "init_wait", "is_running", "is_active", "last_run_time", "last_run_ago",
        "total_runs", "failed_runs", "success_rate", "timestamp", "duration_ms", "success", "message", "healthy",
        "extra_info",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Exchange:
    """A request, and what LMCache answered."""

    method: str
    path: str
    status: int
    content_type: str
    body: Any
    request: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def read(name: str) -> list[Exchange]:
    lines = [json.loads(line) for line in (HERE / name).read_text().splitlines()]
    return [
        Exchange(
            line["method"],
            line["path"],
            line["status"],
            line["content_type"],
            line["body"],
            {key: line[key] for key in ("json", "data", "file") if key in line},
        )
        for line in lines
    ]


async def ask(client: aiohttp.ClientSession, exchange: Exchange, path: str | None = None) -> tuple[int, str, Any]:
    """Status, media type and body (parsed, where it is JSON) of our answer."""
    given = dict(exchange.request)
    if "file" in given:
        form = aiohttp.FormData()
        for field, (name, text) in given.pop("file").items():
            form.add_field(field, text.encode(), filename=name)
        given["data"] = form
    async with client.request(exchange.method, path or exchange.path, **given) as response:
        text = await response.text()
        is_json = not isinstance(exchange.body, str) or response.content_type == "application/json"
        return response.status, response.content_type, json.loads(text) if is_json else text


def difference(recorded: Any, ours: Any, where: str = "body") -> str | None:
    """How `ours` differs from what was recorded, or `None`."""
    if isinstance(recorded, dict) and isinstance(ours, dict):
        if recorded.keys() != ours.keys():
            return f"{where}: keys {sorted(ours)}, recorded {sorted(recorded)}"
        for key, value in recorded.items():
            found = _by_type(value, ours[key]) if key in VARYING else difference(value, ours[key], f"{where}.{key}")
            if found:
                return found if found.startswith(where) else f"{where}.{key}: {found}"
        return None
    if isinstance(recorded, list) and isinstance(ours, list) and where.endswith(".threads"):
        return next(filter(None, (difference(recorded[0], item, f"{where}[]") for item in ours)), None)
    return None if recorded == ours else f"{where}: {ours!r}, recorded {recorded!r}"


def _by_type(recorded: Any, ours: Any) -> str | None:
    if isinstance(recorded, bool) or isinstance(ours, bool):
        return None if isinstance(recorded, bool) and isinstance(ours, bool) else f"{ours!r}, recorded {recorded!r}"
    number = (int, float, type(None))
    if isinstance(recorded, number) and isinstance(ours, number):
        return None
    return None if type(recorded) is type(ours) else f"{ours!r}, recorded {recorded!r}"
