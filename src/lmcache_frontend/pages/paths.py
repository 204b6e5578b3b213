"""Where a node's pages lie: `/nodes/{proxy}/{name}/{tab}`. A name may hold anything, also a slash or two dots."""

from __future__ import annotations

from urllib.parse import quote

_ESCAPE = "~"
"""Stands before a name that a browser would take for a step in the path, and before one that begins with it."""


def segment(name: str) -> str:
    """A name as one segment of a path. `.` and `..` are steps to a browser, however they are quoted (WHATWG URL)."""
    escaped = _ESCAPE + name if name in (".", "..") or name.startswith(_ESCAPE) else name
    return quote(escaped, safe="")


def name_of(decoded: str) -> str:
    """The name that a segment stands for, as the router has decoded it."""
    return decoded.removeprefix(_ESCAPE)


def node_path(proxy: str, name: str, tab: str = "") -> str:
    """The page of a proxy's node."""
    return f"/nodes/{segment(proxy)}/{segment(name)}" + (f"/{tab}" if tab else "")
