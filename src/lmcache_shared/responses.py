"""The media types and JSON forms that LMCache's tools expect."""

from __future__ import annotations

import json
from collections.abc import Mapping

from aiohttp import web

TEXT = "text/plain"


def json_text(value: object, *, indent: int | None = None) -> str:
    """`value` as JSON, compact unless `indent` is given; a lone surrogate is escaped, never an error."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False)
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
