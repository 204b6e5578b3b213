"""Everything that an operator and a load may ask of one worker, all at once, with budgets that are always too small.

`STRESS_SECONDS=60 make test ARGS="-k stress"` makes it a minute; without it, six seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.embedded import component as component_module
from lmcache_api.embedded.engine import EmbeddedEngine
from lmcache_api.embedded.keys import Chunk, ChunkKeys
from lmcache_api.embedded.layout import KVLayout, PagedKVCache, pattern
from lmcache_api.pytest_plugin import RunningApi, StartApi
from tests.api.embedded.making import CHUNK, CHUNK_BYTES, CHUNK_SPACE, CPU, DISK, settings_of

SECONDS = float(os.environ.get("STRESS_SECONDS", "6"))
PHASE_SECONDS = 4.0
CPU_CHUNKS = 60
DISK_CHUNKS = 120
CONVERSATIONS = 50
MAX_CHUNKS = 12

KNOWN: dict[str, frozenset[int]] = {
    "store": frozenset({200}),
    "retrieve": frozenset({200}),
    "lookup": frozenset({200}),
    "clear": frozenset({200}),
    "freeze": frozenset({200}),
    "hot_cache": frozenset({200, 503}),  # 503: LocalCPUBackend is closed now
    "close": frozenset({200, 404}),
    "create": frozenset({200}),
    "recreate": frozenset({200, 404}),
    "bypass": frozenset({200, 400}),  # 400: that backend is closed now
    "conf": frozenset({200}),
    "check": frozenset({200}),
    "look": frozenset({200}),
    "unusable": frozenset({400}),
}
"""The statuses that the contract has for each operation."""


class Checking(EmbeddedEngine):
    """The engine itself; what it fetches is compared with what must have been computed."""

    wrong: list[str]
    fetched: Counter[str]

    def _fetch(self, chunk: Chunk, only: Sequence[str] | None) -> bytes | None:
        data = super()._fetch(chunk, only)
        self.fetched[str(data is not None)] += 1
        if data is not None and data != pattern(chunk.key, (chunk.end - chunk.start) * self.layout.token_bytes):
            self.wrong.append(chunk.key.hex())
        return data


class Sampler:
    """Measures budgets as often as it can, in a thread of its own; what is too much is kept in `over`."""

    def __init__(self, engine: EmbeddedEngine, folders: list[Path]) -> None:
        self.over: list[str] = []
        self.samples = 0
        self.most: Counter[str] = Counter()
        self._engine = engine
        self._folders = folders
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self.samples += 1
            cpu, disk = self._engine.backends.cpu, self._engine.backends.disk
            self._see("memory", cpu.used_bytes if cpu else 0, CPU_CHUNKS * CHUNK_BYTES)
            self._see("disk", disk.used_bytes if disk else 0, DISK_CHUNKS * CHUNK_SPACE)
            for folder in self._folders:
                self._see("files", at_one_moment(folder), DISK_CHUNKS * CHUNK_SPACE)

    def _see(self, what: str, size: int, budget: int) -> None:
        self.most[what] = max(self.most[what], size)
        if not 0 <= size <= budget:
            self.over.append(f"{what}: {size} of {budget}")


def at_one_moment(folder: Path) -> int:
    """At least so many bytes of files were there between two looks: those that both saw, the same and unchanged."""
    first = looked_at(folder)
    return sum(size for file, size in looked_at(folder).items() if first.get(file) == size)


def looked_at(folder: Path) -> dict[tuple[str, int, int], int]:
    found = {}
    for entry in os.scandir(folder) if folder.exists() else ():
        try:
            told = entry.stat()
        except FileNotFoundError:
            continue
        if entry.name != "lock":
            found[entry.name, told.st_ino, told.st_mtime_ns] = told.st_blocks * 512
    return found


class Stress:
    """One served worker, and those who ask it."""

    def __init__(self, server: RunningApi, tmp_path: Path) -> None:
        assert isinstance(server.component, EmbeddedComponent)
        assert isinstance(server.component.engine, Checking)
        self.client = server.client
        self.engine = server.component.engine
        self.settings = server.component.settings
        self.parents = [tmp_path / "a", tmp_path / "b"]
        self.folders = [parent / server.component.name for parent in self.parents]
        (tmp_path / "file").write_text("x")
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.unknown: list[str] = []
        self.until = 0.0
        layout = KVLayout.of(self.settings)
        self.keys = ChunkKeys(self.settings, layout, worker_id=0, world_size=1)

    async def ask(self, operation: str, method: str, path: str, **given: Any) -> Any:
        async with self.client.request(method, path, **given) as response:
            text = await response.text()
            self.statuses[operation, response.status] += 1
            if response.status not in KNOWN[operation]:
                self.unknown.append(f"{method} {path}: {response.status} {text[:300]}")
            return await response.json() if response.content_type == "application/json" else text

    async def tokens(self, operation: str, tokens: range) -> Any:
        return await self.ask(operation, "POST", f"/cache/{operation}?tokens_mock={tokens.start},{tokens.stop}")

    # What each of those who ask does once.

    async def store(self, choose: random.Random) -> None:
        await self.tokens("store", request(choose))

    async def retrieve(self, choose: random.Random) -> None:
        tokens = request(choose)
        told = await self.tokens("retrieve", tokens)
        assert told["num_retrieved"] in range(0, len(tokens) + 1, CHUNK)

    async def look_up(self, choose: random.Random) -> None:
        tokens = request(choose)
        told = await self.tokens("lookup", tokens)
        assert told["num_hit_tokens"] == told["num_hit_chunks"] * CHUNK <= len(tokens)
        ends = [0, *(span["end"] for span in told["spans"])]
        assert [span["start"] for span in told["spans"]] == ends[:-1]

    async def clear(self, choose: random.Random) -> None:
        await asyncio.sleep(choose.uniform(0, 0.2))
        locations = choose.choice(["", f"?locations={CPU}", f"?locations={DISK}", "?locations=Nope"])
        await self.ask("clear", "DELETE", f"/cache/clear{locations}")

    async def freeze(self, choose: random.Random) -> None:
        await self.ask("freeze", "PUT", "/freeze/enable")
        assert (await self.ask("freeze", "GET", "/freeze/status"))["freeze"] is True
        cpu = self.engine.backends.cpu
        before = cpu.used_bytes if cpu else 0
        await asyncio.sleep(choose.uniform(0, 0.05))
        assert cpu is None or cpu.used_bytes <= before + 4 * CHUNK_BYTES  # no more than stores under way
        await self.ask("freeze", "PUT", "/freeze/disable")
        await asyncio.sleep(choose.uniform(0, 0.2))

    async def hot_cache(self, choose: random.Random) -> None:
        await self.ask("hot_cache", "PUT", "/hot_cache/disable")
        await asyncio.sleep(choose.uniform(0, 0.05))
        await self.ask("hot_cache", "PUT", "/hot_cache/enable")
        await asyncio.sleep(choose.uniform(0, 0.2))

    async def backends(self, choose: random.Random) -> None:
        name = choose.choice([CPU, DISK])
        if choose.random() < 0.5:
            await self.ask("close", "DELETE", f"/backends/{name}")
            await asyncio.sleep(choose.uniform(0, 0.05))
            await self.ask("create", "POST", "/backends")
        else:
            await self.ask("recreate", "POST", f"/backends/{name}/recreate")
        await asyncio.sleep(choose.uniform(0, 0.1))

    async def bypass(self, choose: random.Random) -> None:
        name = choose.choice([CPU, DISK])
        await self.ask("bypass", "PUT", f"/bypass/add?backend_name={name}")
        await asyncio.sleep(choose.uniform(0, 0.05))
        while (await self.ask("bypass", "PUT", f"/bypass/remove?backend_name={name}")).get("status") != "success":
            await asyncio.sleep(0.01)  # it is closed now, and made again soon
        await asyncio.sleep(choose.uniform(0, 0.2))

    async def configure(self, choose: random.Random) -> None:
        values = {
            "local_disk": str(choose.choice(self.parents)),
            "retrieve_locations": choose.choice([None, [CPU], [CPU, DISK]]) or [],
            "min_retrieve_tokens": choose.randrange(100),
        }
        await self.ask("conf", "POST", "/conf", json=values)
        await asyncio.sleep(choose.uniform(0, 0.3))

    async def look(self, choose: random.Random) -> None:
        await self.ask("check", "GET", "/cache/kvcache/check?slot_mapping=[0,255]&chunk_size=16")
        for path in ("/metrics", "/backends", "/bypass/list", "/conf", "/hot_cache/status", "/cache/kvcache/info"):
            await self.ask("look", "GET", path)

    async def load_files(self, choose: random.Random) -> None:
        body = {"config_path": str(choose.choice(["/nowhere", "/dev/null"]))}
        await self.ask("unusable", "POST", "/cache/load-fs-chunks", json=body)
        await asyncio.sleep(choose.uniform(0, 0.1))

    async def churn(self, seconds: float, seed: int) -> None:
        """All of it at once."""
        until = time.monotonic() + seconds

        async def again_and_again(what: Callable[[random.Random], Awaitable[None]], seed: int) -> None:
            choose = random.Random(seed)
            while time.monotonic() < until:
                await what(choose)

        each = [self.store] * 6 + [self.retrieve] * 4 + [self.look_up] * 3
        each += [self.clear, self.freeze, self.hot_cache, self.backends, self.bypass, self.configure, self.look]
        each += [self.load_files]
        await asyncio.gather(*(again_and_again(what, seed * 100 + number) for number, what in enumerate(each)))

    async def settle(self) -> None:
        """All on again, with nobody else about."""
        await self.ask("freeze", "PUT", "/freeze/disable")
        await self.ask("create", "POST", "/backends")
        values = {"local_disk": str(self.folder.parent), "retrieve_locations": [], "min_retrieve_tokens": 0}
        await self.ask("conf", "POST", "/conf", json=values)
        await self.ask("hot_cache", "PUT", "/hot_cache/enable")
        for name in (CPU, DISK):
            await self.ask("bypass", "PUT", f"/bypass/remove?backend_name={name}")
        assert await self.ask("look", "GET", "/backends") == {CPU: CPU, DISK: DISK}

    async def check_accounts(self) -> None:
        """In quiet, what is counted is what is there."""
        cpu, disk = self.engine.backends.cpu, self.engine.backends.disk
        assert cpu is not None
        assert disk is not None
        assert cpu.used_bytes == cpu.chunks * CHUNK_BYTES <= CPU_CHUNKS * CHUNK_BYTES
        assert cpu.pinned == 0
        files = [path for path in disk.folder.iterdir() if path.name != "lock"]
        assert [path.name for path in files if not re.fullmatch("[0-9a-f]{32}.kv", path.name)] == []
        assert len(files) == disk.chunks
        assert disk.used_bytes == disk.chunks * CHUNK_SPACE <= DISK_CHUNKS * CHUNK_SPACE
        for folder in self.folders:
            assert at_one_moment(folder) <= DISK_CHUNKS * CHUNK_SPACE

    async def check_bytes(self, conversations: Sequence[range]) -> int:
        """What is retrieved is what was computed: `kvcache/check` beside one of our own. How many tokens it was."""
        hits = 0
        for tokens in conversations:
            hit = (await self.tokens("retrieve", tokens))["num_retrieved"]
            if not hit:
                continue
            hits += hit
            path = f"/cache/kvcache/check?slot_mapping=[0,{hit - 1}]&chunk_size={CHUNK}"
            assert (await self.ask("check", "GET", path))["chunk_checksums"] == self.checksums(tokens[:hit])
        return hits

    def checksums(self, tokens: range) -> list[str]:
        caches = PagedKVCache(self.engine.layout)
        chunks = list(self.keys.of(tokens))
        for chunk in chunks:
            caches.write(chunk.start, pattern(chunk.key, CHUNK_BYTES))
        together = []
        for chunk in chunks:
            slots = range(chunk.start, chunk.end)
            layers = [hashlib.md5(caches.slot_bytes(name, slots)).hexdigest() for name in sorted(caches.layers())]
            together.append(hashlib.md5("".join(layers).encode()).hexdigest())
        return together

    async def check_nothing_is_lost(self, seed: int) -> None:
        """As much as both budgets hold, stored by many at once while many look, is found by everybody."""
        await self.ask("clear", "DELETE", "/cache/clear")
        await self.check_accounts()
        assert await self.check_bytes(range_of_all()) == 0
        choose = random.Random(seed)
        sizes = [choose.randint(1, CPU_CHUNKS // 10) for _ in range(10)]
        stored = [range(10**6 * (1 + number), 10**6 * (1 + number) + size * CHUNK) for number, size in enumerate(sizes)]

        async def store(tokens: range) -> None:
            for _ in range(3):
                await self.tokens("store", tokens)
                for operation in ("retrieve", "lookup"):
                    told = await self.tokens(operation, tokens)
                    assert told.get("num_retrieved", told.get("num_hit_tokens")) == len(tokens)

        await asyncio.gather(*map(store, stored))
        for tokens in stored:
            (span,) = (await self.tokens("lookup", tokens))["spans"]
            assert (span["end"], span["locations"]) == (len(tokens), [CPU, DISK])
        total = sum(map(len, stored))
        assert await self.check_bytes(stored) == total
        await self.check_accounts()
        for name in (DISK, CPU):  # the disk is found again; then the memory is empty, and all comes from the disk
            await self.ask("recreate", "POST", f"/backends/{name}/recreate")
        await self.check_accounts()
        assert await self.check_bytes(stored) == total
        assert (await self.ask("clear", "DELETE", "/cache/clear"))["num_removed"] == 2 * total
        assert at_one_moment(self.folder) == 0

    @property
    def folder(self) -> Path:
        assert self.engine.backends.disk is not None
        return self.engine.backends.disk.folder


def request(choose: random.Random) -> range:
    """The beginning of a conversation: a whole number of chunks, and some tokens that fill none."""
    first = choose.randrange(CONVERSATIONS) * 10_000
    return range(first, first + choose.randint(1, MAX_CHUNKS) * CHUNK)


def range_of_all() -> list[range]:
    return [range(number * 10_000, number * 10_000 + MAX_CHUNKS * CHUNK) for number in range(CONVERSATIONS)]


@pytest.fixture
async def stress(api_server: StartApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stress:
    monkeypatch.setattr(component_module, "EmbeddedEngine", Checking)
    monkeypatch.setattr(Checking, "wrong", [], raising=False)
    monkeypatch.setattr(Checking, "fetched", Counter(), raising=False)
    budgets = settings_of(cpu_chunks=CPU_CHUNKS, disk_chunks=DISK_CHUNKS, local_disk=tmp_path / "a", engine_blocks=16)
    names = (
        "max_local_cpu_size", "max_local_disk_size", "local_disk", "chunk_size", "engine_layers", "engine_heads",
        "engine_head_size", "engine_blocks", "engine_block_size",
    )  # fmt: skip
    return Stress(await api_server(role="worker", **{name: getattr(budgets, name) for name in names}), tmp_path)


@pytest.mark.timeout(SECONDS * 2 + 60)
async def test_everything_at_once(stress: Stress, caplog: pytest.LogCaptureFixture) -> None:
    until = time.monotonic() + SECONDS
    hits = 0
    with Sampler(stress.engine, stress.folders) as sampler:
        for number in itertools.count():
            left = until - time.monotonic()
            if number and left <= 0:
                break
            await stress.churn(min(PHASE_SECONDS, max(0.5, left - 1)), seed=number)
            await stress.settle()
            await stress.check_accounts()
            hits += await stress.check_bytes(range_of_all())
            await stress.check_nothing_is_lost(seed=number)
            assert stress.unknown == []
            assert sampler.over == []
            assert stress.engine.wrong == []
    assert sampler.samples > 20 * SECONDS
    assert {"memory", "disk", "files"} == {what for what, size in sampler.most.items() if size}
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [error for error in errors if "Invalid configuration" not in error] == []

    # That it was a stress at all: every operation was done, and chunks were hit, missed and driven out.
    assert {operation for operation, _ in stress.statuses} == KNOWN.keys()
    assert min(Counter(stress.engine.fetched).values()) > 0
    assert len(stress.engine.fetched) == 2
    async with stress.client.get("/metrics") as response:
        metrics = await response.text()
    (evicted,) = re.findall(r"lmcache:local_cpu_evict_keys_count_total\{.*\} (.*)", metrics)
    assert float(evicted) > 10 * SECONDS
    print(f"\n{sum(stress.statuses.values())} requests, {dict(stress.statuses)}")
    print(f"fetched {dict(stress.engine.fetched)}, evicted {evicted}, {hits} tokens found after the churns")
    print(f"{sampler.samples} samples, at most {dict(sampler.most)}, {number} phases")
