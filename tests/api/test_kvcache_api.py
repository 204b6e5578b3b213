"""`/cache/kvcache`: which slots are meant, and their checksums against ones made here."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_api import checksums
from lmcache_api.checksums import ranges_of
from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.pytest_plugin import RunningApi, StartApi
from lmcache_shared.errors import Failure, Refusal

CHECK = "/cache/kvcache/check"


@pytest.fixture
async def worker(api_server: StartApi) -> RunningApi:
    return await api_server()


async def ask(server: RunningApi, method: str, path: str, **query: object) -> tuple[int, Any]:
    params = {name: str(value) for name, value in query.items()}
    async with server.client.request(method, path, params=params) as response:
        assert response.content_type == "application/json"
        text = await response.text()
        answer = json.loads(text, parse_constant=pytest.fail)
        if not isinstance(answer, dict) or "detail" not in answer:
            assert text == json.dumps(answer, indent=2, ensure_ascii=False)
        return response.status, answer


# Slots


def unfolded(told: list[int | list[int]]) -> Iterator[int]:
    for entry in told:
        if isinstance(entry, int):
            yield entry
        else:
            first, last = entry
            assert last - first >= 2  # one or two stand by themselves
            yield from range(first, last + 1)


def folded(slots: list[int]) -> list[int | list[int]]:
    """Three or more in a row as a pair, found by looking at each slot's neighbours."""
    starts = [i for i, slot in enumerate(slots) if i == 0 or slots[i - 1] != slot - 1]
    told: list[int | list[int]] = []
    for start, end in zip(starts, [*starts, len(slots)][1:], strict=True):
        told += [[slots[start], slots[end - 1]]] if end - start > 2 else slots[start:end]
    return told


def written(told: list[int | list[int]]) -> str:
    return ",".join(str(entry).replace(" ", "") for entry in told)


SLOTS = st.lists(st.integers(0, 40) | st.integers(0, 511), max_size=40)
RUNS = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 11)), max_size=8).map(
    lambda runs: [slot for first, count in runs for slot in range(first, first + count)]
)


@given(SLOTS | RUNS)
def test_slots_are_folded_and_unfolded(slots: list[int]) -> None:
    told = ranges_of(slots)
    assert told == folded(slots)
    assert list(unfolded(told)) == slots
    assert checksums.parse_slots(written(told), 1000) == slots
    assert checksums.parse_slots(",".join(map(str, slots)), 1000) == slots


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slots=(SLOTS | RUNS).filter(bool), size=st.integers(1, 50))
async def test_slots_go_there_and_back(worker: RunningApi, slots: list[int], size: int) -> None:
    status, answer = await ask(worker, "GET", CHECK, slot_mapping=written(folded(slots)), chunk_size=size)
    assert (status, answer["slot_mapping_ranges"]) == (200, folded(slots))
    assert answer["num_chunks"] == len(answer["chunk_checksums"]) == -(-len(slots) // size)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (" 0, 1 ,[ 4 , 7 ]\t, 9", [0, 1, [4, 7], 9]),
        ("[3,3],[5,6]", [3, 5, 6]),
        ("1,1,1", [1, 1, 1]),
        ("3,2,1", [3, 2, 1]),
        ("1,,2,", [1, 2]),
        ("[1,2]3", [[1, 3]]),
        ("+1,0_2", [1, 2]),
        (",", []),
        ("00000000000000000007", [7]),
    ],
)
async def test_spellings_of_slots(worker: RunningApi, text: str, told: list[object]) -> None:
    status, answer = await ask(worker, "GET", CHECK, slot_mapping=text, chunk_size=512)
    assert (status, answer["slot_mapping_ranges"]) == (200, told)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a", "Invalid slot format: 'a'"),
        ("1.5", "Invalid slot format: '1.5'"),
        ("0x1", "Invalid slot format: '0x1'"),
        ("1;2", "Invalid slot format: '1;2'"),
        ("[1,2", "Invalid slot format: '[1,2'"),
        ("1,2]", "Invalid slot format: ']'"),
        ("[[1,2]]", "Invalid slot format: '['"),
        ("1[2,3]", "Invalid slot format: '1[2,3]'"),
        ("[1,2,3]", "Invalid slot format: '[1,2,3]'"),
        ("[1]", "Invalid slot format: '[1]'"),
        ("[]", "Invalid slot format: '[]'"),
        ("[-1,3]", "Invalid slot format: '[-1,3]'"),
        ("[7,4]", "Range start 7 must be <= end 4"),
        ("٣", "Invalid slot format: '٣'"),
        ("1" * 21, f"Invalid slot format: '{'1' * 21}'"),
        ("1" * 7000, f"Invalid slot format: '{'1' * 80}'"),
        ("\x00", "Invalid slot format: '\x00'"),
    ],
    ids=lambda text: ascii(text)[:24],
)
async def test_what_are_no_slots(worker: RunningApi, text: str, why: str) -> None:
    status, answer = await ask(worker, "GET", CHECK, slot_mapping=text, chunk_size=2)
    message = f"slot_mapping must be comma-separated integers or ranges like [start,end]: {why}"
    assert (status, answer) == (400, {"error": "Invalid slot_mapping format", "message": message})


@given(st.text("0123456789[],- x", max_size=30))
def test_no_text_is_more_than_refused(text: str) -> None:
    try:
        slots = checksums.parse_slots(text, 1000)
    except Failure as failure:
        assert failure.status == 400
    else:
        assert len(slots) <= 1000


async def test_slots_are_needed_and_lie_in_the_cache(worker: RunningApi) -> None:
    for query in ({}, {"slot_mapping": ""}):
        assert await ask(worker, "GET", CHECK, chunk_size=2, **query) == (
            400,
            {"error": "Missing parameters", "message": "slot_mapping parameter is required"},
        )

    async def outside(text: str) -> str:
        status, answer = await ask(worker, "GET", CHECK, slot_mapping=text, chunk_size=2)
        assert (status, answer["error"]) == (400, "Invalid slot indices")
        message: str = answer["message"]
        return message

    assert await outside("0,512,-1,511") == "Slot indices out of bounds: [512, -1]. Valid range: 0 to 511"
    named = ", ".join(map(str, range(512, 528)))
    assert await outside("[0,527]") == f"Slot indices out of bounds: [{named}]. Valid range: 0 to 511"
    assert await outside("[0,600]") == f"Slot indices out of bounds: [{named}] and 73 more. Valid range: 0 to 511"
    assert "[99999999999999999999]" in await outside("[99999999999999999999,99999999999999999999]")


async def test_one_request_names_only_so_many_slots(api_server: StartApi) -> None:
    worker = await api_server(internal_api_server_max_tokens=100)
    refusal = {
        "error": "Too many slots",
        "message": "more than 100 slots, which is what internal_api_server_max_tokens allows at once",
    }
    for text in ("[0,100]", "[0,50],[0,50]", ",".join("7" * 101), f"[0,{10**12}]", "[0,99999999999999999999]"):
        assert await ask(worker, "GET", CHECK, slot_mapping=text, chunk_size=2) == (400, refusal)
    for text in ("[0,99]", "[0,49],[0,49]", ",".join("7" * 100)):
        assert (await ask(worker, "GET", CHECK, slot_mapping=text, chunk_size=50))[1]["num_chunks"] == 2


async def test_one_answer_holds_only_so_many_checksums(api_server: StartApi) -> None:
    worker = await api_server(engine_layers=1, engine_heads=1, engine_head_size=1, engine_blocks=300, chunk_size=16)
    size = {"chunk_size": 1}
    status, answer = await ask(worker, "GET", CHECK, slot_mapping="[0,65536]", **size)
    message = "65537 checksums, but one answer holds 65536; take a larger chunk_size or fewer slots"
    assert (status, answer) == (400, {"error": "Too many chunks", "message": message})
    status, answer = await ask(worker, "GET", CHECK, slot_mapping="[0,65536]", chunk_size=2)
    assert (status, answer["num_chunks"]) == (200, 32769)
    two = await api_server(engine_layers=2, engine_heads=1, engine_head_size=1, engine_blocks=300, chunk_size=16)
    status, answer = await ask(two, "GET", CHECK, slot_mapping="[0,65536]", chunk_size=2, layerwise="true")
    assert (status, answer["error"]) == (400, "Too many chunks")


@pytest.mark.parametrize("layerwise", ["true", "false"])
async def test_sizes_of_chunks(worker: RunningApi, layerwise: str) -> None:
    status, answer = await ask(worker, "GET", CHECK, slot_mapping="[0,3]", layerwise=layerwise)
    assert (status, answer) == (
        200,
        {
            "status": "success",
            "slot_mapping_ranges": [[0, 3]],
            "chunk_size": None,
            "num_chunks": 0,
            "chunk_checksums": [],
            "layerwise": layerwise == "true",
        },
    )
    for size in (0, -1, -(10**30)):
        status, answer = await ask(worker, "GET", CHECK, slot_mapping="[0,3]", chunk_size=size, layerwise=layerwise)
        assert (status, answer["message"]) == (400, "chunk_size must be a positive integer")
    status, answer = await ask(worker, "GET", CHECK, slot_mapping="[0,3]", chunk_size=10**30, layerwise=layerwise)
    assert (status, answer["num_chunks"], answer["chunk_size"]) == (200, 1, 10**30)
    for size in ("x", "1.5", "", "1e3", "9" * 50):
        status, answer = await ask(worker, "GET", CHECK, slot_mapping="[0,3]", chunk_size=size)
        assert (status, answer["detail"][0]["loc"]) == (422, ["query", "chunk_size"])
    status, answer = await ask(worker, "GET", CHECK, slot_mapping="[0,3]", layerwise="maybe")
    assert (status, answer["detail"][0]["type"]) == (422, "bool_parsing")


# Checksums


class Known:
    """The KV cache that a worker begins with, made again byte by byte: each layer's name gives its bytes."""

    def __init__(self, layers: int, mla: bool, dtype: str, heads: int = 3, head_size: int = 5, slots: int = 60) -> None:
        self.names = [f"model.layers.{number}" for number in range(layers)]
        self.planes = 1 if mla else 2
        self.dtype = dtype
        self.slots = slots
        self.width = (1 if mla else heads) * head_size * {"float16": 2, "bfloat16": 2, "float32": 4, "uint8": 1}[dtype]

    def digest(self, name: str, slots: list[int]) -> str:
        block = hashlib.shake_128(name.encode()).digest(1 << 16)[: self.planes * self.slots * self.width]
        out = bytearray()
        for plane in range(self.planes):
            for slot in slots:
                start = (plane * self.slots + slot) * self.width
                number = bytes(block[at % len(block)] for at in range(start, start + self.width))
                if self.dtype == "bfloat16":
                    number = b"".join(b"\0\0" + number[at : at + 2] for at in range(0, len(number), 2))
                out += number
        return hashlib.md5(out).hexdigest()

    def together(self, slots: list[int]) -> str:
        return hashlib.md5("".join(self.digest(name, slots) for name in sorted(self.names)).encode()).hexdigest()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "uint8"])
@pytest.mark.parametrize("mla", [False, True], ids=["MHA", "MLA"])
async def test_checksums_are_of_these_bytes(api_server: StartApi, mla: bool, dtype: str) -> None:
    layers = 11  # by name the tenth comes after the first
    known = Known(layers, mla, dtype)
    worker = await api_server(
        engine_layers=layers, engine_heads=3, engine_head_size=5, engine_blocks=3, engine_block_size=20,
        engine_dtype=dtype, engine_use_mla=mla, chunk_size=16,
    )  # fmt: skip
    status, answer = await ask(worker, "GET", "/cache/kvcache/info")
    shape = [3, 20, 5] if mla else [2, 3, 20, 3, 5]
    layer = {"shape": shape, "dtype": f"torch.{dtype}", "device": "cpu"}
    assert (status, answer) == (
        200,
        {"status": "success", "num_layers": 11, "layers": dict.fromkeys(known.names, layer)},
    )
    slots = [5, *range(17, 24), 59, 0, 0, 41]
    chunks = [slots[:5], slots[5:10], slots[10:]]
    query = {"slot_mapping": "5,[17,23],59,0,0,41", "chunk_size": 5}
    status, answer = await ask(worker, "GET", CHECK, **query)
    assert (status, answer) == (
        200,
        {
            "status": "success",
            "slot_mapping_ranges": [5, [17, 23], 59, 0, 0, 41],
            "chunk_size": 5,
            "num_chunks": 3,
            "chunk_checksums": [known.together(chunk) for chunk in chunks],
            "layerwise": False,
        },
    )
    status, answer = await ask(worker, "GET", CHECK, layerwise=1, **query)
    assert answer["chunk_checksums"] == {name: [known.digest(name, chunk) for chunk in chunks] for name in known.names}
    assert (answer["num_chunks"], answer["layerwise"]) == (3, True)


async def test_checksums_tell_whether_two_workers_have_the_same(api_server: StartApi) -> None:
    one, other = await api_server(), await api_server()

    async def sums(server: RunningApi, slots: str = "[0,511]") -> Any:
        return (await ask(server, "GET", CHECK, slot_mapping=slots, chunk_size=256))[1]["chunk_checksums"]

    before = await sums(one)
    assert await sums(other) == before
    await ask(one, "POST", "/cache/store", tokens_mock="0,256")
    after = await sums(one)
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert await sums(one) == after
    await ask(other, "POST", "/cache/store", tokens_mock="0,256")
    assert await sums(other) == after
    await ask(other, "POST", "/cache/store", tokens_mock="1,257")
    assert (await sums(other))[0] != after[0]
    await ask(other, "POST", "/cache/lookup", tokens_mock="0,256")
    assert await sums(other) != after  # to look up changes nothing
    await ask(other, "POST", "/cache/retrieve", tokens_mock="0,256")
    assert await sums(other) == after


async def test_without_a_kv_cache_it_is_a_404(api_server: StartApi) -> None:
    missing = {"error": "kv_caches not available", "message": "kv_caches is empty or not initialized"}

    class Unregistered(EmbeddedComponent):
        @property
        def kv_caches(self) -> Any:
            return Nothing()

    class Nothing:
        def layers(self) -> dict[str, Any]:
            return {}

    for server in (await api_server(role="scheduler"), await api_server(component=Unregistered)):
        assert await ask(server, "GET", CHECK, slot_mapping="0") == (404, missing)
        assert await ask(server, "GET", "/cache/kvcache/info") == (404, missing)
        status, answer = await ask(server, "GET", CHECK, slot_mapping="x")
        assert (status, answer["error"]) == (400, "Invalid slot_mapping format")


def test_nothing_is_computed_that_nobody_waits_for() -> None:
    class Counting:
        read = 0

        def layers(self) -> dict[str, Any]:
            return {"a": checksums.LayerInfo((1, 8, 1), "torch.uint8", "cpu")}

        def slot_bytes(self, layer: str, slots: list[int]) -> bytes:
            self.read += 1
            return bytes(len(slots))

    caches = Counting()
    with pytest.raises(Refusal, match="504: compute checksums: not done in time; take fewer slots"):
        checksums.of_chunks(caches, range(8), 1, layerwise=False, until=time.monotonic())
    assert caches.read == 0
    found = checksums.of_chunks(caches, range(8), 3, layerwise=False, until=time.monotonic() + 60)
    assert found is not None
    assert (found.chunks, len(found.together), caches.read) == (3, 3, 1)
    many = [slot % 8 for slot in range(3 * checksums.BATCH_SLOTS)]
    assert checksums.of_chunks(caches, many, 2, layerwise=False, until=time.monotonic() + 60) is not None
    assert caches.read == 4  # a batch at a time


async def test_slots_are_recorded_in_the_log(worker: RunningApi, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmcache_api")
    path = "/cache/kvcache/record_slot"

    async def recorded(**query: str) -> bool:
        status, answer = await ask(worker, "POST", path, **query)
        assert (status, answer["status"]) == (200, "success")
        enabled: bool = answer["kvcache_check_log_enabled"]
        return enabled

    assert not await recorded()
    await ask(worker, "POST", "/cache/store", tokens_mock="0,300")
    assert "[KVCache Check]" not in caplog.text
    assert await recorded(enabled="TRUE")
    assert await recorded()
    await ask(worker, "POST", "/cache/store", tokens_mock="0,300")
    await ask(worker, "POST", "/cache/retrieve", tokens_mock="0,300")
    assert "[KVCache Check] lmcache_worker0: Store, tokens=300, slot_mapping: [[0, 299]]" in caplog.text
    assert "[KVCache Check] lmcache_worker0: Retrieve, tokens=256, slot_mapping: [[0, 255]]" in caplog.text
    for word in ("", "maybe", "1", "true "):
        assert await ask(worker, "POST", path, enabled=word) == (
            400,
            {"error": "Invalid parameter", "message": "enabled must be 'true' or 'false'"},
        )
    assert await recorded()
    assert not await recorded(enabled="False")
