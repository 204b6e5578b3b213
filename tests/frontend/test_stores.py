"""The stores: what all of them promise, and what each does when its file or its Redis does not play along."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from lmcache_frontend.nodes.stores import Change, Store, StoreAway, Unkeepable, open_store
from lmcache_frontend.nodes.stores import bounds as bounds_module
from lmcache_frontend.nodes.stores import redis as redis_module
from lmcache_frontend.nodes.stores import sqlite as sqlite_module
from lmcache_frontend.nodes.stores.spec import check_spec
from lmcache_frontend.nodes.stores.sqlite import SqliteStore
from lmcache_shared.errors import ConfigError
from tests.frontend.redis_server import RedisServer, Way, redis_server, way_to

KINDS = ("memory", "sqlite", "redis")
SHARED = ("sqlite", "redis")
PORT = 8000
LONG_SECONDS = 20.0
"""A deadline for what takes well below a second."""


@pytest.fixture(scope="module")
def module_server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def server(module_server: RedisServer) -> RedisServer:
    module_server.ask("FLUSHALL")
    return module_server


class Openers:
    """Opens stores, and closes them when the test is over."""

    def __init__(self) -> None:
        self._opened: list[Store] = []

    def __call__(self, spec: str) -> Store:
        self._opened.append(open_store(spec, PORT))
        return self._opened[-1]

    async def opened(self, spec: str) -> Store:
        store = self(spec)
        await store.open()
        return store

    async def close(self) -> None:
        for store in self._opened:
            await store.close()


@pytest.fixture
async def stores() -> AsyncIterator[Openers]:
    openers = Openers()
    yield openers
    await openers.close()


@pytest.fixture
def spec_of(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], str]:
    def spec(kind: str) -> str:
        if kind == "redis":
            return str(request.getfixturevalue("server").url)
        return kind if kind == "memory" else f"sqlite:{tmp_path}/state/frontend.db"

    return spec


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest, stores: Openers, spec_of: Callable[[str], str]) -> Store:
    return await stores.opened(spec_of(request.param))


@pytest.fixture(params=SHARED)
async def two(request: pytest.FixtureRequest, stores: Openers, spec_of: Callable[[str], str]) -> tuple[Store, Store]:
    """Two frontends' stores that share what is kept."""
    spec = spec_of(request.param)
    return await stores.opened(spec), await stores.opened(spec)


def add(key: str, value: str = "v") -> Change:
    return Change(key, None, value)


async def becomes_changed(store: Store) -> None:
    """Wait until the store tells of a change; that it is away meanwhile is no failure."""
    deadline = time.monotonic() + LONG_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(StoreAway):
            if await store.changed(1.0):
                return
        await asyncio.sleep(0.05)
    raise AssertionError("no change was noticed")


async def is_read(store: Store) -> dict[str, str]:
    """What it holds, once it can be asked again."""
    deadline = time.monotonic() + LONG_SECONDS
    while True:
        try:
            return await store.read()
        except StoreAway:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def away(store: Store, *changes: Change) -> str:
    """Why the store does not make the changes: one line."""
    with pytest.raises(StoreAway) as refused:
        await store.apply(changes or [add("refused")])
    assert "\n" not in str(refused.value)
    return str(refused.value)


# what all of them promise


async def test_changes_are_kept_replaced_and_removed(store: Store) -> None:
    assert await store.read() == {}
    assert await store.apply([])
    assert await store.apply([add("a", "1"), add("ä/😀 \0", '{"x": "ü"}')])
    assert await store.read() == {"a": "1", "ä/😀 \0": '{"x": "ü"}'}
    assert await store.apply([Change("a", "1", "2"), Change("ä/😀 \0", '{"x": "ü"}', None), add("b", "")])
    assert await store.read() == {"a": "2", "b": ""}


@pytest.mark.parametrize(
    "wrong", [Change("a", None, "x"), Change("a", "2", "x"), Change("b", "1", None), Change("a", "", None)]
)
async def test_all_or_nothing(store: Store, wrong: Change) -> None:
    assert await store.apply([add("a", "1")])
    assert not await store.apply([add("before"), wrong, add("after")])
    assert await store.read() == {"a": "1"}


@pytest.mark.parametrize(
    "change",
    [add(""), add("\ud800"), add("a", "\ud800"), add("k" * 5000), add("a", "v" * 70_000), add("a", "ü" * 40_000)],
)
async def test_what_could_not_be_read_again_is_not_kept(store: Store, change: Change) -> None:
    with pytest.raises(Unkeepable):
        await store.apply([add("b"), change])
    with pytest.raises(StoreAway):
        await store.report(change.key, change.after or "", keep_seconds=5, limit=5)
    assert (await store.read(), await store.reports()) == ({}, {})
    assert "two changes of one record" in await away(store, add("b"), Change("b", "v", None))


@pytest.mark.parametrize("kind", KINDS)
async def test_records_are_bounded(
    kind: str, stores: Openers, spec_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bounds", "memory", "sqlite", "redis"):
        monkeypatch.setattr(f"lmcache_frontend.nodes.stores.{name}.MAX_RECORDS", 2)
    store = await stores.opened(spec_of(kind))
    assert await store.apply([add("a"), add("b")])
    assert "takes no more" in await away(store, add("c"))
    assert await store.apply([Change("a", "v", None), add("c")])
    assert sorted(await store.read()) == ["b", "c"]
    assert [await store.report(key, "v", keep_seconds=60, limit=10) for key in "abc"] == [True, True, False]


async def test_ten_thousand_records(store: Store) -> None:
    records = {f"node{i}": json.dumps({"name": f"node{i}", "host": "10.0.0.1", "port": i}) for i in range(10_000)}
    assert await store.apply([add(key, value) for key, value in records.items()])
    assert await store.read() == records


async def test_own_changes_are_told_once(store: Store) -> None:
    assert not await store.changed(0.05)
    assert await store.apply([add("a")])
    assert await store.changed(LONG_SECONDS)
    assert not await store.changed(0.05)
    assert not await store.apply([add("a")])
    assert not await store.changed(0.05)
    mark = await store.reports_mark()
    assert await store.report("r", "1", keep_seconds=60, limit=1)
    assert await store.reports_mark() != mark
    assert not await store.changed(0.05), "records are as they were"


async def test_waiting_can_be_cancelled_and_taken_up_again(store: Store) -> None:
    for _ in range(3):
        waiting = asyncio.ensure_future(store.changed(LONG_SECONDS))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert await store.apply([add("a")])
    assert await store.changed(LONG_SECONDS)


async def test_reports_until_their_time_is_over(store: Store) -> None:
    assert await store.report("short", "1", keep_seconds=0.3, limit=3)
    assert await store.report("long", "2", keep_seconds=60, limit=3)
    assert await store.report("long", "3", keep_seconds=60, limit=3)
    assert (await store.reports())["long"] == "3"
    deadline = time.monotonic() + LONG_SECONDS
    while "short" in await store.reports():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert await store.reports() == {"long": "3"}
    assert await store.read() == {}


async def test_reports_are_limited(store: Store) -> None:
    assert await store.report("a", "1", keep_seconds=0.2, limit=2)
    assert await store.report("b", "1", keep_seconds=60, limit=2)
    assert not await store.report("b", "2", keep_seconds=60, limit=0)
    await asyncio.sleep(0.25)
    assert await store.report("c", "1", keep_seconds=60, limit=2), "one that is over does not count"
    assert not await store.report("d", "1", keep_seconds=60, limit=2)
    assert await store.report("c", "2", keep_seconds=60, limit=2), "its own former does not count"
    assert await store.reports() == {"b": "1", "c": "2"}


async def test_others_changes_are_noticed(two: tuple[Store, Store]) -> None:
    here, there = two
    for number in range(3):
        waiting = asyncio.ensure_future(here.changed(LONG_SECONDS))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        assert await there.apply([add(f"a{number}")])
        assert await waiting
        assert time.monotonic() - started < 1.0
        assert len(await here.read()) == number + 1
    assert not await here.changed(0.05)
    assert await there.apply([add("between")])
    assert await here.changed(LONG_SECONDS), "what is changed between two calls is not missed"


async def test_one_of_two_wins(two: tuple[Store, Store]) -> None:
    for number in range(10):
        key = f"node{number}"
        results = await asyncio.gather(*(store.apply([add(key, str(i))]) for i, store in enumerate(two)))
        assert sorted(results) == [False, True]
        assert (await two[0].read())[key] == str(results.index(True)) == (await two[1].read())[key]


async def test_what_one_keeps_outlives_it(two: tuple[Store, Store]) -> None:
    assert await two[0].apply([add("a")])
    for _ in range(2):
        await two[0].close()
    assert await two[1].read() == {"a": "v"}
    for call in (two[0].read(), two[0].changed(1), two[0].open(), two[0].apply([add("b")])):
        with pytest.raises(StoreAway, match="this frontend has closed it"):
            await call
    assert await two[1].read() == {"a": "v"}


# which store is meant


@pytest.mark.parametrize(
    ("spec", "description"),
    [
        ("memory", "memory"),
        ("sqlite:/a/b.db", "sqlite:/a/b.db"),
        ("sqlite:/a/b c?d#e%41.db", "sqlite:/a/b c?d#e%41.db"),
        ("redis://h", "redis://h:6379/0"),
        ("redis://h:1/3", "redis://h:1/3"),
        ("redis://:s3cret@h/", "redis://h:6379/0"),
        ("redis://u:s3%2Fcret@[::1]:7/2", "redis://[::1]:7/2"),
        ("rediss://u:s3cret@h:7/2?ssl_ca_certs=/ca.pem", "rediss://h:7/2"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("unix://u:s3cret@/run/redis.sock?db=4", "unix:///run/redis.sock?db=4"),
    ],
)
async def test_specs(spec: str, description: str, stores: Openers) -> None:
    assert stores(spec).description == description


@pytest.mark.parametrize(
    "spec",
    [
        "", "disk", "Memory", "memory:", "sqlite:", "sqlite:relative.db", "sqlite:/a/", "sqlite:/a\0b", "sqlite3",
        "redis:", "redis://", "redis:///0", "redis://h:x/0", "redis://h:99999/0", "redis://h/x", "redis://h/0/1",
        "redis://h/-1", "redis://h/0?db=3", "redis://h/0?socket_timeout=9999", "redis://u@h/0", "redis://[::1/0",
        "redis://h/0#x", "unix://", "unix://path/redis.sock", "unix:/", "http://u:s3cret@h/", "redi://u:s3cret@h/",
        "redis://u:s3cret@h:x/0", "redis://u:s3cret@[h/0", "redis://u:s3cret#@h/0", "rediss://u:s3cret@h/0?x=1",
    ],
)  # fmt: skip
def test_specs_that_name_no_store(spec: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_spec(spec)
    assert "s3cret" not in str(refused.value)
    assert len(str(refused.value)) < 300


async def test_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stores: Openers) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert stores("sqlite").description == f"sqlite:{tmp_path}/xdg/lmcache-ops/frontend-{PORT}.db"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    store = await stores.opened("sqlite")
    assert await store.apply([add("a")])
    path = tmp_path / f"home/.local/state/lmcache-ops/frontend-{PORT}.db"
    assert store.description == f"sqlite:{path}"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    monkeypatch.setenv("HOME", "")
    homeless = stores("sqlite")
    for call in (homeless.open(), homeless.read(), homeless.apply([add("a")]), homeless.changed(1)):
        with pytest.raises(StoreAway, match="HOME.* name a file with --registry sqlite:/a/file"):
            await call
    assert await homeless.report("a", "1", keep_seconds=60, limit=1)
    assert await homeless.reports() == {"a": "1"}


# SQLite

CHILD = """
import asyncio, resource, sys
from lmcache_frontend.nodes.stores import Change, StoreAway, open_store

async def main():
    store = open_store("sqlite:" + sys.argv[1], 1)
    await store.open()
{body}
asyncio.run(main())
"""


def child(path: Path, body: str) -> subprocess.Popen[str]:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(body=lines), str(path)], stdout=subprocess.PIPE, text=True, env=environ
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "frontend.db"


@pytest.mark.parametrize("count", [1, 40])
async def test_what_was_acknowledged_outlives_a_kill(count: int, path: Path, stores: Openers) -> None:
    body = """
for i in range(10**6):
    assert await store.apply([Change(f"a{i}", None, "x" * 100), Change(f"b{i}", None, "x" * 100)])
    print(i, flush=True)
"""
    with child(path, body) as process:
        assert process.stdout is not None
        for _ in range(count):
            process.stdout.readline()
        process.kill()
        acknowledged = count + len(process.stdout.read().splitlines())
    kept = set(await (await stores.opened(f"sqlite:{path}")).read())
    assert {f"{half}{i}" for half in "ab" for i in range(acknowledged)} <= kept
    assert {key[1:] for key in kept if key[0] == "a"} == {key[1:] for key in kept if key[0] == "b"}, "half a change"


async def test_no_room(path: Path, stores: Openers) -> None:
    """The largest file that a process may write stands in for the disk's end; it needs no rights."""
    body = """
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
kept = 0
try:
    while kept < 1000:
        assert await store.apply([Change(f"a{kept}", None, "x" * 10_000), Change(f"b{kept}", None, "x" * 10_000)])
        kept += 1
except StoreAway as away:
    print(kept, away)
assert len(await store.read()) == 2 * kept, "it can still be read"
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
assert await store.apply([Change("room", None, "x" * 10_000)])
print(len(await store.read()))
await store.close()
"""
    with child(path, body) as process:
        out, _ = process.communicate(timeout=LONG_SECONDS)
    assert process.returncode == 0, out
    refused, count = out.splitlines()
    kept, _, text = refused.partition(" ")
    assert 0 < int(kept) < 10
    assert f"sqlite:{path}: " in text
    assert "full" in text
    assert int(count) == 2 * int(kept) + 1
    assert len(await (await stores.opened(f"sqlite:{path}")).read()) == int(count)


async def test_sqlite_says_full(path: Path, stores: Openers) -> None:
    store = await stores.opened(f"sqlite:{path}")
    assert isinstance(store, SqliteStore)
    await store._call(lambda file: file._current().execute("PRAGMA max_page_count = 4").fetchall())
    assert "the disk is full; make room" in await away(store, *(add(key, "x" * 10_000) for key in "abc"))
    assert await store.apply([add("a")]), "opened anew"
    assert await store.read() == {"a": "v"}


@pytest.mark.parametrize("below", ["file/frontend.db", "file/folder/frontend.db", "folder", "pipe"])
async def test_what_cannot_be_a_file(below: str, tmp_path: Path, stores: Openers) -> None:
    """A file in a folder's place refuses root, too."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    store = stores(f"sqlite:{tmp_path / below}")
    with pytest.raises(StoreAway, match=r"(?s)^sqlite:.*name a file in a folder that this user can write"):
        await store.open()
    assert str(tmp_path) in await away(store)
    with pytest.raises(StoreAway):
        await store.changed(1)
    assert await store.report("a", "1", keep_seconds=60, limit=1), "heartbeats need no file"
    (tmp_path / "file").unlink()
    if below.startswith("file"):
        assert await store.apply([add("a")]), "tried again"
        assert await store.changed(LONG_SECONDS)


def other_database(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b"no database" * 1000), "no SQLite database; move it away"),
        (lambda path: path.write_bytes(path.read_bytes()[:100] + b"\xff" * 8092), "damaged; move it away"),
        (lambda path: other_database(path, "PRAGMA user_version = 2"), "newer frontend.*upgrade"),
        (lambda path: other_database(path, "PRAGMA application_id = 7"), "another program; name another file"),
        (lambda path: other_database(path, "DROP TABLE records"), "no such table"),
    ],
)
async def test_a_file_that_is_none_of_ours(
    damage: Callable[[Path], object], reason: str, path: Path, stores: Openers
) -> None:
    first = await stores.opened(f"sqlite:{path}")
    assert await first.apply([add("a")])
    await first.close()
    good = path.read_bytes()
    damage(path)
    store = stores(f"sqlite:{path}")
    with pytest.raises(StoreAway, match=f"^sqlite:{path}: .*{reason}"):
        await store.read()
    await away(store)
    path.write_bytes(good)
    assert await store.read() == {"a": "v"}


async def test_another_programs_database_is_left_alone(path: Path, stores: Openers) -> None:
    other_database(path, "CREATE TABLE theirs (x)")
    before = path.read_bytes()
    assert "belongs to another program" in await away(stores(f"sqlite:{path}"))
    assert path.read_bytes() == before


async def test_a_lock_that_is_held_long(path: Path, stores: Openers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "LOCK_SECONDS", 0.2)
    store = await stores.opened(f"sqlite:{path}")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "another process holds its lock" in await away(store)
        with pytest.raises(StoreAway):
            await store.read()
        other.execute("ROLLBACK")
        assert await store.apply([add("a")])
        other.execute("BEGIN")
        assert other.execute("SELECT count(*) FROM records").fetchone() == (1,)
        assert "another process holds its lock" in await away(store, add("b")), "a reader keeps it from committing"
    assert await store.read() == {"a": "v"}


async def test_a_stuck_disk(path: Path, stores: Openers, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller was refused is not made when the disk comes back."""
    store = await stores.opened(f"sqlite:{path}")
    monkeypatch.setattr(sqlite_module, "CALL_SECONDS", 0.3)
    stuck, use = threading.Event(), sqlite_module._Consent.use
    monkeypatch.setattr(sqlite_module._Consent, "use", lambda consent: stuck.wait(LONG_SECONDS) and use(consent))
    try:
        text = await away(store)
        assert "the disk does not answer" in text
        with pytest.raises(StoreAway):
            await store.read()
    finally:
        stuck.set()
    assert await is_read(store) == {}
    assert await store.apply([add("a")])


async def test_a_file_that_was_moved_or_removed(path: Path, stores: Openers) -> None:
    store = await stores.opened(f"sqlite:{path}")
    assert await store.apply([add("a")])
    assert await store.changed(LONG_SECONDS)
    path.rename(path.with_suffix(".moved"))
    assert await store.changed(LONG_SECONDS)
    assert await store.apply([add("b")])
    assert await store.read() == {"b": "v"}
    path.with_suffix(".moved").rename(path)
    assert await store.changed(LONG_SECONDS)
    assert await store.read() == {"a": "v"}


async def test_records_of_others_in_the_file(path: Path, stores: Openers, caplog: pytest.LogCaptureFixture) -> None:
    store = await stores.opened(f"sqlite:{path}")
    assert await store.apply([add("a")])
    other_database(
        path,
        "INSERT INTO records VALUES (CAST(x'ff' AS TEXT), 'v'), ('no utf-8', CAST(x'ff' AS TEXT))",
        "INSERT INTO records VALUES ('long', printf('%.70000c', 'x')), (printf('%.5000c', 'x'), 'v')",
    )
    with caplog.at_level(logging.WARNING):
        assert await store.read() == await store.read() == {"a": "v"}
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["4 records are skipped"]


async def test_two_processes_on_one_file(path: Path, stores: Openers) -> None:
    store = await stores.opened(f"sqlite:{path}")
    body = """
for i in range(30):
    print(await store.apply([Change(f"theirs{i}", None, "v"), Change(f"both{i}", None, "theirs")]), flush=True)
await store.close()
"""
    with child(path, body) as process:
        ours = [await store.apply([add(f"ours{i}"), add(f"both{i}", "ours")]) for i in range(30)]
        assert process.stdout is not None
        theirs = [line.strip() == "True" for line in process.stdout]
    assert process.returncode == 0
    assert [one != other for one, other in zip(ours, theirs, strict=True)] == [True] * 30
    records = await store.read()
    assert [records[f"both{i}"] for i in range(30)] == ["ours" if won else "theirs" for won in ours]


# Redis


@pytest.fixture
async def way(server: RedisServer) -> AsyncIterator[Way]:
    async with way_to(server) as way:
        yield way


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


KEY = redis_module.PREFIX.encode()


async def test_by_its_socket_and_in_another_database(server: RedisServer, stores: Openers) -> None:
    store = await stores.opened(server.socket_url + "?db=3")
    other = await stores.opened(server.url)
    assert await store.apply([add("a")])
    assert await store.read() == {"a": "v"}
    assert await other.read() == {}
    assert not await other.changed(0.1)


async def test_every_key_has_the_prefix(server: RedisServer, stores: Openers) -> None:
    store = await stores.opened(server.url)
    assert await store.apply([add("a")])
    assert await store.report("a", "1", keep_seconds=60, limit=1)
    keys = server.ask("KEYS", "*")
    assert isinstance(keys, list)
    assert len(keys) == 6
    assert all(key.startswith(b"lmcache-ops:") for key in keys)
    lasting = {key for key in keys if server.ask("TTL", key) == -1}
    assert lasting == {KEY + b"records", KEY + b"mark", KEY + b"reports-mark"}, "the rest goes by itself"


async def test_redis_hangs_and_comes_back(own_server: RedisServer, stores: Openers) -> None:
    store = await stores.opened(own_server.url)
    assert await store.apply([add("a")])
    waiting = asyncio.ensure_future(store.changed(LONG_SECONDS))
    assert await waiting
    own_server.pause()
    try:
        started = time.monotonic()
        calls = store.read(), store.apply([add("b")]), store.changed(30), store.reports(), stores(own_server.url).open()
        for problem in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(problem, StoreAway)
            assert "no answer within" in str(problem) or "imeout" in str(problem)
        assert time.monotonic() - started < 10
    finally:
        own_server.go_on()
    assert await is_read(store) == {"a": "v"}
    assert await store.apply([add("b")])
    await becomes_changed(store)


async def test_redis_is_killed_and_comes_back_empty(own_server: RedisServer, stores: Openers) -> None:
    store = await stores.opened(own_server.url)
    assert await store.apply([add("a")])
    assert await store.changed(LONG_SECONDS)
    waiting = asyncio.ensure_future(becomes_changed(store))
    await asyncio.sleep(0.1)
    own_server.kill()
    await away(store)
    with pytest.raises(StoreAway, match=f"^{own_server.url}: .*connecting"):
        await store.read()
    own_server.start()
    await waiting
    assert await store.read() == {}
    assert await store.apply([add("a")])


async def test_redis_starts_after_the_frontend(own_server: RedisServer, stores: Openers) -> None:
    own_server.kill()
    store = stores(own_server.url)
    with pytest.raises(StoreAway):
        await store.open()
    own_server.start()
    assert await store.read() == {}
    assert await store.changed(LONG_SECONDS), "what was changed since is not known"
    assert await store.apply([add("a")])
    assert await store.changed(LONG_SECONDS)


@pytest.mark.parametrize("answer", [b"kept", b"quicker"])
async def test_an_answer_that_was_lost_is_asked_for(
    answer: bytes, server: RedisServer, way: Way, stores: Openers
) -> None:
    store = await stores.opened(way.url)
    if answer == b"quicker":
        server.ask("HSET", KEY + b"records", "a", "theirs")
    way.lose = answer
    assert await store.apply([add("a")]) == (answer == b"kept")
    assert way.lose is None, "it was lost"
    assert (await store.read())["a"] == ("v" if answer == b"kept" else "theirs")


async def test_a_change_that_arrives_late_is_not_made(
    way: Way, stores: Openers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_module, "APPLY_SECONDS", 1.5)
    store = await stores.opened(way.url)
    assert await store.apply([add("first")]), "from now on Redis knows the script"
    way.hold = b"EVAL"
    assert "could not be found out" in await away(store)
    await asyncio.sleep(0.1)
    way.let_go()
    assert await is_read(store) == {"first": "v"}
    await asyncio.sleep(0.3)
    assert await store.read() == {"first": "v"}
    assert await store.apply([add("a")])


async def test_changes_are_published(server: RedisServer, stores: Openers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_module, "POLL_SECONDS", 3 * LONG_SECONDS)
    store, other = await stores.opened(server.url), await stores.opened(server.url)
    waiting = asyncio.ensure_future(store.changed(2 * LONG_SECONDS))
    await asyncio.sleep(0.2)
    assert await other.report("r", "1", keep_seconds=60, limit=1)
    await asyncio.sleep(0.2)
    assert not waiting.done(), "heartbeats have a mark of their own"
    assert await other.apply([add("a")])
    assert await asyncio.wait_for(waiting, LONG_SECONDS)


async def test_a_subscription_that_is_half_open(server: RedisServer, way: Way, stores: Openers) -> None:
    store, other = await stores.opened(way.url), await stores.opened(server.url)
    assert not await store.changed(0.1)
    way.dead = True
    waiting = asyncio.ensure_future(store.changed(LONG_SECONDS))
    await asyncio.sleep(0.3)
    way.dead = False
    assert await other.apply([add("a")])
    assert await waiting, "the mark is asked for as well"
    deadline = time.monotonic() + LONG_SECONDS
    while way.subscriptions < 2:
        assert time.monotonic() < deadline, "no new subscription"
        await store.changed(1.5)


async def test_messages_that_are_lost(server: RedisServer, stores: Openers) -> None:
    server.ask("ACL", "SETUSER", "mute", "on", ">pw", "~*", "+@all", "resetchannels")
    mute = server.url.replace("//", "//mute:pw@")
    store, other = await stores.opened(mute), await stores.opened(mute)
    waiting = asyncio.ensure_future(store.changed(LONG_SECONDS))
    await asyncio.sleep(0.2)
    assert await other.apply([add("a")])
    assert await waiting


@pytest.mark.parametrize("missing", ["hset", "hdel", "set", "hget", "time", "evalsha"])
async def test_a_user_who_may_not_do_all_changes_nothing(missing: str, server: RedisServer, stores: Openers) -> None:
    server.ask("HSET", KEY + b"records", "a", "1")
    server.ask("ACL", "SETUSER", "some", "reset", "on", ">pw", "~*", "&*", "+@all", f"-{missing}")
    store = stores(server.url.replace("//", "//some:pw@"))
    assert "this user may not" in await away(store, Change("a", "1", "2"), add("b"))
    assert server.ask("HGETALL", KEY + b"records") == {b"a": b"1"}


async def test_the_rights_that_the_docs_name_are_enough(server: RedisServer, stores: Openers) -> None:
    docs = (Path(__file__).parents[2] / "docs/frontend.md").read_text()
    rights = re.search(r"`(~lmcache-ops:\* [^`]*)`", docs)
    assert rights
    server.ask("ACL", "SETUSER", "ours", "reset", "on", ">pw", *rights[1].split())
    store = await stores.opened(server.url.replace("//", "//ours:pw@"))
    assert await store.apply([add("a"), add("b")])
    assert await store.apply([Change("a", "v", None)])
    assert await store.report("r", "1", keep_seconds=9, limit=1)
    assert (await store.read(), await store.reports()) == ({"b": "v"}, {"r": "1"})
    assert await store.changed(LONG_SECONDS)
    assert not await store.changed(0.1)
    numbers = server.ask("PUBSUB", "NUMSUB", f"{redis_module.PREFIX}changed:0")
    assert numbers == [KEY + b"changed:0", 1], "it listens"


async def test_passwords(stores: Openers) -> None:
    with redis_server("--requirepass", "s3cret/#") as server:
        store = await stores.opened(server.url.replace("//", "//:s3cret%2F%23@"))
        assert await store.apply([add("a")])
        for spec, reason in (
            (server.url, "wants a password"),
            (server.url.replace("//", "//:wr0ng@"), "refuses this user and password"),
            (server.url.replace("//", "//who:wr0ng@"), "refuses this user and password"),
        ):
            refused = stores(spec)
            text = await away(refused)
            assert text.startswith(f"{server.url}: it {reason}")
            assert "wr0ng" not in text
            with pytest.raises(StoreAway, match=reason):
                await refused.changed(1)


async def test_a_replica_takes_no_changes_until_it_is_the_primary(own_server: RedisServer, stores: Openers) -> None:
    store = await stores.opened(own_server.url)
    assert await store.apply([add("a")])
    own_server.ask("REPLICAOF", "127.0.0.1", 1)
    assert "it is a replica" in await away(store)
    assert await store.read() == {"a": "v"}
    with pytest.raises(StoreAway, match="it is a replica"):
        await store.report("a", "1", keep_seconds=60, limit=1)
    own_server.ask("REPLICAOF", "NO", "ONE")
    assert await store.apply([add("b")])


async def test_no_memory(own_server: RedisServer, stores: Openers) -> None:
    store = await stores.opened(own_server.url)
    assert await store.apply([add("a")])
    own_server.ask("CONFIG", "SET", "maxmemory", 1)
    assert "no memory left" in await away(store, Change("a", "v", None), add("b"))
    assert await store.read() == {"a": "v"}
    own_server.ask("CONFIG", "SET", "maxmemory", 0)
    assert await store.apply([add("b")])


@pytest.mark.parametrize("name", ["records", "mark", "reports", "report-ends"])
async def test_keys_of_another_type(name: str, server: RedisServer, stores: Openers) -> None:
    server.ask("RPUSH", KEY + name.encode(), "x")
    store = stores(server.url)
    problems = []
    for call in (
        store.open(), store.read(), store.reports(), store.report("a", "1", keep_seconds=9, limit=1),
        store.apply([add("a")]),
    ):  # fmt: skip
        try:
            await call
        except StoreAway as problem:
            problems.append(problem)
    assert problems
    assert all("a key lmcache-ops:* is of another type" in str(problem) for problem in problems)


async def test_what_others_wrote(
    server: RedisServer, stores: Openers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await stores.opened(server.url)
    assert await store.apply([add("a")])
    for key, value in ((b"\xff", b"v"), (b"b", b"\xff"), (b"c", b"x" * 70_000), (b"x" * 5000, b"v")):
        server.ask("HSET", KEY + b"records", key, value)
        server.ask("HSET", KEY + b"reports", key, value)
        server.ask("ZADD", KEY + b"report-ends", "inf", key)
    server.ask("ZADD", KEY + b"report-ends", "inf", "nothing")
    with caplog.at_level(logging.WARNING):
        assert await store.read() == await store.read() == {"a": "v"}
        assert await store.reports() == {}
    texts = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert texts == ["4 records are skipped", "5 reports are skipped"]
    monkeypatch.setattr(redis_module, "MAX_RECORDS", 4)
    with pytest.raises(StoreAway, match="5 records .* at most 4 are read"):
        await store.read()
    monkeypatch.setattr(redis_module, "MAX_RECORDS", bounds_module.MAX_RECORDS)
    monkeypatch.setattr(redis_module, "MAX_TOTAL_BYTES", 1)
    with pytest.raises(StoreAway, match="bytes .* at most 1 are read"):
        await store.read()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"-MOVED 1234 10.0.0.7:6379\r\n", "this node of a Redis cluster does not hold"),
        (b"-CLUSTERDOWN Hash slot not served\r\n", "its cluster is down"),
        (b"-MISCONF Redis is configured to save RDB snapshots\r\n", "cannot write to its disk"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", "still loading"),
        (b"-ERR \xff\n\x1b[2J strange\r\n", ""),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ""),
        (b"*-1\r\n", ""),
        (b":5\r\n", ""),
        (b"$5\r\nab", ""),
        (b"\x00" * 100, ""),
        (b"", ""),
    ],
)
async def test_whatever_answers(answer: bytes, reason: str, stores: Openers, monkeypatch: pytest.MonkeyPatch) -> None:
    if not reason:  # it takes the time that it has
        monkeypatch.setattr(redis_module, "OPERATION_SECONDS", 0.3)
        monkeypatch.setattr(redis_module, "CALL_SECONDS", 0.6)
        monkeypatch.setattr(redis_module, "APPLY_SECONDS", 1.0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(answer * len(re.findall(rb"\*\d+\r\n\$", data)))  # to each of the questions
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        store = stores(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
        text = await away(store)
        assert text.isprintable()
        assert reason in text
        with pytest.raises(StoreAway):
            await store.read()
        with pytest.raises(StoreAway):
            await store.report("a", "1", keep_seconds=1, limit=1)
    finally:
        await store.close()
        server.close()
