"""Every route, by everybody, however it is shown who asks, on every way: let in or refused, on servers that serve.

The routes are those of the running servers: one that is not in `ROUTES` fails here, until somebody has written down who
may ask for it.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from lmcache_api.pytest_plugin import RunningApi, StartApi
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_shared.access.roles import Role
from tests.test_access import SECRETS, token_file

__all__ = ["token_file"]

AT_ONCE = 16
AWAY = {"X-Forwarded-For": "10.0.0.9"}

ROUTES = {
    # of a component
    Role.VIEWER: """
        GET /version /lmc_version /commit_id /meta /metrics /conf /conf/definitions /loglevel /loglevel?logger_name=x
        GET /periodic-threads /periodic-threads/{thread_name} /periodic-threads-health /backends /bypass/list
        GET /cache/lookup /freeze/status /chunk_statistics/status /hot_cache/status /inference_info /inference_version
        GET /cache/kvcache/info /cache/kvcache/check /lookup/info /controller/key-stats /controller/workers
        POST /cache/lookup /lookup /health /query_instance /query_worker_info /check_finish
        """,
    Role.OPERATOR: """
        GET /threads /loglevel?logger_name=access.matrix&level=info
        POST /conf /metrics/reset /backends /backends/{backend_name}/recreate /cache/store /cache/retrieve
        POST /chunk_statistics/start /chunk_statistics/stop /chunk_statistics/reset /cache/kvcache/record_slot
        POST /cache/load-fs-chunks /lookup/close /lookup/create /lookup/recreate /clear /pin
        POST /compress /decompress /move
        PUT /bypass/add /bypass/remove /freeze/enable /freeze/disable /hot_cache/enable /hot_cache/disable
        DELETE /backends/{backend_name} /cache/clear /controller/workers
        """,
    Role.ADMIN: """
        GET /env /conf?show_secrets=true
        POST /run_script /controller/workers
        """,
}
FRONTEND_ROUTES = {
    Role.NOBODY: """
        GET /health /ready /sign-in /static
        POST /sign-in /sign-out
        """,
    Role.VIEWER: """
        GET / /favicon.ico /metrics /sd/prometheus /lmcache_infos /lmcache_heartbeat /heartbeat /api/nodes /api/sources
        GET /api/proxies /api/proxies/{proxy}/nodes /api/proxies/{proxy}/refresh /api/heartbeat/status
        GET /nodes /api/history /api/history/latest /api/timeline /api/stream?topics=none
        """,
    Role.OPERATOR: """
        POST /api/heartbeat/start /api/heartbeat/stop /api/nodes/{name}/restore /api/proxies /api/proxies/{proxy}/nodes
        PUT /api/nodes/{name}
        DELETE /api/nodes/{name}
        """,
}
ASKING_ROUTES = {
    Role.VIEWER: """
        GET /nodes/{proxy}/{name} /nodes/{proxy}/{name}/{tab} /compare /manage /manage/add /manage/entry /manage/import
        GET /manage/nodes.json /manage/sources /operations /operations/{number} /operations/{number}/results.csv
        GET /operations/{number}/results.json
        POST /nodes/{proxy}/{name}/{tab}/{action} /compare
        """,
    Role.OPERATOR: """
        POST /operations /operations/{number}/again /operations/{number}/cancel /operations/{number}/start
        POST /manage/add /manage/entry/change /manage/entry/refresh /manage/entry/remove /manage/entry/restore
        POST /manage/import /manage/test
        """,
}
"""Pages that ask a node for their caller, each time for what that needs; through another frontend they are unknown."""

NO_HEAD = {"/lmcache_heartbeat", "/heartbeat", "/api/stream?topics=none"}
PROXY_ROUTES = {("*", "/proxy/{host}/{target}{path}"), ("*", "/proxy2/{name}{path}")}
"""These are ways to others."""


@dataclass(frozen=True)
class Caller:
    """Who asks: the fields that show it, the role of a token among them, and what he is without."""

    headers: dict[str, str]
    token: Role | None = None
    by_cookie: bool = False
    is_local: bool = False
    is_wrong: bool = False


def callers(port: int) -> dict[str, Caller]:
    """`port` is that of the frontend whose cookie it is."""
    roles = {"viewer": Role.VIEWER, "operator": Role.OPERATOR, "admin": Role.ADMIN}
    bearer = {name: {"Authorization": f"Bearer {secret}"} for name, secret in SECRETS.items()}
    cookies = {name: {"Cookie": f"a=b; lmcache_frontend_{port}={secret}"} for name, secret in SECRETS.items()}
    return {
        "local": Caller({}, is_local=True),
        "anonymous": Caller(AWAY),
        "says it is local": Caller({"X-Forwarded-For": "127.0.0.1"}),
        "says so as nginx does": Caller({"X-Real-IP": "127.0.0.1"}),
        "by a name that points here": Caller({"Host": f"evil.example:{port}"}),
        **{name: Caller({**AWAY, **bearer[name]}, role) for name, role in roles.items()},
        **{
            f"{name}, signed in": Caller({**AWAY, **cookies[name]}, role, by_cookie=True)
            for name, role in roles.items()
        },
        "taken back": Caller({**AWAY, "Cookie": f"lmcache_frontend_{port}=a-token-that-was-taken-back"}),
        "wrong": Caller({"Authorization": "Bearer a-token-of-nobody-at-all"}, is_wrong=True),
    }


def listed(table: dict[Role, str]) -> Iterator[tuple[str, str, Role]]:
    for role, text in table.items():
        for line in text.strip().splitlines():
            method, *paths = line.split()
            yield from ((method, path, role) for path in paths)


def of_app(app: web.Application) -> set[tuple[str, str]]:
    found = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}
    return {(method, re.sub(r"\{path:.*\}$", "{path}", path)) for method, path in found if method != "HEAD"}


@dataclass(frozen=True)
class Way:
    """A way to a server: whom to ask, what stands before the path, and how many frontends are between."""

    name: str
    client: aiohttp.ClientSession
    before: str = ""
    is_frontend: bool = True

    @property
    def is_proxied(self) -> bool:
        return bool(self.before)


@dataclass(frozen=True)
class Rules:
    """What the options say."""

    trust_local: bool = True
    open_to_viewers: bool = True
    auth: bool = True


def expected(caller: Caller, role: Role, way: Way, rules: Rules) -> set[int]:
    """The status of a refusal, nothing when the caller is let in."""
    role = max(role, Role.VIEWER) if way.is_proxied else role
    if not rules.auth or (caller.is_local and rules.trust_local) or role == Role.NOBODY:
        return set()
    if caller.is_wrong:
        return {401}
    if caller.token is not None and (way.is_frontend or not caller.by_cookie):
        return {403} if caller.token < role else set()
    return {401} if role > (Role.VIEWER if rules.open_to_viewers else Role.NOBODY) else set()


class Matrix:
    def __init__(self, rules: Rules, port: int) -> None:
        self._rules = rules
        self._callers = callers(port)
        self._problems: list[str] = []
        self._numbers = itertools.count()
        self.asked = 0

    async def check(self, ways: Iterable[Way], routes: Iterable[tuple[str, str, Role]], *, heads: bool = True) -> None:
        wanted = [
            (name, way, asked, path, role)
            for way in ways
            for method, path, role in routes
            for asked in ((method, "HEAD") if method == "GET" and heads and path not in NO_HEAD else (method,))
            for name in self._callers
        ]
        work = iter(wanted)
        await asyncio.gather(*(self._work(work) for _ in range(AT_ONCE)))
        self.asked += len(wanted)
        assert self._problems == [], f"{len(self._problems)} of {len(wanted)}"

    async def _work(self, work: Iterator[tuple[str, Way, str, str, Role]]) -> None:
        for name, way, method, path, role in work:
            caller = self._callers[name]
            headers = caller.headers
            if caller.is_wrong:  # each from somewhere else, or it would have to wait
                number = next(self._numbers)
                headers = {**headers, "X-Forwarded-For": f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"}
            status, said, fields = await ask(way, method, path, headers)
            is_refused = status == 401 or (status == 403 and b"needs the role" in said)
            if method == "HEAD":
                is_refused = status in (401, 403)
            refusal = expected(caller, role, way, self._rules)
            right = (
                (is_refused and status in refusal) if refusal else not (is_refused or status in (429, 500, 502, 504))
            )
            right = right and (status != 401 or "WWW-Authenticate" in fields)
            if not right:
                self._problems.append(
                    f"{name}: {way.name}: {method} {path}: {status}, not {refusal or 'let in'}: {said!r}"
                )


async def ask(way: Way, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes, Any]:
    """Ask for nothing that does harm: bodies are empty, and names are nobody's."""
    path = "/static/icon.svg" if path == "/static" else re.sub(r"\{\w+\}", "nobody", path)
    url = URL(str(way.client._base_url).rstrip("/") + way.before + path, encoded=True)
    data = f"token={SECRETS['viewer']}" if path == "/sign-in" else "{}"
    body = data if method in ("POST", "PUT") else None
    async with way.client.request(method, url, headers=headers, data=body, allow_redirects=False) as response:
        return response.status, await response.read(), response.headers


@dataclass(frozen=True)
class Cluster:
    worker: RunningApi
    controller: RunningApi
    inner: RunningFrontend
    outer: RunningFrontend

    def directly(self) -> list[tuple[Way, RunningApi]]:
        return [
            (Way("directly", server.client, is_frontend=False), server) for server in (self.worker, self.controller)
        ]

    def proxied(self, name: str, server: RunningApi) -> list[Way]:
        client, rack = self.outer.client, "/proxy2/rack"
        address = server.address.proxy_path()
        return [
            Way("by address", client, address),
            Way("by name", client, f"/proxy2/{name}"),
            Way("through two, by name", client, f"{rack}/proxy2/{name}"),
            Way("through two, by address", client, f"{self.inner_path}{address}"),
        ]

    @property
    def inner_path(self) -> str:
        return self.inner.server.address.proxy_path()

    def frontends(self) -> list[Way]:
        client = self.outer.client
        return [
            Way("directly", client),
            Way("through another, by name", client, "/proxy2/rack"),
            Way("through another, by address", client, self.inner_path),
        ]


async def cluster(
    api_server: StartApi, frontend_server: StartFrontend, of_components: dict[str, Any], of_frontend: dict[str, Any]
) -> Cluster:
    worker = await api_server(tcp=True, **of_components)
    controller = await api_server("controller", tcp=True, **of_components)
    nodes = [{**worker.node, "name": "w"}, {**controller.node, "name": "c"}]
    for node in nodes:
        if "internal_api_server_token" in of_components:
            node["token"] = of_components["internal_api_server_token"]
    inner = await frontend_server(nodes=nodes, token_file=of_frontend.get("token_file"))
    rack = {"name": "rack", "host": "127.0.0.1", "port": inner.server.address.port, "nodes": []}
    return Cluster(worker, controller, inner, await frontend_server(nodes=[*nodes, rack], **of_frontend))


def served(server: RunningApi) -> list[tuple[str, str, Role]]:
    """The routes of the table that this server has."""
    from lmcache_api.app import create_app

    has = of_app(create_app(server.component))
    return [(method, path, role) for method, path, role in listed(ROUTES) if (method, path.partition("?")[0]) in has]


async def test_the_table_has_every_route(api_server: StartApi, frontend_server: StartFrontend) -> None:
    from lmcache_api.app import create_app

    made = await cluster(api_server, frontend_server, {}, {})
    components = of_app(create_app(made.worker.component)) | of_app(create_app(made.controller.component))
    assert {(method, path.partition("?")[0]) for method, path, _ in listed(ROUTES)} == components
    frontends = of_app(made.outer.server._runner.app)
    known = [*listed(FRONTEND_ROUTES), *listed(ASKING_ROUTES)]
    assert {(method, path.partition("?")[0]) for method, path, _ in known} == frontends - PROXY_ROUTES


async def test_every_route_by_everybody_on_every_way(
    api_server: StartApi, frontend_server: StartFrontend, token_file: str
) -> None:
    made = await cluster(
        api_server, frontend_server, {"internal_api_server_token_file": token_file}, {"token_file": token_file}
    )
    matrix = Matrix(Rules(), made.outer.server.address.port)
    for way, server in made.directly():
        await matrix.check([way], served(server))
    for name, server in (("w", made.worker), ("c", made.controller)):
        await matrix.check(made.proxied(name, server), served(server), heads=False)
    await matrix.check(made.frontends(), list(listed(FRONTEND_ROUTES)))
    await matrix.check(made.frontends()[:1], list(listed(ASKING_ROUTES)))
    assert matrix.asked > 5000


VARIANTS: dict[str, tuple[Rules, dict[str, Any], dict[str, Any]]] = {
    "no auth": (Rules(auth=False), {"internal_api_server_auth": False}, {"no_auth": True}),
    "no trust in callers here": (
        Rules(trust_local=False), {"internal_api_server_trust_local": False}, {"no_trust_local": True}
    ),
    "viewers need a token": (
        Rules(open_to_viewers=False), {"internal_api_server_viewers": "token"}, {"viewers": "token"}
    ),
    "both": (
        Rules(trust_local=False, open_to_viewers=False),
        {"internal_api_server_trust_local": False, "internal_api_server_viewers": "token"},
        {"no_trust_local": True, "viewers": "token"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
async def test_other_rules(api_server: StartApi, frontend_server: StartFrontend, token_file: str, variant: str) -> None:
    rules, of_components, of_frontend = VARIANTS[variant]
    own = {"internal_api_server_token": "the-nodes-own-token-0123456789"} if rules.auth else {}
    made = await cluster(
        api_server,
        frontend_server,
        {**of_components, **own, "internal_api_server_token_file": token_file},
        {**of_frontend, "token_file": token_file},
    )
    matrix = Matrix(rules, made.outer.server.address.port)
    for way, server in made.directly():
        await matrix.check([way], served(server), heads=False)
    await matrix.check([Way("by name", made.outer.client, "/proxy2/w")], served(made.worker), heads=False)
    await matrix.check(made.frontends()[:1], [*listed(FRONTEND_ROUTES), *listed(ASKING_ROUTES)], heads=False)
