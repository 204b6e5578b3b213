"""The tokens that a request names: a range for a test (`tokens_mock=0,512`), or real ones in a JSON body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from aiohttp import web

from lmcache_api.app import COMPONENT, call
from lmcache_shared.errors import Failure
from lmcache_shared.schema import read_body

BYTES_A_TOKEN = 22
"""Room for a token in a body: a sign, nineteen digits, a comma and a space."""

BYTES_AROUND = 1024
MAX_SHOWN = 80

_INT64 = 1 << 63


class _Body(msgspec.Struct):
    tokens: list[Annotated[int, msgspec.Meta(ge=-_INT64, le=_INT64 - 1)]]


async def read_tokens(request: web.Request) -> Sequence[int]:
    """The tokens of `tokens_mock=START,END` (without END), or those of a body `{"tokens": [1, 2, …]}`.

    Where both are given the parameter counts, as with LMCache, which knows no body here.

    Raises:
        Failure: 400, when there are none, too many, or something else.
        Refusal: 413, when the body is too large.
    """
    most = request.app[COMPONENT].settings.internal_api_server_max_tokens
    mock = request.query.getall("tokens_mock", [""])[-1]
    if mock:
        start, end = _mock_range(mock)
        _check_count(end - start, most)
        return range(start, end)
    body = await read_body(request, BYTES_AROUND + BYTES_A_TOKEN * most)
    if not body.strip():
        raise Failure(400, "Missing parameters", "Must specify either tokens_input or tokens_mock")
    tokens = await call(request, lambda: _body_tokens(body), "reading the tokens")
    _check_count(len(tokens), most)
    return tokens


def _check_count(count: int, most: int) -> None:
    if count > most:
        message = f"{count} tokens, but internal_api_server_max_tokens allows {most} at once"
        raise Failure(400, "Too many tokens", message)


def _mock_range(text: str) -> tuple[int, int]:
    try:
        parts = text.split(",")
        if len(parts) != 2:
            raise ValueError("tokens_mock must contain exactly 2 numbers")
        start, end = (_number(part) for part in parts)
        if start >= end:
            raise ValueError("start must be less than end")
    except ValueError as error:
        raise Failure(400, "Invalid tokens_mock format", f"tokens_mock must be 'start,end': {error}") from None
    return start, end


def _number(text: str) -> int:
    number = int(text.strip()) if len(text) <= MAX_SHOWN else _INT64
    if not -_INT64 <= number < _INT64:
        raise ValueError(f"{text[:MAX_SHOWN]} is no number of 64 bits")
    return number


def _body_tokens(body: bytes) -> list[int]:
    try:
        tokens: list[int] = msgspec.json.decode(body, type=_Body).tokens
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Failure(400, "Invalid tokens", f'expected {{"tokens": [1, 2, …]}}: {error}') from None
    if not tokens:
        raise Failure(400, "Invalid tokens", "there are none")
    return tokens
