"""A node behind another frontend: which answers are that frontend's own, because the node was not reached.

A frontend that no longer has a node answers 404, and so does a node that has no `/version`. Two things tell them apart:
the words of a frontend's refusals, LMCache's and ours alike, which also come through further frontends unchanged; and
that ours puts `Content-Security-Policy: sandbox` on whatever a target said, and on nothing that it says itself.
"""

from __future__ import annotations

import json
import re

from lmcache_frontend.nodes.node import Node
from lmcache_frontend.telemetry.client import Answer

MAX_DETAIL_LENGTH = 150

_NOT_THERE = re.compile(r"Node with name '.*' not found", re.DOTALL)
_NOT_CLEAR = re.compile(r"\d+ nodes are named '.*'; ask for ", re.DOTALL)


def from_the_way(problem: str, node: Node, proxy: str) -> str:
    """Why a node was not asked, with the proxy that it lies behind: to its address the connection goes."""
    return problem if not node.reach.prefix else f"{proxy} ({node.reach.address}): {problem}"


def not_reached(answer: Answer, node: Node, proxy: str) -> str | None:
    """Why the answer is no answer of the node but of a frontend on the way; None when it is the node's.

    Args:
        proxy: the name of the one that the node lies behind.
    """
    if not node.reach.prefix or (answer.sandboxed and len(node.through) == 1):
        return None  # its own, or what the one frontend between, one of ours, has from it
    detail = _said(answer, "detail")
    who = f"a frontend behind {proxy}" if answer.sandboxed else proxy
    if answer.status == 404 and _NOT_THERE.fullmatch(detail):
        return f"{who} no longer has it"
    if answer.status == 409 and _NOT_CLEAR.match(detail):
        return f"{who} has several nodes of its name"
    if answer.status == 401 and not answer.sandboxed:
        return f"{who} answers 401: it asks for a token, or for another one, as token in its entry"
    if answer.status == 403:
        return f"{who} answers 403: it does not let the node be reached"
    # LMCache's frontend marks nothing: of its answers those with an error of a server are failures, whoever made them
    if not answer.sandboxed and (answer.status >= 500 or (answer.status >= 400 and node.through)):
        told = ": ".join(text for text in (detail, _said(answer, "reason")) if text)
        return f"{proxy} answers {answer.status}" + (f": {_shown(told)}" if told else "")
    return None


def _said(answer: Answer, key: str) -> str:
    """What a refusal says: `detail` in the one shape that both have, `reason` in ours."""
    if answer.status < 400 or answer.body is None:
        return ""
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        return ""
    said = body.get(key) if isinstance(body, dict) else None
    return said if isinstance(said, str) else ""


def _shown(detail: str) -> str:
    """One line that can be shown and written: half a character fits into no answer."""
    shown = "".join(c if c.isprintable() else "?" for c in detail[: MAX_DETAIL_LENGTH + 1])
    return shown if len(shown) <= MAX_DETAIL_LENGTH else f"{shown[:MAX_DETAIL_LENGTH]}…"
