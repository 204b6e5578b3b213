"""What HTTP/1.1 asks of a proxy, with a bare socket on both sides, over both transports.

`test_proxy.py` asks the same of the native one with a client's help; what it shows is not shown again.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import pytest

from lmcache_api.pytest_plugin import free_port
from lmcache_frontend.proxy import limits, transport
from lmcache_frontend.proxy.native import NativeTransport, Room
from lmcache_frontend.proxy.plain import PlainTransport
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_shared.address import Address
from tests.frontend.upstream import Talk, Upstream, raw, serving

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Ask = Callable[[bytes], "asyncio.Future[bytes]"]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture(autouse=True, params=["native", "plain"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs over both transports; no node is checked meanwhile."""
    monkeypatch.setattr(HealthBoard, "start", lambda board: None)
    if request.param == "plain":

        def plain(address: Address, room: Room) -> PlainTransport:
            return PlainTransport(address)

        monkeypatch.setattr(transport, "NativeTransport", plain)
    else:
        assert transport.NativeTransport is NativeTransport
    return str(request.param)


class Between:
    """A frontend before one bare upstream."""

    def __init__(self, upstream: Upstream, port: int) -> None:
        self.upstream = upstream
        self.port = port

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
        yield Between(upstream, frontend.server.address.port)


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


async def test_expect_is_answered_here_before_the_body_comes(between: Between, bodies: list[bytes]) -> None:
    reader, writer = await between.connect()
    writer.write(b"POST /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"body")
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200 ")
    assert bodies == [b"body"]
    assert not fields_of(between.upstream.heads[0], "Expect")
    writer.close()


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
        b"GET /proxy2/upstream/ HTTP/1.1\r\nHost: localhost\r\nConnection: X-Mine, , Host\r\nX-Mine: 1\r\nTE: trailers\r\n"
        b"Keep-Alive: 1\r\nProxy-Connection: x\r\nProxy-Authorization: x\r\nX-Kept: 1\r\n\r\n"
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


async def test_interim_answers_are_passed_over(between: Between) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    between.upstream.talk = answering(interim, b"HTTP/1.1 100 Continue\r\n\r\n" + OK, pause=0.05)
    head, body = await between.ask("GET /proxy2/upstream/")
    assert (head.split(b"\r\n")[0], body) == (b"HTTP/1.1 200 OK", b"ok")
    assert not fields_of(head, "Link")


async def test_repeated_fields_of_an_answer(between: Between) -> None:
    fields = b"Set-Cookie: a=1\r\nX-A: 1\r\nSet-Cookie: b=2\r\nX-A: 2\r\nContent-Length: 2\r\n\r\n"
    between.upstream.answer = b"HTTP/1.1 200 Fine \xe9\r\n" + fields + b"ok"
    head, _ = await between.ask("GET /proxy2/upstream/")
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
    await asyncio.sleep(0.35)
    assert [(await ask())[0] for _ in range(3)] == [502, 503, 503]  # one tries, the others are refused
    server = await asyncio.start_server(answering(OK), "127.0.0.1", port)
    await asyncio.sleep(0.35)
    assert [await ask() for _ in range(3)] == [(200, "ok")] * 3
    server.close()


# -- upgrades

UPGRADE = (
    b"GET /proxy2/upstream/ws?a=b HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: p\r\n\r\n"
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
