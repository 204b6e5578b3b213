"""What the routes of both programs need, for a proxy before them: the two programs do not import each other.

The declarations (`@needs`) are on the routes; a test holds this table against them (`tests/test_access_table.py`).
A path is looked up in every reading that a server behind might give it: decoded once or twice, with `//`, `.`, `..`,
a `/` at its end and what follows a `#` taken out. The highest role counts.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

from lmcache_shared.access.roles import Needs, Role, by_method

_NOBODY, _VIEWER, _OPERATOR = Needs(Role.NOBODY), Needs(Role.VIEWER), Needs(Role.OPERATOR)

DECLARED: Mapping[tuple[str, str], Needs] = {
    ("GET", "/env"): Needs(Role.ADMIN),
    ("GET", "/threads"): _OPERATOR,
    ("GET", "/loglevel"): Needs(Role.VIEWER, {"level": Role.OPERATOR}),
    ("GET", "/conf"): Needs(Role.VIEWER, {"show_secrets": Role.ADMIN}),
    ("POST", "/run_script"): Needs(Role.ADMIN),
    ("POST", "/controller/workers"): Needs(Role.ADMIN),
    ("POST", "/cache/lookup"): _VIEWER,
    ("POST", "/lookup"): _VIEWER,
    ("POST", "/health"): _VIEWER,
    ("POST", "/query_instance"): _VIEWER,
    ("POST", "/query_worker_info"): _VIEWER,
    ("POST", "/check_finish"): _VIEWER,
    ("GET", "/health"): _NOBODY,
    ("GET", "/sign-in"): _NOBODY,
    ("POST", "/sign-in"): _NOBODY,
    ("POST", "/sign-out"): _NOBODY,
    ("GET", "/ready"): _NOBODY,
}
"""The routes that need something else than their method says."""

BY_METHOD: frozenset[tuple[str, str]] = frozenset(
    (method, path)
    for method, paths in {
        "GET": """
            /periodic-threads /periodic-threads/{} /periodic-threads-health /version /lmc_version /commit_id /meta
            /conf/definitions
            /metrics /controller/key-stats /controller/workers /hot_cache/status /bypass/list /chunk_statistics/status
            /cache/kvcache/info /cache/kvcache/check /freeze/status /inference_info /inference_version /lookup/info
            /backends /cache/lookup
            / /nodes /favicon.ico
            /heartbeat /lmcache_heartbeat /lmcache_infos /api/nodes /api/sources /api/heartbeat/status
            /api/proxies /api/proxies/{}/nodes /api/proxies/{}/refresh /api/history /api/history/latest
            /api/timeline /api/stream /sd/prometheus
            """,
        "POST": """
            /conf /metrics/reset /clear /pin /compress /decompress /move
            /chunk_statistics/start /chunk_statistics/stop
            /chunk_statistics/reset /cache/kvcache/record_slot /lookup/close /lookup/create /lookup/recreate
            /cache/load-fs-chunks /backends /backends/{}/recreate /cache/store /cache/retrieve
            /api/nodes/{}/restore /api/heartbeat/start /api/heartbeat/stop /api/proxies /api/proxies/{}/nodes
            """,
        "PUT": """
            /hot_cache/enable /hot_cache/disable /bypass/add /bypass/remove /freeze/enable /freeze/disable
            /api/nodes/{}
            """,
        "DELETE": "/controller/workers /backends/{} /cache/clear /api/nodes/{}",
    }.items()
    for path in paths.split()
)
"""All others; `{}` is one segment."""

MAX_DECODED = 2
_PLAIN = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+|/", re.ASCII)
_PROXIED = re.compile(r"/proxy/[^/]*/[^/]*(?=/|$)|/proxy2/[^/]*(?=/|$)")


@dataclass(frozen=True)
class Proxied:
    """What a request that is passed on needs; `known`: it is one of the table, and no server reads another into it."""

    role: Role
    known: bool


def of_proxied(method: str, target: str) -> Proxied:
    """What a request needs whose path and query, as they go on, are `target`.

    Of a path that leads through a further frontend (`/proxy2/rack2/env`) its last part counts.
    """
    path, _, query = target.partition("?")
    parameters = [name for name, _ in parse_qsl(query, keep_blank_values=True)] if query else []
    inner = _innermost(path)
    is_plain = _PLAIN.fullmatch(inner) is not None
    itself = _lookup(method, inner)
    if is_plain and "%" not in path:  # there is no other reading
        return Proxied((itself or by_method(method)).of(parameters), itself is not None)
    found = [_lookup(method, reading) for reading in _readings(path)]
    role = max((it or by_method(method)).of(parameters) for it in found)
    return Proxied(role, is_plain and itself is not None)


def _readings(path: str) -> Iterator[str]:
    for _ in range(1 + MAX_DECODED):
        inner = _innermost(path)
        yield inner
        yield _innermost(posixpath.normpath("/" + inner.partition("#")[0].lstrip("/")))
        path = unquote(path)


def _innermost(path: str) -> str:
    while (prefix := _PROXIED.match(path)) is not None:
        path = path[prefix.end() :] or "/"
    return path


def _lookup(method: str, path: str) -> Needs | None:
    method = "GET" if method == "HEAD" else method
    segments = path.split("/")
    for shape in (path, *("/".join([*segments[:i], "{}", *segments[i + 1 :]]) for i in range(2, len(segments)))):
        if (method, shape) in DECLARED:
            return DECLARED[method, shape]
        if (method, shape) in BY_METHOD:
            return by_method(method)
    return None
