"""The front of the server: what it serves itself, what it hands over, and that nobody can tell the two apart."""

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import web

from lmcache_frontend import server
from lmcache_frontend.proxy import front, fronted, limits, passing
from lmcache_frontend.proxy.front import MAX_PIPELINED_BYTES, Others
from lmcache_frontend.proxy.head import MAX_HEAD_BYTES
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_frontend.telemetry.health.board import HealthBoard
from tests.frontend.upstream import Upstream, raw, serving

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter

PROXIED = b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\n\r\n"
OTHER = b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /proxy2/upstream/last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(autouse=True)
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HealthBoard, "start", lambda board: None)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is handed over, as it is."""
    found: list[bytes] = []
    real = fronted.handing_to

    def noting(to: web.Server) -> Others:
        others = real(to)

        def hand_over(transport: asyncio.Transport, data: bytes) -> None:
            found.append(data)
            others(transport, data)

        return hand_over

    monkeypatch.setattr(fronted, "handing_to", noting)
    return found


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[front._Connection]:
    """The front's connections as they come."""
    connections: list[front._Connection] = []
    real = front.Front.came

    def noting(self: front.Front, connection: front._Connection) -> None:
        connections.append(connection)
        real(self, connection)

    monkeypatch.setattr(front.Front, "came", noting)
    return connections


def small_buffer(connection: front._Connection) -> asyncio.Transport:
    """Have the kernel keep little of what is written to a connection."""
    transport = connection.transport
    assert transport is not None
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return transport


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with serving(Upstream()) as found:
        yield found


@pytest.fixture
async def frontend(upstream: Upstream, handed: list[bytes], frontend_server: StartFrontend) -> RunningFrontend:
    return await frontend_server(nodes=[upstream.node])


def statuses(answers: bytes) -> list[bytes]:
    return re.findall(rb"HTTP/1\.1 (\d+) ", answers)


async def read_answer(reader: Reader) -> bytes:
    head = b"HTTP/1.1 1"
    while head.startswith(b"HTTP/1.1 1"):  # an answer before the answer
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    length = re.search(rb"(?i)content-length: (\d+)", head)
    assert length is not None
    return head + await reader.readexactly(int(length[1]))


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


# -- handing over


@pytest.mark.parametrize("before", [0, 1, 5])
async def test_other_requests_are_handed_over(
    frontend: RunningFrontend, handed: list[bytes], upstream: Upstream, before: int
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
    for _ in range(before):
        writer.write(PROXIED)
        assert (await read_answer(reader)).endswith(b"\r\n\r\nok")
    assert handed == []
    for request in (OTHER, PROXIED, OTHER, PROXIED):  # and the connection is as good as any
        writer.write(request)
        assert (await read_answer(reader)).startswith(b"HTTP/1.1 200 ")
    assert handed == [OTHER]
    assert len(upstream.heads) == before + 2
    writer.close()


@pytest.mark.parametrize("requests", [[PROXIED] * 3, [OTHER, PROXIED], [PROXIED, OTHER, PROXIED], [PROXIED, OTHER] * 3])
async def test_pipelined_requests_are_answered_in_their_order(
    frontend: RunningFrontend, handed: list[bytes], upstream: Upstream, requests: list[bytes]
) -> None:
    answers = await raw(frontend.server.address.port, b"".join([*requests, LAST]))
    assert statuses(answers) == [b"200"] * (len(requests) + 1)
    kinds = [OTHER if b'"status"' in one or b"ready" in one else PROXIED for one in answers.split(b"HTTP/1.1 ")[1:-1]]
    assert kinds == requests
    first = requests.index(OTHER) if OTHER in requests else None
    assert handed == ([] if first is None else [b"".join([*requests[first:], LAST])])
    assert upstream.heads[-1].startswith(b"GET /last ")


@pytest.mark.parametrize("request_bytes", [PROXIED, OTHER], ids=["proxied", "other"])
async def test_a_head_in_two_pieces_split_at_every_byte(
    frontend: RunningFrontend, handed: list[bytes], request_bytes: bytes
) -> None:
    for at in range(1, len(request_bytes)):
        reader, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
        writer.write(request_bytes[:at])
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        writer.write(request_bytes[at:])
        assert (await read_answer(reader)).startswith(b"HTTP/1.1 200 "), at
        writer.close()
    assert handed == [OTHER] * (len(request_bytes) - 1) * (request_bytes == OTHER)


async def test_a_head_in_pieces_of_one_byte(frontend: RunningFrontend, handed: list[bytes]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
    for byte in PROXIED + LAST:
        writer.write(bytes([byte]))
        await asyncio.sleep(0.0005)
    assert statuses(await asyncio.wait_for(reader.read(-1), 10)) == [b"200", b"200"]
    assert handed == []
    writer.close()


async def test_bodies_and_upgrades_are_handed_over(frontend: RunningFrontend, handed: list[bytes]) -> None:
    start = b"POST /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2\r\n\r\n"
    assert statuses(await raw(frontend.server.address.port, start + b"ok")) == [b"200"]
    assert b"".join(handed).startswith(start)


# -- bounds


@pytest.mark.parametrize("before", [0, 1])
async def test_a_slow_head_is_cut_off(frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
    for _ in range(before):
        writer.write(PROXIED)
        await read_answer(reader)
    began = time.monotonic()
    for byte in PROXIED:
        writer.write(bytes([byte]))
        try:
            assert await asyncio.wait_for(reader.read(), 0.05) == b""
            break
        except asyncio.TimeoutError:
            continue
    else:
        pytest.fail("a piece now and then kept it open")
    assert time.monotonic() - began < 2
    writer.close()


async def test_idle_connections_are_closed(frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_frontend.proxy.front.KEEPALIVE_SECONDS", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
    writer.write(PROXIED)
    await read_answer(reader)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_long_heads(frontend: RunningFrontend, handed: list[bytes]) -> None:
    start = b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    many = b"".join(b"X-%d: %b\r\n" % (number, b"v" * 1000) for number in range(20))
    assert statuses(await raw(frontend.server.address.port, start + many + b"\r\n")) == [b"200"]
    answer = await raw(frontend.server.address.port, start + b"X: " + b"v" * (MAX_HEAD_BYTES + 100))  # without an end
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert len(handed) == 2


async def test_what_is_pipelined_is_bounded(frontend: RunningFrontend, upstream: Upstream) -> None:
    asked = asyncio.Event()
    goes_on = asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            asked.set()
            await goes_on.wait()
            writer.write(upstream.answer)

    upstream.talk = talk
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
    count = (MAX_PIPELINED_BYTES * 3) // len(PROXIED)
    writer.write(PROXIED)
    await asyncio.wait_for(asked.wait(), 10)
    writer.write(PROXIED * count + LAST)
    goes_on.set()
    answers = await asyncio.wait_for(reader.read(-1), 30)
    assert statuses(answers) == [b"200"] * (count + 2)
    writer.close()


# -- the two ways in are one

BAD = [
    b"GET /proxy2/nobody/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy2/nobody/a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"GET /proxy2/nobody/a HTTP/1.0\r\n\r\n",
    b"GET /proxy2/nobody/a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"HEAD /proxy2/nobody/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy2/nobody/a HTTP/1.1\r\n\r\n",
    b"GET /proxy2/nobody/a HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET /proxy/10.0.0.1/80/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy/a%20b/80/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy/localhost/0/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy/localhost/%252Fetc%252Fpasswd/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy/localhost/%2Fproc%2Fself%2F..%2F/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy/2130706433/1/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy/[::ffff:10.0.0.1]/80/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy/{x}/80/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy/localhost HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy2/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy2//a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /%70roxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /Proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy2/upstream#/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http:///proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy2/up\xffstream/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy2/upstream/\xe9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"DELETE /proxy2/upstream/a HTTP/1.1\r\nHost: rebound.example\r\n\r\n",
    b"GET /proxy2/upstream/env HTTP/1.1\r\nHost: rebound.example\r\n\r\n",
    b"GET /proxy2/upstream/%65nv HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n",
    b"GET /proxy2/upstream/loglevel?level=DEBUG HTTP/1.1\r\nHost: localhost\r\nForwarded: for=10.0.0.1\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: same-origin\r\nSec-Fetch-Site: x\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong\r\nX-Real-IP: 1.2.3.4\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nVia: " + b"1.1 lmcache-frontend, " * 20 + b"x\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nX: a\nb: c\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nX : a\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nSec-WebSocket-Key1: x\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nUser-Agent: a\r\nUser-Agent: b\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/2.0\r\nHost: localhost\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.2\r\nHost: localhost\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\nHost: localhost\n\n",
    b"GET  /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"G\x01T /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT upstream:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
    b"GET /proxy2/upstream/" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 200 + b"\r\n",
]  # fmt: skip

_VARIES = re.compile(rb"(?m)^Date: .*?\r$")


async def test_bad_requests_are_answered_alike_to_the_byte(
    upstream: Upstream, frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[RunningFrontend] = []
    for kind in (fronted.FrontedRunner, web.AppRunner):
        monkeypatch.setattr(server, "FrontedRunner", kind)
        ways.append(await frontend_server(nodes=[upstream.node], token="t" * 16))

    async def ask(frontend: RunningFrontend, request: bytes) -> bytes:
        """The answer, and that of a further request where the connection is kept."""
        closes = b"close" in request or (b"HTTP/1.0" in request and b"keep-alive" not in request)
        answer = await raw(frontend.server.address.port, request if closes else request + LAST)
        return _VARIES.sub(b"", answer)

    for request in BAD:
        front, aiohttps = await asyncio.gather(*(ask(way, request) for way in ways))
        assert front == aiohttps, request
        assert front, request


async def test_http_1_0(frontend: RunningFrontend, handed: list[bytes]) -> None:
    start = b"GET /proxy2/upstream/a HTTP/1.0\r\n"
    answer = await raw(frontend.server.address.port, start + b"\r\n")
    assert answer.endswith(b"\r\n\r\nok")
    assert b"Connection: close\r\n" in answer
    answers = await raw(frontend.server.address.port, start + b"Connection: keep-alive\r\n\r\n" + start + b"\r\n")
    assert statuses(answers) == [b"200", b"200"]
    assert b"Connection: keep-alive\r\n" in answers
    assert handed == []


async def test_changes_are_in_the_audit_log_and_every_request_is_counted_once(
    upstream: Upstream, handed: list[bytes], frontend_server: StartFrontend, tmp_path: Path
) -> None:
    log = tmp_path / "audit"
    frontend = await frontend_server(nodes=[upstream.node], audit_log=str(log))
    port = frontend.server.address.port
    change = b"DELETE /proxy2/upstream/cache/clear?token=x HTTP/1.1\r\nHost: localhost\r\n\r\n"
    refused = change.replace(b"localhost", b"rebound.example")
    answers = await raw(port, change + PROXIED * 3 + refused + LAST)
    assert statuses(answers) == [b"200"] * 4 + [b"401", b"200"]
    assert handed == []
    async with frontend.client.get("/metrics?scope=all") as response:
        text = await response.text()
    assert 'lmcache_frontend_proxy_requests_total{code="2xx",node="upstream",proxy="local_proxy"} 5.0' in text
    await frontend.server.stop()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["method"], line["path"], line["status"], line["who"]) for line in lines] == [
        ("DELETE", "/proxy2/upstream/cache/clear", 200, "local")
    ]
    assert lines[0]["query"] != {"token": "x"}


# -- what is not judged anew


async def test_a_node_that_is_gone_is_gone_at_once(frontend: RunningFrontend) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
    for _ in range(3):
        writer.write(PROXIED)
        assert (await read_answer(reader)).startswith(b"HTTP/1.1 200 ")
    frontend.server.cluster.registry.publish("nodes", [])
    writer.write(PROXIED)
    assert (await read_answer(reader)).startswith(b"HTTP/1.1 404 ")
    writer.close()


async def test_who_shows_a_token_or_changes_something_is_judged_each_time(
    upstream: Upstream, frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    frontend = await frontend_server(nodes=[upstream.node], token="t" * 16)
    passed_again: list[str] = []
    again = passing.again

    async def noting(request: passing.Proxying, passed: passing.Passed) -> web.StreamResponse:
        passed_again.append(request.raw_path)
        return await again(request, passed)

    monkeypatch.setattr(passing, "again", noting)
    with_token = PROXIED[:-2] + b"X-Real-IP: 1.2.3.4\r\nAuthorization: Bearer " + b"t" * 16 + b"\r\n\r\n"
    change = PROXIED.replace(b"GET", b"DELETE")
    port = frontend.server.address.port
    assert statuses(await raw(port, with_token * 3 + change * 3 + LAST)) == [b"200"] * 7
    assert passed_again == []
    assert statuses(await raw(port, PROXIED * 4 + LAST)) == [b"200"] * 5
    assert passed_again == ["/proxy2/upstream/a"] * 2
    monkeypatch.setattr(passing, "JUDGED_SECONDS", 0.0)
    assert statuses(await raw(port, PROXIED * 3 + LAST)) == [b"200"] * 4
    assert len(passed_again) == 2


async def test_answers_that_begin_alike_are_told_apart(frontend: RunningFrontend, upstream: Upstream) -> None:
    head = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 3\r\n\r\n"
    said = [
        [head + b"one"],
        [head + b"two"],
        [head, b"thr"],
        [head[:-10], head[-10:] + b"fo", b"u"],
        [head + b"f", b"iv"],
        [b"HTTP/1.1 200 OK\r\nX-A: 2\r\nContent-Length: 3\r\n\r\nsix"],
        [b"HTTP/1.1 103 Early\r\n\r\n" + head + b"sev"],
        [b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 0\r\n\r\n"],
        [head + b"nin"],
    ]
    bodies = [b"one", b"two", b"thr", b"fou", b"fiv", b"six", b"sev", b"", b"", b"nin"]

    async def talk(reader: Reader, writer: Writer) -> None:
        for pieces in said:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.01)

    upstream.talk = talk
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
    for body in bodies:
        writer.write(PROXIED)
        answer = await read_answer(reader)
        assert answer.partition(b"\r\n\r\n")[2] == body
        assert (b"X-A: 2\r\n" in answer) == (body == b"six")
        assert answer.count(b"Content-Length: ") == 1
    assert upstream.connections == 1
    writer.close()


# -- ends


async def test_a_caller_that_leaves_ends_its_request(frontend: RunningFrontend, upstream: Upstream) -> None:
    seen: list[str] = []

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.append("asked")
        await reader.read()
        seen.append("left")

    upstream.talk = talk
    _, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
    writer.write(PROXIED)
    await until(lambda: seen)
    writer.close()
    await until(lambda: len(seen) == 2)


@pytest.mark.parametrize("takes", [0.1, 60.0])
async def test_requests_in_flight_may_end_when_the_server_stops(
    upstream: Upstream, frontend_server: StartFrontend, takes: float
) -> None:
    asked = asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await asyncio.sleep(takes)
        writer.write(upstream.answer)
        await writer.drain()

    upstream.talk = talk
    async with AsyncExitStack() as stack:
        frontend = await frontend_server(nodes=[upstream.node])
        port = frontend.server.address.port
        connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        stack.callback(lambda: [writer.close() for _, writer in connections])
        idle, (reader, writer) = connections[0][0], connections[1]
        writer.write(PROXIED)
        await asyncio.wait_for(asked.wait(), 10)
        began = time.monotonic()
        await frontend.server.stop()
        assert time.monotonic() - began < 10
        assert await asyncio.wait_for(idle.read(), 10) == b""
        try:
            answer = await asyncio.wait_for(reader.read(), 10)
        except ConnectionResetError:
            answer = b""
        assert statuses(answer) == ([b"200"] if takes < 1 else [])


async def test_the_server_stops_within_its_time_whoever_holds_it_up(
    frontend: RunningFrontend, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def talk(reader: Reader, writer: Writer) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        asked += 1
        await asyncio.sleep(60)

    upstream.talk = talk
    writers = []
    for request in (PROXIED, PROXIED[:-2] + b"Cookie: a=b\r\n\r\n"):  # this one by aiohttp's server
        _, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
        writer.write(request)
        writers.append(writer)
    await until(lambda: asked == 2)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await frontend.server.stop()
    assert server.DRAIN_SECONDS / 2 < loop.time() - began < server.DRAIN_SECONDS * 1.3
    for writer in writers:
        writer.close()


# -- callers that do not read


async def test_nothing_piles_up_for_who_does_not_read(
    frontend: RunningFrontend, found: list[front._Connection]
) -> None:
    """Neither its requests nor the answers; not even of refusals, which no target holds back."""
    refused = b"GET /proxy2/nobody/a HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
    loop = asyncio.get_running_loop()
    with socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        late.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        late.setblocking(False)
        await loop.sock_connect(late, ("127.0.0.1", frontend.server.address.port))
        await until(lambda: found)
        transport = small_buffer(found[0])
        most = 0
        deadline = time.monotonic() + 10
        while not found[0].writing_paused and time.monotonic() < deadline:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(loop.sock_sendall(late, refused), 0.02)
            most = max(most, len(found[0]._pending))
        await asyncio.sleep(0.1)
        assert most <= MAX_PIPELINED_BYTES + (256 << 10)  # and what is read at once
        assert transport.get_write_buffer_size() < 128 << 10
        assert found[0].writing_paused


async def test_who_leaves_while_it_is_not_read_ends_its_request(frontend: RunningFrontend, upstream: Upstream) -> None:
    seen: list[str] = []

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.append("asked")
        await reader.read()
        seen.append("left")

    upstream.talk = talk
    _, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
    writer.write(PROXIED)
    await until(lambda: seen)
    writer.write(PROXIED * (2 * MAX_PIPELINED_BYTES // len(PROXIED)))
    await asyncio.sleep(0.05)
    writer.close()
    await until(lambda: len(seen) == 2)


@pytest.mark.parametrize("by_aiohttps", [False, True])
async def test_who_never_reads_the_last_of_an_answer_is_cut_off(
    upstream: Upstream,
    frontend_server: StartFrontend,
    found: list[front._Connection],
    monkeypatch: pytest.MonkeyPatch,
    by_aiohttps: bool,
) -> None:
    """What waits here is too little for the request to wait for it."""
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.5)
    upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n" + bytes(20_000)
    frontend = await frontend_server(nodes=[upstream.node])
    loop = asyncio.get_running_loop()
    with socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        late.setblocking(False)
        await loop.sock_connect(late, ("127.0.0.1", frontend.server.address.port))
        request = PROXIED[:-2] + (b"Cookie: a=b\r\n\r\n" if by_aiohttps else b"\r\n")
        await until(lambda: found)
        transport = found[0].transport
        assert transport is not None
        while not transport.get_write_buffer_size() and not transport.is_closing():
            count = len(upstream.heads)
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(late, request)
            await until(lambda count=count: len(upstream.heads) > count or transport.is_closing())  # type: ignore[misc]
            await asyncio.sleep(0.005)
        await until(transport.is_closing)
