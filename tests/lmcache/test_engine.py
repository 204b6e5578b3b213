"""The engine operations of our server on a real LMCache engine, beside LMCache's own server on the same engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.contract.exchanges import Exchange, difference, read
from tests.contract.exchanges import ask as ask_exchange
from tests.lmcache.processes import Answer, Host, ask

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(300)]

INTENDED = {
    "GET /inference_version": (503, "StandaloneLMCacheManager has no get_inference_version"),
    "POST /lookup/create?dryrun=true": (400, "engine_id is required for RPC communication"),
}
"""Where LMCache answers 500 because something raised, and ours says what is missing (docs/compatibility.md)."""

Client = aiohttp.ClientSession


async def test_every_recorded_exchange_of_the_engine_in_turn(theirs: Client, ours: Client) -> None:
    """Once through LMCache's own server, once through ours: both answer as was recorded."""
    for client, intended in ((theirs, {}), (ours, INTENDED)):
        await ask(client, "POST", "/conf", json={"min_retrieve_tokens": 0, "save_decode_cache": False})
        differences: dict[str, object] = {}
        for exchange in read("engine.jsonl"):
            if exchange.path.startswith("/cache/clear?"):
                await _written_to_disk(ours, "tokens_mock=0,512", 512)
            status, content_type, body = await ask_exchange(client, exchange)
            if str(exchange) in intended:
                expected_status, message = intended[str(exchange)]
                if status != expected_status or message not in body.values():
                    differences[str(exchange)] = (status, body)
            elif (status, content_type) != (exchange.status, exchange.content_type.partition(";")[0]):
                differences[str(exchange)] = (status, content_type, body)
            elif found := _difference(exchange, body):
                differences[str(exchange)] = found
        assert differences == {}, client


async def _written_to_disk(ours: Client, tokens: str, count: int) -> None:
    """LMCache writes behind, and clears no chunk that is still being written."""
    deadline = time.monotonic() + 30
    while True:
        spans = (await ask(ours, "GET", f"/cache/lookup?{tokens}")).json()["spans"]
        on_disk = [span["end"] - span["start"] for span in spans if "LocalDiskBackend" in span["locations"]]
        if sum(on_disk) == count:
            break
        assert time.monotonic() < deadline, spans
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.1)  # it lets go of a chunk just after it has noted it as written


def _difference(exchange: Exchange, body: Any) -> str | None:
    return None if exchange.body == body else difference(exchange.body, body)


ALIKE: Sequence[tuple[str, str, Mapping[str, Any]]] = [
    ("POST", "/cache/store?tokens_mock=-5,300", {}),
    ("POST", "/cache/retrieve?tokens_mock=-5,700", {}),
    ("POST", "/cache/store?tokens_mock=+1_0,%202_0%20", {}),
    ("POST", "/cache/store?tokens_mock=,", {}),
    ("POST", "/cache/store?tokens_mock=1,2,3", {}),
    ("POST", "/cache/store?tokens_mock=", {}),
    ("POST", "/cache/retrieve?tokens_mock=a,b", {}),
    ("POST", "/cache/retrieve?tokens_mock=5,5", {}),
    ("GET", "/cache/store?tokens_mock=0,5", {}),
    ("DELETE", "/cache/clear?locations=Nope", {}),
    ("DELETE", "/cache/clear?locations=LocalDiskBackend&locations=Nope", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=0,1", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=a&chunk_size=2", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=3,,4,&chunk_size=1", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=3&chunk_size=-1", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=3&chunk_size=0", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=-1&chunk_size=1", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=510,511,512&chunk_size=1", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=,&chunk_size=1", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=%5B5,3%5D&chunk_size=1", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=5&chunk_size=x&layerwise=7", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=5,5,6,4,%5B1,9%5D&chunk_size=3&layerwise=yes", {}),
    ("GET", "/cache/kvcache/check?slot_mapping=%5B0,511%5D&chunk_size=100", {}),
    ("POST", "/cache/kvcache/record_slot?enabled=TRUE", {}),
    ("POST", "/cache/kvcache/record_slot?enabled=", {}),
    ("POST", "/cache/kvcache/record_slot?enabled=False", {}),
    ("POST", "/lookup/close", {}),
    ("POST", "/lookup/recreate", {}),
    ("POST", "/lookup/create?dryrun=x", {}),
    ("GET", "/conf?names=", {}),
    ("GET", "/conf?names=nope,chunk_size,chunk_size,cache_policy", {}),
    ("POST", "/conf", {"json": {"chunk_size": "abc"}}),
    ("POST", "/conf", {"json": {"save_decode_cache": "maybe"}}),
    ("POST", "/conf", {"json": {"min_retrieve_tokens": "7", "blend_thresholds": "1,2.5"}}),
    ("POST", "/conf", {"json": {"min_retrieve_tokens": 0, "blend_thresholds": None}}),
    ("POST", "/conf", {"data": ""}),
    ("POST", "/conf", {"json": {}}),
    ("POST", "/conf", {"json": "text"}),
    ("POST", "/conf", {"json": {"extra_config": {"a": [1, {"b": None}]}}}),
    ("GET", "/conf?names=extra_config", {}),
    ("POST", "/conf", {"json": {"extra_config": None}}),
    ("POST", "/cache/load-fs-chunks", {}),
    ("POST", "/cache/load-fs-chunks", {"json": []}),
    ("POST", "/cache/load-fs-chunks", {"json": {"config_path": 5, "max_chunks": "x", "max_failed_keys": 1.5}}),
    ("POST", "/cache/load-fs-chunks", {"json": {"config_path": "/tmp", "max_chunks": 7.0, "max_failed_keys": None}}),
    ("POST", "/cache/load-fs-chunks", {"json": {"config_path": "/no/such", "max_chunks": None}}),
    ("PUT", "/bypass/remove", {}),
    ("PUT", "/bypass/remove?backend_name=LocalCPUBackend", {}),
    ("PUT", "/freeze/status", {}),
    ("GET", "/freeze/enable", {}),
    ("GET", "/inference_info?format=x", {}),
    ("GET", "/controller/key-stats", {}),
    ("GET", "/controller/workers?instance_id=x", {}),
]
"""Further questions, answered the same by both."""


@pytest.mark.parametrize("question", ALIKE, ids=lambda question: f"{question[0]} {question[1]} {question[2] or ''}")
async def test_both_servers_answer_alike(
    theirs: Client, ours: Client, question: tuple[str, str, Mapping[str, Any]]
) -> None:
    method, path, how = question
    expected, answer = await ask(theirs, method, path, **how), await ask(ours, method, path, **how)
    assert answer.head == expected.head
    assert _told(path, answer) == _told(path, expected)


def _told(path: str, answer: Answer) -> object:
    """The answer's JSON; infinity, which is none, as ours writes it."""
    content = json.loads(answer.text, parse_constant=lambda constant: {"Infinity": "inf"}[constant])
    if path.startswith("/conf?names="):
        content.pop("internal_api_server_socket_path_prefix", None)
    return content


async def test_bytes_stored_through_one_are_found_through_the_other(theirs: Client, ours: Client) -> None:
    for number, (storing, finding) in enumerate([(ours, theirs), (theirs, ours)]):
        begin = 100_000 * (number + 1)
        tokens = f"tokens_mock={begin},{begin + 1024}"
        assert (await ask(finding, "POST", f"/cache/retrieve?{tokens}")).json()["num_retrieved"] == 0
        assert (await ask(storing, "POST", f"/cache/store?{tokens}")).json()["num_tokens"] == 1024
        assert (await ask(finding, "POST", f"/cache/retrieve?{tokens}")).json()["num_retrieved"] == 1024
        found = (await ask(ours, "GET", f"/cache/lookup?tokens_mock={begin},{begin + 1100}")).json()
        assert (found["num_tokens"], found["num_hit_tokens"], found["num_hit_chunks"]) == (1100, 1024, 4)
        assert "LocalCPUBackend" in found["spans"][0]["locations"]
    real = {"tokens": list(range(200_000, 200_512))}
    assert (await ask(ours, "POST", "/cache/retrieve", json=real)).json()["num_retrieved"] == 512
    assert (await ask(ours, "POST", "/cache/lookup", json=real)).json()["num_hit_tokens"] == 512


async def test_a_lookup_changes_nothing_and_counts_nothing(ours: Client) -> None:
    before = (await ask(ours, "GET", "/metrics")).text
    for _ in range(3):
        assert (await ask(ours, "GET", "/cache/lookup?tokens_mock=0,4096")).status == 200
    after = (await ask(ours, "GET", "/metrics")).text
    names = ("lmcache:num_lookup_requests_total", "lmcache:local_cpu_keys_in_request_count")
    for name in names:
        assert _lines(before, name) == _lines(after, name)


def _lines(exposition: str, name: str) -> list[str]:
    return [line for line in exposition.splitlines() if line.startswith(name)]


async def test_switches_set_by_one_are_seen_by_the_other(theirs: Client, ours: Client) -> None:
    for setter, reader in ((ours, theirs), (theirs, ours)):
        for switch in ("freeze", "hot_cache"):
            for verb in ("enable", "disable", "enable" if switch == "hot_cache" else "disable"):
                await ask(setter, "PUT", f"/{switch}/{verb}")
                told = (await ask(reader, "GET", f"/{switch}/status")).json()
                assert told[switch] is (verb == "enable")
        await ask(setter, "PUT", "/bypass/add?backend_name=LocalDiskBackend")
        assert (await ask(reader, "GET", "/bypass/list")).json()["bypassed_backends"] == ["LocalDiskBackend"]
        await ask(setter, "PUT", "/bypass/remove?backend_name=LocalDiskBackend")
        await ask(setter, "POST", "/conf", json={"min_retrieve_tokens": 11})
        assert (await ask(reader, "GET", "/conf?names=min_retrieve_tokens")).json() == {"min_retrieve_tokens": 11}
        await ask(setter, "POST", "/conf", json={"min_retrieve_tokens": 0})


async def test_running_code_cannot_be_opened_over_http(ours: Client) -> None:
    """On purpose: LMCache's own server lets anybody."""
    answer = await ask(ours, "POST", "/conf", json={"run_script_api_enabled": True, "script_allowed_imports": ["os"]})
    assert answer.status == 400
    assert set(answer.json()["errors"].values()) == {"Config is not mutable at runtime"}
    assert (await ask(ours, "GET", "/conf?names=run_script_api_enabled")).json() == {"run_script_api_enabled": False}


async def test_secrets_in_settings_are_masked(theirs: Client, ours: Client) -> None:
    url = "redis://user:of-the-tests@localhost:6379"
    try:
        assert (await ask(ours, "POST", "/conf", json={"remote_url": url})).json() == {"updated": {"remote_url": "***"}}
        assert (await ask(theirs, "GET", "/conf?names=remote_url")).json() == {"remote_url": url}
        assert (await ask(ours, "GET", "/conf?names=remote_url")).json() == {"remote_url": "***"}
    finally:
        await ask(ours, "POST", "/conf", json={"remote_url": None})


SHAPES = {
    "MHA": ([2, 3, 8, 2, 4], "float16"),
    "MHA of bfloat16": ([2, 3, 8, 2, 4], "bfloat16"),
    "MLA": ([3, 8, 16], "float32"),
    "four dimensions": ([3, 8, 2, 4], "float16"),
    "bytes": ([2, 3, 8, 2, 4], "uint8"),
}


@pytest.fixture
def kv(host: Host) -> Iterator[Host]:
    yield host
    host.tell(f"kv {json.dumps([[2, 2, 256, 4, 16], 'float16'])}", "FILLED")


@pytest.mark.parametrize("layout", SHAPES.values(), ids=SHAPES)
async def test_checksums_are_lmcaches(kv: Host, theirs: Client, ours: Client, layout: tuple[list[int], str]) -> None:
    kv.tell(f"kv {json.dumps(layout)}", "FILLED")
    for path in (
        "info",
        "check?slot_mapping=%5B0,23%5D&chunk_size=5",
        "check?slot_mapping=%5B0,23%5D&chunk_size=5&layerwise=true",
        "check?slot_mapping=7,3,3,%5B20,22%5D&chunk_size=2",
        "check?slot_mapping=23,24&chunk_size=1",
    ):
        expected, answer = [await ask(server, "GET", f"/cache/kvcache/{path}") for server in (theirs, ours)]
        assert (answer.status, answer.json()) == (expected.status, expected.json()), path


async def test_a_tensor_type_that_numpy_does_not_know(kv: Host, ours: Client) -> None:
    """On purpose: LMCache's own server cannot tell its checksum."""
    kv.tell(f"kv {json.dumps([[2, 3, 8, 2, 4], 'float8_e4m3fn'])}", "FILLED")
    answer = (await ask(ours, "GET", "/cache/kvcache/check?slot_mapping=0,1&chunk_size=1")).json()
    first, second = answer["chunk_checksums"]
    assert len(first) == 32
    assert first != second


async def test_chunk_files_are_loaded(host: Host, theirs: Client, ours: Client, tmp_path: Path) -> None:
    """Written by LMCache's file system connector, forgotten, loaded through each server, and found again."""
    folder = host.folder / "chunks"
    config = host.folder / "chunks.yaml"
    config.write_text(f"chunk_size: 256\nremote_url: fs://localhost:0{folder}/\n")
    tokens = "tokens_mock=700000,700768"
    try:
        await ask(ours, "POST", "/conf", json={"remote_url": f"fs://localhost:0{folder}/"})
        created = (await ask(ours, "POST", "/backends")).json()["created"]
        assert created == {"RemoteBackend": "RemoteBackend"}
        await ask(ours, "POST", f"/cache/store?{tokens}")
        deadline = time.monotonic() + 30
        while len(list(folder.glob("*.data"))) < 3:
            assert time.monotonic() < deadline, list(folder.iterdir())
            await asyncio.sleep(0.05)
    finally:
        await ask(ours, "DELETE", "/backends/RemoteBackend")
        await ask(ours, "POST", "/conf", json={"remote_url": None})
    await ask(ours, "PUT", "/bypass/add?backend_name=LocalDiskBackend")
    try:
        for server in (theirs, ours):
            await ask(ours, "DELETE", "/cache/clear")
            assert (await ask(ours, "GET", f"/cache/lookup?{tokens}")).json()["num_hit_tokens"] == 0
            answer = await ask(server, "POST", "/cache/load-fs-chunks", json={"config_path": str(config)})
            told = {"loaded_chunks": 3, "total_files": 3, "failed_keys": [], "config_path": str(config)}
            assert answer.json() == {"status": "success", **told}
            assert (await ask(ours, "POST", f"/cache/retrieve?{tokens}")).json()["num_retrieved"] == 768
        some = await ask(ours, "POST", "/cache/load-fs-chunks", json={"config_path": str(config), "max_chunks": 1})
        assert (some.json()["loaded_chunks"], some.json()["total_files"]) == (1, 3)
        (folder / "no@key.data").write_text("x")
        for server in (theirs, ours):
            answer = await ask(server, "POST", "/cache/load-fs-chunks", json={"config_path": str(config)})
            assert (answer.json()["loaded_chunks"], answer.json()["failed_keys"]) == (3, ["no@key"])
    finally:
        await ask(ours, "PUT", "/bypass/remove?backend_name=LocalDiskBackend")


async def test_a_configuration_that_leads_to_no_chunks(host: Host, ours: Client) -> None:
    config = host.folder / "nothing.yaml"
    for text in ("chunk_size: 256\n", "chunk_size: [", "a: &a [1]\nb: " + "[*a," * 200):
        config.write_text(text)
        answer = await ask(ours, "POST", "/cache/load-fs-chunks", json={"config_path": str(config)})
        assert answer.status == 400, text
        assert list(answer.json()) == ["detail"]


OF_THE_SCHEDULER = [
    ("GET", "/lookup/info"),
    ("POST", "/lookup/recreate"),
    ("POST", "/lookup/close"),
    ("GET", "/lookup/info"),
    ("POST", "/lookup/create?dryrun=true"),
    ("POST", "/lookup/recreate"),
    ("GET", "/chunk_statistics/status"),
    ("POST", "/lookup/create"),
    ("POST", "/chunk_statistics/start"),
    ("POST", "/chunk_statistics/stop"),
    ("POST", "/chunk_statistics/reset"),
    ("PUT", "/freeze/enable"),
    ("GET", "/hot_cache/status"),
    ("GET", "/backends"),
    ("PUT", "/bypass/add"),
    ("POST", "/cache/store"),
    ("DELETE", "/cache/clear"),
    ("GET", "/cache/kvcache/info"),
    ("GET", "/cache/kvcache/check?slot_mapping=1&chunk_size=1"),
    ("POST", "/cache/kvcache/record_slot?enabled=x"),
    ("GET", "/inference_info"),
    ("GET", "/meta"),
]


async def test_a_scheduler_answers_as_lmcaches(their_scheduler: Client, our_scheduler: Client) -> None:
    """A real lookup client and no engine: the same questions in turn, through one server and then the other."""
    expected, answers = [
        [await ask(server, method, path) for method, path in OF_THE_SCHEDULER]
        for server in (their_scheduler, our_scheduler)
    ]
    for (_, path), theirs, ours in zip(OF_THE_SCHEDULER, expected, answers, strict=True):
        if path.startswith("/cache/kvcache/record_slot"):
            assert (theirs.status, ours.status) == (400, 503)  # it has no engine that could record: on purpose
            continue
        assert (ours.status, ours.media_type) == (theirs.status, theirs.media_type), path
        assert ours.json() == theirs.json(), path


async def test_chunk_statistics_are_the_clients(host: Host, their_scheduler: Client, our_scheduler: Client) -> None:
    await ask(our_scheduler, "POST", "/chunk_statistics/reset")
    for _ in range(2):
        host.tell("record 1024", "RECORDED")
    theirs, ours = [
        (await ask(server, "GET", "/chunk_statistics/status")).json() for server in (their_scheduler, our_scheduler)
    ]
    assert ours.keys() == theirs.keys()
    assert (ours["total_chunks"], ours["unique_chunks"], ours["duplicate_chunks"]) == (8, 4, 4)
    assert ours["bloom_filter"] == theirs["bloom_filter"]
    assert (theirs["auto_exit_enabled"], ours["auto_exit_enabled"]) == (True, False)  # no limit is set: on purpose


async def test_a_schedulers_lookup_is_not_asked_beside_its_requests(our_scheduler: Client) -> None:
    answer = await ask(our_scheduler, "GET", "/cache/lookup?tokens_mock=0,512")
    assert answer.status == 503
    assert "ask the workers" in answer.json()["message"]


async def test_what_hangs_in_lmcache_hangs_no_server(our_scheduler: Client) -> None:
    """A dry run beside a client that is there never returns in LMCache: its close waits for the other's sockets."""
    try:
        await ask(our_scheduler, "POST", "/conf", json={"extra_config": {"internal_api_server_call_seconds": 0.5}})
        answer = await ask(our_scheduler, "POST", "/lookup/create?dryrun=true")
        assert answer.status == 504
        assert "it may still finish" in answer.json()["detail"]
        assert (await ask(our_scheduler, "GET", "/version")).status == 200
        assert (await ask(our_scheduler, "GET", "/metrics")).status == 200
        assert (await ask(our_scheduler, "GET", "/lookup/info")).status == 200
    finally:
        await ask(our_scheduler, "POST", "/conf", json={"extra_config": None})


async def test_without_memory_the_hot_cache_says_so(ours: Client) -> None:
    """On purpose: LMCache's own server says that it was enabled."""
    try:
        assert (await ask(ours, "DELETE", "/backends/LocalCPUBackend")).status == 200
        answer = await ask(ours, "PUT", "/hot_cache/enable")
        assert (answer.status, answer.json()["error"]) == (503, "API unavailable")
    finally:
        answer = await ask(ours, "POST", "/backends")
    assert answer.json()["created"] == {
        "LocalCPUBackend": "LocalCPUBackend"
    }  # LMCache's loader keeps using the old one
