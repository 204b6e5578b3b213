from dataclasses import dataclass

import pytest
from aiohttp.test_utils import make_mocked_request

from lmcache_shared.errors import Refusal
from lmcache_shared.schema import parse_query


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
