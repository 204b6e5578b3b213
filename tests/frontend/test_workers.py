"""What the processes of one frontend send one another: the nodes, frames, and connections of callers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_frontend.nodes.node import LOCAL_PROXY, Node, Proxy, Reach
from lmcache_frontend.nodes.registry import Registry, view_of
from lmcache_frontend.options import Options, read_options
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_frontend.workers import snapshot, supervisor
from lmcache_frontend.workers.adopting import MAX_WAITING, Adopting, sending_over
from lmcache_frontend.workers.channel import NO_FILE, Channel, Kind
from lmcache_frontend.workers.worker import Start
from lmcache_shared import address
from lmcache_shared.address import Address
from lmcache_shared.errors import ConfigError
from tests.e2e.processes import children_of
from tests.frontend.registries import entries, registry_of
from tests.frontend.upstream import Upstream, raw, serving

NAMES = st.sampled_from(["a", "b", "c", "ü/ %2F", "x" * 255])
TOKENS = st.none() | st.just("secret")
PLACES = st.tuples(st.sampled_from(["h", "10.0.0.1", "localhost", "::1"]), st.sampled_from([1, "7000", "/run/a", "/ü"]))


def node(name: str, place: tuple[str, int | str], token: str | None, path: str | None) -> Node:
    return Node(name, *place, address.from_node(*place), path=path, token=token)


NODES = st.builds(node, NAMES, PLACES, TOKENS, st.sampled_from([None, "/proxy2/far"]))


@st.composite
def registries(draw: st.DrawFn) -> Registry:
    found = Registry(host="h", port=1)
    found.publish("nodes", draw(st.lists(NODES, max_size=4)))
    for name, place, token in draw(st.lists(st.tuples(NAMES, PLACES, TOKENS), max_size=3)):
        children = tuple({one.name: one for one in draw(st.lists(NODES, max_size=3))}.values())
        where = address.from_node(*place)
        found.publish("file", [Proxy(name, *place, where, children, found=draw(st.booleans()), token=token)])
    return found


@settings(max_examples=200)
@given(registries())
def test_what_the_proxy_asks_of_the_nodes_is_the_same_in_each_process(registry: Registry) -> None:
    mirror = Registry(host="h", port=1)
    mirror.mirror(view_of(snapshot.decoded(snapshot.encoded(registry.proxies()))))
    names = {LOCAL_PROXY, "nobody", *(proxy.name for proxy in registry.proxies())}
    names |= {one.name for one in registry.nodes()}
    addresses: set[Address] = {address.from_node("nobody", 1), *(proxy.address for proxy in registry.proxies())}
    for one in registry.nodes():
        addresses |= {one.address, one.reach.address}

    def reach(found: Node | None) -> Reach | None:
        return None if found is None else found.reach

    for name in names:
        assert mirror.find(name) == registry.find(name)
        mine, theirs = mirror.proxy(name), registry.proxy(name)
        assert (mine and (mine.address, mine.token)) == (theirs and (theirs.address, theirs.token))
        assert [reach(mirror.node(name, child)) for child in names] == [
            reach(registry.node(name, child)) for child in names
        ]
    for where in addresses:
        assert mirror.at(where) == registry.at(where)
        assert mirror.has(where) == registry.has(where)
        assert mirror.token_of(where) == registry.token_of(where)
    told = [[(proxy.name, one.name) for one in proxy.nodes] for proxy in registry.proxies()]
    assert [[(proxy.name, one.name) for one in proxy.nodes] for proxy in mirror.proxies()] == told


def test_a_mirror_changes_at_once_and_says_that_it_did() -> None:
    mirror, before = registry_of(), registry_of(entries({"name": "n", "host": "h", "port": 1}))
    revision = mirror.revision
    mirror.mirror(view_of(snapshot.decoded(snapshot.encoded(before.proxies()))))
    assert mirror.revision > revision and mirror.find("n") is not None
    mirror.mirror(view_of(()))
    assert mirror.find("n") is None and not list(mirror.nodes())


def test_the_options_get_to_a_worker_as_they_are() -> None:
    given = ["--workers", "3", "--token", "t" * 20, "--route-folder", "/a", "--route-folder", "/b", "--no-trust-local"]
    options = read_options(given, {"LMCACHE_FRONTEND_SOCKET_PREFIX": "/run/x"})
    start = msgspec.msgpack.decode(msgspec.msgpack.encode(Start(options, 2, [3, 4])), type=Start)
    assert start == Start(options, 2, [3, 4])
    assert start.options.places == options.places and isinstance(start.options, Options)


@pytest.mark.parametrize("count", ["0", "65", "two"])
def test_a_count_of_workers_that_is_none_is_refused(count: str) -> None:
    with pytest.raises(ConfigError, match="--workers"):
        read_options(["--workers", count], {})


class End:
    """A channel's end that keeps what comes."""

    def __init__(self, sock: socket.socket, give: Callable[[Kind, bytes, int], None] | None = None) -> None:
        self.frames: list[tuple[Kind, bytes, int]] = []
        self.is_lost = asyncio.Event()
        self.came = asyncio.Event()
        self._give = give
        self.channel = Channel(sock, self._received, self.is_lost.set)

    def _received(self, kind: Kind, payload: bytes, file: int) -> None:
        if self._give is not None:
            self._give(kind, payload, file)
        self.frames.append((kind, payload, file))
        self.came.set()

    async def until(self, count: int) -> None:
        while len(self.frames) < count:
            self.came.clear()
            await asyncio.wait_for(self.came.wait(), 10)


@contextlib.asynccontextmanager
async def connected(give: Callable[[Kind, bytes, int], None] | None = None) -> AsyncIterator[tuple[End, End]]:
    mine, theirs = (End(sock, how) for sock, how in zip(socket.socketpair(), (give, None), strict=True))
    yield mine, theirs
    mine.channel.close()
    theirs.channel.close()


async def test_frames_and_files_come_in_their_order() -> None:
    async with connected() as (main, worker):
        ends = []
        for number in range(200):
            read, write = os.pipe()
            ends.append(read)
            worker.channel.send(Kind.COUNTED, b"c" * number)
            worker.channel.send(Kind.CONNECTION, b"%d" % number * 1000, write)
        worker.channel.send(Kind.KNOWS, b"x" * 5_000_000)
        assert worker.channel.waiting > 0
        await main.until(401)
        await asyncio.wait_for(worker.channel.sent(), 10)
        assert worker.channel.waiting == 0
        assert [kind for kind, _, _ in main.frames] == [Kind.COUNTED, Kind.CONNECTION] * 200 + [Kind.KNOWS]
        assert len(main.frames[-1][1]) == 5_000_000
        for number, read in enumerate(ends):
            _, payload, file = main.frames[2 * number + 1]
            assert payload == b"%d" % number * 1000
            os.write(file, b"%d" % number)
            os.close(file)
            assert os.read(read, 10) == b"%d" % number
            assert os.read(read, 1) == b"", "the sender has closed its own"
            os.close(read)
    assert worker.is_lost.is_set() is main.is_lost.is_set() is False, "who closes needs not be told"


async def test_what_is_no_frame_ends_the_channel() -> None:
    mine, theirs = socket.socketpair()
    with theirs:
        end = End(mine)
        theirs.sendall(b"\xff\0\0\0\0")
        await asyncio.wait_for(end.is_lost.wait(), 10)
        assert theirs.recv(1) == b""
        end.channel.send(Kind.STOP)


async def test_an_end_that_is_gone_is_noticed() -> None:
    mine, theirs = socket.socketpair()
    end = End(mine)
    read, write = os.pipe()
    theirs.close()
    end.channel.send(Kind.CONNECTION, b"x" * (10 << 20), write)
    await asyncio.wait_for(end.is_lost.wait(), 10)
    assert os.read(read, 1) == b"", "its files are closed"
    os.close(read)


class Echo(asyncio.Protocol):
    """Answers what comes with its length and the caller's address, from `begin` on."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        _, port = self.transport.get_extra_info("peername")
        self.transport.write(b"%d from %d;" % (len(data), port))


def goes_on(transport: asyncio.Transport, data: bytes) -> None:
    echo = Echo()
    transport.set_protocol(echo)
    echo.connection_made(transport)
    echo.data_received(data)


class HandsOver(asyncio.Protocol):
    """Writes `first`, and hands over with the first bytes that come."""

    def __init__(self, channel: Channel, first: bytes) -> None:
        self._others = sending_over(channel)
        self._first = first

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(self._first)
        self._others(self._transport, data)


@contextlib.asynccontextmanager
async def handing_over(first: bytes, *, busy: bool = False) -> AsyncIterator[tuple[int, End]]:
    """The port of a server that hands every connection over."""
    adopting = Adopting(goes_on)
    pair = socket.socketpair()
    main = End(pair[0], lambda kind, payload, file: adopting.take(file, payload))
    if busy:
        asyncio.get_running_loop().remove_reader(pair[0])
    worker = End(pair[1])
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: HandsOver(worker.channel, first), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], worker
    finally:
        server.close()
        worker.channel.close()
        main.channel.close()
        await adopting.close()


@pytest.mark.parametrize("first", [b"", b"first;", b"f" * (4 << 20) + b";"], ids=["nothing", "little", "much"])
async def test_a_connection_goes_over_with_its_bytes_and_its_address(first: bytes) -> None:
    async with handing_over(first) as (port, _):
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            own = writer.get_extra_info("sockname")[1]

            async def answered(reader: asyncio.StreamReader = reader, own: int = own) -> int:
                """How many bytes came to the other process in one piece."""
                length, _, port = (await asyncio.wait_for(reader.readuntil(b";"), 10)).partition(b" from ")
                assert port == b"%d;" % own
                return int(length)

            writer.write(b"x" * 50_000)
            assert await asyncio.wait_for(reader.readexactly(len(first)), 10) == first
            there = 0
            while there < 50_000:
                there += await answered()
            assert there == 50_000
            writer.write(b"z")
            assert await answered() == 1, "the connection stays there"
            writer.close()


async def test_who_comes_while_the_main_process_is_busy_is_refused_at_once() -> None:
    async with handing_over(b"", busy=True) as (port, worker):
        for number in range(MAX_WAITING):
            worker.channel.send(Kind.COUNTED, b"x" * (1 << 20) if number == 0 else b"")
        assert worker.channel.waiting >= MAX_WAITING
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"\r\nRetry-After: 1\r\n" in answer
        assert answer.endswith(b'{"detail":"the main process of this frontend is busy; ask again"}')
        writer.close()


async def test_a_file_that_did_not_come_is_told() -> None:
    async with connected() as (main, worker):
        worker.channel.send(Kind.CONNECTION, b"lost")
        await main.until(1)
        assert main.frames == [(Kind.CONNECTION, b"lost", NO_FILE)]


async def test_a_server_in_somebodys_loop_has_workers_too(frontend_server: StartFrontend) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], workers=2)
        await frontend.server.workers.ready()
        assert frontend.server.workers.count() == 2
        for path in ("/proxy2/upstream/", "/health", "/proxy2/upstream/") * 10:
            assert b"HTTP/1.1 200 OK\r\n" in await raw(frontend.server.address.port, closing(path))
        (worker,) = children_of(os.getpid())
        os.kill(worker, signal.SIGKILL)
        for path in ("/proxy2/upstream/", "/health") * 10:
            with contextlib.suppress(ConnectionError):
                answer = await raw(frontend.server.address.port, closing(path))
                assert not answer or b"HTTP/1.1 200 OK\r\n" in answer, "it had the connection in its hands"
        await frontend.server.stop()
        assert children_of(os.getpid()) == []


def closing(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


async def test_a_worker_that_hangs_is_killed(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    frontend = await frontend_server(workers=2)
    workers = frontend.server.workers
    await workers.ready()
    (worker,) = children_of(os.getpid())
    os.kill(worker, signal.SIGSTOP)
    monkeypatch.setattr(supervisor, "SILENT_SECONDS", 0.3)
    while workers.count() > 1:
        await asyncio.sleep(0.05)
    assert "worker 1 has said nothing for 0.3 seconds; it is killed" in caplog.text
