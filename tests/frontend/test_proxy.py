import asyncio
import gzip
import hashlib
import io
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_frontend.app import TARGETS
from lmcache_frontend.proxy import answering, limits, transport
from lmcache_frontend.proxy.exchange import Answer
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_shared.address import UnixAddress, quote_socket
from tests.frontend.boards import settled
from tests.frontend.upstream import Upstream, raw, serving

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upstreams here count what reaches them: no node is checked before somebody asks the board."""
    monkeypatch.setattr(HealthBoard, "start", lambda board: None)


async def frontend_for(frontend_server: StartFrontend, *nodes: object, **options: object) -> RunningFrontend:
    return await frontend_server(nodes=list(nodes), **options)


async def test_the_readmes_line(api_server: StartApi, frontend_server: StartFrontend) -> None:
    scheduler = await api_server(role="scheduler")
    frontend = await frontend_for(frontend_server, scheduler.node)
    assert isinstance(scheduler.address, UnixAddress)
    for times in (1, 2):
        path = f"/proxy/localhost/{quote_socket(scheduler.address.path, times=times)}/metrics"
        async with frontend.client.get(URL(frontend.url + path, encoded=True)) as response:
            assert response.status == 200
            assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert "lmcache:lmcache_is_healthy" in await response.text()


async def test_a_tcp_target_by_number_name_and_node(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(tcp=True)
    frontend = await frontend_for(frontend_server, worker.node)
    for path in (f"/proxy/127.0.0.1/{worker.node['port']}/version", f"/proxy2/{worker.node['name']}/version"):
        async with frontend.client.get(path) as response:
            assert (response.status, await response.json()) == (200, "0.1.0-embedded")


async def test_ipv6(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(tcp=True, internal_api_server_host="::1")
    frontend = await frontend_for(frontend_server, worker.node)
    port = worker.node["port"]
    for path in (f"/proxy/[::1]/{port}/version", f"/proxy/%3A%3A1/{port}/version", "/proxy2/lmcache_worker0/version"):
        async with frontend.client.get(URL(frontend.url + path, encoded=True)) as response:
            assert (response.status, await response.json()) == (200, "0.1.0-embedded")
    (found,) = await settled(frontend)
    assert found.state == "up"


async def test_run_script_through_the_proxy(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(tcp=True, run_script_api_enabled=True)
    frontend = await frontend_for(frontend_server, worker.node)
    form = aiohttp.FormData()
    form.add_field("script", "result = app.state.lmcache_adapter.config.run_script_api_enabled", filename="scratch.py")
    async with frontend.client.post(f"/proxy/localhost/{worker.node['port']}/run_script", data=form) as response:
        assert (response.status, await response.text()) == (200, "True")


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
async def test_every_method(frontend_server: StartFrontend, method: str) -> None:
    async with serving(Upstream()) as upstream:
        if method == "HEAD":
            upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
        frontend = await frontend_for(frontend_server, upstream.node)
        async with frontend.client.request(method, "/proxy2/upstream/a") as response:
            assert response.status == 200
            assert response.headers["Content-Length"] == "2"
            assert await response.read() == (b"" if method == "HEAD" else b"ok")
        assert upstream.heads[0].startswith(f"{method} /a HTTP/1.1\r\n".encode())


@pytest.mark.parametrize(
    "target",
    [
        b"/a", b"/", b"/a/", b"//a", b"/a//b", b"/a?", b"/a?b=c&b=%63&d", b"/a?x=1?y=2", b"/%2F%2f%252F", b"/a%20b+c",
        b"/a;b=c,d", b"/a?q=%7B%22k%22%3A1%7D", b"/[x]{y}|z^`", b"/a?\"<>", b"/%zz%", b"/a?b=c/d", b"/..%2f..%2fetc",
        b"/a/../b/./c", b"/?", b"/%00", b"/:80/@x", b"/a?%ff",
    ],
)  # fmt: skip
async def test_path_and_query_go_on_byte_for_byte(frontend_server: StartFrontend, target: bytes) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        line = b"GET /proxy2/upstream" + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answer = await raw(frontend.server.address.port, line)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), answer
        assert upstream.heads[0].split(b"\r\n")[0] == b"GET " + target + b" HTTP/1.1"


async def test_a_target_alone_is_its_root_and_the_absolute_form_is_read(frontend_server: StartFrontend) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        for start in (b"/proxy2/upstream", b"http://front:80/proxy2/upstream"):
            line = b"GET " + start + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            assert (await raw(frontend.server.address.port, line)).startswith(b"HTTP/1.1 200")
        assert [head.split(b"\r\n")[0] for head in upstream.heads] == [b"GET / HTTP/1.1"] * 2


async def test_bytes_that_are_no_ascii_are_refused(
    frontend_server: StartFrontend, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        line = b"GET /proxy2/upstream/\xff\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert b" 400 " in (await raw(frontend.server.address.port, line)).split(b"\r\n")[0]
        assert upstream.heads == []
    assert not caplog.records


async def test_header_fields_of_a_request(frontend_server: StartFrontend) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        line = (
            b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nConnection: close, X-Mine\r\nX-Mine: 1\r\n"
            b"Keep-Alive: 5\r\n"
            b"Proxy-Authorization: Basic eA==\r\nTE: trailers\r\nTrailer: X\r\nUpgrade: h2c\r\nProxy-Connection: x\r\n"
            b"Cookie: a=b\r\nX-Twice: 1\r\nX-Twice: 2\r\nAuthorization: Bearer y\r\nVia: 1.0 first\r\n\r\n"
        )
        await raw(frontend.server.address.port, line)
        fields = sorted(upstream.heads[0].decode().split("\r\n")[1:-2])
        assert fields == [
            "Authorization: Bearer y",
            "Cookie: a=b",
            f"Host: 127.0.0.1:{upstream.port}",
            "Via: 1.0 first, 1.1 lmcache-frontend",
            "X-Forwarded-For: unknown, 127.0.0.1",  # `Via` shows somebody else
            "X-Forwarded-Host: localhost",
            "X-Forwarded-Prefix: /proxy2/upstream",
            "X-Forwarded-Proto: http",
            "X-Twice: 1",
            "X-Twice: 2",
        ]


async def test_header_fields_of_an_answer(frontend_server: StartFrontend) -> None:
    answer = (
        b"HTTP/1.1 207 Odd Words\r\nConnection: X-Mine\r\nX-Mine: 1\r\nKeep-Alive: timeout=5\r\nServer: theirs\r\n"
        b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nContent-Encoding: gzip\r\n"
        b"Proxy-Authenticate: x\r\nContent-Type: a/b\r\nContent-Length: 3\r\n\r\nraw"
    )
    async with serving(Upstream(answer)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        line = b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        head, _, body = (await raw(frontend.server.address.port, line)).partition(b"\r\n\r\n")
        assert body == b"raw"  # not decompressed on the way
        assert sorted(head.decode().split("\r\n")) == [
            "Connection: close",
            "Content-Encoding: gzip",
            "Content-Length: 3",
            "Content-Security-Policy: sandbox",
            "Content-Type: a/b",
            "Date: Thu, 01 Jan 1970 00:00:00 GMT",
            "HTTP/1.1 207 Odd Words",
            "Server: theirs",
            "Set-Cookie: a=1; Path=/proxy2/upstream/",
            "Set-Cookie: b=2; Path=/proxy2/upstream/",
            "X-Content-Type-Options: nosniff",
        ]


async def test_a_field_that_is_no_utf8_is_no_500(frontend_server: StartFrontend) -> None:
    async with serving(Upstream(b"HTTP/1.1 200 OK\r\nX-Odd: a\xffb\r\nContent-Length: 2\r\n\r\nok")) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        line = b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nX-In: a\xffb\r\nConnection: close\r\n\r\n"
        answer = await raw(frontend.server.address.port, line)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"X-Odd: a\xffb\r\n" in answer
        assert b"X-In: a\xffb\r\n" in upstream.heads[0]


@pytest.mark.parametrize("status", [204, 301, 304, 404, 500])
async def test_statuses_come_back_as_they_are(frontend_server: StartFrontend, status: int) -> None:
    length = "" if status in (204, 304) else "Content-Length: 0\r\n"
    answer = f"HTTP/1.1 {status} X\r\nLocation: /elsewhere\r\n{length}\r\n"
    async with serving(Upstream(answer.encode())) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        async with frontend.client.get("/proxy2/upstream/", allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (status, "/proxy2/upstream/elsewhere")
        assert upstream.connections == 1


@pytest.fixture
async def echo(frontend_server: StartFrontend) -> AsyncIterator[RunningFrontend]:
    """A frontend before a target that hashes what it gets and tells how it was framed."""

    async def hashed(request: web.Request) -> web.StreamResponse:
        digest = hashlib.sha256()
        async for chunk in request.content.iter_any():
            digest.update(chunk)
        framing = request.headers.get("Transfer-Encoding") or request.headers.get("Content-Length")
        return web.json_response([digest.hexdigest(), framing, request.headers.get("Content-Type")])

    async def large(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if "length" in request.query:
            response.content_length = 32 * MIB
        await response.prepare(request)
        for _ in range(32):
            await response.write(b"x" * MIB)
        return response

    app = web.Application()
    app.router.add_post("/hash", hashed)
    app.router.add_get("/large", large)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield await frontend_server(nodes=[{"name": "echo", "host": "127.0.0.1", "port": str(port)}])
    await runner.cleanup()


async def test_bodies_of_any_size_and_framing(echo: RunningFrontend) -> None:
    data = b"0123456789abcdef" * (2 * MIB)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(data), MIB):
            yield data[start : start + MIB]

    digest = hashlib.sha256(data).hexdigest()
    async with echo.client.post(
        "/proxy2/echo/hash", data=io.BytesIO(data), headers={"Content-Type": "a/b"}
    ) as response:
        assert await response.json() == [digest, str(len(data)), "a/b"]
    async with echo.client.post("/proxy2/echo/hash", data=pieces()) as response:
        assert (await response.json())[:2] == [digest, "chunked"]
    async with echo.client.post("/proxy2/echo/hash", skip_auto_headers=["Content-Type"]) as response:
        assert await response.json() == [hashlib.sha256().hexdigest(), "0", None]
    async with echo.client.post("/proxy2/echo/hash", data=b"x", expect100=True) as response:
        assert (await response.json())[0] == hashlib.sha256(b"x").hexdigest()
    for query in ("", "?length"):
        async with echo.client.get(f"/proxy2/echo/large{query}") as response:
            assert ("Content-Length" in response.headers) == bool(query)
            assert len(await response.read()) == 32 * MIB


async def test_bodies_stream_both_ways_before_they_end(frontend_server: StartFrontend) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while (size := int(await reader.readline(), 16)) > 0:
            piece = await reader.readexactly(size + 2)
            writer.write(b"%x\r\n" % size + piece)
        writer.write(b"0\r\n\r\n")
        await reader.read()

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        answered = asyncio.Event()

        async def sent() -> AsyncIterator[bytes]:
            yield b"first"
            await answered.wait()  # the second piece goes out only when the first has come back
            yield b"second"

        async with frontend.client.post("/proxy2/upstream/", data=sent()) as response:
            assert await asyncio.wait_for(response.content.readexactly(5), 10) == b"first"
            answered.set()
            assert await asyncio.wait_for(response.content.read(), 10) == b"second"


async def test_a_slow_reader_holds_the_target_back(frontend_server: StartFrontend) -> None:
    written = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        for _ in range(1000):
            writer.write(b"x" * MIB)
            await writer.drain()
            written += MIB

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        async with frontend.client.get("/proxy2/upstream/") as response:
            await response.content.readexactly(1)
            await asyncio.sleep(0.5)
            assert written < 64 * MIB


async def test_a_caller_that_leaves_ends_the_request_to_the_target(frontend_server: StartFrontend) -> None:
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read()
        gone.set()

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        _, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
        writer.write(b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(0.2)
        writer.close()
        await asyncio.wait_for(gone.wait(), 10)


@pytest.mark.parametrize(
    "answer",
    [
        [b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", b"nonsense\r\n"],
    ],
)
async def test_half_an_answer_never_looks_whole(frontend_server: StartFrontend, answer: list[bytes]) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in answer:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.1)

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        with pytest.raises(aiohttp.ClientError):
            async with frontend.client.get("/proxy2/upstream/") as response:
                await response.read()
        async with frontend.client.get("/health") as response:
            assert response.status == 200


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n", b"nonsense\r\n\r\n",
     b"HTTP/1.1 9999 X\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000 + b"\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n"],
)  # fmt: skip
async def test_what_speaks_no_http_is_a_502(frontend_server: StartFrontend, answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        async with frontend.client.get("/proxy2/upstream/") as response:
            assert response.status == 502
            assert (await response.json())["detail"].startswith("Error communicating with target service: ")


async def test_nobody_there_is_a_502(frontend_server: StartFrontend, tmp_path: Path) -> None:
    port = free_port()
    nodes = [
        {"name": "tcp", "host": "127.0.0.1", "port": port},
        {"name": "unix", "host": "localhost", "port": f"{tmp_path}/s"},
    ]
    frontend = await frontend_for(frontend_server, *nodes)
    async with frontend.client.get("/proxy2/tcp/") as response:
        detail = {"detail": f"Failed to connect to target service 127.0.0.1:{port}", "reason": "Connection refused"}
        assert (response.status, await response.json()) == (502, detail)
    async with frontend.client.get("/proxy2/unix/") as response:
        detail = {"detail": f"Failed to connect to socket: {tmp_path}/s", "reason": "No such file or directory"}
        assert (response.status, await response.json()) == (502, detail)


async def test_too_slow_is_a_504(frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_BYTE_SECONDS", 0.2)
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.2)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        async with frontend.client.get("/proxy2/upstream/") as response:
            detail = {"detail": f"Connection to target service 127.0.0.1:{upstream.port} timed out"}
            assert (response.status, await response.json()) == (504, detail)


async def test_one_client_per_target_keeps_its_connections(frontend_server: StartFrontend) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        for _ in range(5):
            async with frontend.client.get("/proxy2/upstream/") as response:
                assert await response.read() == b"ok"
        assert upstream.connections == 1


async def test_clients_of_unregistered_targets_are_bounded(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_UNREGISTERED_TARGETS", 3)
    async with serving(Upstream()) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        targets = frontend.server._runner.app[TARGETS]
        kept = await targets.get(next(frontend.server.cluster.registry.nodes()).address)
        for port in [free_port() for _ in range(10)]:
            async with frontend.client.get(f"/proxy/localhost/{port}/") as response:
                assert response.status == 502
        assert len(targets._targets) == 4
        assert kept in targets._targets.values()


async def test_a_dead_target_that_is_scraped_fills_no_log(
    frontend_server: StartFrontend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmcache_frontend.proxy")
    frontend = await frontend_server(nodes=[{"name": "gone", "host": "127.0.0.1", "port": free_port()}])
    async with frontend.client.get("/proxy2/gone/metrics") as response:
        assert response.status == 502
    assert caplog.records == []


@pytest.mark.parametrize(
    ("path", "status", "detail"),
    [
        ("/proxy/10.0.0.1/80/x", 403, "Target 10.0.0.1:80 is not a registered node"),
        ("/proxy/h/99999/x", 400, "'99999': expected a port from 1 to 65535"),
        ("/proxy/h/abc/x", 400, "'abc': expected a port"),
        ("/proxy/a%20b/80/x", 400, "'a b': expected a host name"),
        ("/proxy/%0d%0a/80/x", 400, "expected a host name"),
        (f"/proxy/h/%2F{'x' * 200}/x", 400, "201 bytes, but the path of a Unix socket has at most 107"),
        ("/proxy/h/%2Ftmp%00/x", 400, "no control"),
        ("/proxy/h", 404, "Not Found"),
        ("/proxy2/nobody/x", 404, "Node with name 'nobody' not found"),
        ("/proxy2/%F0%9F/x", 404, "not found"),
        ("/nowhere", 404, "Not Found"),
    ],
)
async def test_refusals(frontend_server: StartFrontend, path: str, status: int, detail: str) -> None:
    frontend = await frontend_server()
    line = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    answer = await raw(frontend.server.address.port, line)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"Content-Type: application/json\r\n" in answer
    assert detail.encode() in answer


async def test_a_request_whose_body_breaks_is_no_500(
    frontend_server: StartFrontend, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        head = b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = await raw(frontend.server.address.port, head + b"4\r\nhalf\r\nnonsense\r\n")
        assert b" 500 " not in answer
        _, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
        writer.write(head + b"4\r\nhalf\r\n")
        await asyncio.sleep(0.1)
        writer.write(b"nonsense\r\n")
        await asyncio.sleep(0.1)
        writer.close()
        async with frontend.client.get("/health") as response:
            assert response.status == 200
    assert [record for record in caplog.records if record.exc_info] == []


async def test_a_compressed_body_goes_on_as_it_came(frontend_server: StartFrontend) -> None:
    """Were it unfolded on the way, its length would lie: the target would read the next request as the rest of this."""
    body = gzip.compress(b"x" * 100_000)
    got = b""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        head = await reader.readuntil(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}\r\n".encode() in head
        got = await reader.readexactly(len(body))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.read()

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        headers = {"Content-Encoding": "gzip"}
        async with frontend.client.post("/proxy2/upstream/", data=body, headers=headers) as response:
            assert response.status == 200
    assert got == body


async def test_what_another_sites_page_asks_is_refused(frontend_server: StartFrontend) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        async with frontend.client.post("/proxy2/upstream/", headers={"Origin": "http://evil.example"}) as response:
            assert response.status == 403
        assert upstream.heads == []


async def test_many_targets_at_once(frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_UNREGISTERED_TARGETS", 3)
    frontend = await frontend_server()

    async def ask(port: int) -> int:
        async with frontend.client.get(f"/proxy/localhost/{port}/") as response:
            return response.status

    for _ in range(5):
        assert set(await asyncio.gather(*(ask(free_port()) for _ in range(40)))) == {502}


@pytest.mark.parametrize("host", ["[::1%25a@[fd00::2]]", "[::1%25a@x]", "a..b", "x" * 64, "[::1%25]"])
async def test_hosts_that_hide_another(frontend_server: StartFrontend, host: str) -> None:
    frontend = await frontend_server()
    line = f"GET /proxy/{host}/80/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    assert (await raw(frontend.server.address.port, line)).startswith(b"HTTP/1.1 400 ")


async def test_an_http_1_0_caller_sees_the_end_of_an_answer_without_length(frontend_server: StartFrontend) -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    async with serving(Upstream(answer)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        line = b"GET /proxy2/upstream/ HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n"
        assert (await asyncio.wait_for(raw(frontend.server.address.port, line), 10)).endswith(b"\r\n\r\nok")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nX: a\x01b\r\nContent-Length: 2\r\n\r\nok", (200, 502)),
        (b"HTTP/1.1 200 a\x01b\r\nContent-Length: 2\r\n\r\nok", (200, 502)),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", (502,)),
        (b"HTTP/1.1 099 X\r\nContent-Length: 2\r\n\r\nok", (502,)),
    ],
)
async def test_answers_that_cannot_go_on_as_they_are(
    frontend_server: StartFrontend, answer: bytes, status: tuple[int, ...]
) -> None:
    async with serving(Upstream(answer)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        async with frontend.client.get("/proxy2/upstream/") as response:
            assert response.status in status


@pytest.mark.parametrize("size", [MIB, 64 * MIB])
async def test_a_caller_that_never_reads_does_not_hold_the_target(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.5)
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 * MIB) + b"x" * size)
        try:
            await reader.read()  # until the frontend lets go, by an end or by a reset
        finally:
            gone.set()

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        with socket.socket() as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            caller.connect(("127.0.0.1", frontend.server.address.port))
            caller.sendall(b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.wait_for(gone.wait(), 10)


async def test_a_caller_that_stops_sending_does_not_hold_the_target(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.5)
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        gone.set()

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        with socket.socket() as caller:
            caller.connect(("127.0.0.1", frontend.server.address.port))
            caller.sendall(b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
            await asyncio.wait_for(gone.wait(), 10)


async def test_every_via_goes_on(frontend_server: StartFrontend) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_for(frontend_server, upstream.node)
        line = b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nVia: 1.0 a\xff\r\n"
        line += b"Via: 1.1 b\r\nConnection: close\r\n\r\n"
        assert (await raw(frontend.server.address.port, line)).startswith(b"HTTP/1.1 200")
        assert b"Via: 1.0 a\xff, 1.1 b, 1.1 lmcache-frontend\r\n" in upstream.heads[0]


async def test_one_large_piece_to_a_caller_that_never_reads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """How large the pieces of an answer are is the network's choice; here it is ours, so its reader is made."""
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.5)
    ended = asyncio.Event()

    class OnePiece:
        status, reason, fields = 200, b"OK", [(b"Content-Length", b"%d" % (32 * MIB))]

        def take(self) -> tuple[bytes, bool]:
            return b"x" * (32 * MIB), True

        async def wait(self) -> None: ...

        def release(self) -> None: ...

    async def handler(request: web.Request) -> web.StreamResponse:
        answer: Answer = OnePiece()
        try:
            return await answering.send_back(request, answer, answer.fields, answering.Traffic())
        finally:
            ended.set()

    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        with socket.socket() as caller:
            caller.connect(("127.0.0.1", port))
            caller.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.wait_for(ended.wait(), 5)
    finally:
        await runner.cleanup()
