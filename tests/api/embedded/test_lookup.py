import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.embedded.keys import ChunkKeys
from lmcache_api.embedded.layout import KVLayout
from lmcache_api.embedded.lookup import EmbeddedLookupClient, RemoteWorker, SchedulerLookup, Worker, WorkerLookup
from lmcache_api.embedded.statistics import EmbeddedChunkStatistics
from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_shared.address import Address, tcp_address, unix_address
from lmcache_shared.settings import Settings
from tests.api.embedded.making import CHUNK, SMALL, Made, settings_of

TOKENS = range(4 * CHUNK)
Answering = Callable[[bytes], Address]


def remote(address: Address, milliseconds: int = 3000) -> RemoteWorker:
    settings = settings_of(lookup_timeout_ms=milliseconds)
    return RemoteWorker(address, lambda: settings)


def client(workers: dict[int, Worker], settings: Settings | None = None, *, counting: bool = False) -> Any:
    settings = settings or settings_of()
    keys = ChunkKeys(settings, KVLayout.of(settings), worker_id=0, world_size=1)
    return EmbeddedLookupClient(workers, keys, EmbeddedChunkStatistics(settings) if counting else None)


@contextlib.contextmanager
def serving(talk: Callable[[socket.socket], None]) -> Iterator[Address]:
    """A server of its own words: `talk` has each connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        talk(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield tcp_address("127.0.0.1", server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert not thread.is_alive()


def answer(body: bytes, status: str = "200 OK") -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + body)

    return talk


class Knows:
    def __init__(self, hit: int) -> None:
        self.hit = hit

    def hit_tokens(self, tokens: Sequence[int]) -> int:
        return self.hit


def test_a_requests_hit_is_what_all_workers_have(made: Callable[..., Made]) -> None:
    engines = [made().engine for _ in range(3)]
    for number, engine in enumerate(engines):
        engine.store(TOKENS[: (4 - number) * CHUNK])
    asks = client(dict(enumerate(engines)))
    assert asks.hits(TOKENS) == {0: 64, 1: 48, 2: 32}
    assert asks.lookup(TOKENS) == 32
    assert asks.lookup(range(900, 1000)) == 0
    assert client({}).lookup(TOKENS) == 0


@pytest.mark.parametrize("tcp", [True, False])
async def test_a_worker_of_another_process_is_asked_by_its_internal_api(api_server: StartApi, tcp: bool) -> None:
    server = await api_server(role="worker", tcp=tcp, **SMALL)
    worker = remote(server.address)
    assert await asyncio.to_thread(worker.hit_tokens, TOKENS) == 0
    async with server.client.post("/cache/store?tokens_mock=0,40") as response:
        assert response.status == 200
    assert await asyncio.to_thread(worker.hit_tokens, TOKENS) == 32
    assert await asyncio.to_thread(worker.hit_tokens, list(TOKENS)) == 32
    with pytest.raises(OSError, match="it answers 400"):
        await asyncio.to_thread(worker.hit_tokens, [])


async def test_local_and_remote_workers_together(api_server: StartApi, made: Callable[..., Made]) -> None:
    server = await api_server(role="worker", **SMALL)
    async with server.client.post("/cache/store?tokens_mock=0,32") as response:
        assert response.status == 200
    engine = made().engine
    engine.store(TOKENS)
    workers: dict[int, Worker] = {number: remote(server.address) for number in range(1, 12)}
    both = client({0: engine, **workers})
    assert await asyncio.to_thread(both.hits, TOKENS) == {0: 64, **dict.fromkeys(range(1, 12), 32)}
    assert await asyncio.to_thread(both.lookup, TOKENS) == 32


def test_a_dead_worker_has_nothing_and_is_told_of(tmp_path: Path) -> None:
    dead = {1: remote(tcp_address("127.0.0.1", free_port())), 2: remote(unix_address(f"{tmp_path}/none"))}
    asks = client({0: Knows(64), **dead})
    assert asks.lookup(TOKENS) == 0
    hits = asks.hits(TOKENS)
    assert hits[0] == 64
    assert "Connection refused" in str(hits[1])
    assert "No such file" in str(hits[2])


def silent(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def dripping(connection: socket.socket) -> None:
    """Never an end, and never so long without a byte that a socket's own timeout would strike."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    connection.settimeout(0.02)
    while True:
        with contextlib.suppress(TimeoutError):
            connection.sendall(b" ")
            if not connection.recv(65536):
                return


def many_headers(connection: socket.socket) -> None:
    connection.settimeout(0.02)
    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    while True:
        with contextlib.suppress(TimeoutError):
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if not connection.recv(65536):
                return


@pytest.mark.parametrize("talk", [silent, dripping, many_headers])
def test_a_worker_that_never_answers_is_waited_for_until_the_deadline(talk: Callable[[socket.socket], None]) -> None:
    with serving(talk) as address:
        began = time.monotonic()
        with pytest.raises(OSError, match="timed out"):
            remote(address, 200).hit_tokens(TOKENS)
        assert 0.15 < time.monotonic() - began < 2
        assert client({0: remote(address, 100), 1: Knows(64)}).lookup(TOKENS) == 0


def test_a_unix_socket_whose_line_is_full_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(f"{tmp_path}/s")
        server.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(f"{tmp_path}/s")
        began = time.monotonic()
        with pytest.raises(OSError):
            remote(unix_address(f"{tmp_path}/s"), 200).hit_tokens(TOKENS)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "talk",
    [
        answer(b""),
        answer(b"{"),
        answer(b"[1]"),
        answer(b'"num_hit_tokens"'),
        answer(b"null"),
        answer(b"{}"),
        answer(b'{"num_hit_tokens": "16"}'),
        answer(b'{"num_hit_tokens": 16.0}'),
        answer(b'{"num_hit_tokens": true}'),
        answer(b'{"num_hit_tokens": -16}'),
        answer(b'{"num_hit_tokens": 65}'),
        answer(b'{"num_hit_tokens": 1' + b"0" * 5000 + b"}"),
        answer(b"[" * 200_000),
        answer(b"\xff\xfe"),
        answer(b'{"num_hit_tokens": 16, "x": "' + b" " * (2 << 20) + b'"}'),
        answer(b'{"num_hit_tokens": 16}', "500 Internal Server Error"),
        answer(b'{"num_hit_tokens": 16}', "404 Not Found"),
        answer(b'{"num_hit_tokens": 16}', "307 Temporary Redirect\r\nLocation: /"),
        lambda connection: connection.close(),
        lambda connection: connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n"),
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{}"),
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500),
        lambda connection: connection.sendall(b"x" * 100_000),
    ],
)
def test_garbage_is_no_hit(talk: Callable[[socket.socket], None]) -> None:
    with serving(talk) as address:
        with pytest.raises(OSError):
            remote(address).hit_tokens(TOKENS)
        asks = client({0: remote(address), 1: Knows(64)})
        assert asks.lookup(TOKENS) == 0
        hits = asks.hits(TOKENS)
        assert isinstance(hits[0], OSError)
        assert hits[1] == 64


def test_a_right_answer_of_the_same_server_is_a_hit() -> None:
    with serving(answer(b'{"num_hit_tokens": 64}')) as address:
        assert remote(address).hit_tokens(TOKENS) == 64


def test_lookups_are_counted_and_questions_of_an_operator_not() -> None:
    asks = client({0: Knows(16)}, counting=True)
    asks.statistics.start()
    asks.lookup(TOKENS)
    asks.lookup(range(5 * CHUNK))
    asks.hits(range(900, 1000))
    status = asks.statistics.status()
    assert (status["total_requests"], status["total_chunks"], status["unique_chunks"]) == (2, 9, 5)
    assert status["timing"]["lookup_time_seconds"] > 0


def test_closed_and_made_again_by_the_settings_of_now() -> None:
    settings = [settings_of()]
    keys = ChunkKeys(settings[0], KVLayout.of(settings[0]), worker_id=0, world_size=1)
    lookup = SchedulerLookup(lambda: settings[0], {0: Knows(16)}, keys)
    plain, counting = "EmbeddedLookupClient", "ChunkStatisticsLookupClient(EmbeddedLookupClient)"
    assert lookup.info() == {"client": plain, "server": "None"}
    settings[0] = settings_of(enable_chunk_statistics=True, chunk_statistics_auto_start_statistics=True)
    assert lookup.info()["client"] == plain
    before = lookup.client
    assert lookup.create(dryrun=True) == {"new": counting, "dryrun": True}
    assert lookup.client is before
    assert lookup.recreate() == {"old": plain, "new": counting}
    assert lookup.client is not None
    assert lookup.client.statistics is not None
    assert lookup.client.statistics.status()["enabled"]
    assert lookup.client.lookup(TOKENS) == 16
    assert lookup.close() == {"old": counting}
    assert lookup.close() == {"old": "None"}
    assert lookup.client is None
    assert lookup.info()["client"] == "None"
    assert lookup.recreate() == {"error": "lookup client not available"}
    settings[0] = settings_of()
    assert lookup.create(dryrun=True) == {"new": plain, "dryrun": True}
    assert lookup.client is None
    assert lookup.create(dryrun=False) == {"new": plain}
    assert lookup.client.lookup(TOKENS) == 16


def test_a_worker_has_neither_and_says_so() -> None:
    lookup = WorkerLookup()
    assert lookup.info() == {"client": "None", "server": "None"}
    assert lookup.close() == {"old": "None"}
    assert "has no lookup server" in lookup.create(dryrun=False)["error"]
    assert "error" in lookup.recreate()


async def test_a_scheduler_asks_its_workers_over_their_sockets(api_server: StartApi) -> None:
    worker = await api_server(role="worker", **SMALL)
    prefix = str(worker.address).rpartition("_")[0]
    async with worker.client.post("/cache/store?tokens_mock=0,64") as response:
        assert response.status == 200
    scheduler = EmbeddedComponent(settings_of(internal_api_server_socket_path_prefix=prefix))
    assert scheduler.lookup_client is not None
    assert await asyncio.to_thread(scheduler.lookup_client.hits, TOKENS) == {0: 64}


async def test_the_gauges_of_a_client_that_is_closed_are_zero(api_server: StartApi) -> None:
    scheduler = await api_server(
        role="scheduler", enable_chunk_statistics=True, chunk_statistics_auto_start_statistics=True, **SMALL
    )

    async def gauge(name: str) -> str:
        async with scheduler.client.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        return next(line.rpartition(" ")[2] for line in lines if line.startswith(f"lmcache:chunk_statistics_{name}{{"))

    assert (await gauge("enabled"), float(await gauge("bloom_filter_size_mb")) > 1) == ("1.0", True)
    async with scheduler.client.post("/lookup/close") as response:
        assert response.status == 200
    assert (await gauge("enabled"), await gauge("bloom_filter_size_mb")) == ("0.0", "0.0")
