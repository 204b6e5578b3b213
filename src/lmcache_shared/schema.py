"""Query parameters declared once, as a frozen dataclass, and checked before a handler sees them.

    @dataclass(frozen=True)
    class ThreadsQuery:
        name: str | None = None
        thread_id: int | None = None

    query = parse_query(request, ThreadsQuery)

A value of the wrong type is a 422 with `{"detail": [{"type", "loc", "msg", "input"}]}`: the body that
LMCache's servers (FastAPI, pydantic) send, with their words for the cases below.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import web

from lmcache_shared.errors import Refusal

T = TypeVar("T")

MAX_NUMBER_DIGITS = 40
"""Longest text that is tried as a number; a longer one is refused as no number."""

_TRUE = frozenset({"true", "t", "1", "on", "yes", "y"})
_FALSE = frozenset({"false", "f", "0", "off", "no", "n"})


def parse_query(request: web.Request, model: Callable[..., T]) -> T:
    """The request's query as `model`; of a repeated parameter the last one counts, unknown ones are ignored.

    Raises:
        Refusal: 422, when a parameter is missing or of the wrong type.
    """
    values: dict[str, Any] = {}
    problems: list[dict[str, object]] = []
    for name, kind, required in _fields(model):
        given = request.query.getall(name, [])
        if not given:
            if required:
                problems.append(_problem("missing", name, "Field required", None))
            continue
        text = given[-1]
        if kind is int:
            number = _integer(text)
            if number is None:
                message = "Input should be a valid integer, unable to parse string as an integer"
                problems.append(_problem("int_parsing", name, message, text))
            values[name] = number
        elif kind is bool:
            truth = _boolean(text)
            if truth is None:
                message = "Input should be a valid boolean, unable to interpret input"
                problems.append(_problem("bool_parsing", name, message, text))
            values[name] = truth
        else:
            values[name] = text
    if problems:
        raise Refusal(422, problems)
    return model(**values)


def _problem(kind: str, name: str, message: str, value: str | None) -> dict[str, object]:
    return {"type": kind, "loc": ["query", name], "msg": message, "input": value}


def _integer(text: str) -> int | None:
    """pydantic reads `7`, ` 7 `, `+7` and `7.0` as 7; so do we."""
    digits = text.strip()
    if len(digits) > MAX_NUMBER_DIGITS or not digits.isascii():
        return None
    whole, point, fraction = digits.partition(".")
    if point and fraction.strip("0"):
        return None
    try:
        return int(whole)
    except ValueError:
        return None


def _boolean(text: str) -> bool | None:
    word = text.lower()
    return True if word in _TRUE else False if word in _FALSE else None


@functools.cache
def _fields(model: Any) -> tuple[tuple[str, type, bool], ...]:
    """Each field's name, its type without `None`, and whether it must be given."""
    hints = typing.get_type_hints(model)
    found = []
    for field in dataclasses.fields(model):
        kind = hints[field.name]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
        if kind not in (str, int, bool):
            raise TypeError(f"{model.__name__}.{field.name}: a query parameter is a str, int or bool, not {kind}")
        found.append((field.name, kind, field.default is dataclasses.MISSING))
    return tuple(found)
