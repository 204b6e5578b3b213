import asyncio
import json
import math
from dataclasses import dataclass
from unittest import mock

import pytest
from aiohttp.streams import StreamReader
from aiohttp.test_utils import make_mocked_request

from lmcache_shared.errors import Refusal
from lmcache_shared.schema import body_of, parse_body, parse_query


@dataclass(frozen=True)
class Query:
    count: int
    name: str | None = None
    flag: bool = False


def read(query: str) -> Query:
    return parse_query(make_mocked_request("GET", f"/x?{query}"), Query)


def test_values_defaults_and_the_last_of_a_repeated_parameter() -> None:
    assert read("count=1") == Query(1)
    assert read("count=1&count=%202%20&name=&flag=Yes&other=x") == Query(2, "", True)
    assert read("count=7.0&flag=off") == Query(7)
    assert read("count=%2B7&flag=T") == Query(7, None, True)


@pytest.mark.parametrize("value", ["", "a", "1.5", "1e3", "٣", "9" * 41, "0x1", "--1", "1_", "."])
def test_what_is_no_integer(value: str) -> None:
    with pytest.raises(Refusal) as refused:
        read(f"count={value}")
    assert refused.value.status == 422
    assert refused.value.detail == [
        {
            "type": "int_parsing",
            "loc": ["query", "count"],
            "msg": "Input should be a valid integer, unable to parse string as an integer",
            "input": value,
        }
    ]


def test_every_problem_is_told() -> None:
    with pytest.raises(Refusal) as refused:
        read("flag=maybe")
    message = "Input should be a valid boolean, unable to interpret input"
    assert refused.value.detail == [
        {"type": "missing", "loc": ["query", "count"], "msg": "Field required", "input": None},
        {"type": "bool_parsing", "loc": ["query", "flag"], "msg": message, "input": "maybe"},
    ]


def test_a_field_of_another_type_is_a_mistake_of_ours() -> None:
    @dataclass(frozen=True)
    class Wrong:
        when: float = 0.0

    with pytest.raises(TypeError, match=r"Wrong\.when"):
        parse_query(make_mocked_request("GET", "/x"), Wrong)


@dataclass(frozen=True)
class Body:
    path: str
    count: int | None = None
    most: int = 10
    flag: bool = False


async def read_json(content: object, *, max_bytes: int = 1 << 20) -> Body:
    """`parse_body` of these bytes, or of the object as JSON."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    stream = StreamReader(mock.Mock(_reading_paused=False), limit=1 << 16, loop=asyncio.get_running_loop())
    for start in range(0, len(data), 1000):
        stream.feed_data(data[start : start + 1000])
    stream.feed_eof()
    return await parse_body(make_mocked_request("POST", "/x", payload=stream), Body, max_bytes=max_bytes)


async def problems(content: object) -> list[tuple[str, list[object]]]:
    with pytest.raises(Refusal) as refused:
        await read_json(content)
    assert refused.value.status == 422
    detail = refused.value.detail
    assert isinstance(detail, list)
    assert all({"type", "loc", "msg", "input"} <= problem.keys() for problem in detail)
    json.dumps(detail, allow_nan=False)
    return [(problem["type"], problem["loc"]) for problem in detail]


async def test_a_body_with_its_values_and_defaults() -> None:
    assert await read_json({"path": "x"}) == Body("x")
    assert await read_json({"path": "", "count": None, "most": "7", "flag": True, "other": [1]}) == Body(
        "", None, 7, True
    )
    assert await read_json({"path": "x", "count": 7.0}) == Body("x", 7)
    assert await read_json({"path": "x", "count": -(1 << 63)}) == Body("x", -(1 << 63))
    assert await read_json(b' {"path": "a", "path": "b"} ') == Body("b")
    assert type((await read_json({"path": "x", "count": 7.0})).count) is int


async def test_every_problem_of_a_body_is_told() -> None:
    assert await problems({"count": "x", "most": None, "flag": 1}) == [
        ("missing", ["body", "path"]),
        ("int_parsing", ["body", "count"]),
        ("int_type", ["body", "most"]),
        ("bool_type", ["body", "flag"]),
    ]
    for value in (None, 1, True, [], {}, math.nan):
        assert await problems({"path": value}) == [("string_type", ["body", "path"])]
    for value, kind in (
        (1.5, "int_from_float"),
        (math.nan, "int_from_float"),
        (math.inf, "int_from_float"),
        (1e30, "int_type"),
        (1 << 64, "int_type"),
        ([], "int_type"),
        ({}, "int_type"),
        ("1.5", "int_parsing"),
        ("", "int_parsing"),
    ):
        assert await problems({"path": "x", "count": value}) == [(kind, ["body", "count"])]


@pytest.mark.parametrize(
    ("content", "kind", "where"),
    [
        (b"", "missing", ["body"]),
        (b" ", "json_invalid", ["body", 1]),
        (b"nope", "json_invalid", ["body", 0]),
        (b'{"path": "x"', "json_invalid", ["body", 12]),
        (b"\xff", "json_invalid", ["body", 0]),
        (b"[" * 100_000, "json_invalid", ["body", 0]),
        (b'{"path": ' + b"9" * 5000 + b"}", "json_invalid", ["body", 0]),
        (b"[]", "model_attributes_type", ["body"]),
        (b"null", "model_attributes_type", ["body"]),
        (b"[1e999]", "model_attributes_type", ["body"]),
    ],
    ids=lambda value: ascii(value)[:24],
)
async def test_what_is_no_body(content: bytes, kind: str, where: list[object]) -> None:
    assert await problems(content) == [(kind, where)]


@dataclass(frozen=True)
class Lists:
    numbers: list[int]
    names: list[str] | None = None


def lists(content: object) -> Lists:
    return body_of(json.dumps(content).encode(), Lists)


def test_lists_with_their_items_as_pydantic_reads_them() -> None:
    assert lists({"numbers": []}) == Lists([])
    assert lists({"numbers": [1, "2", 3.0, " 4 "], "names": ["a", ""]}) == Lists([1, 2, 3, 4], ["a", ""])
    assert all(type(number) is int for number in lists({"numbers": [1.0, 2]}).numbers)
    assert lists({"numbers": [-(1 << 63), 1 << 63], "names": None}) == Lists([-(1 << 63), 1 << 63])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"numbers": None}, [("list_type", ["body", "numbers"])]),
        ({"numbers": {"0": 1}, "names": "ab"}, [("list_type", ["body", "numbers"]), ("list_type", ["body", "names"])]),
        ({"names": [None]}, [("missing", ["body", "numbers"]), ("string_type", ["body", "names", 0])]),
        ({"numbers": [1, "x", None, True, 1.5, [1]]}, [
            ("int_parsing", ["body", "numbers", 1]), ("int_type", ["body", "numbers", 2]),
            ("int_from_float", ["body", "numbers", 4]),
            ("int_type", ["body", "numbers", 5])]),
        ({"numbers": [1 << 64]}, [("int_type", ["body", "numbers", 0])]),
        ({"numbers": [0, -(1 << 64)]}, [("int_type", ["body", "numbers", 1])]),
        ({"numbers": ["x"] * 100}, [("int_parsing", ["body", "numbers", number]) for number in range(16)]),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_wrong_within_lists(content: object, found: list[tuple[str, list[object]]]) -> None:
    with pytest.raises(Refusal) as refused:
        lists(content)
    detail = refused.value.detail
    assert isinstance(detail, list)
    assert [(problem["type"], problem["loc"]) for problem in detail] == found


def test_of_a_large_body_nothing_is_sent_back() -> None:
    for numbers, sent in (([1] * 10 + ["x"], True), ([1] * 100_000 + ["x"], False)):
        with pytest.raises(Refusal) as refused:
            lists({"numbers": numbers})
        assert isinstance(refused.value.detail, list)
        assert ["input" in problem for problem in refused.value.detail] == [sent]


async def test_a_body_that_is_too_large() -> None:
    assert await read_json(b'{"path": "x"}', max_bytes=13) == Body("x")
    with pytest.raises(Refusal, match="413: the body is larger than 12 bytes"):
        await read_json(b'{"path": "x"}', max_bytes=12)


async def test_a_body_that_is_deep_is_told_cut_off() -> None:
    for depth in range(870, 1000):
        nested = b"[" * depth + b"]" * depth
        for content in (nested, b'{"path": %s}' % nested):
            assert await problems(content)
