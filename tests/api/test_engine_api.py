"""The engine's endpoints over HTTP: which tokens a request names, and what store, lookup and the switches do."""

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yarl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lmcache_api.pytest_plugin import RunningApi, StartApi

SMALL = {"chunk_size": 16, "engine_layers": 1, "engine_heads": 1, "engine_head_size": 2, "engine_block_size": 64}
CPU, DISK = "LocalCPUBackend", "LocalDiskBackend"
INT64 = 1 << 63
MISSING = {"error": "Missing parameters", "message": "Must specify either tokens_input or tokens_mock"}
OVER_HTTP = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
async def worker(api_server: StartApi) -> RunningApi:
    return await api_server(**SMALL)


async def ask(server: RunningApi, method: str, path: str, **more: Any) -> tuple[int, Any]:
    async with server.client.request(method, path, **more) as response:
        assert response.content_type == "application/json"
        text = await response.text()
        return response.status, json.loads(text, parse_constant=pytest.fail)


async def hits(server: RunningApi, **more: Any) -> tuple[int, int]:
    status, answer = await ask(server, "POST", "/cache/lookup", **more)
    assert status == 200, answer
    return answer["num_tokens"], answer["num_hit_tokens"]


# Which tokens


def lmcaches_range(text: str) -> range | None:
    """What LMCache reads: `_parse_tokens_from_params` of its cache_api.py."""
    parts = text.split(",")
    if len(parts) != 2:
        return None
    try:
        start, end = (int(part.strip()) for part in parts)
    except ValueError:
        return None
    return range(start, end) if start < end else None


SPELLINGS = {
    "0,32": 32,
    " 0 , 32 ": 32,
    "\t0,\n32": 32,
    "+0,+32": 32,
    "-0,032": 32,
    "-16,16": 32,
    "-32,-16": 16,
    "0,3_2": 32,
    "\u0660,\u0663\u0662": 32,
    f"{-INT64},{1 - INT64}": 1,
    f"{INT64 - 2},{INT64 - 1}": 1,
    " " * 60 + "0," + "0" * 78 + "7": 7,
}


@pytest.mark.parametrize("text", SPELLINGS, ids=ascii)
async def test_a_range_of_tokens(worker: RunningApi, text: str) -> None:
    assert lmcaches_range(text) is not None
    for method, path in (("POST", "/cache/store"), ("POST", "/cache/retrieve"), ("GET", "/cache/lookup")):
        status, answer = await ask(worker, method, path, params={"tokens_mock": text})
        assert (status, answer["status"], answer["num_tokens"]) == (200, "success", SPELLINGS[text])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("5", "exactly 2 numbers"),
        ("1,2,3", "exactly 2 numbers"),
        (" ", "exactly 2 numbers"),
        ("0;32", "exactly 2 numbers"),
        (",", "invalid literal"),
        ("0,", "invalid literal"),
        ("a,b", "invalid literal"),
        ("1.0,2", "invalid literal"),
        ("0x0,0x20", "invalid literal"),
        ("0,1e3", "invalid literal"),
        ("1 6,32", "invalid literal"),
        ("--1,5", "invalid literal"),
        ("1__0,20", "invalid literal"),
        ("[0,32]", "invalid literal"),
        ("0,NaN", "invalid literal"),
        ("\x00,1", "invalid literal"),
        ("9,3", "start must be less than end"),
        ("3,3", "start must be less than end"),
        (f"0,{INT64}", "no number of 64 bits"),
        (f"{-INT64 - 1},0", "no number of 64 bits"),
        ("0," + "9" * 81, "no number of 64 bits"),
        ("0," + "9" * 7000, "no number of 64 bits"),
    ],
    ids=lambda value: ascii(value)[:24],
)
async def test_what_is_no_range_of_tokens(worker: RunningApi, text: str, why: str) -> None:
    for method, path in (("POST", "/cache/store"), ("POST", "/cache/retrieve"), ("GET", "/cache/lookup")):
        status, answer = await ask(worker, method, path, params={"tokens_mock": text})
        assert (status, answer["error"]) == (400, "Invalid tokens_mock format")
        assert answer["message"].startswith("tokens_mock must be 'start,end': ")
        assert why in answer["message"]
        assert len(answer["message"]) < 300


@OVER_HTTP
@given(st.text("0123456789+-_ ,.", max_size=12))
async def test_ranges_are_read_as_lmcache_reads_them(worker: RunningApi, text: str) -> None:
    expected = lmcaches_range(text)
    status, answer = await ask(worker, "POST", "/cache/lookup", params={"tokens_mock": text})
    if not text:
        assert (status, answer) == (400, MISSING)
    elif expected is None:
        assert (status, answer["error"]) == (400, "Invalid tokens_mock format")
    elif expected.stop - expected.start > 1 << 20:
        assert (status, answer["error"]) == (400, "Too many tokens")
    else:
        assert (status, answer["num_tokens"]) == (200, len(expected))


async def test_real_tokens_are_the_same_chunks_as_the_same_range(worker: RunningApi) -> None:
    assert (await ask(worker, "POST", "/cache/store", params={"tokens_mock": "100,164"}))[0] == 200
    assert await hits(worker, json={"tokens": list(range(100, 164))}) == (64, 64)
    assert await hits(worker, json={"tokens": [*range(100, 132), 1, *range(133, 164)]}) == (64, 32)
    assert await hits(worker, json={"tokens": [101, *range(101, 164)]}) == (64, 0)
    assert (await ask(worker, "POST", "/cache/store", json={"tokens": list(range(-40, -8))}))[0] == 200
    assert await hits(worker, params={"tokens_mock": "-40,0"}) == (40, 32)
    status, answer = await ask(worker, "POST", "/cache/retrieve", json={"tokens": list(range(-40, 0))})
    assert (status, answer) == (200, {"status": "success", "num_tokens": 40, "num_retrieved": 32})
    status, answer = await ask(worker, "GET", "/cache/lookup", data=b'{"tokens": [%s]}' % b",".join([b"1"] * 16))
    assert (status, answer["num_tokens"], answer["spans"]) == (200, 16, [])


GOOD_BODIES = {
    b'{"tokens": [1]}': 1,
    b' \n{"tokens":\t[ 1 , 2 ] } ': 2,
    b'{"tokens": [-9223372036854775808, 9223372036854775807, -0]}': 3,
    b'{"tokens": [1], "other": {"x": [null]}}': 1,
    b'{"tokens": [1], "tokens": [1, 2]}': 2,
}
BAD_BODIES = [
    b"null",
    b"7",
    b'"tokens"',
    b"[1, 2]",
    b"{}",
    b"[]",
    b'{"tokens": []}',
    b'{"tokens": null}',
    b'{"tokens": "1,2"}',
    b'{"tokens": {"0": 1}}',
    b'{"tokens": 5}',
    b'{"tokens": [1.5]}',
    b'{"tokens": [1e99]}',
    b'{"tokens": [1e999]}',
    b'{"tokens": [NaN]}',
    b'{"tokens": [Infinity]}',
    b'{"tokens": [true]}',
    b'{"tokens": [null]}',
    b'{"tokens": ["1"]}',
    b'{"tokens": [[1]]}',
    b'{"tokens": [9223372036854775808]}',
    b'{"tokens": [-9223372036854775809]}',
    b'{"tokens": [' + b"1" * 5000 + b"]}",
    b'{"tokens": [1, 2}',
    b'{"tokens": [1]} x',
    b'{"tokens": [1]',
    b'{"tokens": [1],}',
    b'{"tokens": [01]}',
    b'{"TOKENS": [1]}',
    b"tokens=1",
    b"\xff\xfe",
    b'{"tokens": ["\xff"]}',
    b'\xef\xbb\xbf{"tokens": [1]}',
    b"\x00",
    b'{"tokens": ' + b"[" * 100_000,
    b'{"x": ' + b"[" * 50_000 + b"]" * 50_000 + b', "tokens": [1]}',
    b'{"x": ' * 100_000,
]


@pytest.mark.parametrize("body", GOOD_BODIES, ids=ascii)
async def test_tokens_of_a_body(worker: RunningApi, body: bytes) -> None:
    for path in ("/cache/store", "/cache/retrieve", "/cache/lookup"):
        status, answer = await ask(worker, "POST", path, data=body)
        assert (status, answer.get("num_tokens")) == (200, GOOD_BODIES[body]), answer


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: ascii(body)[:32])
async def test_what_is_no_body_of_tokens(worker: RunningApi, body: bytes) -> None:
    for path in ("/cache/store", "/cache/retrieve", "/cache/lookup"):
        status, answer = await ask(worker, "POST", path, data=body)
        assert (status, answer["error"]) == (400, "Invalid tokens")
        assert answer["message"] == "there are none" or answer["message"].startswith('expected {"tokens": [1, 2, …]}: ')
        assert "not currently supported" not in answer["message"]
        assert len(answer["message"]) < 200


async def test_no_tokens_and_both(worker: RunningApi) -> None:
    for path in ("/cache/store", "/cache/retrieve", "/cache/lookup"):
        for body in (b"", b" \r\n"):
            assert await ask(worker, "POST", path, data=body) == (400, MISSING)
            assert await ask(worker, "POST", f"{path}?tokens_mock=", data=body) == (400, MISSING)
        status, answer = await ask(worker, "POST", f"{path}?tokens_mock=0,7", json={"tokens": [1, 2]})
        assert (status, answer["num_tokens"]) == (200, 7)
        status, answer = await ask(worker, "POST", f"{path}?tokens_mock=0,7", data=b"broken")
        assert (status, answer["num_tokens"]) == (200, 7)
        status, answer = await ask(worker, "POST", f"{path}?tokens_mock=x&tokens_mock=0,8")
        assert (status, answer["num_tokens"]) == (200, 8)  # the last one counts
    assert await ask(worker, "GET", "/cache/lookup") == (400, MISSING)


async def test_a_request_names_only_so_many_tokens(api_server: StartApi) -> None:
    worker = await api_server(internal_api_server_max_tokens=100, **SMALL)
    assert await hits(worker, params={"tokens_mock": "0,100"}) == (100, 0)
    assert await hits(worker, json={"tokens": list(range(100))}) == (100, 0)
    begun = time.perf_counter()
    for given_tokens, count in (
        ({"params": {"tokens_mock": "0,101"}}, 101),
        ({"json": {"tokens": list(range(101))}}, 101),
        ({"params": {"tokens_mock": f"0,{10**12}"}}, 10**12),
        ({"params": {"tokens_mock": f"{-INT64},{INT64 - 1}"}}, 2 * INT64 - 1),
    ):
        for path in ("/cache/store", "/cache/retrieve", "/cache/lookup"):
            message = f"{count} tokens, but internal_api_server_max_tokens allows 100 at once"
            assert await ask(worker, "POST", path, **given_tokens) == (
                400,
                {"error": "Too many tokens", "message": message},
            )
    assert time.perf_counter() - begun < 5  # a range of 10**12 is never made


async def test_a_body_has_only_so_many_bytes(api_server: StartApi) -> None:
    worker = await api_server(internal_api_server_max_tokens=100, **SMALL)
    most = 1024 + 22 * 100
    fits = b'{"tokens": [1]' + b" " * (most - 15) + b"}"
    assert len(fits) == most
    assert await hits(worker, data=fits) == (1, 0)

    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    assert await hits(worker, data=pieces(fits)) == (1, 0)
    for path in ("/cache/store", "/cache/retrieve", "/cache/lookup"):
        for body in (fits + b" ", pieces(fits + b" ")):
            refusal = {"detail": f"the body is larger than {most} bytes"}
            assert await ask(worker, "POST", path, data=body) == (413, refusal)


async def test_a_caller_that_leaves_in_the_middle_of_a_body_harms_nobody(
    worker: RunningApi, caplog: pytest.LogCaptureFixture
) -> None:
    for rest in (b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"):
        _, writer = await asyncio.open_unix_connection(str(worker.address.path))
        writer.write(b"POST /cache/store HTTP/1.1\r\nHost: x\r\n" + rest)
        await writer.drain()
        assert await hits(worker, json={"tokens": [1]}) == (1, 0)
        writer.close()
        await writer.wait_closed()
        assert await hits(worker, json={"tokens": [1]}) == (1, 0)
    assert caplog.text == ""


# What the operations do


class Model:
    """What a worker with two backends holds, by the words of docs/engine.md; a chunk is the number of its place."""

    def __init__(self) -> None:
        self.memory: set[int] = set()
        self.files: set[int] = set()
        self.backends = [CPU, DISK]
        self.bypassed: set[str] = set()
        self.frozen = False
        self.hot = True

    def held(self, name: str) -> set[int]:
        return self.memory if name == CPU else self.files

    def active(self) -> list[str]:
        return [n for n in self.backends if n not in self.bypassed and not (self.frozen and n == DISK)]

    def admits(self, name: str) -> bool:
        return name != CPU or self.hot

    def prefix(self, chunks: int) -> list[list[str]]:
        found = []
        for chunk in range(chunks):
            where = [name for name in self.active() if chunk in self.held(name)]
            if not where:
                break
            found.append(where)
        return found

    def store(self, chunks: int) -> None:
        for name in [] if self.frozen else self.active():
            self.held(name).update(range(chunks) if self.admits(name) else ())

    def retrieve(self, chunks: int) -> int:
        found = self.prefix(chunks)
        if CPU in self.active() and self.hot and not self.frozen:
            self.memory.update(range(len(found)))
        return len(found)

    def clear(self, locations: list[str]) -> int:
        names = [name for name in self.backends if not locations or name in locations]
        removed = sum(len(self.held(name)) for name in names)
        for name in names:
            self.held(name).clear()
        return removed

    def close(self, name: str) -> None:
        self.backends.remove(name)
        if name == CPU:
            self.memory.clear()

    def set_hot(self, hot: bool) -> None:
        self.hot = hot
        if not hot:
            self.memory.clear()

    def create(self) -> list[str]:
        made = [name for name in (CPU, DISK) if name not in self.backends]
        self.hot = self.hot or CPU in made
        self.backends = [CPU, DISK]
        return made


NAMES = st.sampled_from([CPU, DISK, CPU, DISK, "Nope", "a/b", "%2F", "ä ✓", "..", "LocalCPUBackend\x00"])
CHUNKS = st.integers(1, 3)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["store", "retrieve", "lookup"]), CHUNKS),
    st.tuples(st.just("clear"), st.lists(NAMES, max_size=2)),
    st.tuples(st.sampled_from(["close", "recreate", "bypass", "use"]), NAMES),
    st.tuples(st.sampled_from(["freeze", "hot"]), st.booleans()),
    st.tuples(st.just("create"), st.none()),
)


def backend_path(name: str, end: str = "") -> yarl.URL:
    return yarl.URL(f"/backends/{quote(name, safe='').replace('.', '%2E')}{end}", encoded=True)


class Pair:
    """A worker and its model: each operation is done on both, and their answers are compared."""

    def __init__(self, server: RunningApi, model: Model) -> None:
        self.server = server
        self.model = model

    async def tokens(self, what: str, chunks: int) -> Any:
        status, answer = await ask(self.server, "POST", f"/cache/{what}?tokens_mock=0,{16 * chunks + 5}")
        assert (status, answer["num_tokens"]) == (200, 16 * chunks + 5)
        return answer

    async def store(self, chunks: int) -> None:
        await self.tokens("store", chunks)
        self.model.store(chunks)

    async def retrieve(self, chunks: int) -> None:
        answer = await self.tokens("retrieve", chunks)
        assert answer["num_retrieved"] == 16 * self.model.retrieve(chunks)

    async def lookup(self, chunks: int) -> None:
        answer = await self.tokens("lookup", chunks)
        where = [span["locations"] for span in answer["spans"] for _ in range(span["chunks"])]
        assert where == self.model.prefix(chunks)
        assert (answer["num_hit_tokens"], answer["num_hit_chunks"]) == (16 * len(where), len(where))

    async def clear(self, names: list[str]) -> None:
        removed = 16 * self.model.clear(names)
        answer = await ask(self.server, "DELETE", "/cache/clear", params=[("locations", name) for name in names])
        assert answer == (200, {"status": "success", "num_removed": removed})

    async def close(self, name: str) -> None:
        known = name in self.model.backends
        status, answer = await ask(self.server, "DELETE", backend_path(name))
        if known:
            self.model.close(name)
        message = f"Backend {name} {'closed' if known else 'not found'}"
        expected = {"status": "success" if known else "not_found", "message": message, "backends": self.classes()}
        assert (status, answer) == (200 if known else 404, expected)

    async def recreate(self, name: str) -> None:
        known = name in self.model.backends
        status, answer = await ask(self.server, "POST", backend_path(name, "/recreate"))
        if known:
            self.model.close(name)
            expected = {"status": "success", "recreated": self.made(), "backends": self.classes()}
        else:
            expected = {"status": "not_found", "message": f"Backend {name} not found", "backends": self.classes()}
        assert (status, answer) == (200 if known else 404, expected)

    async def create(self, _: None) -> None:
        expected = {"status": "success", "created": self.made(), "backends": self.classes()}
        assert await ask(self.server, "POST", "/backends") == (200, expected)

    async def bypass(self, name: str) -> None:
        await self.set_bypass(name, True)

    async def use(self, name: str) -> None:
        await self.set_bypass(name, False)

    async def set_bypass(self, name: str, bypass: bool) -> None:
        path = f"/bypass/{'add' if bypass else 'remove'}"
        status, answer = await ask(self.server, "PUT", path, params={"backend_name": name})
        if name not in self.model.backends:
            message = f"Backend '{name}' not found. Available: {self.model.backends}"
            assert (status, answer) == (400, {"error": "Unknown backend", "message": message})
            return
        before = name in self.model.bypassed
        (self.model.bypassed.add if bypass else self.model.bypassed.discard)(name)
        assert (status, answer) == (
            200,
            {
                "status": "success",
                "backend_name": name,
                "bypassed": bypass,
                "was_already_bypassed" if bypass else "was_bypassed": before,
                "bypassed_backends": sorted(self.model.bypassed),
            },
        )

    async def freeze(self, frozen: bool) -> None:
        self.model.frozen = frozen
        status, answer = await ask(self.server, "PUT", f"/freeze/{'enable' if frozen else 'disable'}")
        assert (status, answer["freeze"]) == (200, frozen)

    async def hot(self, hot: bool) -> None:
        status, answer = await ask(self.server, "PUT", f"/hot_cache/{'enable' if hot else 'disable'}")
        if hot and CPU not in self.model.backends:
            assert (status, answer["error"]) == (503, "API unavailable")
            return
        assert (status, answer["hot_cache"]) == (200, hot)
        if CPU in self.model.backends:
            self.model.set_hot(hot)

    def made(self) -> dict[str, str]:
        return {name: name for name in sorted(self.model.create())}

    def classes(self) -> dict[str, str]:
        return {name: name for name in self.model.backends}

    async def compare(self) -> None:
        assert await ask(self.server, "GET", "/backends") == (200, self.classes())
        _, answer = await ask(self.server, "GET", "/bypass/list")
        assert answer["bypassed_backends"] == sorted(self.model.bypassed)
        assert answer["all_backends"] == self.model.backends
        word = "enabled" if self.model.frozen else "disabled"
        assert (await ask(self.server, "GET", "/freeze/status"))[1]["message"] == f"Freeze mode is {word}"
        hot = CPU in self.model.backends and self.model.hot
        assert (await ask(self.server, "GET", "/hot_cache/status"))[1]["hot_cache"] == hot
        await self.lookup(3)


@settings(OVER_HTTP, max_examples=60)
@example(steps=[("store", 2), ("close", CPU), ("hot", True), ("hot", False), ("retrieve", 3), ("create", None)])
@example(steps=[("store", 2), ("bypass", CPU), ("clear", [CPU]), ("retrieve", 2), ("use", CPU), ("lookup", 2)])
@example(steps=[("store", 1), ("freeze", True), ("store", 3), ("hot", False), ("retrieve", 1), ("recreate", DISK)])
@given(steps=st.lists(STEPS, max_size=14))
async def test_backends_and_switches_do_as_they_are_told(
    api_server: StartApi, tmp_path: Path, steps: list[tuple[str, Any]]
) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    worker = await api_server(local_disk=str(folder), max_local_disk_size=0.01, **SMALL)
    pair = Pair(worker, Model())
    for what, value in steps:
        await getattr(pair, what)(value)
        await pair.compare()


async def test_there_is_no_hot_cache_without_memory(worker: RunningApi) -> None:
    assert (await ask(worker, "DELETE", f"/backends/{CPU}"))[0] == 200
    message = "there is no LocalCPUBackend; POST /backends makes it again"
    expected = (503, {"error": "API unavailable", "message": message})
    assert await ask(worker, "PUT", "/hot_cache/enable") == expected
    assert (await ask(worker, "PUT", "/hot_cache/disable"))[0] == 200
    assert (await ask(worker, "POST", "/backends"))[0] == 200
    assert (await ask(worker, "PUT", "/hot_cache/enable"))[0] == 200


async def test_bypass_needs_a_name(worker: RunningApi) -> None:
    for path in ("/bypass/add", "/bypass/remove", "/bypass/add?backend_name="):
        assert await ask(worker, "PUT", path) == (
            400,
            {"error": "Missing parameter", "message": "backend_name is required"},
        )


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/backends", "GET,HEAD,POST"),
        ("/backends/x", "DELETE"),
        ("/backends/x/recreate", "POST"),
        ("/bypass/list", "GET,HEAD"),
        ("/bypass/add", "PUT"),
        ("/bypass/remove", "PUT"),
        ("/freeze/enable", "PUT"),
        ("/freeze/status", "GET,HEAD"),
        ("/hot_cache/disable", "PUT"),
        ("/hot_cache/status", "GET,HEAD"),
        ("/cache/store", "POST"),
        ("/cache/retrieve", "POST"),
        ("/cache/lookup", "GET,HEAD,POST"),
        ("/cache/clear", "DELETE"),
        ("/cache/kvcache/info", "GET,HEAD"),
        ("/cache/kvcache/check", "GET,HEAD"),
        ("/cache/kvcache/record_slot", "POST"),
        ("/cache/load-fs-chunks", "POST"),
        ("/conf", "GET,HEAD,POST"),
        ("/meta", "GET,HEAD"),
        ("/lookup/info", "GET,HEAD"),
        ("/lookup/recreate", "POST"),
        ("/chunk_statistics/start", "POST"),
        ("/chunk_statistics/status", "GET,HEAD"),
        ("/inference_info", "GET,HEAD"),
        ("/controller/workers", "GET,HEAD,POST,DELETE"),
    ],
)
async def test_other_methods_are_405(worker: RunningApi, path: str, allowed: str) -> None:
    for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - set(allowed.split(",")):
        async with worker.client.request(method, path) as response:
            assert (response.status, await response.json()) == (405, {"detail": "Method Not Allowed"})
            assert sorted(response.headers["Allow"].split(",")) == sorted(allowed.split(","))


# Chunk files


async def test_chunk_files_are_loaded_and_what_is_wrong_is_told(api_server: StartApi, tmp_path: Path) -> None:
    first = await api_server(local_disk=f"{tmp_path}/disk", max_local_disk_size=0.01, **SMALL)
    await ask(first, "POST", "/cache/store?tokens_mock=0,64")
    (folder,) = (tmp_path / "disk").iterdir()
    config = tmp_path / "load.yaml"
    config.write_text(f"remote_url: fs://h:1{folder}\n")
    second = await api_server(**SMALL)
    body = {"config_path": str(config), "max_chunks": 3}
    answer = {"status": "success", "loaded_chunks": 3, "total_files": 4, "failed_keys": [], "config_path": str(config)}
    assert await ask(second, "POST", "/cache/load-fs-chunks", json=body) == (200, answer)
    answer["loaded_chunks"] = 4
    for most in (None, 0, 4, "4", 4.0, 10**18):
        status, found = await ask(second, "POST", "/cache/load-fs-chunks", json={**body, "max_chunks": most})
        assert (status, found) == (200, answer), most
    assert await hits(second, params={"tokens_mock": "0,64"}) == (64, 64)
    await ask(second, "DELETE", f"/backends/{CPU}")
    for most, told in ((10, 4), (2, 2), (0, 0)):
        status, found = await ask(
            second, "POST", "/cache/load-fs-chunks", json={"config_path": str(config), "max_failed_keys": most}
        )
        assert (status, found["loaded_chunks"], len(found["failed_keys"])) == (200, 0, told)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"config_path": "/nope/nope.yaml"}, 400),
        ({"config_path": "/"}, 400),
        ({"config_path": ""}, 400),
        ({"config_path": "a\0b"}, 400),
        ({"config_path": "\ud800"}, 400),
        ({"config_path": "x" * 5000}, 400),
        ({"config_path": "/dev/zero"}, 400),
        ({"config_path": "/dev/null"}, 400),
        ({"config_path": None}, 422),
        ({"config_path": math.nan}, 422),
        ({"config_path": "x", "max_chunks": math.inf}, 422),
        ({"config_path": "x", "max_chunks": 1.5}, 422),
        ({"config_path": "x", "max_chunks": 1e30}, 422),
        ({"config_path": "x", "max_failed_keys": None}, 422),
        ({"max_chunks": 1}, 422),
        ([], 422),
        (math.nan, 422),
    ],
    ids=lambda value: ascii(value)[:40],
)
async def test_what_cannot_be_loaded(worker: RunningApi, body: object, status: int) -> None:
    found, answer = await ask(worker, "POST", "/cache/load-fs-chunks", data=json.dumps(body))
    assert found == status
    assert answer["detail"]


async def test_a_number_below_zero_is_refused(worker: RunningApi) -> None:
    for name in ("max_chunks", "max_failed_keys"):
        answer = await ask(worker, "POST", "/cache/load-fs-chunks", json={"config_path": "x", name: -1})
        assert answer == (400, {"detail": f"{name} -1: expected a number from 0"})


async def test_no_depth_of_a_body_is_a_server_error(worker: RunningApi) -> None:
    """At some depth Python can read it and no longer write it: the refusal tells of it all the same."""
    for depth in [1, 40, *range(860, 1000), 5000, 100_000]:
        for template in ('{"config_path": %s}', "%s", '{"x": %s}'):
            status, answer = await ask(
                worker, "POST", "/cache/load-fs-chunks", data=template % ("[" * depth + "]" * depth)
            )
            assert status == 422, depth
            assert answer["detail"][0]["type"] in ("string_type", "missing", "model_attributes_type", "json_invalid")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "null byte"])
async def test_a_configuration_that_is_no_plain_file_holds_nobody_up(
    api_server: StartApi, tmp_path: Path, kind: str
) -> None:
    worker = await api_server()
    path = {"pipe": str(tmp_path / "pipe"), "device": "/dev/zero", "folder": str(tmp_path), "null byte": "a\0b"}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    async with worker.client.post("/cache/load-fs-chunks", json={"config_path": path}) as response:
        assert response.status == 400
        assert (await response.json())["detail"].startswith("Invalid configuration file: ")


async def test_what_a_file_holds_is_not_told(api_server: StartApi, tmp_path: Path) -> None:
    worker = await api_server()
    for text in ("hf_abcdefghijklmnop", "a: [hf_abcdefghijklmnop", "- hf_abcdefghijklmnop", "? [hf_abcdefghijklmnop]"):
        path = tmp_path / "secret"
        path.write_text(text)
        async with worker.client.post("/cache/load-fs-chunks", json={"config_path": str(path)}) as response:
            assert response.status == 400
            assert "hf_" not in await response.text()


async def test_numbers_in_texts_are_read_as_pydantic_reads_them(api_server: StartApi) -> None:
    worker = await api_server()
    for number, status in (("7.0", 400), ("7", 400), (True, 400), (7.0, 400), ("7.", 422), ("7.5", 422), ("x", 422)):
        body = {"config_path": "/no/such", "max_chunks": number}
        async with worker.client.post("/cache/load-fs-chunks", json=body) as response:
            assert response.status == status, number


async def test_a_bypass_outlives_its_backend_and_can_be_taken_back(api_server: StartApi, tmp_path: Path) -> None:
    worker = await api_server(local_disk=str(tmp_path), max_local_disk_size=0.1)
    disk = "LocalDiskBackend"
    for method, path in (("put", f"/bypass/add?backend_name={disk}"), ("delete", f"/backends/{disk}")):
        async with getattr(worker.client, method)(path) as response:
            assert response.status == 200
    async with worker.client.put(f"/bypass/remove?backend_name={disk}") as response:
        assert (await response.json())["bypassed_backends"] == []
    for path in (f"/bypass/remove?backend_name={disk}", f"/bypass/add?backend_name={disk}"):
        async with worker.client.put(path) as response:
            assert response.status == 400


async def test_a_mask_is_no_value(api_server: StartApi) -> None:
    worker = await api_server()
    async with worker.client.post("/conf", json={"local_disk": "***", "min_retrieve_tokens": 3}) as response:
        answer = await response.json()
    assert answer == {"updated": {"min_retrieve_tokens": 3}, "errors": {"local_disk": "*** is a mask and no value"}}
