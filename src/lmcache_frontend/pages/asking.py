"""A page asks a node, for the caller who looks at it: what the proxy would let pass, bounded in bytes and in time.

Nothing is raised for what a node, the way to it or the caller's role makes impossible: the outcome says it, and the
page shows it in the form that each kind has (`macros.html`, `outcome`).
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

from lmcache_frontend.app import POLICY, REGISTRY, TARGETS
from lmcache_frontend.audit import Note
from lmcache_frontend.nodes.node import Node
from lmcache_frontend.pages.reading import is_deep
from lmcache_frontend.pages.wording import size
from lmcache_frontend.proxy.exchange import Answer, Outgoing
from lmcache_frontend.proxy.headers import refuse_loops, request_fields
from lmcache_frontend.proxy.vouching import admitted, introduction
from lmcache_frontend.telemetry import client
from lmcache_frontend.telemetry.health.behind import from_the_way, not_reached
from lmcache_shared.access.caller import SPEAKING_FOR_OTHERS
from lmcache_shared.access.roles import Role
from lmcache_shared.access.table import of_proxied
from lmcache_shared.errors import Refusal
from lmcache_shared.responses import json_text

MOST_BYTES = 4 << 20
"""Of an answer, unless a page says otherwise."""

SECONDS = 10.0
"""For a question and its whole answer, unless a page says otherwise."""

MAX_DETAIL = 2000
"""Characters of what a node says of a failure."""

MAX_WRONG = 50
"""Parameters that it says something of."""

Kind = Literal["ok", "refused", "offline", "late", "missing", "unavailable", "failed", "too large"]
"""How a question ended.

ok          the node did what it was asked
refused     the caller's role is not enough, or the node wants a token that nobody has
offline     the node cannot be reached
late        the node has not answered in time; it may still do what it was asked
missing     the node does not know the endpoint
unavailable the node has no part that could do it (a scheduler has no engine)
failed      the node says that it went wrong
too large   the answer is larger than what a page holds
"""

MAX_DIGITS = 300
"""Of a whole number: one with more is none that can be divided."""

_ANY_DIGIT = bytes.maketrans(b"123456789", b"000000000")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_KEPT = frozenset(name.lower().encode() for name in SPEAKING_FOR_OTHERS) | {
    b"via",
    b"authorization",
    b"x-forwarded-host",
    b"x-forwarded-proto",
}
"""Of the caller's fields: who asks. What the answer is to look like is the page's business."""

_KINDS: Mapping[int, Kind] = {
    401: "refused",
    403: "refused",
    404: "missing",
    405: "missing",
    501: "missing",
    503: "unavailable",
    504: "late",
}


@dataclass(frozen=True)
class Outcome:
    """What came of a question.

    Attributes:
        kind: how it ended.
        status: the node's, or that which the proxy would have given.
        body: the node's answer; cut off where it was too large.
        problem: why it is not `ok`, in a sentence or in the node's words.
        needs: the role that the caller lacks.
        by_node: it was the node that refused, not this frontend.
    """

    kind: Kind
    status: int
    body: bytes = b""
    problem: str = ""
    needs: Role | None = None
    by_node: bool = False

    @property
    def ok(self) -> bool:
        return self.kind == "ok"

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> object:
        """The answer as JSON; None when it is none, or one that no page can show (`_read_json`)."""
        return _read_json(self.body)

    def object(self) -> dict[str, object]:
        """The answer as a JSON object; an empty one when it is none."""
        found = self.json()
        return found if isinstance(found, dict) else {}


def _read_json(body: bytes) -> object:
    """JSON with which any page can compute: no number beyond a float's, no half of a character, and not too deep."""
    has_long = b"0" * MAX_DIGITS in body.translate(_ANY_DIGIT)
    try:
        found: object = json.loads(body, parse_int=_whole if has_long else None)
        if _SURROGATE.search(body):
            found = json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return None if is_deep(found) else found


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) < MAX_DIGITS else float(digits)


@dataclass(frozen=True)
class Question:
    """What a node is asked: `path` with its query, quoted as it is to be sent."""

    method: str
    path: str
    body: bytes | None = None
    content_type: str = "application/json"
    seconds: float = SECONDS
    most: int = MOST_BYTES

    @classmethod
    def of_json(cls, method: str, path: str, value: object, *, seconds: float = SECONDS) -> Question:
        """With a body in JSON."""
        return cls(method, path, json_text(value).encode(), seconds=seconds)


async def ask(request: web.Request, proxy: str, node: Node, question: Question) -> Outcome:
    """Ask a proxy's node for the caller of `request`; what needs an operator or an admin goes into the audit log.

    Raises:
        Refusal: 508, the request goes in a circle.
    """
    return await Asked(request, proxy, node, question).outcome()


class Asked:
    """A question to a proxy's node in the name of the caller of `request`, who needs not be there when it is sent.

    Whether the caller may ask is found out at once, and so is what the node is told of the caller.

    Args:
        is_event: a change by it is an event of the timeline, and not one of many that have one together.

    Raises:
        Refusal: 508, the request goes in a circle.
    """

    def __init__(
        self, request: web.Request, proxy: str, node: Node, question: Question, *, is_event: bool = True
    ) -> None:
        refuse_loops(request)
        self._app = request.app
        self._proxy, self._node, self._question = proxy, node, question
        path = node.reach.prefix + question.path
        self._refused: Outcome | None = None
        self._outgoing: Outgoing | None = None
        try:
            asked = admitted(request, path, question.method)
        except Refusal as refusal:
            role = max(of_proxied(question.method, path).role, Role.VIEWER)
            self._refused = Outcome("refused", refusal.status, problem=str(refusal.detail), needs=role)
        else:
            role = asked.role
            token = request.app[REGISTRY].token_of(node.reach.address)
            shown = request_fields(request, "", introduction(request, asked, token))
            self._outgoing = _outgoing(question, path, [field for field in shown if field[0].lower() in _KEPT])
        try:
            self._address = request.app[POLICY].allowed(request, node.reach.address)
        except Refusal as refusal:
            self._refused = self._refused or Outcome("failed", refusal.status, problem=str(refusal.detail))
        known = (proxy, node)
        is_change = role >= Role.OPERATOR
        self._note = Note(request, known, question.method, question.path, is_event=is_event) if is_change else None

    async def outcome(self) -> Outcome:
        """Send it. Nothing is raised for what a node does; a lost answer is an outcome as well."""
        began = time.monotonic()
        outcome = self._refused or await self._send()
        if self._note is not None:
            await self._note.tell(outcome.status, time.monotonic() - began)
        return outcome

    async def _send(self) -> Outcome:
        assert self._outgoing is not None
        seconds = self._question.seconds
        try:
            return await asyncio.wait_for(self._exchange(self._outgoing), seconds)
        except asyncio.TimeoutError:
            return Outcome("late", 504, problem=f"no whole answer within {seconds:g} seconds")
        except Refusal as refusal:
            kind: Kind = {503: "offline", 502: "offline", 504: "late"}.get(refusal.status, "failed")  # type: ignore[assignment]
            return Outcome(kind, refusal.status, problem=from_the_way(str(refusal.detail), self._node, self._proxy))

    async def _exchange(self, outgoing: Outgoing) -> Outcome:
        most = self._question.most
        target = await self._app[TARGETS].get(self._address)
        answer = await target.request(outgoing)
        try:
            body = await _read(answer, most)
            if len(body) > most:
                problem = f"the answer is larger than the {size(most)} that a page holds"
                return Outcome("too large", answer.status, body[:most], problem)
            return _judged(answer, body, self._proxy, self._node)
        except ConnectionError as error:
            return Outcome("failed", 502, problem=f"the answer broke off: {error or type(error).__name__}")
        finally:
            answer.release()


def _outgoing(question: Question, path: str, shown: list[tuple[bytes, bytes]]) -> Outgoing:
    fields = [*shown, (b"Accept", b"application/json, text/plain;q=0.9, */*;q=0.1"), (b"Accept-Encoding", b"identity")]
    if question.body is None:
        return Outgoing(question.method, path, fields)
    fields.append((b"Content-Type", question.content_type.encode("ascii", "replace")))
    fields.append((b"Content-Length", b"%d" % len(question.body)))
    return Outgoing(question.method, path, fields, _Whole(question.body))


class _Whole:
    """A body that is here already."""

    is_chunked = False

    def __init__(self, data: bytes) -> None:
        self._data = data

    def whole(self) -> bytes:
        return self._data

    async def read(self) -> bytes:
        return b""


async def _read(answer: Answer, most: int) -> bytes:
    """The body, or a little more than `most` bytes of it."""
    body = bytearray()
    while len(body) <= most:
        piece, ended = answer.take()
        body += piece
        if ended:
            break
        if not piece:
            await answer.wait()
    return bytes(body[: most + 1])


def _judged(answer: Answer, body: bytes, proxy: str, node: Node) -> Outcome:
    sandboxed = any(name.lower() == b"content-security-policy" and b"sandbox" in value for name, value in answer.fields)
    way = not_reached(client.Answer(answer.status, body, 0.0, sandboxed=sandboxed), node, proxy)
    if way is not None:
        return Outcome("refused" if answer.status in (401, 403) else "offline", answer.status, problem=way)
    if answer.status < 400:
        return Outcome("ok", answer.status, body)
    kind = _KINDS.get(answer.status, "failed")
    return Outcome(kind, answer.status, body, _detail(body) or f"answers {answer.status}", by_node=True)


def _detail(body: bytes) -> str:
    """What a node says of a failure, in any of its shapes."""
    outcome = Outcome("failed", 0, body)
    found = outcome.object()
    said = found.get("message") or found.get("detail") or found.get("error")
    if isinstance(said, list):  # what is wrong with parameters
        said = "; ".join(f"{_place(it.get('loc'))}: {it.get('msg')}" for it in said[:MAX_WRONG] if isinstance(it, dict))
    text = str(said) if said else outcome.text
    return " ".join(text[:MAX_DETAIL].split())


def _place(found: object) -> str:
    return ".".join(map(str, found)) if isinstance(found, list) else str(found or "")
