"""Parameters and bodies declared once, as a frozen dataclass, and checked before a handler sees them.

    @dataclass(frozen=True)
    class ThreadsQuery:
        name: str | None = None
        thread_id: int | None = None

    query = parse_query(request, ThreadsQuery)

A body, an object in JSON, is declared and parsed alike (`parse_body`). A value of the wrong type is a 422 with
`{"detail": [{"type", "loc", "msg", "input"}]}`: the body that LMCache's servers (FastAPI, pydantic) send, with their
words for the cases below.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import web

from lmcache_shared.errors import Refusal
from lmcache_shared.responses import plain

T = TypeVar("T")

MAX_BODY_BYTES = 1 << 20
"""Largest body that is read, unless an endpoint says otherwise."""

MAX_SHOWN_BODY = 1 << 16
"""The largest body of which a refusal sends something back."""

MAX_PROBLEMS = 16
BODY_SECONDS = 30.0
MAX_BODIES_BYTES = 64 << 20

MAX_INTEGER = 1 << 63
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


async def parse_body(request: web.Request, model: Callable[..., T], *, max_bytes: int = MAX_BODY_BYTES) -> T:
    """The request's JSON body as `model`, whatever media type it claims; unknown fields are ignored.

    Raises:
        Refusal: 422, when it is no JSON object, or a field is missing or of the wrong type; 413 when it is too large.
    """
    return body_of(await read_body(request, max_bytes), model)


def body_of(body: bytes, model: Callable[..., T]) -> T:
    """A body that has been read as `parse_body` has it; of a large one it takes a while, which is no thing for a loop.

    Raises:
        Refusal: 422, as `parse_body`.
    """
    if not body:
        raise Refusal(422, [{"type": "missing", "loc": ["body"], "msg": "Field required", "input": None}])
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        where, why = getattr(error, "pos", 0), getattr(error, "msg", str(error))
        problem = {"type": "json_invalid", "loc": ["body", where], "msg": "JSON decode error", "input": {}}
        raise Refusal(422, [{**problem, "ctx": {"error": why}}]) from None
    if not isinstance(content, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        refused = {"type": "model_attributes_type", "loc": ["body"], "msg": message, "input": plain(content)}
        raise Refusal(422, [refused])
    problems: list[dict[str, object]] = []
    values: dict[str, Any] = {}
    for name, kind, required in _fields(model):
        if name in content:
            is_optional = name in _optional(model)
            values[name] = _checked(kind, content[name], ["body", name], problems, optional=is_optional)
        elif required:
            problems.append(_problem("missing", name, "Field required", content, "body"))
    if problems:
        raise Refusal(422, problems if len(body) <= MAX_SHOWN_BODY else [_without_input(it) for it in problems])
    return model(**values)


def _checked(kind: Any, value: Any, where: list[Any], problems: list[dict[str, object]], *, optional: bool) -> Any:
    """`value` as the field takes it; what is wrong with it goes into `problems`, of a list's items the first few."""
    if typing.get_origin(kind) is list:
        if value is None and optional:
            return None
        if not isinstance(value, list):
            problems.append({"type": "list_type", "loc": where, "msg": "Input should be a valid list", "input": value})
            return None
        (item_kind,) = typing.get_args(kind)
        if _is_plain(item_kind, value):
            return value
        checked = []
        for number, item in enumerate(value):
            if len(problems) >= MAX_PROBLEMS:
                break
            checked.append(_checked(item_kind, item, [*where, number], problems, optional=False))
        return checked
    problem_type, message = _wrong_type(kind, value, optional=optional)
    if problem_type:
        problems.append({"type": problem_type, "loc": where, "msg": message, "input": plain(value)})
        return None
    return _as_integer(value) if kind is int else value


def _is_plain(kind: Any, values: list[Any]) -> bool:
    """Whether there is nothing to check one by one, as in a million tokens."""
    if not all(type(value) is kind for value in values):
        return False
    return kind is not int or not values or (min(values) >= -MAX_INTEGER and max(values) <= MAX_INTEGER)


def _without_input(problem: dict[str, object]) -> dict[str, object]:
    """Of a large body nothing is sent back."""
    return {key: value for key, value in problem.items() if key != "input"}


def _wrong_type(kind: type, value: object, *, optional: bool) -> tuple[str, str]:
    """pydantic's name and words for what is wrong with a field's value, or twice nothing."""
    if value is None and optional:
        return "", ""
    if kind is str:
        return ("", "") if isinstance(value, str) else ("string_type", "Input should be a valid string")
    if kind is bool:
        return ("", "") if isinstance(value, bool) else ("bool_type", "Input should be a valid boolean")
    if isinstance(value, str):
        message = "Input should be a valid integer, unable to parse string as an integer"
        return ("", "") if _integer(value) is not None else ("int_parsing", message)
    if isinstance(value, float) and not value.is_integer():
        return "int_from_float", "Input should be a valid integer, got a number with a fractional part"
    if not isinstance(value, int | float) or abs(value) > MAX_INTEGER:
        return "int_type", "Input should be a valid integer"
    return "", ""


def _as_integer(value: str | float | None) -> int | None:
    return _integer(value) if isinstance(value, str) else None if value is None else int(value)


async def read_body(request: web.Request, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The request's body.

    Raises:
        Refusal: 413, when it is larger than `max_bytes`.
    """
    too_large = Refusal(413, f"the body is larger than {max_bytes} bytes")
    if (request.content_length or 0) > max_bytes:
        raise too_large
    bodies = request.app.get(BODIES) or Bodies()
    body = bytearray()

    async def read() -> None:
        async for piece in request.content.iter_chunked(1 << 16):
            bodies.take(len(piece))
            body.extend(piece)
            if len(body) > max_bytes:
                raise too_large

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
        return bytes(body)
    except ConnectionError:
        raise Refusal(400, "the body breaks off") from None  # which nobody hears: the caller has left
    except asyncio.TimeoutError:
        raise Refusal(408, f"the body has not come within {BODY_SECONDS:g} seconds") from None
    finally:
        bodies.give_back(len(body))


class Bodies:
    """The bytes of all bodies that are being read: callers that send slowly hold no more than this together."""

    def __init__(self) -> None:
        self._held = 0

    def take(self, size: int) -> None:
        """Raises:
        Refusal: 503, when too much is held already.
        """
        if self._held + size > MAX_BODIES_BYTES:
            raise Refusal(503, "too many large bodies at once; try again later", {"Retry-After": "1"})
        self._held += size

    def give_back(self, size: int) -> None:
        self._held -= size


BODIES: web.AppKey[Bodies] = web.AppKey("bodies", Bodies)


def _problem(kind: str, name: str, message: str, value: object, where: str = "query") -> dict[str, object]:
    return {"type": kind, "loc": [where, name], "msg": message, "input": plain(value)}


def _integer(text: str) -> int | None:
    """pydantic reads `7`, ` 7 `, `+7` and `7.0` as 7; so do we."""
    digits = text.strip()
    if len(digits) > MAX_NUMBER_DIGITS or not digits.isascii():
        return None
    whole, point, fraction = digits.partition(".")
    if point and (not fraction or fraction.strip("0")):
        return None
    try:
        return int(whole)
    except ValueError:
        return None


def _boolean(text: str) -> bool | None:
    word = text.lower()
    return True if word in _TRUE else False if word in _FALSE else None


@functools.cache
def _optional(model: Any) -> frozenset[str]:
    """The fields that may be `None`."""
    hints = typing.get_type_hints(model)
    return frozenset(name for name, kind in hints.items() if type(None) in typing.get_args(kind))


@functools.cache
def _fields(model: Any) -> tuple[tuple[str, type, bool], ...]:
    """Each field's name, its type without `None`, and whether it must be given."""
    hints = typing.get_type_hints(model)
    found = []
    for field in dataclasses.fields(model):
        kind = hints[field.name]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
        if kind not in (str, int, bool) and kind not in (list[int], list[str]):
            raise TypeError(
                f"{model.__name__}.{field.name}: a field is a str, int, bool, or a list of them, not {kind}"
            )
        found.append((field.name, kind, field.default is dataclasses.MISSING))
    return tuple(found)
