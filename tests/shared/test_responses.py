import enum
import json
import math
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_shared.responses import MAX_DEPTH, json_response, json_text, plain, text_response

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(st.characters(codec=None)) | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=20,
)


class Colour(enum.Enum):
    RED = 1


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@settings(deadline=None)
@given(JSON)
def test_json_comes_back_as_it_was(value: Any) -> None:
    assert json.loads(json_text(value)) == value
    assert json.loads(json_text(value, indent=2)) == value
    assert plain(value) == value


@settings(deadline=None)
@given(ANYTHING)
def test_anything_has_a_plain_form_that_is_json(value: Any) -> None:
    text = json_text(plain(value))
    text.encode()
    json.loads(text, parse_constant=pytest.fail)


@settings(deadline=None)
@given(st.lists(st.floats() | st.text(st.characters(codec=None))))
def test_floats_and_texts_of_any_kind_are_answered(value: list[float | str]) -> None:
    body = json_response(value).body
    assert isinstance(body, bytes)
    told = json.loads(body, parse_constant=pytest.fail)
    for before, after in zip(value, told, strict=True):
        finite = isinstance(before, str) or math.isfinite(before)
        assert after == (before if finite else str(before))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, None, True, "ä"]}, '{"a":[1,null,true,"ä"]}'),
        ({"a": math.inf, "b": [-math.inf, math.nan, 0.5]}, '{"a":"inf","b":["-inf","nan",0.5]}'),
        ("\ud800ä", '"\\ud800ä"'),
        ("\u2028", '"\u2028"'),
        ((1, 2), "[1,2]"),
    ],
)
def test_as_text(value: object, text: str) -> None:
    assert json_text(value) == text


def test_indented_as_lmcache_does() -> None:
    value = {"a": [1, {"b": "ä"}], "c": {}}
    assert json_text(value, indent=2) == json.dumps(value, indent=2, ensure_ascii=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Colour.RED, "Colour.RED"),
        (b"x", "b'x'"),
        ({1: {2}}, {"1": [2]}),
        (MappingProxyType({"a": (1, frozenset([3]))}), {"a": [1, [3]]}),
        (OrderedDict(a=math.nan), {"a": "nan"}),
        (1 + 2j, "(1+2j)"),
    ],
)
def test_what_json_does_not_know_is_told_as_text(value: object, expected: object) -> None:
    assert plain(value) == expected


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH, 500, 900, 980, 5000, 20_000])
def test_no_depth_is_an_error(depth: int) -> None:
    value = nested(depth)
    assert json.loads(json_text(plain(value)))
    told = json_text(value)
    assert json.loads(told)
    if depth == MAX_DEPTH - 1:
        assert told == "[" * MAX_DEPTH + "]" * MAX_DEPTH


def test_what_holds_itself_is_told_as_well() -> None:
    value: list[object] = [1]
    value.append(value)
    assert json.loads(json_text(value))[0] == 1


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with pytest.raises(TypeError):
        json_text({"a": Colour.RED})


def test_media_types() -> None:
    answer = json_response({"a": 1}, status=418, headers={"X": "y"})
    assert (answer.status, answer.headers["Content-Type"], answer.headers["X"]) == (418, "application/json", "y")
    text = text_response("ä\ud800", status=202)
    assert (text.status, text.headers["Content-Type"]) == (202, "text/plain; charset=utf-8")
    assert text.body == "ä\\ud800".encode()
