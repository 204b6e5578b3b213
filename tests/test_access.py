"""Who may do what, on servers that serve: directly, through a frontend, and through two."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from yarl import URL

from lmcache_api.app import create_app
from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.pytest_plugin import RunningApi, StartApi, free_port
from lmcache_frontend.audit import AuditLog
from lmcache_frontend.nodes.node import read_list
from lmcache_frontend.options import Options
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_frontend.server import serve
from lmcache_shared.access import tokens
from lmcache_shared.access.attempts import MAX_ADDRESSES, MAX_FAILURES, Attempts
from lmcache_shared.access.roles import Role
from lmcache_shared.access.tokens import Tokens
from lmcache_shared.errors import ConfigError
from lmcache_shared.settings import Settings

SECRETS = {role: f"a-token-of-a-{role}-0123456789" for role in ("viewer", "operator", "admin")}
ASKED = [
    ("GET", "/version", "viewer"),
    ("GET", "/loglevel", "viewer"),
    ("GET", "/conf", "viewer"),
    ("GET", "/metrics", "viewer"),
    ("GET", "/loglevel?logger_name=access.test&level=info", "operator"),
    ("GET", "/threads", "operator"),
    ("POST", "/metrics/reset", "operator"),
    ("POST", "/conf", "operator"),
    ("PUT", "/freeze/disable", "operator"),
    ("DELETE", "/cache/clear", "operator"),
    ("GET", "/env", "admin"),
    ("POST", "/run_script", "admin"),
]
RANK = {"anonymous": 1, "viewer": 1, "operator": 2, "admin": 3, "local": 3}
CALLERS: dict[str, dict[str, str]] = {
    "local": {},
    "anonymous": {"X-Forwarded-For": "10.0.0.9"},
    **{role: {"X-Forwarded-For": "10.0.0.9", "Authorization": f"Bearer {it}"} for role, it in SECRETS.items()},
}


def entry(role: str) -> dict[str, str]:
    return {"name": f"the {role}", "role": role, "sha256": hashlib.sha256(SECRETS[role].encode()).hexdigest()}


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "tokens"
    path.write_text("".join(json.dumps(entry(role)) + "\n" for role in SECRETS))
    return str(path)


async def status(client: aiohttp.ClientSession, method: str, path: str, headers: dict[str, str]) -> tuple[int, Any]:
    data = b"{}" if method == "POST" else None
    url = URL(str(client._base_url).rstrip("/") + path, encoded=True)
    async with client.request(method, url, headers=headers, data=data) as response:
        return response.status, await response.read()


async def check(client: aiohttp.ClientSession, before: str = "") -> None:
    for caller, headers in CALLERS.items():
        for method, path, role in ASKED:
            found, said = await status(client, method, before + path, headers)
            if RANK[caller] >= RANK[role]:
                assert found not in (401, 403), (caller, method, path, said)
            else:
                assert found == (401 if caller == "anonymous" else 403), (caller, method, path, said)
                assert b"needs the role" in said


@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
async def test_directly(api_server: StartApi, token_file: str, tcp: bool) -> None:
    await check((await api_server(tcp=tcp, internal_api_server_token_file=token_file)).client)


@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
async def test_through_a_frontend_and_through_two(
    api_server: StartApi, frontend_server: StartFrontend, token_file: str, tcp: bool
) -> None:
    worker = await api_server(tcp=tcp)  # which knows no tokens: it believes the frontend on its machine
    inner = await frontend_server(nodes=[{**worker.node, "name": "w"}])
    rack = {"name": "rack", "host": "127.0.0.1", "port": inner.server.address.port, "nodes": []}
    outer = await frontend_server(nodes=[{**worker.node, "name": "w"}, rack], token_file=token_file)
    await check(outer.client, "/proxy2/w")
    await check(outer.client, worker.address.proxy_path())
    await check(outer.client, "/proxy2/rack/proxy2/w")


async def test_a_page_of_a_name_that_points_here_is_a_viewer(api_server: StartApi) -> None:
    worker = await api_server(tcp=True)
    host = {"Host": f"evil.example:{worker.node['port']}"}
    assert (await status(worker.client, "GET", "/version", host))[0] == 200
    assert (await status(worker.client, "POST", "/conf", host))[0] == 401
    assert (await status(worker.client, "GET", "/env", host))[0] == 401


async def test_a_node_judges_by_itself_what_the_frontend_does_not_know(
    api_server: StartApi, frontend_server: StartFrontend, token_file: str, tmp_path: Path
) -> None:
    (tmp_path / "own_api.py").write_text(
        "from aiohttp import web\n"
        "from lmcache_shared.access.roles import Role, needs\n"
        "router = web.RouteTableDef()\n"
        '@router.get("/secrets")\n@needs(Role.ADMIN)\n'
        'async def secrets(request):\n    return web.Response(text="secret")\n'
    )
    worker = await api_server(internal_api_server_route_folders=[str(tmp_path)])
    frontend = await frontend_server(nodes=[{**worker.node, "name": "w"}], token_file=token_file)
    found = {it: (await status(frontend.client, "GET", "/proxy2/w/secrets", CALLERS[it]))[0] for it in CALLERS}
    assert found == {"local": 200, "anonymous": 401, "viewer": 401, "operator": 401, "admin": 200}
    untrusting = await frontend_server(
        nodes=[{**worker.node, "name": "w"}], no_trust_local=True, token=SECRETS["admin"]
    )
    before = {"name": "f", "host": "127.0.0.1", "port": frontend.server.address.port, "nodes": []}
    outer = await frontend_server(nodes=[before])
    passed_on = {"Host": "ops.example.com"}  # as by a proxy on this machine that adds nothing
    hidden = {**passed_on, "X-Real-IP": "10.0.0.9", "Connection": "X-Real-IP, X-Forwarded-For, Via"}
    for client, path, headers, expected in (
        (frontend.client, "/proxy2/w", passed_on, 401),
        (frontend.client, "/proxy2/w", hidden, 401),
        (untrusting.client, "/proxy2/w", {}, 401),
        (untrusting.client, "/proxy2/w", {"Authorization": f"Bearer {SECRETS['admin']}"}, 200),
        (outer.client, "/proxy2/f/proxy2/w", {}, 200),
        (outer.client, "/proxy2/f/proxy2/w", passed_on, 401),
    ):
        assert (await status(client, "GET", f"{path}/secrets", headers))[0] == expected, (path, headers)


class TestOfAFrontend:
    @pytest.fixture
    async def frontend(self, frontend_server: StartFrontend, token_file: str) -> RunningFrontend:
        return await frontend_server(token_file=token_file)

    async def test_its_own_routes(self, frontend: RunningFrontend) -> None:
        for caller, headers in CALLERS.items():
            for path in ("/", "/health", "/ready", "/api/nodes", "/api/sources", "/metrics", "/sd/prometheus"):
                assert (await status(frontend.client, "GET", path, headers))[0] == 200
            for method, path in (("POST", "/api/proxies"), ("PUT", "/api/nodes/x"), ("DELETE", "/api/nodes/x")):
                found = (await status(frontend.client, method, path, headers))[0]
                assert (found in (401, 403)) == (RANK[caller] < RANK["operator"]), (caller, path)

    async def test_what_leads_nowhere_is_told_as_ever(self, frontend: RunningFrontend) -> None:
        assert (await status(frontend.client, "POST", "/nowhere", CALLERS["anonymous"]))[0] == 404
        assert (await status(frontend.client, "POST", "/health", CALLERS["anonymous"]))[0] == 405

    async def test_a_wrong_token_is_refused_and_counted(self, frontend: RunningFrontend) -> None:
        wrong = {"X-Forwarded-For": "10.0.0.8", "Authorization": "Bearer no-such-token"}
        for number in range(2 * MAX_FAILURES):  # one that is shown again and again guesses nothing
            if number > MAX_FAILURES:
                wrong["Authorization"] += "x"
            found, said = await status(frontend.client, "GET", "/api/nodes", wrong)
            assert found == 401
            assert b"no-such-token" not in said
        assert (await status(frontend.client, "GET", "/api/nodes", wrong))[0] == 429
        assert (await status(frontend.client, "GET", "/health", wrong))[0] == 200
        assert (await status(frontend.client, "GET", "/api/nodes", CALLERS["operator"]))[0] == 200

    async def test_a_wrong_token_is_told_of_what_is_proxied_too(self, frontend_server: StartFrontend) -> None:
        nodes = [{"name": "w", "host": "127.0.0.1", "port": free_port()}]
        frontend = await frontend_server(nodes=nodes, token=SECRETS["admin"])
        wrong = {"X-Forwarded-For": "10.0.0.8"}
        for method in ("GET", "POST"):  # they have a server each
            wrong["Authorization"] = f"Bearer no-such-token-{method}"
            found, said = await status(frontend.client, method, "/proxy2/w/version", wrong)
            assert found == 401
            assert b"none that this server knows; it knows those of --token (LMCACHE_FRONTEND_TOKEN)" in said
        for number in range(MAX_FAILURES):
            wrong["Authorization"] += str(number)
            await status(frontend.client, "GET", "/proxy2/w/version", wrong)
        for method in ("GET", "POST"):
            right = {**wrong, "Authorization": f"Bearer {SECRETS['admin']}"}
            found, said = await status(frontend.client, method, "/proxy2/w/version", right)
            assert (found, b"too many wrong tokens from 10.0.0.8" in said) == (429, True)

    async def test_who_guesses_keeps_nobody_of_his_address_out(self, frontend: RunningFrontend) -> None:
        away = {"X-Forwarded-For": "10.0.0.8"}
        cookie = f"lmcache_frontend_{frontend.server.address.port}"
        shown = {it: {**away, "Authorization": f"Bearer {SECRETS[it]}"} for it in SECRETS}
        signed_in = {it: {**away, "Cookie": f"{cookie}={SECRETS[it]}"} for it in SECRETS}
        for known in (shown, signed_in):
            assert (await status(frontend.client, "DELETE", "/api/nodes/x", known["operator"]))[0] == 404
        for number in range(MAX_FAILURES):
            await status(frontend.client, "GET", "/api/nodes", {**away, "Authorization": f"Bearer wrong-{number}"})
            await status(frontend.client, "GET", "/api/nodes", {**away, "Cookie": f"{cookie}=wrong-{number}"})
        for known, refused in ((shown, 429), (signed_in, 401)):
            assert (await status(frontend.client, "DELETE", "/api/nodes/x", known["operator"]))[0] == 404
            assert (await status(frontend.client, "DELETE", "/api/nodes/x", known["admin"]))[0] == refused


async def test_its_token_stays_with_the_frontend(frontend_server: StartFrontend, token_file: str) -> None:
    seen: list[Any] = []

    async def node(request: web.Request) -> web.Response:
        seen.append(request.headers.copy())
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", node)
    async with TestServer(app) as server:
        node_entry = {"name": "w", "host": "127.0.0.1", "port": server.port}
        frontend = await frontend_server(nodes=[node_entry], token_file=token_file)
        await status(frontend.client, "POST", "/proxy2/w/conf", CALLERS["operator"])
        await status(frontend.client, "GET", "/proxy2/w/version", CALLERS["anonymous"])
        own = {"Authorization": "Bearer of-the-node"}
        await status(frontend.client, "GET", "/proxy2/w/version", own)
        known = {"Authorization": f"Bearer {SECRETS['viewer']}"}
        await status(frontend.client, "GET", "/proxy2/w/version", known)
    posted, got, local, needless = (it for it in seen if "Via" in it)
    assert "Authorization" not in needless
    assert "Authorization" not in posted
    assert "X-Forwarded-For" not in posted
    assert got["X-Forwarded-For"] == "10.0.0.9, 127.0.0.1"
    assert local["Authorization"] == "Bearer of-the-node"


async def test_without_tokens_an_authorization_is_nobodys_matter(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    assert (await status(frontend.client, "GET", "/api/nodes", CALLERS["admin"]))[0] == 200
    found, said = await status(frontend.client, "POST", "/api/proxies", CALLERS["admin"])
    assert found == 401
    assert all(option in said for option in (b"--token", b"--token-file", b"--no-auth"))


async def test_the_token_of_a_setting_is_an_admins(api_server: StartApi) -> None:
    worker = await api_server(tcp=True, internal_api_server_token=SECRETS["admin"])
    assert (await status(worker.client, "GET", "/env", CALLERS["admin"]))[0] == 200
    assert (await status(worker.client, "GET", "/env", CALLERS["operator"]))[0] == 401
    for path in ("/env", "/conf"):
        assert SECRETS["admin"].encode() not in (await status(worker.client, "GET", path, {}))[1]


async def test_callers_here_need_not_be_trusted(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(internal_api_server_trust_local=False, internal_api_server_token=SECRETS["admin"])
    frontend = await frontend_server(no_trust_local=True, token=SECRETS["admin"])
    assert (await status(worker.client, "GET", "/env", {}))[0] == 401
    assert (await status(worker.client, "GET", "/env", {"Authorization": f"bearer {SECRETS['admin']}"}))[0] == 200
    assert (await status(frontend.client, "DELETE", "/api/nodes/x", {}))[0] == 401


async def test_everybody_may_do_everything_when_the_operator_says_so(
    api_server: StartApi, frontend_server: StartFrontend, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await api_server(tcp=True, internal_api_server_auth=False)
    frontend = await frontend_server(no_auth=True)
    assert (await status(worker.client, "GET", "/env", CALLERS["anonymous"]))[0] == 200
    assert (await status(frontend.client, "DELETE", "/api/nodes/x", CALLERS["anonymous"]))[0] == 404
    assert caplog.text.count("whoever reaches this server may do everything") == 2


class TestTokens:
    async def test_a_changed_file_is_read_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokens, "LOOK_SECONDS", 0.0)
        path = tmp_path / "tokens.yaml"
        path.write_text(json.dumps({"tokens": [entry("operator")]}))
        known = Tokens(None, str(path), place="here")
        found = await known.find(SECRETS["operator"])
        assert found is not None
        assert (found.name, found.role, found.by_token) == ("the operator", Role.OPERATOR, True)
        path.write_text(json.dumps({"tokens": [entry("admin")]}))
        os.utime(path, (1, 1))
        assert await known.find(SECRETS["operator"]) is None
        assert await known.find(SECRETS["admin"]) is not None
        path.unlink()
        assert await known.find(SECRETS["admin"]) is None

    async def test_bad_lines_are_told_and_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        lines = [
            entry("viewer"), {**entry("admin"), "role": "root"}, {**entry("admin"), "sha256": "x"},
            {**entry("admin"), "name": "a\nb"}, {**entry("admin"), "sha256": entry("viewer")["sha256"]}, [1],
        ]  # fmt: skip
        path = tmp_path / "tokens"
        path.write_text("\n".join([*map(json.dumps, lines), "{no json", ""]))
        known = Tokens(None, str(path), place="here")
        assert [await known.find(it) is not None for it in SECRETS.values()] == [True, False, False]
        assert len(caplog.records) == 6
        assert "line 2: role: expected one of viewer, operator, admin, found 'root'" in caplog.text
        assert [f"line {number}" in caplog.text for number in range(1, 8)] == [False] + [True] * 6

    @pytest.mark.parametrize("content", ["", "tokens: []", "tokns: [a]", "tokens: [a]"])
    def test_a_file_of_which_nothing_counts_is_told(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
    ) -> None:
        path = tmp_path / "tokens"
        path.write_text(content)
        Tokens(None, str(path), place="here")
        assert f"{path}: no token in it can be used; expected tokens: with a list of" in caplog.text

    @pytest.mark.parametrize("content", [None, "tokens: 5", "- a\n- b", "tokens: [", "\x00"])
    def test_a_file_that_is_none_stops_the_start(self, tmp_path: Path, content: str | None) -> None:
        path = tmp_path / "tokens"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            create_app(EmbeddedComponent(Settings(internal_api_server_token_file=str(path))))

    @pytest.mark.parametrize("token", ["short", "x" * 513, "with a space in it 0123", "ümlaut-0123456789-0123"])
    def test_a_token_that_no_field_takes_stops_the_start(self, token: str) -> None:
        with pytest.raises(ConfigError, match="here: expected 16 to 512"):
            Tokens(token, None, place="here")


def test_attempts_are_bounded() -> None:
    attempts = Attempts()
    for number in range(MAX_ADDRESSES + 10):
        attempts.failed(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", "x")
    assert len(attempts._failures) == MAX_ADDRESSES
    for number in range(MAX_FAILURES):
        assert attempts.failed(f"2001:db8::{number}", f"{number}")
        assert not attempts.failed(f"2001:db8::{number}", f"{number}")
    assert attempts.wait_seconds("2001:db8::ffff", "x") > 0
    assert attempts.wait_seconds("2001:db8:0:1::1", "x") == 0
    for number in range(MAX_ADDRESSES + 10):
        attempts.was_right("2001:db8::1", f"right {number}")
    assert len(attempts._right) == MAX_ADDRESSES
    assert attempts.wait_seconds("2001:db8::2", f"right {number}") == 0
    assert attempts.wait_seconds("2001:db8:0:1::1", "right 0") == 0


class TestANodesToken:
    async def check(self, worker: RunningApi, frontend: RunningFrontend, name: str) -> None:
        for caller, headers in CALLERS.items():
            for method, path, role in ASKED:
                found, _ = await status(frontend.client, method, f"/proxy2/{name}{path}", headers)
                assert (found in (401, 403)) == (RANK[caller] < RANK[role]), (caller, method, path)
        for path in ("/api/nodes", "/api/nodes?detail=true", "/api/proxies", "/api/sources", "/metrics", "/"):
            _, said = await status(frontend.client, "GET", path, {})
            assert SECRETS["admin"].encode() not in said

    async def test_of_a_list(self, api_server: StartApi, frontend_server: StartFrontend, token_file: str) -> None:
        worker = await api_server(internal_api_server_trust_local=False, internal_api_server_token=SECRETS["admin"])
        entry = {**worker.node, "name": "w", "token": SECRETS["admin"]}
        await self.check(worker, await frontend_server(nodes=[entry], token_file=token_file), "w")

    async def test_by_hand(
        self, api_server: StartApi, frontend_server: StartFrontend, token_file: str, tmp_path: Path
    ) -> None:
        worker = await api_server(internal_api_server_trust_local=False, internal_api_server_token=SECRETS["admin"])
        kept = f"sqlite:{tmp_path}/kept.db"
        first = await frontend_server(registry=kept)
        node = {**worker.node, "name": "w", "token": SECRETS["admin"]}
        async with first.client.post("/api/proxies/local_proxy/nodes", json=node) as response:
            assert SECRETS["admin"] not in await response.text()
        assert (await status(first.client, "GET", "/proxy2/w/env", {}))[0] == 200
        assert (await status(first.client, "POST", "/proxy2/w/conf", {"X-Forwarded-For": "10.0.0.9"}))[0] == 401
        await first.server.stop()
        assert os.stat(f"{tmp_path}/kept.db").st_mode & 0o777 == 0o600
        again = await frontend_server(registry=kept, token_file=token_file)
        await self.check(worker, again, "w")
        del node["token"]
        async with again.client.put("/api/nodes/w", json=node) as response:
            assert response.status == 200
        assert (await status(again.client, "GET", "/proxy2/w/env", {}))[0] == 401

    async def test_of_a_frontend_on_the_way(
        self, api_server: StartApi, frontend_server: StartFrontend, token_file: str
    ) -> None:
        worker = await api_server()
        inner = await frontend_server(nodes=[{**worker.node, "name": "w"}], no_trust_local=True, token=SECRETS["admin"])
        port = inner.server.address.port
        rack = {"name": "rack", "host": "127.0.0.1", "port": port, "nodes": [], "token": SECRETS["admin"]}
        await self.check(worker, await frontend_server(nodes=[rack], token_file=token_file), "rack/proxy2/w")

    @pytest.mark.parametrize("token", ["", "a b", "a\r\nX: y", "x" * 513, 5])
    async def test_one_that_no_field_takes(self, frontend_server: StartFrontend, token: object) -> None:
        frontend = await frontend_server()
        node = {"name": "w", "host": "h", "port": 1, "token": token}
        async with frontend.client.post("/api/proxies/local_proxy/nodes", json=node) as response:
            assert response.status == 400
            assert "token" in (await response.json())["reason"]

    def test_it_is_in_no_text_of_a_node(self) -> None:
        (node,) = read_list(b'[{"name":"w","host":"h","port":1,"token":"of-the-node"}]', "here")
        assert "of-the-node" not in repr(node)


async def test_what_reveals_is_kept_by_nobody(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server()
    frontend = await frontend_server(nodes=[{**worker.node, "name": "w"}])
    for client, before in ((worker.client, ""), (frontend.client, "/proxy2/w")):
        for path, kept in (("/env", "no-store"), ("/threads", "no-store"), ("/version", None)):
            async with client.get(before + path) as response:
                assert response.headers.get("Cache-Control") == kept


async def test_of_others_nodes_too(frontend_server: StartFrontend) -> None:
    async def node(request: web.Request) -> web.Response:
        return web.Response(headers={"Cache-Control": "max-age=9"} if "own" in request.query else {})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", node)
    async with TestServer(app) as server:
        frontend = await frontend_server(nodes=[{"name": "w", "host": "127.0.0.1", "port": server.port}])
        for path, kept in (("/env", "no-store"), ("/env?own", "max-age=9"), ("/version", None)):
            async with frontend.client.get("/proxy2/w" + path) as response:
                assert response.headers.get("Cache-Control") == kept


class TestTheAuditLog:
    async def test_it_has_every_change_that_passes(
        self, api_server: StartApi, frontend_server: StartFrontend, token_file: str, tmp_path: Path
    ) -> None:
        worker = await api_server()
        log = tmp_path / "audit"
        nodes = [{**worker.node, "name": "w"}]
        frontend = await frontend_server(nodes=nodes, token_file=token_file, audit_log=str(log))
        for headers in CALLERS.values():
            for method, path in (("GET", "/version"), ("POST", "/metrics/reset"), ("GET", "/env?password=x")):
                await status(frontend.client, method, "/proxy2/w" + path, headers)
        await status(frontend.client, "DELETE", "/api/nodes/nobody?a=%2541&b=1&a=2&b", CALLERS["operator"])
        await status(frontend.client, "POST", "/nowhere", CALLERS["operator"])
        await frontend.server.stop()
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        told = [(it["who"], it["role"], it["node"], it["method"], it["path"], it["status"]) for it in lines]
        reset = (str(worker.address), "POST", "/proxy2/w/metrics/reset", 200)
        env = (str(worker.address), "GET", "/proxy2/w/env", 200)
        assert told == [
            ("local", "admin", *reset),
            ("local", "admin", *env),
            ("the operator", "operator", *reset),
            ("the admin", "admin", *reset),
            ("the admin", "admin", *env),
            ("the operator", "operator", "", "DELETE", "/api/nodes/nobody", 404),
        ]
        assert lines[1]["query"] == {"password": "***"}
        assert lines[-1]["query"] == {"a": "%41, 2", "b": "1, "}
        assert lines[2]["from"] == "10.0.0.9"
        assert all(it["ms"] > 0 and it["time"].endswith("+00:00") for it in lines)
        assert log.stat().st_mode & 0o777 == 0o600

    async def test_it_is_bounded(self, tmp_path: Path) -> None:
        log = AuditLog(str(tmp_path / "audit"), max_bytes=1000)
        log.start()
        for number in range(200):
            await log.add({"number": number, "text": "x" * 80})
            await asyncio.sleep(0.002)
        await log.close()
        files = sorted(tmp_path.iterdir())
        assert [file.name for file in files] == ["audit", "audit.1", "audit.2", "audit.3", "audit.4"]
        numbers = [json.loads(line)["number"] for file in reversed(files) for line in file.read_text().splitlines()]
        assert numbers == list(range(numbers[0], 200))

    async def test_a_disk_that_fails_is_told_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        log = AuditLog(str(folder / "audit"))
        log.start()
        (folder / "audit").unlink()
        folder.rmdir()
        for number in range(3):
            await log.add({"number": number})
            await asyncio.sleep(0.02)
        await log.close()
        assert caplog.text.count("cannot be written: No such file or directory; changes go on") == 1

    def test_half_a_line_on_a_full_disk_is_none(self, tmp_path: Path) -> None:
        log = tmp_path / "audit"
        program = (
            "import asyncio, resource, sys\n"
            "from lmcache_frontend.audit import AuditLog\n"
            "async def main():\n"
            "    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
            "    for number, room in enumerate((hard, 60, 50, hard)):\n"
            "        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))\n"
            "        log = AuditLog(sys.argv[1])\n"
            "        log.start()\n"
            "        await log.add({'number': number, 'text': 'x' * 20})\n"
            "        await log.close()\n"
            "asyncio.run(main())\n"
        )
        subprocess.run([sys.executable, "-c", program, str(log)], check=True, timeout=30)
        assert [json.loads(line)["number"] for line in log.read_text().splitlines()] == [0, 3]

    def test_a_file_that_cannot_be_written_stops_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--audit-log .*: cannot be written: Is a directory"):
            AuditLog(str(tmp_path))


async def test_a_link_on_another_site_changes_nothing(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server()
    frontend = await frontend_server(nodes=[{**worker.node, "name": "w"}])
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    for path, found in (("/loglevel", 200), ("/loglevel?logger_name=a&level=info", 403), ("/env", 403)):
        assert (await status(worker.client, "GET", path, followed))[0] == found
        assert (await status(frontend.client, "GET", "/proxy2/w" + path, followed))[0] == found


async def test_a_link_on_another_site_changes_nothing_that_the_frontend_does_not_know(
    api_server: StartApi, frontend_server: StartFrontend, tmp_path: Path
) -> None:
    (tmp_path / "own_api.py").write_text(
        "from aiohttp import web\n"
        "from lmcache_shared.access.roles import Role, needs\n"
        "router = web.RouteTableDef()\n"
        '@router.get("/own")\n@needs(Role.OPERATOR)\nasync def own(request):\n    return web.Response()\n'
    )
    trusting = await api_server(internal_api_server_route_folders=[str(tmp_path)])
    asking = await api_server(
        worker_id=1,
        internal_api_server_route_folders=[str(tmp_path)],
        internal_api_server_trust_local=False,
        internal_api_server_token=SECRETS["admin"],
    )
    nodes = [{**trusting.node, "name": "w"}, {**asking.node, "name": "v", "token": SECRETS["admin"]}]
    inner = await frontend_server(nodes=nodes)
    rack = {"name": "rack", "host": "127.0.0.1", "port": inner.server.address.port, "nodes": []}
    frontend = await frontend_server(nodes=[*nodes, rack])
    for path in ("/proxy2/w/own", "/proxy2/v/own", "/proxy2/rack/proxy2/w/own", "/proxy2/rack/proxy2/v/own"):
        for followed, expected in (("none", 200), ("same-origin", 200), ("same-site", 403), ("cross-site", 403)):
            headers = {"Sec-Fetch-Site": followed, "Sec-Fetch-Mode": "navigate"}
            assert (await status(frontend.client, "GET", path, headers))[0] == expected, (path, followed)


class TestSignIn:
    async def sign_in(self, frontend: RunningFrontend, token: str) -> tuple[int, Any]:
        data, away = {"token": token}, {"X-Forwarded-For": "10.0.0.9"}
        async with frontend.client.post("/sign-in", data=data, headers=away, allow_redirects=False) as response:
            return response.status, response.headers.copy()

    async def test_in_and_out(self, frontend_server: StartFrontend, token_file: str) -> None:
        frontend = await frontend_server(token_file=token_file)
        found, headers = await self.sign_in(frontend, SECRETS["operator"])
        assert (found, headers["Location"], headers["Cache-Control"]) == (303, "/", "no-store")
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        away = {"X-Forwarded-For": "10.0.0.9", "Cookie": cookie.partition(";")[0]}
        plain = {"X-Forwarded-For": "10.0.0.9"}
        for path, role in (("/api/nodes/x", "operator"), ("/api/nodes/y", "operator")):
            assert (await status(frontend.client, "DELETE", path, away))[0] == 404, role
        frontend.client.cookie_jar.clear()
        assert (await status(frontend.client, "DELETE", "/api/nodes/x", plain))[0] == 401
        assert headers["Referrer-Policy"] == "same-origin"  # or browsers send the form with `Origin: null`
        _, page = await status(frontend.client, "GET", "/sign-in", away)
        assert b"the operator" in page
        assert SECRETS["operator"].encode() not in page
        async with frontend.client.post("/sign-out", headers=away, allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (303, "/sign-in")
            assert "Max-Age=0" in response.headers["Set-Cookie"]

    async def test_back_to_where_one_came_from(self, frontend_server: StartFrontend, token_file: str) -> None:
        frontend = await frontend_server(token_file=token_file)
        away, here = {"X-Forwarded-For": "10.0.0.9"}, f"http://{frontend.server.address}"
        for asked, referer, shown in (
            ("?next=/nodes%3Fq%3Da%26b%3D%2525", "", "/nodes?q=a&amp;b=%25"),
            ("", f"{here}/nodes/p/n/env?q=x", "/nodes/p/n/env?q=x"),
            ("?next=/manage", f"{here}/nodes", "/manage"),
            ("", "http://evil.example/nodes", "/"),
            ("?next=/nodes%3Ftoken%3Dabc", "", "/nodes"),
            ("", "http://[", "/"),
            ("", f"{here}/sign-in", "/"),
            ("?next=/sign-in%3Fnext%3D/", "", "/"),
        ):
            _, page = await status(frontend.client, "GET", f"/sign-in{asked}", {**away, "Referer": referer})
            assert f'name="next" value="{shown}"'.encode() in page, (asked, referer)
        for asked, place in (
            ("/nodes?q=a", "/nodes?q=a"),
            *(
                (it, "/")
                for it in ("//evil.example", "/\\evil.example", "/\t/evil.example", "https://evil.example", "nodes")
            ),
            ("/" + "x" * 3000, "/"),
            ("/a\r\nSet-Cookie: a=b", "/"),
        ):
            data = {"token": SECRETS["viewer"], "next": asked}
            async with frontend.client.post("/sign-in", data=data, headers=away, allow_redirects=False) as response:
                assert (response.status, response.headers["Location"]) == (303, place)
        async with frontend.client.post(
            "/sign-in", data={"token": "wrong", "next": "/nodes"}, headers=away
        ) as response:
            assert 'name="next" value="/nodes"' in await response.text(), "a wrong token does not lose the way"

    async def test_a_wrong_token(self, frontend_server: StartFrontend, token_file: str) -> None:
        frontend = await frontend_server(token_file=token_file)
        for number in range(MAX_FAILURES):
            found, headers = await self.sign_in(frontend, f"<b>no-such-token</b>{number}")
            assert (found, "Set-Cookie" in headers) == (401, False)
        assert (await self.sign_in(frontend, SECRETS["admin"]))[0] == 429

    async def test_pages_of_others_sign_nobody_in(self, frontend_server: StartFrontend, token_file: str) -> None:
        frontend = await frontend_server(token_file=token_file)
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        path = f"/sign-in?token={SECRETS['admin']}"
        for headers, found in ((link, 200), ({}, 303)):
            async with frontend.client.get(path, headers=headers, allow_redirects=False) as response:
                assert (response.status, "Set-Cookie" in response.headers) == (found, found == 303)
        async with frontend.client.post("/sign-in", data={"token": SECRETS["admin"]}, headers=link) as response:
            assert response.status == 403

    async def test_the_cookie_stays_with_the_frontend(self, frontend_server: StartFrontend, token_file: str) -> None:
        cookies: list[str | None] = []

        async def node(request: web.Request) -> web.Response:
            cookies.append(request.headers.get("Cookie"))
            return web.Response()

        app = web.Application()
        app.router.add_route("POST", "/{path:.*}", node)
        async with TestServer(app) as server:
            nodes = [{"name": "w", "host": "127.0.0.1", "port": server.port}]
            frontend = await frontend_server(nodes=nodes, token_file=token_file)
            name = f"lmcache_frontend_{frontend.server.address.port}"
            for others in ("a=1; ", ""):
                shown = {"X-Forwarded-For": "10.0.0.9", "Cookie": f"{others}{name}={SECRETS['operator']}"}
                assert (await status(frontend.client, "POST", "/proxy2/w/conf", shown))[0] == 200
        assert cookies == ["a=1", None]

    async def test_a_token_is_made_for_a_server_that_others_reach(self, capsys: pytest.CaptureFixture[str]) -> None:
        for host, options, made in (
            ("0.0.0.0", {}, True),
            ("127.0.0.1", {}, False),
            ("127.0.0.1", {"no_trust_local": True}, True),  # else nobody could change anything
            ("0.0.0.0", {"no_auth": True}, False),
            ("0.0.0.0", {"token": SECRETS["admin"]}, False),
        ):
            stop = asyncio.Event()
            asyncio.get_running_loop().call_later(0.2, stop.set)
            await serve(Options(host=host, port=free_port(), registry="memory", **options), stop)
            assert ("/sign-in?token=" in capsys.readouterr().out) == made


async def test_viewers_may_need_a_token(
    api_server: StartApi, frontend_server: StartFrontend, token_file: str, tmp_path: Path
) -> None:
    worker = await api_server()
    closed = await frontend_server(
        nodes=[{**worker.node, "name": "w"}], viewers="token", no_trust_local=True, token_file=token_file
    )
    for caller, headers in CALLERS.items():
        found = {
            path: (await status(closed.client, "GET", path, headers))[0]
            for path in ("/", "/api/nodes", "/metrics", "/proxy2/w/version", "/health", "/sign-in", "/static/icon.svg")
        }
        told = 401 if caller in ("local", "anonymous") else 200
        assert list(found.values()) == [told] * 4 + [200] * 3, (caller, found)
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8", "User-Agent": "Mozilla/5.0"}
    for path, place in (
        ("/", ""),
        ("/proxy2/w/version", "?next=/proxy2/w/version"),
        ("/?q=a&b", "?next=/%3Fq%3Da%26b"),
        ("/nodes?token=abc&q=a", "?next=/nodes%3Fq%3Da"),
    ):
        async with closed.client.get(path, headers=browser, allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (303, f"/sign-in{place}")
    async with closed.client.get("/", headers={**browser, "HX-Request": "true"}, allow_redirects=False) as response:
        assert response.status == 401, "a page that is open must not get the sign-in page as its part"
    rack = {"name": "rack", "host": "127.0.0.1", "port": closed.server.address.port, "nodes": []}
    for token, known in (({}, False), ({"token": SECRETS["viewer"]}, True)):
        frontend = await frontend_server(nodes=[{**rack, **token}], health_interval=1.0)
        _, said = await status(frontend.client, "GET", "/api/proxies/rack/refresh", {})
        assert (b'"w"' in said) == known
        if known:
            await frontend.server.cluster.health.settled(5)
            _, said = await status(frontend.client, "GET", "/api/nodes?detail=true", {})
            assert b'"state":"up"' in said.replace(b" ", b"")
            _, said = await status(frontend.client, "GET", "/metrics", {})
            assert b'node="w"' in said
