"""Continuous health, of nodes that really listen: what makes a node up, slow, down or unknown, and when it is asked."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import uvloop

from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_frontend.nodes.node import Node, Proxy, Reach
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_frontend.telemetry import client, names
from lmcache_frontend.telemetry.client import NoAnswer, ask, request_bytes
from lmcache_frontend.telemetry.health import board as health
from lmcache_frontend.telemetry.health import changes, states
from lmcache_frontend.telemetry.health.board import HealthBoard, NodeHealth, pause, version_of
from lmcache_frontend.telemetry.health.states import Checked, after
from lmcache_frontend.telemetry.names import Names, NotAsked
from lmcache_shared.address import Address, TcpAddress, UnixAddress, from_node
from tests.frontend.upstream import Upstream, serving

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
GOOD = b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"0.5.6"'
UNAVAILABLE = b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"


class Changing(Registry):
    """A registry whose nodes change, as one that discovers them."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        super().__init__(host="h", port=1)
        self.set(nodes)

    def set(self, nodes: Iterable[Node]) -> None:
        self._found = Proxy("p", "h", 1, TcpAddress("h", 1), tuple(nodes))

    def proxies(self) -> Iterator[Proxy]:
        return iter([self._found])

    def node(self, proxy: str, name: str) -> Node | None:
        return next((node for node in self._found.nodes if proxy == "p" and node.name == name), None)


def node(port: int | str, name: str = "n", host: str = "127.0.0.1") -> Node:
    return Node(name, host, port, from_node(host, port))


@contextlib.asynccontextmanager
async def board_of(*nodes: Node, interval: float = 60.0, rise: int = 1, fall: int = 2) -> AsyncIterator[HealthBoard]:
    board = HealthBoard(Changing(nodes), interval=interval, rise=rise, fall=fall)
    board.start()
    try:
        yield board
    finally:
        await asyncio.wait_for(board.close(), 2)
        assert not [task for task in asyncio.all_tasks() if task.get_name() in ("health check", "look up a name")]


def set_nodes(board: HealthBoard, *nodes: Node) -> None:
    assert isinstance(board._registry, Changing)
    board._registry.set(nodes)


async def until(condition: Callable[[], bool], seconds: float = 8.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


def talking(*pieces: bytes, then: Callable[[], Awaitable[None]] | None = None) -> Upstream:
    """It says these pieces, then nothing more or what `then` does, and closes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        if then is not None:
            await then()

    return Upstream(talk=talk)


async def for_ever() -> None:
    await asyncio.sleep(60)


# What one more check makes of a node


def fresh() -> NodeHealth:
    return NodeHealth(node(1), "p")


def checked(found: Iterable[Checked], *, rise: int = 1, fall: int = 2) -> list[tuple[str, int, int]]:
    health, seen = fresh(), []
    for number, one in enumerate(found):
        health = after(health, one, NOON + timedelta(seconds=number), rise=rise, fall=fall)
        seen.append((health.state, health.successes, health.failures))
    return seen


GOOD_CHECK, BAD, SLOW = Checked(milliseconds=2.0), Checked("no answer"), Checked(milliseconds=1500.0)
OUR_FAULT = Checked("could not be asked", asked=False)


def test_rise_and_fall() -> None:
    assert checked([GOOD_CHECK, BAD, GOOD_CHECK, BAD, BAD, BAD, GOOD_CHECK]) == [
        ("up", 1, 0),
        ("up", 0, 1),
        ("up", 1, 0),
        ("up", 0, 1),
        ("down", 0, 2),
        ("down", 0, 3),
        ("up", 1, 0),
    ]
    steps = [BAD, GOOD_CHECK, GOOD_CHECK, BAD, GOOD_CHECK, GOOD_CHECK, GOOD_CHECK, BAD, BAD, BAD]
    found = [state for state, _, _ in checked(steps, rise=3, fall=3)]
    assert found == ["down", "down", "down", "down", "down", "down", "up", "up", "up", "down"]


def test_slow_and_unknown() -> None:
    steps = [SLOW, GOOD_CHECK, SLOW, BAD, BAD, SLOW, OUR_FAULT, BAD, OUR_FAULT, GOOD_CHECK]
    found = [state for state, _, _ in checked(steps)]
    assert found == ["slow", "up", "slow", "slow", "down", "slow", "unknown", "down", "unknown", "up"]


def test_what_is_told_of_a_node() -> None:
    first = after(fresh(), Checked(milliseconds=2.126, version="1"), NOON)
    assert first.as_json() == {
        "proxy": "p",
        "node": "n",
        "address": "127.0.0.1:1",
        "state": "up",
        "since": "2026-01-01T12:00:00.000+00:00",
        "successes": 1,
        "failures": 0,
        "problem": None,
        "checked": "2026-01-01T12:00:00.000+00:00",
        "milliseconds": 2.13,
        "version": "1",
        "role": None,
        "model": None,
        "instance": None,
    }
    later = after(first, BAD, NOON + timedelta(seconds=9))
    assert (later.state, later.since, later.problem, later.version) == ("up", NOON, "no answer", "1")
    down = after(later, BAD, NOON + timedelta(seconds=10))
    assert (down.state, down.since, down.milliseconds) == ("down", NOON + timedelta(seconds=10), None)
    slow = after(first, SLOW, NOON)
    assert slow.problem == "answered after 1.5 seconds; from 1 on it is slow"
    assert fresh().as_json()["since"] is None


# One question


async def answer_of(upstream: Upstream) -> tuple[int, bytes | None]:
    async with serving(upstream):
        address = TcpAddress("127.0.0.1", upstream.port)
        found = await ask(address, request_bytes(address, "/version"), Names())
        return found.status, found.body


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"], b"ok"),
        ([bytes([byte]) for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"], b"ok"),
        (
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n", b"1;x=y\r\nk\r\n0\r\nT: v\r\n\r\n"],
            b"ok",
        ),
        ([b"HTTP/1.0 200 OK\r\n\r\no", b"k"], b"ok"),
        ([b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok"], b"ok"),
        ([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 X\r\nLink: x\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nok"], b"ok"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"], b""),
        ([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 500 X\r\n\r\n"], b"ok"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n", b"x" * 300_000], None),
        ([b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 50_000] * 6], None),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"], "no HTTP"),
    ],
)
async def test_bodies(pieces: list[bytes], body: bytes | str | None) -> None:
    if isinstance(body, str):
        with pytest.raises(NoAnswer, match=body):
            await answer_of(talking(*pieces))
        return
    status, found = await answer_of(talking(*pieces))
    assert (status, found) == (204 if b"204" in pieces[0] else 200, body)


@pytest.mark.parametrize(
    ("upstream", "problem"),
    [
        (talking(b"nonsense\r\n\r\n"), "answers something that is no HTTP"),
        (talking(b"SSH-2.0-OpenSSH_9.2\r\n"), "answers something that is no HTTP"),
        (talking(b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), "answers something that is no HTTP"),
        (talking(b"HTTP/1.1 099 X\r\n\r\n"), "answers something that is no HTTP"),
        (talking(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n"), "no HTTP"),
        (talking(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000), "answers with a head of more than 16 KiB"),
        (talking(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), "answers with a head of more than 16 KiB"),
        (talking(), "hangs up without an answer"),
        (talking(b"HTTP/1.1 200 O"), "breaks off in the middle of its answer"),
        (talking(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok"), "breaks off in the middle of its answer"),
        (talking(CHUNKED + b"2\r\nok\r\n"), "breaks off in the middle"),
        (talking(then=for_ever), "no answer within 0.2 seconds"),
        (
            talking(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", then=for_ever),
            "no whole answer within 0.2 seconds",
        ),
    ],
)
async def test_what_is_no_answer(upstream: Upstream, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.2)
    with pytest.raises(NoAnswer, match=problem):
        await answer_of(upstream)


async def problem_of(address: Address) -> str:
    with pytest.raises((NoAnswer, NotAsked)) as refused:
        await ask(address, request_bytes(address, "/version"), Names())
    return f"{type(refused.value).__name__}: {refused.value}"


async def test_what_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CONNECT_SECONDS", 0.2)
    assert await problem_of(TcpAddress("127.0.0.1", free_port())) == "NoAnswer: Connection refused"
    assert await problem_of(UnixAddress(str(tmp_path / "s"))) == "NoAnswer: No such file or directory"
    assert (await problem_of(TcpAddress("no-such-host.invalid", 80))).startswith("NoAnswer: ")
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(4):  # its line is full: a SYN is not even refused
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
            assert await problem_of(TcpAddress("127.0.0.1", port)) == "NoAnswer: no connection within 0.2 seconds"


def test_a_node_that_hangs_up_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the loop of the program: there nothing can be written to a connection that is gone."""
    connect = client._connect

    async def late(address: Address, found: list[names.AddressInfo], reader: client._Reader) -> None:
        await connect(address, found, reader)
        await asyncio.sleep(0.05)  # this process is busy

    monkeypatch.setattr(client, "_connect", late)

    async def at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async def ask_often() -> set[str]:
        async with serving(Upstream(talk=at_once)) as upstream:
            address = TcpAddress("127.0.0.1", upstream.port)
            return {await problem_of(address) for _ in range(3)}

    told = {"NoAnswer: hangs up without an answer", "NoAnswer: Connection reset by peer"}
    assert uvloop.run(ask_often()) <= told


async def test_what_lies_on_this_side_is_no_fault_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_more(*args: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(client, "_connect", no_more)
    assert await problem_of(TcpAddress("127.0.0.1", 1)) == "NotAsked: could not be asked: Too many open files"
    async with board_of(node(1)) as board:
        assert await board.settled(5)
        assert board.of("p", "n").state == "unknown"


async def test_names_are_looked_up_once_for_all_and_forgotten_when_nobody_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(names, "LOOKUP_SECONDS", 0.1)
    asked: list[str] = []
    gate = asyncio.Event()

    async def getaddrinfo(host: str, port: object, **_: object) -> list[object]:
        asked.append(host)
        await gate.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    kept, address = Names(), TcpAddress("somewhere", 7)
    for _ in range(3):
        with pytest.raises(NotAsked, match="not resolved within"):
            await kept.addresses(address)
    gate.set()
    found = await asyncio.gather(*(kept.addresses(address) for _ in range(5)))
    assert {where for infos in found for *_, where in infos} == {("127.0.0.1", 7)}
    assert asked == ["somewhere"]
    kept.forget("somewhere")
    await kept.addresses(address)
    assert asked == ["somewhere"] * 2
    assert await kept.addresses(TcpAddress("::1", 7)) == [], "a number needs no lookup"
    await kept.close()


async def test_a_name_with_two_addresses_of_which_one_is_dead() -> None:
    async with serving(Upstream(GOOD)) as upstream:
        address = TcpAddress("two", upstream.port)
        found = [
            (family, socket.SOCK_STREAM, 6, "", (host, address.port))
            for family, host in ((socket.AF_INET, "127.0.0.9"), (socket.AF_INET, "127.0.0.1"))
        ]

        class Two(Names):
            async def addresses(self, address: TcpAddress) -> list[names.AddressInfo]:
                return found  # type: ignore[return-value]

        assert (await ask(address, request_bytes(address, "/version"), Two())).body == b'"0.5.6"'


def test_a_request_to_the_byte() -> None:
    sent = request_bytes(TcpAddress("fe80::1%eth0", 80), "/proxy/localhost/%252Fs/version")
    assert sent.startswith(b"GET /proxy/localhost/%252Fs/version HTTP/1.1\r\nHost: [fe80::1]:80\r\n")
    assert b"\r\nHost: localhost\r\n" in request_bytes(UnixAddress("/s"), "/version")


@pytest.mark.parametrize(
    ("body", "version"),
    [
        (b'"0.5.6"', "0.5.6"),
        (b'"0.5.6-commit 1a2b"', "0.5.6-commit 1a2b"),
        (b"'0.5.6'", "0.5.6"),
        (b" 0.5.6\n", "0.5.6"),
        (b"", None),
        (b"ok", None),
        (b"[" * 4000, None),
        (b"[" * 60_000, None),
        (b'"\\ud800"', None),
        (b'{"a": 1}', None),
        (b"5", None),
        (b"1" * 200, None),
        (b'"%s"' % (b"x" * 200), None),
        (b"\xff\x00", None),
    ],
)
def test_what_a_node_says_of_its_version(body: bytes, version: str | None) -> None:
    assert version_of(body) == version


# The board


async def test_nodes_of_every_kind(api_server: StartApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(states, "SLOW_MILLISECONDS", 100.0)

    async def a_while() -> None:
        await asyncio.sleep(0.2)

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await a_while()
        writer.write(GOOD)

    worker = await api_server(role="worker")
    upstreams = {
        "late": Upstream(talk=late),
        "hangs": Upstream(talk=hang),
        "503": Upstream(UNAVAILABLE),
        "404": Upstream(b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n"),
        "garbage": talking(b"220 smtp\r\n"),
        "half": talking(GOOD[:-3]),
    }
    async with contextlib.AsyncExitStack() as stack:
        nodes = [
            node(str(worker.address), "unix"),
            node(free_port(), "refused"),
            node(str(tmp_path / "s"), "no socket"),
        ]
        for name, upstream in upstreams.items():
            await stack.enter_async_context(serving(upstream))
            nodes.append(node(upstream.port, name))
        board = await stack.enter_async_context(board_of(*nodes))
        assert [entry.state for entry in board.all()] == ["unknown"] * len(nodes)
        assert await board.settled(5)
        assert [(entry.node.name, entry.state, entry.problem) for entry in board.all()] == [
            ("unix", "up", None),
            ("refused", "down", "Connection refused"),
            ("no socket", "down", "No such file or directory"),
            ("late", "slow", "answered after 0.2 seconds; from 0.1 on it is slow"),
            ("hangs", "down", "no answer within 0.5 seconds"),
            ("503", "down", "answers 503"),
            ("404", "up", None),
            ("garbage", "down", "answers something that is no HTTP"),
            ("half", "down", "breaks off in the middle of its answer"),
        ]
        assert board.counts() == {"down": 6, "unknown": 0, "slow": 1, "up": 2}
        found = board.of("p", "unix")
        assert (found.role, found.version) == ("worker", "0.1.0-embedded")
        assert found.checked is not None
        assert found.milliseconds is not None
        assert abs((datetime.now(timezone.utc) - found.checked).total_seconds()) < 10
        with pytest.raises(KeyError):
            board.of("p", "nobody")


SANDBOX = b"Content-Security-Policy: sandbox\r\n"
GONE = b'{"detail":"Node with name \'worker0\' not found"}'
LATE = b'{"detail":"Connection to socket /s timed out"}'


def refusing(status: int, body: bytes = b"", headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\n%sContent-Length: %d\r\n\r\n%s" % (status, headers, len(body), body)


@pytest.mark.parametrize(
    ("answer", "through", "problem"),
    [
        (refusing(403), (), "p answers 403: it does not let the node be reached"),
        (refusing(401), (), "p answers 401: it asks for a token, or for another one, as token in its entry"),
        (refusing(404, GONE), (), "p no longer has it"),
        (refusing(404, GONE), ("far",), "p no longer has it"),
        (refusing(404, GONE, SANDBOX), ("far", "further"), "a frontend behind p no longer has it"),
        (refusing(409, b'{"detail":"2 nodes are named \'w\'; ask for /x"}'), (), "p has several nodes of its name"),
        (refusing(404), ("far",), "p answers 404"),
        (refusing(504, LATE), (), "p answers 504: Connection to socket /s timed out"),
        (
            refusing(502, b'{"detail":"no /s","reason":"Connection refused"}'),
            (),
            "p answers 502: no /s: Connection refused",
        ),
        (refusing(500, b'{"detail":"a\\u001b\\ud800%s"}' % (b"x" * 999)), (), f"p answers 500: a??{'x' * 147}…"),
        (refusing(503, b"", SANDBOX), ("far",), "answers 503"),
        (refusing(404), (), None),
        (refusing(404, b"[" * 60_000), (), None),
        (refusing(404, b'{"detail":"Not Found"}', SANDBOX), ("far",), None),
        (refusing(409, b"", SANDBOX), ("far",), None),
    ],
)
async def test_what_a_frontend_on_the_way_says_is_no_answer_of_the_node(
    answer: bytes, through: tuple[str, ...], problem: str | None
) -> None:
    async with serving(Upstream(answer)) as upstream:
        way = Reach(TcpAddress("127.0.0.1", upstream.port), "/proxy2/worker0")
        behind = Node("behind", "x", "/s", UnixAddress("/s"), path="/proxy2/worker0", through=through, via=way)
        async with board_of(behind) as board:
            assert await board.settled(5)
            (found,) = board.all()
            assert (found.state, found.problem) == ("down" if problem else "up", problem)
        assert upstream.heads[0].startswith(b"GET /proxy2/worker0/version HTTP/1.1\r\n")


@pytest.mark.parametrize("headers", [b"", SANDBOX])
async def test_a_node_that_wants_a_token_is_up_and_says_so(headers: bytes) -> None:
    async with serving(Upstream(refusing(401, b'{"detail":"x"}', headers))) as upstream:
        asked = node(upstream.port, "w")
        if headers:  # the frontend between has it from the node
            way = Reach(TcpAddress("127.0.0.1", upstream.port), "/proxy2/w")
            asked = Node("w", "x", "/s", UnixAddress("/s"), path="/proxy2/w", through=("far",), via=way)
        async with board_of(asked) as board:
            assert await board.settled(5)
            (found,) = board.all()
            assert found.state == "up"
            assert found.problem == "answers 401: it asks for a token, or for another one, as token in its entry"


async def test_what_a_node_itself_says_of_a_frontend_counts_as_its_answer() -> None:
    async with serving(Upstream(refusing(404, GONE))) as upstream, board_of(node(upstream.port)) as board:
        assert await board.settled(5)
        assert [entry.state for entry in board.all()] == ["up"]


async def test_a_node_that_its_proxy_no_longer_has_is_down_and_says_who_has_lost_it(
    api_server: StartApi, frontend_server: StartFrontend
) -> None:
    worker = await api_server(role="worker")
    far = await frontend_server(nodes=[worker.node])
    middle = await frontend_server(nodes=[proxy_at("far", far.server.address.port)])
    near = await frontend_server(nodes=[proxy_at("middle", middle.server.address.port)], health_interval=1.0)
    for frontend, name in ((middle, "far"), (near, "middle")):
        async with frontend.client.get(f"/api/proxies/{name}/refresh") as response:
            assert response.status == 200
    board = near.server.cluster.health
    assert await board.settled(5)
    await until(lambda: [entry.state for entry in board.all()] == ["up"])
    far.server.cluster.registry.publish("nodes", [])
    await until(lambda: [entry.state for entry in board.all()] == ["down"])
    assert board.all()[0].problem == "a frontend behind middle no longer has it"
    address = middle.server.address
    await middle.server.stop()
    await until(lambda: board.all()[0].problem == f"middle ({address}): Connection refused")


def proxy_at(name: str, port: int) -> dict[str, object]:
    return {"name": name, "host": "127.0.0.1", "port": port, "nodes": []}


async def test_down_after_two_failures_and_up_after_one_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(health, "TICK_SECONDS", 0.01)
    async with serving(Upstream(GOOD)) as upstream, board_of(node(upstream.port), interval=0.05) as board:
        assert await board.settled(5)
        begun = board.of("p", "n").since
        upstream.answer = UNAVAILABLE
        await until(lambda: board.of("p", "n").failures > 0)
        assert (board.of("p", "n").state, board.of("p", "n").since) == ("up", begun)
        await until(lambda: board.of("p", "n").state == "down")
        found = board.of("p", "n")
        assert found.failures >= 2
        assert found.since is not None
        assert begun is not None
        assert found.since > begun
        assert found.problem == "answers 503"
        upstream.answer = GOOD
        await until(lambda: board.of("p", "n").state == "up")


async def test_the_role_is_asked_when_it_comes_up_and_when_its_version_changes() -> None:
    async with serving(Upstream(GOOD)) as upstream, board_of(node(upstream.port), interval=0.03) as board:
        await until(lambda: board.of("p", "n").successes >= 4)
        assert sum(b"/meta?names=role" in head for head in upstream.heads) == 1
        upstream.answer = GOOD.replace(b"0.5.6", b"0.5.7")
        await until(lambda: sum(b"/meta?names=role" in head for head in upstream.heads) == 2)
        assert board.of("p", "n").role is None


async def test_nodes_come_go_and_change_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_SECONDS", 0.05)
    async with serving(Upstream(GOOD)) as first, serving(Upstream(UNAVAILABLE)) as second:  # noqa: SIM117
        async with board_of(node(first.port, "a")) as board:
            assert await board.settled(5)
            since = board.of("p", "a").since
            set_nodes(board, node(first.port, "a"), node(first.port, "b"))
            assert [entry.state for entry in board.all()] == ["up", "unknown"]
            await until(lambda: board.counts()["up"] == 2)
            assert board.of("p", "a").since == since, "it is the same node"
            set_nodes(board, node(second.port, "a"))
            assert [entry.state for entry in board.all()] == ["unknown"], "nothing is known of what is there"
            await until(lambda: board.counts()["down"] == 1)
            assert board.of("p", "a").version is None
            set_nodes(board)
            await until(lambda: not board._watched)
            assert await board.settled(0)


async def test_a_node_that_goes_while_it_is_asked_leaves_nothing() -> None:
    async with serving(Upstream(talk=hang)) as upstream, board_of(node(upstream.port)) as board:
        await until(lambda: upstream.connections == 1)
        set_nodes(board)
        board._look()
        await until(lambda: not board._tasks)
        assert await board.settled(1)
        assert board._lanes[0].running == 0


async def test_close_with_checks_in_flight() -> None:
    async with serving(Upstream(talk=hang)) as upstream:
        board = HealthBoard(Changing(node(upstream.port, f"n{i}") for i in range(50)))
        board.start()
        await until(lambda: upstream.connections == 50)
        assert not await board.settled(0.01)
        clock = time.monotonic()
        await board.close()
        assert time.monotonic() - clock < 0.5
        assert not board._tasks
        await until(lambda: not upstream._tasks)


async def test_close_is_told_again_to_a_check_that_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forgetful(*args: object) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    monkeypatch.setattr(health, "ask", forgetful)
    async with board_of(node(1)) as board:
        await asyncio.sleep(0.01)
        assert board._tasks


async def test_what_hangs_is_bounded_and_does_not_delay_what_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CHECKS_AT_ONCE", 8)
    monkeypatch.setattr(health, "FAILING_AT_ONCE", 4)
    monkeypatch.setattr(health, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(health, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.2)
    most = 0
    now = 0

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        try:
            await reader.read()
        finally:
            now -= 1

    async with serving(Upstream(talk=slow)) as hanging, serving(Upstream(GOOD)) as fine:
        nodes = [node(hanging.port, f"h{i}") for i in range(40)]
        async with board_of(*nodes, node(fine.port, "fine"), interval=0.1) as board:
            assert not await board.settled(0.01)
            assert await board.settled(5)
            assert 7 <= most <= 14  # 8 and 4; the far end sees an old one end a little after the next begins
            before = board.of("p", "fine").successes
            clock = time.monotonic()
            await until(lambda: board.of("p", "fine").successes >= before + 8)
            assert time.monotonic() - clock < 2.5, "no more than its interval lies between its checks"
            assert board.counts() == {"down": 40, "unknown": 0, "slow": 0, "up": 1}


async def test_a_thousand_nodes_and_when_they_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(Upstream(GOOD)) as good, serving(Upstream(UNAVAILABLE)) as bad:
        nodes = [node(bad.port if i % 10 == 0 else good.port, f"n{i}") for i in range(1000)]
        async with board_of(*nodes, interval=600.0) as board:
            assert await board.settled(20)
            assert board.counts() == {"down": 100, "unknown": 0, "slow": 0, "up": 900}
            assert [entry.node for entry in board.all()] == nodes
            assert all((entry.state == "down") is (i % 10 == 0) for i, entry in enumerate(board.all()))
            due = [w.due + pause(600.0, w.health, w.phase) - w.due for w in board._watched.values() if w.checks == 1]
    well = [seconds for seconds in due if seconds > 2]
    tenths = [sum(60 * i <= seconds < 60 * (i + 1) for seconds in well) for i in range(10)]
    assert all(70 <= count <= 110 for count in tenths), tenths  # spread over the interval: 90 in each tenth


def test_pauses() -> None:
    up, down = after(fresh(), GOOD_CHECK, NOON), after(fresh(), BAD, NOON)
    assert pause(10, up, 0.25) == 2.5
    usual = [pause(10, up) for _ in range(300)]
    assert 9 <= min(usual) < 9.3
    assert 10.7 < max(usual) <= 11
    assert len(set(usual)) > 250
    for failures, seconds in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (10_000, 10)):
        found = pause(10, states.replace(down, failures=failures), 0.5)
        assert seconds * 0.9 <= found <= seconds * 1.1
    assert pause(10, states.replace(down, failures=0)) < 1.2, "it has begun to answer: is it back?"


async def test_a_registry_that_fails_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_SECONDS", 0.02)
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))
    async with serving(Upstream(GOOD)) as upstream, board_of() as board:
        registry = board._registry
        board._registry = None  # type: ignore[assignment]
        await until(lambda: bool(told))
        board._registry = registry
        set_nodes(board, node(upstream.port))
        await until(lambda: board.counts()["up"] == 1)


# The log


async def test_each_change_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(health, "TICK_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "lmcache_frontend.telemetry.health.changes")
    async with serving(Upstream(GOOD)) as upstream, board_of(node(upstream.port, "a\x1b"), interval=0.03) as board:
        await until(lambda: board.all()[0].successes > 3)
        upstream.answer = UNAVAILABLE
        await until(lambda: board.all()[0].failures > 4)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "a? of p is up"),
        ("WARNING", "a? of p is down: answers 503"),
    ]


async def test_a_whole_fleet_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lmcache_frontend.telemetry.health.changes")
    log = changes.ChangeLog()
    for i in range(1000):
        log.note(after(NodeHealth(node(1, f"n{i}"), "p"), GOOD_CHECK, NOON))  # below the level: not counted
        log.note(after(NodeHealth(node(1, f"n{i}"), "p"), Checked("x" * 500), NOON))
    assert len(caplog.records) == changes.LINES_PER_SECOND
    assert len(caplog.records[0].getMessage()) < 300
    log.close()
    assert caplog.records[-1].getMessage() == "and 990 more nodes changed their state: 990 down"
    log.note(after(fresh(), BAD, NOON))
    assert caplog.records[-1].getMessage() == "n of p is down: no answer"
    log.close()
