"""The media types and JSON forms that LMCache's tools expect."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping

from aiohttp import web

TEXT = "text/plain"

MAX_DEPTH = 32
"""Levels of an object that `plain` goes into; what is deeper is told as text."""


def plain(value: object, depth: int = 0) -> object:
    """`value` as JSON knows it: what JSON does not know (a torch dtype, an enum, infinity) as its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if depth >= MAX_DEPTH:
        return _text(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner, depth + 1) for inner in value]
    return str(value)


def _text(value: object) -> str:
    try:
        return str(value)
    except RecursionError:
        return "..."


def json_text(value: object, *, indent: int | None = None) -> str:
    """`value` as JSON, compact unless `indent` is given.

    A lone surrogate is escaped; infinity and what is nested too deep are told as text.
    """
    separators = (",", ":") if indent is None else None
    dumps = functools.partial(json.dumps, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)
    try:
        text = dumps(value)
    except (ValueError, RecursionError):  # infinity, or deeper than Python goes: both may come in by a request
        text = dumps(plain(value))
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def json_response(
    value: object, *, status: int = 200, indent: int | None = None, headers: Mapping[str, str] | None = None
) -> web.Response:
    """A JSON answer; `application/json` without a charset, as LMCache's servers send it."""
    body = json_text(value, indent=indent).encode()
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


def text_response(text: str, *, status: int = 200) -> web.Response:
    """A plain text answer in UTF-8; what cannot be encoded (a stray surrogate) becomes an escape."""
    body = text.encode("utf-8", "backslashreplace")
    return web.Response(body=body, status=status, content_type=TEXT, charset="utf-8")
