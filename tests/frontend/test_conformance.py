"""What HTTP/1.1 asks of a proxy, with a bare socket on both sides, on each way in and over both transports.

`test_proxy.py` asks the same of the native one with a client's help; what it shows is not shown again. Which test shows
what, in the order in which they come:

| claim | tests that begin with |
| --- | --- |
| any method, path and query byte for byte | `method_path` |
| bodies sized and chunked, of any size, both ways; trailers dropped | `a_sized_`, `a_chunked_` |
| bodies are streams, held back both ways | `who_does_not_read`, `a_slow_end_of_a_tunnel` |
| repeated and odd fields; compressed bodies | `repeated_`, `a_compressed_` |
| hop-by-hop; `Via`, `X-Forwarded-*`; `Location`, cookies | `hop_by_hop_`, `who_asked_`, `a_location_`, `a_cookies_` |
| ambiguous framing is 400, also behind the head | `ambiguous_`, `broken_framing_` |
| HEAD, 204, 304, an end that is the connection's | `head_has`, `answers_without`, `an_answer_that_ends` |
| 1xx | `interim_`, `slow_interim_` |
| `Expect: 100-continue` | `a_body_is_`, `a_body_that_the_target_refuses`, `a_target_that_knows_no_expect` |
| events and long polls without delay | `events_`, `a_late_answer` |
| who leaves, in every phase | `a_caller_that_leaves`, `callers_that_leave_`, `who_leaves_`, `who_breaks_` |
| a cut body is no clean end | `an_upstream_that_dies`, `a_cut_body` |
| stale connections | `a_stale_`, `what_may_not`, `a_connection_closed` |
| an answer before the end of the body | `an_answer_before`, `a_refusal_of`, `a_body_that_breaks` |
| times: connect, first byte, idle, upgrade idle | `no_connection_`, `no_first_`, `an_answer_that_stops`, `an_idle_` |
| bounds: heads, connections, waiters; overload | `a_head_without_end`, `overload_`, `connections_in_all` |
| a target that keeps failing; half-open | `a_target_that_keeps_failing`, `one_alone_tries` |
| websocket and other upgrades | `an_upgraded_`, `the_targets_end`, `an_upgrade_may`, `another_`, `a_tunnel_ends` |
| a target that splits or repeats answers | `an_answer_that_could`, `what_follows`, `a_body_that_comes_after` |
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web

from lmcache_api.pytest_plugin import free_port
from lmcache_frontend import server
from lmcache_frontend.app import TARGETS
from lmcache_frontend.proxy import limits, transport
from lmcache_frontend.proxy.native import NativeTransport, Room
from lmcache_frontend.proxy.plain import PlainTransport
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_shared.address import Address
from tests.frontend.upstream import Talk, Upstream, raw, serving

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Ask = Callable[[bytes], "asyncio.Future[bytes]"]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.fixture(autouse=True, params=["front-native", "aiohttp-native", "aiohttp-plain"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs by the front and by aiohttp's server, over both transports; no node is checked meanwhile."""
    monkeypatch.setattr(HealthBoard, "start", lambda board: None)
    way, _, kind = request.param.partition("-")
    if way == "aiohttp":
        monkeypatch.setattr(server, "FrontedRunner", web.AppRunner)
    if kind == "plain":

        def plain(address: Address, room: Room) -> PlainTransport:
            return PlainTransport(address)

        monkeypatch.setattr(transport, "NativeTransport", plain)
    else:
        assert transport.NativeTransport is NativeTransport
    return str(kind)


native_only = pytest.mark.parametrize("kind", ["native"], indirect=True)
"""Where aiohttp's client has no such thing to show; why is told there."""


class Between:
    """A frontend before one bare upstream."""

    def __init__(self, upstream: Upstream, frontend: RunningFrontend) -> None:
        self.upstream = upstream
        self.frontend = frontend
        self.port = frontend.server.address.port

    async def ask(self, start: str, *fields: str, body: bytes = b"", version: str = "1.1") -> tuple[bytes, bytes]:
        """The head and the rest of all that comes back on a connection of its own, until it is closed."""
        lines = [f"{start} HTTP/{version}", "Host: localhost", "Connection: close", *fields, "", ""]
        answer = await raw(self.port, "\r\n".join(lines).encode("latin-1") + body, 1 << 23)
        head, _, rest = answer.partition(b"\r\n\r\n")
        return head, rest

    async def connect(self) -> tuple[Reader, Writer]:
        return await asyncio.open_connection("127.0.0.1", self.port)


@pytest.fixture
async def between(frontend_server: StartFrontend) -> AsyncIterator[Between]:
    async with serving(Upstream(OK)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        yield Between(upstream, frontend)


def fields_of(head: bytes, name: str) -> list[bytes]:
    pairs = [line.partition(b": ") for line in head.split(b"\r\n")[1:]]
    return [value for key, _, value in pairs if key.lower() == name.lower().encode()]


def answering(*pieces: bytes, pause: float = 0.0, close: bool = False) -> Talk:
    """Each request's head is answered with these pieces."""

    async def talk(reader: Reader, writer: Writer) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
            if close:
                return

    return talk


# -- requests


@pytest.mark.parametrize(
    "path",
    [
        "/..",
        "/a/../../b",
        "//",
        "//a//",
        "/%2F%2f..%2F",
        "/;a=b;c",
        "/a;v=1/b",
        "/%C3%A9%FF",
        "/a?b=%2B+%20&b&&=",
        "/?",
    ],
)
@pytest.mark.parametrize("method", ["GET", "DELETE", "PROPFIND", "M-SEARCH"])
async def test_method_path_and_query_byte_for_byte(between: Between, method: str, path: str) -> None:
    head, body = await between.ask(f"{method} /proxy2/upstream{path}")
    assert (head.split(b"\r\n")[0], body) == (b"HTTP/1.1 200 OK", b"ok")
    assert between.upstream.heads[0].split(b"\r\n")[0] == f"{method} {path} HTTP/1.1".encode()


async def read_body(reader: Reader, head: bytes) -> bytes:
    """A request's body as it is framed, its framing checked."""
    lengths = fields_of(head, "Content-Length")
    if lengths:
        assert not fields_of(head, "Transfer-Encoding")
        return await reader.readexactly(int(lengths[0]))
    assert fields_of(head, "Transfer-Encoding") == [b"chunked"]
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    assert await reader.readexactly(2) == b"\r\n", "no trailers come through"
    return body


@pytest.fixture
def bodies(between: Between) -> list[bytes]:
    found: list[bytes] = []

    async def talk(reader: Reader, writer: Writer) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            between.upstream.heads.append(head)
            found.append(await read_body(reader, head))
            writer.write(OK)

    between.upstream.talk = talk
    return found


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
async def test_a_sized_body_stays_sized(between: Between, bodies: list[bytes], size: int) -> None:
    sent = bytes(range(256)) * (size // 256 + 1)
    head, _ = await between.ask("POST /proxy2/upstream/", f"Content-Length: {size}", body=sent[:size])
    assert head.startswith(b"HTTP/1.1 200 ")
    assert bodies == [sent[:size]]
    assert fields_of(between.upstream.heads[0], "Content-Length") == [str(size).encode()]


@pytest.mark.parametrize("pieces", [0, 1, 3, 200])
async def test_a_chunked_body_stays_chunked_and_its_trailers_are_dropped(
    between: Between, bodies: list[bytes], pieces: int
) -> None:
    chunk = b"c" * 10_000
    framed = b"2710;extension=1\r\n" + chunk + b"\r\n"
    body = framed * pieces + b"0\r\nX-Trailer: 1\r\n\r\n"
    head, _ = await between.ask("PUT /proxy2/upstream/", "Transfer-Encoding: chunked", "Trailer: X-Trailer", body=body)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert bodies == [chunk * pieces]
    assert not fields_of(between.upstream.heads[0], "Trailer")


async def test_repeated_and_odd_fields_go_on_in_their_order(between: Between, kind: str) -> None:
    await between.ask(
        "GET /proxy2/upstream/", "X-A: 1", "x-b: 2, 3", "X-A: 4", "X-Empty:", "X-Latin: \xe9", "Cookie: a=b"
    )
    lines = between.upstream.heads[0].split(b"\r\n")
    assert [line for line in lines if line.lower().startswith(b"x-a")] == [b"X-A: 1", b"X-A: 4"]
    assert b"x-b: 2, 3" in lines
    assert fields_of(between.upstream.heads[0], "X-Empty") == [b""]
    latin = b"\xe9" if kind == "native" else b"?"
    assert fields_of(between.upstream.heads[0], "X-Latin") == [latin]


async def test_hop_by_hop_fields_stop_here(between: Between) -> None:
    between.upstream.answer = (
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Theirs, Content-Length\r\nX-Theirs: 1\r\nKeep-Alive: x\r\n"
        b"Trailer: X\r\nProxy-Authenticate: x\r\nUpgrade: h2c\r\nX-Kept: 1\r\nContent-Length: 2\r\n\r\nok"
    )
    reader, writer = await between.connect()
    writer.write(
        b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nConnection: X-Mine, , Host\r\nX-Mine: 1\r\n"
        b"TE: trailers\r\nKeep-Alive: 1\r\nProxy-Connection: x\r\nProxy-Authorization: x\r\nX-Kept: 1\r\n\r\n"
    )
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert await reader.readexactly(2) == b"ok"
    writer.close()
    for seen in (head, between.upstream.heads[0]):
        names = {line.partition(b":")[0].lower() for line in seen.split(b"\r\n")}
        assert names.isdisjoint(
            {b"x-theirs", b"x-mine", b"keep-alive", b"te", b"trailer", b"upgrade", b"proxy-connection"}
            | {b"proxy-authenticate", b"proxy-authorization", b"connection"}
        )
        assert b"x-kept" in names
    assert fields_of(head, "Content-Length") == [b"2"]
    assert len(fields_of(between.upstream.heads[0], "Host")) == 1


async def test_who_asked_for_what_is_told(between: Between) -> None:
    await between.ask("GET /proxy2/upstream/a")
    head = between.upstream.heads[0]
    assert fields_of(head, "Via") == [b"1.1 lmcache-frontend"]
    assert fields_of(head, "X-Forwarded-For") == [b"127.0.0.1"]
    assert fields_of(head, "X-Forwarded-Host") == [b"localhost"]
    assert fields_of(head, "X-Forwarded-Proto") == [b"http"]
    assert fields_of(head, "X-Forwarded-Prefix") == [b"/proxy2/upstream"]
    await between.ask(
        f"GET /proxy/127.0.0.1/{between.upstream.port}/a",
        "Via: 1.1 first",
        "X-Forwarded-For: 10.0.0.1",
        "X-Forwarded-For: 10.0.0.2",
        "X-Forwarded-Host: outside",
        "X-Forwarded-Proto: https",
        "X-Forwarded-Prefix: /ops/",
    )
    head = between.upstream.heads[1]
    assert fields_of(head, "Via") == [b"1.1 first, 1.1 lmcache-frontend"]
    assert fields_of(head, "X-Forwarded-For") == [b"10.0.0.1, 10.0.0.2, 127.0.0.1"]
    assert fields_of(head, "X-Forwarded-Host") == [b"outside"]
    assert fields_of(head, "X-Forwarded-Proto") == [b"https"]
    prefix = f"/ops/proxy/127.0.0.1/{between.upstream.port}"
    assert fields_of(head, "X-Forwarded-Prefix") == [prefix.encode()]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
        b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"Content-Length: 2, 2\r\n\r\nok",
        b"Content-Length: +2\r\n\r\nok",
        b"Content-Length: 0x2\r\n\r\nok",
        b"Content-Length: -1\r\n\r\nok",
        b"Content-Length: 99999999999999999999999\r\n\r\nok",
        b"Content-Length : 2\r\n\r\nok",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n11111111111111111\r\na\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n",
        b"X-A: 1\nX-B: 2\r\n\r\n",
        b"X-A: 1\n\n",
        b" X-Folded: 1\r\n\r\n",
        b"X-A: 1\r\n folded\r\n\r\n",
        b"X-A: a\x00b\r\n\r\n",
        b"X A: 1\r\n\r\n",
        b": 1\r\n\r\n",
    ],
)
async def test_ambiguous_framing_is_refused(between: Between, request_bytes: bytes) -> None:
    line = b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n" + request_bytes
    answer = await asyncio.wait_for(raw(between.port, line), 5)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert answer.count(b"HTTP/1.") == 1, "nothing of it is taken for another request"
    assert not any(b"\r\n\r\n" in head and b"Content-Length" in head for head in between.upstream.heads)


# -- answers


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
async def test_a_sized_answer_stays_sized(between: Between, size: int) -> None:
    data = (b"0123456789" * (size // 10 + 1))[:size]
    between.upstream.talk = answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, data)
    head, body = await between.ask("GET /proxy2/upstream/")
    assert fields_of(head, "Content-Length") == [str(size).encode()]
    assert not fields_of(head, "Transfer-Encoding")
    assert body == data


async def test_a_chunked_answer_stays_chunked_without_trailers(between: Between) -> None:
    chunks = b"3\r\nabc\r\n" * 3 + b"0\r\nX-Trailer: 1\r\n\r\n"
    between.upstream.answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Trailer\r\n\r\n" + chunks
    head, body = await between.ask("GET /proxy2/upstream/")
    assert fields_of(head, "Transfer-Encoding") == [b"chunked"]
    assert b"railer" not in head + body
    assert body.endswith(b"\r\n0\r\n\r\n")
    assert body.count(b"abc") == 3


async def test_an_answer_that_ends_with_its_connection(between: Between) -> None:
    between.upstream.talk = answering(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"half", b"half", close=True)
    head, body = await between.ask("GET /proxy2/upstream/")
    assert fields_of(head, "Transfer-Encoding") == [b"chunked"]
    assert body.endswith(b"0\r\n\r\n")
    assert body.count(b"half") == 2
    head, body = await between.ask("GET /proxy2/upstream/", version="1.0")
    assert not fields_of(head, "Transfer-Encoding")
    assert body == b"halfhalf"


@pytest.mark.parametrize("framing", [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b""])
async def test_head_has_the_fields_and_no_body(between: Between, framing: bytes) -> None:
    between.upstream.answer = b"HTTP/1.1 200 OK\r\nX-A: 1\r\n" + framing + b"\r\n"
    reader, writer = await between.connect()
    for _ in range(3):  # nothing is left over on the connection
        writer.write(b"HEAD /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert fields_of(head, "X-A") == [b"1"]
        assert fields_of(head, "Content-Length") == ([b"5"] if b"Length" in framing else [])
    writer.close()


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 204 No Content\r\n\r\n", b'HTTP/1.1 304 Not Modified\r\nETag: "a"\r\n\r\n']
)
async def test_answers_without_a_body_keep_the_connection(between: Between, answer: bytes) -> None:
    between.upstream.answer = answer
    reader, writer = await between.connect()
    for _ in range(3):
        writer.write(b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.split(b"\r\n")[0] == answer.split(b"\r\n")[0]
        assert not fields_of(head, "Content-Length")
        assert not fields_of(head, "Transfer-Encoding")
    assert between.upstream.connections == 1
    writer.close()


async def test_interim_answers_go_through(between: Between, kind: str) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    sent = hints + b"HTTP/1.1 102 Processing\r\nConnection: X-Mine\r\nX-Mine: 1\r\nContent-Length: 5\r\n\r\n"
    between.upstream.talk = answering(sent, CONTINUE + OK, pause=0.05)
    head, rest = await between.ask("GET /proxy2/upstream/")
    answer = head + b"\r\n\r\n" + rest
    interim = hints + b"HTTP/1.1 102 Processing\r\n\r\n" + CONTINUE
    if kind == "native":  # aiohttp's client keeps them to itself
        assert answer.startswith(interim)
        answer = answer[len(interim) :]
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nok")
    assert b"Link" not in answer
    head, rest = await between.ask("GET /proxy2/upstream/", version="1.0")
    assert (head.split(b"\r\n")[0], rest) == (b"HTTP/1.1 200 OK", b"ok"), "HTTP/1.0 knows none"


async def test_repeated_fields_of_an_answer(between: Between) -> None:
    fields = b"Set-Cookie: a=1\r\nX-A: 1\r\nSet-Cookie: b=2\r\nX-A: 2\r\nContent-Length: 2\r\n\r\n"
    between.upstream.answer = b"HTTP/1.1 200 Fine \xe9\r\n" + fields + b"ok"
    head, _ = await between.ask("GET /proxy2/upstream/a")
    assert fields_of(head, "Set-Cookie") == [b"a=1", b"b=2"]
    assert fields_of(head, "X-A") == [b"1", b"2"]


async def test_a_compressed_answer_is_not_touched(between: Between) -> None:
    data = b"\x1f\x8b not really gzip"
    between.upstream.answer = (
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data) + data
    )
    head, body = await between.ask("GET /proxy2/upstream/")
    assert (fields_of(head, "Content-Encoding"), body) == ([b"gzip"], data)


async def test_events_come_as_they_are_sent(between: Between) -> None:
    go_on = asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(3):
            await go_on.wait()
            go_on.clear()
            writer.write(b"9\r\ndata: %d\n\n\r\n" % number)
        await reader.read()

    between.upstream.talk = talk
    reader, writer = await between.connect()
    writer.write(b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)  # the head does not wait for an event
    for number in range(3):
        go_on.set()
        assert await asyncio.wait_for(reader.readexactly(14), 5) == b"9\r\ndata: %d\n\n\r\n" % number
    writer.close()


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/a?b#c", "/proxy2/upstream/a?b#c"),
        ("http://{authority}/a", "/proxy2/upstream/a"),
        ("http://{authority}", "/proxy2/upstream/"),
        ("http://{authority}?a", "/proxy2/upstream/?a"),
        ("a/b", "a/b"),
        ("?a", "?a"),
        ("//elsewhere/a", "//elsewhere/a"),
        ("https://elsewhere/a", "https://elsewhere/a"),
        ("http://{authority}0/a", "http://{authority}0/a"),
        ("http://{authority}.evil/a", "http://{authority}.evil/a"),
    ],
)
async def test_a_location_leads_through_the_frontend(between: Between, location: str, expected: str) -> None:
    authority = f"127.0.0.1:{between.upstream.port}"
    sent = location.format(authority=authority).encode()
    between.upstream.answer = b"HTTP/1.1 302 Found\r\nLocation: " + sent + b"\r\nContent-Length: 0\r\n\r\n"
    head, _ = await between.ask("GET /proxy2/upstream/x")
    assert fields_of(head, "Location") == [expected.format(authority=authority).encode()]


@pytest.mark.parametrize(
    ("cookie", "expected"),
    [
        ("a=b; Path=/; HttpOnly", "a=b; Path=/proxy2/upstream/; HttpOnly"),
        ("a=b;path = /x/y", "a=b;path = /proxy2/upstream/x/y"),
        ("a=b; HttpOnly", "a=b; HttpOnly"),
        ("path=/x; Secure", "path=/x; Secure"),
    ],
)
async def test_a_cookies_path_lies_under_the_frontend(between: Between, cookie: str, expected: str) -> None:
    between.upstream.answer = b"HTTP/1.1 200 OK\r\nSet-Cookie: %b\r\nContent-Length: 0\r\n\r\n" % cookie.encode()
    head, _ = await between.ask("GET /proxy2/upstream/x")
    assert fields_of(head, "Set-Cookie") == [expected.encode()]


# -- ends


async def test_a_caller_that_leaves_ends_a_stream_at_once(between: Between) -> None:
    gone: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set_result(time.monotonic())

    between.upstream.talk = talk
    reader, writer = await between.connect()
    writer.write(b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"abc")
    left = time.monotonic()
    writer.close()
    assert await asyncio.wait_for(gone, 5) - left < 1


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
    ],
)
async def test_an_upstream_that_dies_breaks_the_callers_connection(between: Between, start: bytes) -> None:
    between.upstream.talk = answering(start, pause=0.1, close=True)
    reader, writer = await between.connect()
    writer.write(b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"half")
    try:
        rest = await asyncio.wait_for(reader.read(), 5)  # not a clean end, but the end
    except ConnectionError:
        rest = b""
    assert b"0\r\n\r\n" not in rest
    writer.close()


def dying(upstream: Upstream) -> Talk:
    """The first connection answers one request and dies at the second, as one that was idle for too long."""

    async def talk(reader: Reader, writer: Writer) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            upstream.heads.append(head)
            if len(upstream.heads) == 2:
                writer.transport.abort()
                return
            writer.write(OK)

    return talk


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
async def test_a_stale_connection_is_tried_again_once(between: Between, method: str) -> None:
    between.upstream.talk = dying(between.upstream)
    assert (await between.ask("GET /proxy2/upstream/"))[1] == b"ok"
    assert (await between.ask(f"{method} /proxy2/upstream/"))[1] == b"ok"
    assert len(between.upstream.heads) == 3
    assert between.upstream.connections == 2


async def test_what_may_not_be_repeated_is_not(between: Between) -> None:
    between.upstream.talk = dying(between.upstream)
    assert (await between.ask("GET /proxy2/upstream/"))[1] == b"ok"
    head, _ = await between.ask("POST /proxy2/upstream/", "Content-Length: 0")
    assert head.startswith(b"HTTP/1.1 502 ")
    assert len(between.upstream.heads) == 2


async def test_an_answer_before_the_end_of_the_body(between: Between) -> None:
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
    between.upstream.talk = answering(refusal)
    reader, writer = await between.connect()
    writer.write(b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nsome")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 413 ")
    assert await reader.readexactly(2) == b"no"
    writer.close()


async def test_a_body_that_breaks_while_the_answer_comes_breaks_that_off(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp's server does not tell the body's reader of broken framing, so that its time limit has to."""
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.5)
    begun = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"
    between.upstream.talk = answering(begun, pause=5)
    reader, writer = await between.connect()
    writer.write(b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    await asyncio.wait_for(reader.readuntil(b"half"), 5)
    writer.write(b"nonsense\r\n")
    rest = b""
    with contextlib.suppress(ConnectionError):
        rest = await asyncio.wait_for(reader.read(), 5)
    assert b"0\r\n\r\n" not in rest
    assert b"HTTP/1.1" not in rest, "no second answer within the first"
    writer.close()


# -- bounds


async def test_no_first_byte_in_time_is_504(between: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_BYTE_SECONDS", 0.2)
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.2)
    between.upstream.talk = answering(b"", pause=5)
    head, _ = await between.ask("GET /proxy2/upstream/")
    assert head.startswith(b"HTTP/1.1 504 ")


async def test_an_answer_that_stops_coming_is_broken_off(between: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.2)
    between.upstream.talk = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", pause=5)
    began = time.monotonic()
    _, body = await between.ask("GET /proxy2/upstream/")
    assert body == b"half"
    assert time.monotonic() - began < 3


async def test_overload_is_503_with_a_time_at_once(between: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS_PER_TARGET", 2)
    monkeypatch.setattr(limits, "WAITING_PER_TARGET", 1)
    go_on = asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await go_on.wait()
            writer.write(OK)

    between.upstream.talk = talk
    held = [asyncio.create_task(between.ask("GET /proxy2/upstream/")) for _ in range(3)]
    await asyncio.sleep(0.2)
    head, _ = await asyncio.wait_for(between.ask("GET /proxy2/upstream/"), 2)
    assert head.startswith(b"HTTP/1.1 503 ")
    assert fields_of(head, "Retry-After") == [b"1"]
    go_on.set()
    assert [body for _, body in await asyncio.wait_for(asyncio.gather(*held), 5)] == [b"ok"] * 3
    assert between.upstream.connections == 2
    assert (await between.ask("GET /proxy2/upstream/"))[1] == b"ok"


async def test_callers_that_leave_the_line_leave_no_gap(between: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS_PER_TARGET", 1)
    go_on = asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await go_on.wait()
            writer.write(OK)

    between.upstream.talk = talk
    callers = [await between.connect() for _ in range(4)]
    for _, writer in callers:
        writer.write(b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await asyncio.sleep(0.05)
    for _, writer in callers[:2]:
        writer.close()
    await asyncio.sleep(0.2)
    go_on.set()
    for reader, _ in callers[2:]:
        assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"\r\n\r\nok")
    for _, writer in callers:
        writer.close()


async def test_a_head_without_end_is_a_502(between: Between) -> None:
    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X-A: " + b"a" * 8000 + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)

    between.upstream.talk = talk
    head, _ = await asyncio.wait_for(between.ask("GET /proxy2/upstream/"), 10)
    assert head.startswith(b"HTTP/1.1 502 ")


async def test_a_target_that_keeps_failing_is_skipped_for_a_moment(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SKIP_SECONDS", 0.3)
    port = free_port()
    frontend = await frontend_server(nodes=[{"name": "gone", "host": "127.0.0.1", "port": port}])

    async def ask() -> tuple[int, str]:
        async with frontend.client.get("/proxy2/gone/") as response:
            assert ("Retry-After" in response.headers) == (response.status == 503)
            return response.status, await response.text()

    assert {(await ask())[0] for _ in range(limits.FAILURES)} == {502}
    status, text = await ask()
    assert status == 503
    assert f"127.0.0.1:{port} is skipped for a moment after 5 failures: Failed to connect" in text
    assert ": Connection refused" in text
    await asyncio.sleep(0.35)
    assert [(await ask())[0] for _ in range(3)] == [502, 503, 503]  # one tries, the others are refused
    server = await asyncio.start_server(answering(OK), "127.0.0.1", port)
    await asyncio.sleep(0.35)
    assert [await ask() for _ in range(3)] == [(200, "ok")] * 3
    server.close()


# -- upgrades

UPGRADE = (
    b"GET /proxy2/upstream/ws?a=b HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    b"Sec-WebSocket-Protocol: p\r\n\r\n"
)
SWITCHING = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x=\r\n\r\n"
)
PING, PONG, CLOSE = b"\x89\x04ping", b"\x8a\x84\0\0\0\0ping", b"\x88\x82\0\0\0\0\x03\xe8"


async def test_an_upgraded_connection_is_a_tunnel_both_ways(between: Between) -> None:
    """Frames, pings and close codes are bytes to us; the first may come with the head."""
    rest = asyncio.get_running_loop().create_future()

    async def talk(reader: Reader, writer: Writer) -> None:
        between.upstream.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(SWITCHING + PING)
        assert await reader.readexactly(len(PONG)) == PONG
        writer.write(b"\x81\x02hi" * 100_000)
        await writer.drain()
        rest.set_result(await reader.read())

    between.upstream.talk = talk
    reader, writer = await between.connect()
    writer.write(UPGRADE)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert fields_of(head, "Upgrade") == [b"websocket"]
    assert [value.lower() for value in fields_of(head, "Connection")] == [b"upgrade"]
    assert fields_of(head, "Sec-WebSocket-Accept") == [b"x="]
    seen = between.upstream.heads[0]
    assert seen.startswith(b"GET /ws?a=b HTTP/1.1\r\n")
    assert fields_of(seen, "Upgrade") == [b"websocket"]
    assert fields_of(seen, "Connection") == [b"Upgrade"]
    assert fields_of(seen, "Sec-WebSocket-Protocol") == [b"p"]
    assert await asyncio.wait_for(reader.readexactly(len(PING)), 5) == PING
    writer.write(PONG)
    assert await asyncio.wait_for(reader.readexactly(400_000), 5) == b"\x81\x02hi" * 100_000
    writer.write(CLOSE)
    writer.close()  # at once: its close code still arrives
    assert await asyncio.wait_for(rest, 5) == CLOSE


async def test_the_targets_end_of_a_tunnel_ends_it(between: Between) -> None:
    between.upstream.talk = answering(SWITCHING, b"\x88\x02\x03\xe9", close=True)
    reader, writer = await between.connect()
    writer.write(UPGRADE)
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert await asyncio.wait_for(reader.read(), 5) == b"\x88\x02\x03\xe9"
    writer.close()


async def test_an_upgrade_may_be_declined(between: Between) -> None:
    reader, writer = await between.connect()
    for _ in range(2):
        writer.write(UPGRADE)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert await reader.readexactly(2) == b"ok"
    writer.close()


async def test_a_slow_end_of_a_tunnel_holds_the_other_back(between: Between) -> None:
    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCHING)
        await asyncio.sleep(30)

    between.upstream.talk = talk
    reader, writer = await between.connect()
    writer.write(UPGRADE)
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    for _ in range(64):
        writer.write(b"x" * (1 << 20))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.05)
    assert writer.transport.get_write_buffer_size() > 32 << 20, "most of it is still here"
    writer.transport.abort()


async def test_an_idle_tunnel_ends(between: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UPGRADE_IDLE_SECONDS", 0.3)
    between.upstream.talk = answering(SWITCHING, pause=10)
    reader, writer = await between.connect()
    writer.write(UPGRADE)
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 3) == b""
    writer.close()


# -- attacks


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2_0\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-A: 1\nX-B: 2\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX-A: a\x00b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX-A: a\rb\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX A: 1\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\n: 1\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 099 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 600 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n" + OK,
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
)
async def test_an_answer_that_could_be_read_in_two_ways_is_a_502(between: Between, kind: str, answer: bytes) -> None:
    if kind == "plain" and any(odd in answer for odd in (b" : ", b"xchunked", b"identity", b"1\nX")):
        pytest.skip("aiohttp's client (3.14) reads answers leniently")
    between.upstream.talk = answering(answer, close=True)
    head, body = await asyncio.wait_for(between.ask("GET /proxy2/upstream/"), 5)
    assert head.startswith(b"HTTP/1.1 502 "), head
    assert b"Error communicating with target service: " in body


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nX-A: a\r\n  b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 O\x01K\x7f\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",
        b"\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_what_a_careless_target_says_comes_through_as_http_or_not_at_all(between: Between, answer: bytes) -> None:
    between.upstream.talk = answering(answer, close=True)
    head, body = await asyncio.wait_for(between.ask("GET /proxy2/upstream/"), 5)
    assert head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 502 "))
    if head.startswith(b"HTTP/1.1 200"):
        assert body == b"ok"
    for line in head.split(b"\r\n"):
        assert not any((byte < 32 and byte != 9) or byte == 127 for byte in line), head
        assert not line.startswith((b" ", b"\t"))


SECOND = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX-Evil: 1\r\n\r\nevil"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"


@native_only  # aiohttp's client (3.14) keeps some of these connections
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    "surplus", [SECOND, SECOND[:1], SECOND[:9], b"HTTP/1.1 200 ", b"HTTP/1.1 200 OK\r\nX-Evil", b"evil", b"\r\nevil"]
)
@pytest.mark.parametrize(
    ("method", "answer", "expected"),
    [
        ("GET", OK, b"ok"),
        ("GET", CHUNKED, b"2\r\nok\r\n0\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", b""),
        ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 500\r\n\r\n", b""),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n", b""),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", b""),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
)
async def test_what_follows_an_answer_never_reaches_the_next_caller(
    between: Between, method: str, answer: bytes, expected: bytes, surplus: bytes, is_late: bool
) -> None:
    """A body where there is none, a second answer, or the beginning of one, with the answer or later."""
    said = asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer if is_late else answer + surplus)
        if is_late:
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.write(surplus)
        said.set()
        head = await reader.readuntil(b"\r\n\r\n")
        between.upstream.heads.append(head)

    between.upstream.talk = talk
    head, body = await between.ask(f"{method} /proxy2/upstream/")
    assert (head.split(b"\r\n")[0], body) == (answer.split(b"\r\n")[0], expected)
    assert b" 204 " not in head or not fields_of(head, "Content-Length")
    await said.wait()
    between.upstream.talk = answering(OK)
    assert (await between.ask("GET /proxy2/upstream/good"))[1] == b"ok"
    assert between.upstream.heads == [], "the connection serves no other request"


@native_only  # aiohttp's client keeps it
async def test_a_body_that_comes_after_the_answer_to_head_meets_no_other_request(between: Between) -> None:
    """The next request may begin before it comes, so that nobody waits for it: the connection serves no other."""

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(SECOND))
        head = await reader.readuntil(b"\r\n\r\n")
        between.upstream.heads.append(head)
        writer.write(SECOND)

    between.upstream.talk = talk
    await between.ask("HEAD /proxy2/upstream/")
    between.upstream.talk = answering(OK)
    assert (await between.ask("GET /proxy2/upstream/"))[1] == b"ok"
    assert between.upstream.heads == []


@native_only  # aiohttp's client reads them for ever
@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 P\r\nX-A: b\r\n\r\n"])
async def test_interim_answers_without_end_are_bounded(between: Between, interim: bytes) -> None:
    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        while True:
            writer.write(interim * 50)
            await writer.drain()
            await asyncio.sleep(0)

    between.upstream.talk = talk
    head, rest = await asyncio.wait_for(between.ask("GET /proxy2/upstream/"), 10)
    assert b"HTTP/1.1 502 " in rest
    assert head + b"\r\n\r\n" == interim
    assert len(rest) < 1 << 20


@native_only  # aiohttp's client begins its time anew
async def test_slow_interim_answers_do_not_put_the_time_limit_off(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FIRST_BYTE_SECONDS", 0.5)
    between.upstream.talk = answering(*[b"HTTP/1.1 102 Processing\r\n\r\n"] * 100, pause=0.1)
    began = time.monotonic()
    head, rest = await asyncio.wait_for(between.ask("GET /proxy2/upstream/"), 5)
    assert b"HTTP/1.1 504 " in head + rest
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("framing", [b"Content-Length: 10\r\n", b""])
async def test_a_cut_body_is_no_clean_end_for_http_1_0(between: Between, framing: bytes) -> None:
    """There the end of a body without length is the end of the connection: a cut one is a reset."""
    between.upstream.talk = answering(
        b"HTTP/1.1 200 OK\r\n" + (framing or b"Transfer-Encoding: chunked\r\n") + b"\r\n",
        b"half" if framing else b"4\r\nhalf\r\n",
        pause=0.05,
        close=True,
    )
    reader, writer = await between.connect()
    writer.write(b"GET /proxy2/upstream/ HTTP/1.0\r\nHost: localhost\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        while await asyncio.wait_for(reader.read(), 5):
            pass
        pytest.fail("it looks like an end")
    writer.close()


@pytest.mark.parametrize(
    "fields",
    [
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
        "Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n",
        "Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n",
        "Connection: Upgrade\r\nUpgrade: a\r\nUpgrade: websocket\r\n",
        "Connection: keep-alive\r\nUpgrade: websocket\r\n",
    ],
)
async def test_another_upgrade_is_an_ordinary_request_without_it(between: Between, fields: str) -> None:
    reader, writer = await between.connect()
    for _ in range(2):
        writer.write(f"GET /proxy2/upstream/a HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n".encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert await reader.readexactly(2) == b"ok"
    for seen in between.upstream.heads:
        assert not fields_of(seen, "Upgrade")
        assert not fields_of(seen, "HTTP2-Settings")
        assert not fields_of(seen, "Connection")
    writer.close()


async def test_another_protocol_than_was_asked_for_is_a_502(between: Between) -> None:
    between.upstream.talk = answering(SWITCHING.replace(b"websocket", b"h2c"), close=True)
    reader, writer = await between.connect()
    writer.write(UPGRADE)
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 502 ")
    writer.close()


async def test_a_tunnel_ends_with_what_the_target_said_last(between: Between) -> None:
    """Also when the caller goes on sending: what the target does not take any more cuts nothing off."""

    said = b"x" * 50_000 + b"\x88\x02\x03\xe9"

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCHING + said)
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.transport.abort()  # what the caller has sent is not read: a reset

    between.upstream.talk = talk
    for _ in range(5):
        reader, writer = await between.connect()
        writer.write(UPGRADE)
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        for _ in range(20):
            writer.write(b"y" * 100_000)
        assert await asyncio.wait_for(reader.readexactly(len(said)), 5) == said
        await asyncio.sleep(0.02)
        writer.transport.abort()


async def test_broken_framing_behind_the_head_ends_the_request_at_once(between: Between) -> None:
    gone = asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    between.upstream.talk = talk
    reader, writer = await between.connect()
    writer.write(b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    await asyncio.sleep(0.2)
    writer.write(b"zz\r\n\r\nGET /proxy2/upstream/evil HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 400 ")
    await asyncio.wait_for(gone.wait(), 5)
    writer.close()


# -- a body that is held back


HELD_BACK = b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"


async def test_a_body_is_asked_for_when_the_target_asks_for_it(between: Between) -> None:
    asked = asyncio.Event()
    bodies: list[bytes] = []

    async def talk(reader: Reader, writer: Writer) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            between.upstream.heads.append(head)
            await asked.wait()
            writer.write(CONTINUE)
            bodies.append(await read_body(reader, head))
            writer.write(OK)

    between.upstream.talk = talk
    reader, writer = await between.connect()
    for _ in range(2):
        asked.clear()
        writer.write(HELD_BACK)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.2)
        asked.set()
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == CONTINUE
        writer.write(b"body")
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200 ")
        assert await reader.readexactly(2) == b"ok"
    assert bodies == [b"body"] * 2
    assert [fields_of(head, "Expect") for head in between.upstream.heads] == [[b"100-continue"]] * 2
    writer.close()


@pytest.mark.parametrize("status", [b"401 Unauthorized", b"413 Too Large", b"417 Expectation Failed", b"200 OK"])
async def test_a_body_that_the_target_refuses_is_never_asked_for(between: Between, status: bytes) -> None:
    between.upstream.answer = b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\nno"
    reader, writer = await between.connect()
    writer.write(HELD_BACK)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert fields_of(head, "Connection") == [b"close"], "whether the body still comes cannot be known"
    assert await reader.readexactly(2) == b"no"
    writer.close()
    assert (await between.ask("GET /proxy2/upstream/"))[1] == b"no"
    assert between.upstream.connections == 2, "what was told a body and got none serves no other request"


async def test_a_body_is_not_asked_for_where_nobody_is_reached(frontend_server: StartFrontend) -> None:
    gone = {"name": "upstream", "host": "127.0.0.1", "port": free_port()}
    frontend = await frontend_server(nodes=[gone])
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.server.address.port)
    writer.write(HELD_BACK)
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 502 ")
    writer.close()


@native_only  # aiohttp's client waits for ever
async def test_a_target_that_knows_no_expect_gets_the_body_after_a_moment(
    between: Between, bodies: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONTINUE_SECONDS", 0.1)
    reader, writer = await between.connect()
    writer.write(HELD_BACK)
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == CONTINUE
    writer.write(b"body")
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200 ")
    assert bodies == [b"body"]
    writer.close()


async def test_a_body_that_comes_unasked_goes_on_at_once(between: Between, bodies: list[bytes]) -> None:
    head, rest = await asyncio.wait_for(
        between.ask("POST /proxy2/upstream/", "Content-Length: 4", "Expect: 100-continue", body=b"body"), 5
    )
    assert b"ok" in head + rest
    assert bodies == [b"body"]


async def test_an_expectation_that_nobody_knows_is_417(between: Between) -> None:
    head, _ = await between.ask("POST /proxy2/upstream/", "Content-Length: 0", "Expect: more")
    assert head.startswith(b"HTTP/1.1 417 ")


# -- who leaves


async def left_at_once(between: Between, gone: asyncio.Event, request: bytes, wait_for: bytes = b"") -> None:
    reader, writer = await between.connect()
    writer.write(request)
    if wait_for:
        await asyncio.wait_for(reader.readuntil(wait_for), 5)
    else:
        await asyncio.sleep(0.2)
    assert not gone.is_set()
    writer.transport.abort()
    await asyncio.wait_for(gone.wait(), 10)


@pytest.mark.parametrize(
    ("request_bytes", "begun"),
    [
        (b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
        (b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n\r\n", CONTINUE),
        (b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nsome", b""),
        (b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nsome", b""),
        (
            b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        ),
        (HELD_BACK, b""),
    ],
)
async def test_a_caller_that_leaves_ends_its_request_in_every_phase(
    between: Between, request_bytes: bytes, begun: bytes
) -> None:
    gone = asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(begun)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    between.upstream.talk = talk
    await left_at_once(between, gone, request_bytes, b"abc" if b"abc" in begun else b"")


async def test_a_caller_that_leaves_ends_its_tunnel(between: Between) -> None:
    gone = asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCHING)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    between.upstream.talk = talk
    await left_at_once(between, gone, UPGRADE, b"\r\n\r\n")


# -- stale connections


@pytest.mark.parametrize("is_reset", [True, False])
async def test_a_connection_closed_while_idle_costs_nobody_a_request(
    between: Between, is_reset: bool, kind: str
) -> None:
    """Not even one that may not be sent twice: that the target has hung up is seen before the connection is used."""

    async def talk(reader: Reader, writer: Writer) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await read_body(reader, head)
        writer.write(OK)
        await writer.drain()
        await asyncio.sleep(0.02)
        if is_reset:
            writer.transport.abort()

    async def post() -> bytes:
        return (await between.ask("POST /proxy2/upstream/", "Content-Length: 4", body=b"body"))[1]

    between.upstream.talk = talk
    for _ in range(3):
        assert await post() == b"ok"
        await asyncio.sleep(0.1)
    assert between.upstream.connections == 3


async def test_a_refusal_of_a_target_that_hangs_up_arrives_while_the_body_is_sent(between: Between) -> None:
    """A reset of the connection, which the rest of the body brings about, does not swallow the answer before it."""
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
    between.upstream.talk = answering(refusal, close=True)
    for _ in range(20):
        reader, writer = await between.connect()
        writer.write(b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000\r\n\r\n")
        for _ in range(20):
            writer.write(b"x" * 50_000)
            await asyncio.sleep(0)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 502 "))
        writer.transport.abort()


# -- held back


async def taken(writer: Writer, pieces: int) -> int:
    """How many MiB an end that nobody reads takes, until it takes none for a while."""
    for number in range(pieces):
        writer.write(b"x" * (1 << 20))
        try:
            await asyncio.wait_for(writer.drain(), 0.5)
        except asyncio.TimeoutError:
            return number
    return pieces


@pytest.mark.parametrize("framing", [b"Content-Length: 67108864\r\n", b""])
async def test_who_does_not_read_an_answer_holds_the_target_back(between: Between, framing: bytes) -> None:
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n")
        found.set_result(await taken(writer, 64))

    between.upstream.talk = talk
    _, writer = await between.connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert await asyncio.wait_for(found, 20) < 32, "the kernel's buffers, and little here"
    writer.transport.abort()


async def test_who_does_not_read_a_body_holds_the_caller_back(between: Between) -> None:
    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(30)

    between.upstream.talk = talk
    _, writer = await between.connect()
    writer.write(b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 67108864\r\n\r\n")
    assert await asyncio.wait_for(taken(writer, 64), 20) < 32
    writer.transport.abort()


async def test_who_breaks_off_while_held_back_ends_the_request_at_once(between: Between) -> None:
    """Nobody reads the caller then. (A plain end waits behind its bytes, in the caller's kernel.)"""

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(30)

    between.upstream.talk = talk
    _, writer = await between.connect()
    writer.write(b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 67108864\r\n\r\n")
    assert await asyncio.wait_for(taken(writer, 64), 20) < 32
    await until(between.frontend, in_use=True)
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    await until(between.frontend, in_use=False)


async def test_a_late_answer_comes_when_it_is_given(between: Between) -> None:
    given = asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await given.wait()
        writer.write(OK)

    between.upstream.talk = talk
    asking = asyncio.ensure_future(between.ask("GET /proxy2/upstream/"))
    await asyncio.sleep(0.3)
    assert not asking.done()
    given.set()
    assert (await asyncio.wait_for(asking, 5))[1] == b"ok"


async def until(frontend: RunningFrontend, *, in_use: bool) -> None:
    """Until the frontend has something on its way to its target, or nothing any more."""

    async def look() -> None:
        targets = frontend.server._runner.app[TARGETS]
        while [target.in_use for target in targets._targets.values()] != [in_use]:
            await asyncio.sleep(0.01)

    await asyncio.wait_for(look(), 10)


# -- a target that takes no connection


@pytest.fixture
async def full(frontend_server: StartFrontend) -> AsyncIterator[RunningFrontend]:
    """A frontend before a port where nobody accepts, and whose line is full."""
    with socket.socket() as sock, contextlib.ExitStack() as stack:
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(sock.getsockname())
        yield await frontend_server(nodes=[{"name": "full", "host": "127.0.0.1", "port": sock.getsockname()[1]}])


async def test_no_connection_in_time_is_504(full: RunningFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECT_SECONDS", 0.2)
    async with full.client.get("/proxy2/full/") as response:
        assert response.status == 504


async def test_who_leaves_while_a_connection_is_made_ends_that(full: RunningFrontend) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", full.server.address.port)
    writer.write(b"GET /proxy2/full/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await until(full, in_use=True)
    writer.transport.abort()
    await until(full, in_use=False)


@native_only  # aiohttp's client makes connections of its own accord
async def test_one_alone_tries_a_target_that_failed_however_long_it_takes(
    full: RunningFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(limits, "SKIP_SECONDS", 0.1)

    async def ask() -> int:
        async with full.client.get("/proxy2/full/") as response:
            return response.status

    assert [await ask() for _ in range(limits.FAILURES)] == [504] * limits.FAILURES
    await asyncio.sleep(0.15)
    monkeypatch.setattr(limits, "CONNECT_SECONDS", 1.0)
    trying = asyncio.ensure_future(ask())
    await asyncio.sleep(0.3)
    assert [await ask() for _ in range(3)] == [503] * 3
    assert await trying == 504


@native_only  # aiohttp's client knows no bound over all
async def test_connections_in_all_are_bounded(between: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS", 1)
    between.upstream.talk = answering(b"", pause=5)
    _, writer = await between.connect()
    writer.write(b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await asyncio.sleep(0.2)
    head, _ = await asyncio.wait_for(between.ask("GET /proxy2/upstream/"), 2)
    assert head.startswith(b"HTTP/1.1 503 ")
    assert fields_of(head, "Retry-After") == [b"1"]
    writer.close()


# -- connections that many use


async def test_a_piece_of_a_body_may_look_like_the_head_of_another_answer(between: Between) -> None:
    head, said = OK[:-2], False

    async def talk(reader: Reader, writer: Writer) -> None:
        nonlocal said
        while True:
            await reader.readuntil(b"\r\n\r\n")
            if not said:
                said = True
                writer.write(OK)
                continue
            start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\nab" % (len(head) + 2)
            for piece in (start, head, b"\r\n0\r\n\r\n"):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.02)

    between.upstream.talk = talk
    assert (await between.ask("GET /proxy2/upstream/a"))[1] == b"ok"
    _, body = await between.ask("GET /proxy2/upstream/b")
    assert body == b"2\r\nab\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(head), head)
    assert between.upstream.connections == 1


async def test_who_reads_an_answer_late_does_not_touch_the_connections_next_request(between: Between) -> None:
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 15000\r\n\r\n" + bytes(15_000)
    count, asked, goes_on = 0, asyncio.Event(), asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        nonlocal count
        while True:
            if b" /slow " in await reader.readuntil(b"\r\n\r\n"):
                writer.write(OK[:-1])
                asked.set()
                await goes_on.wait()
                writer.write(OK[-1:])
            else:
                count += 1
                writer.write(large)

    between.upstream.talk = talk
    request = b"GET /proxy2/upstream/large HTTP/1.1\r\nHost: localhost\r\n\r\n"
    reader, writer = await between.connect()
    writer.write(request * 1000 + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    before = -1
    while count != before:  # until the caller is waited for
        before = count
        await asyncio.sleep(0.1)
    assert count < 1000
    other = asyncio.ensure_future(between.ask("GET /proxy2/upstream/slow"))
    await asyncio.wait_for(asked.wait(), 10)
    while await asyncio.wait_for(reader.read(1 << 20), 10):
        pass
    goes_on.set()
    assert (await other)[1] == b"ok"
    assert count == 1001
    writer.close()


@native_only  # aiohttp's client sends anything over a kept connection
async def test_what_may_not_be_repeated_goes_over_a_new_connection_from_the_line_too(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS_PER_TARGET", 1)
    goes_on, asked = asyncio.Event(), asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await goes_on.wait()
        writer.write(OK)
        await reader.readuntil(b"\r\n\r\n")  # and hangs up with the next one on the way

    between.upstream.talk = talk
    first = asyncio.ensure_future(between.ask("GET /proxy2/upstream/a"))
    await asyncio.wait_for(asked.wait(), 10)
    second = asyncio.ensure_future(between.ask("POST /proxy2/upstream/b", "Content-Length: 2", body=b"ab"))
    await asyncio.sleep(0.05)
    goes_on.set()
    assert (await first)[1] == (await second)[1] == b"ok"
    assert between.upstream.connections == 2
