"""Operations: planned by reading what is now, carried out some nodes at a time, kept for whoever wants to see.

They run in the background of the frontend, whoever leaves the page; when it ends they end. Everything is bounded: nodes
of one operation, questions in flight, operations at once, and what is kept of former ones in number, rows and age.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

from lmcache_frontend.app import REGISTRY
from lmcache_frontend.pages.asking import Asked, Outcome
from lmcache_frontend.pages.operations.kinds import NOT_READ, Kind, Lacks, Values
from lmcache_frontend.pages.sweeping import Turns, sweep
from lmcache_frontend.telemetry.health.states import NodeHealth
from lmcache_frontend.telemetry.history.timeline import TIMELINE, Event, Timeline
from lmcache_shared.access.caller import Caller
from lmcache_shared.access.gate import caller_of
from lmcache_shared.access.roles import Role
from lmcache_shared.errors import Refusal
from lmcache_shared.secrets import MASK

logger = logging.getLogger(__name__)

MAX_NODES = 5000
"""Of one operation."""

AT_ONCE = 16
"""Nodes of one operation that are asked at the same time."""

MAX_RUNNING = 4
"""Operations that are planned or carried out at the same time."""

MAX_SECONDS = 3600.0
PLAN_SECONDS = 120.0
MAX_KEPT = 50
MAX_ROWS = 20_000
"""Nodes of all operations that are kept together."""

MAX_AGE = 24 * 3600.0
PLAN_AGE = 900.0
"""A plan that nobody has carried out is then too old: nodes may be in another state."""

MAX_TEXT = 500
"""Characters of a result."""

State = Literal["planning", "ready", "running", "done", "cancelled"]
Status = Literal["waiting", "changes", "same", "unable", "silent", "doing", "ok", "failed", "left", "cancelled"]
"""How far it is with a node.

waiting    it has not been read yet
changes    the operation would change it
same       it is already so
unable     it cannot do this: no engine, no such endpoint, no such backend
silent     it did not tell how it is now
doing      it is being asked
ok, failed what came of it
left       the plan left it out
cancelled  the operation was ended before its turn
"""

_UNABLE = frozenset({"missing", "unavailable"})
ORDER: tuple[Status, ...] = (
    "doing", "failed", "silent", "unable", "changes", "waiting", "cancelled", "ok", "same", "left",
)  # fmt: skip
"""In which order somebody wants to see them."""


@dataclass
class Row:
    """A node of an operation."""

    proxy: str
    name: str
    status: Status = "waiting"
    old: str = NOT_READ
    text: str = ""
    seconds: float | None = None


class Operation:
    """One operation, from its plan to its results.

    Args:
        kind, values: what is to be done.
        caller: whose it is.
        rows: where.
    """

    def __init__(self, kind: Kind, values: Values, caller: Caller, rows: Sequence[Row]) -> None:
        self.number = secrets.token_hex(6)
        self.kind = kind
        self.values = values
        self.caller = caller
        self.rows = list(rows)
        self.state: State = "planning"
        self.made = time.time()
        self.begun: float | None = None
        self.ended: float | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def title(self) -> str:
        return self.kind.title(self.values)

    @property
    def new(self) -> str:
        return self.kind.new(self.values)

    @property
    def counts(self) -> Counter[str]:
        return Counter(row.status for row in self.rows)

    @property
    def is_busy(self) -> bool:
        return self.state in ("planning", "running")

    @property
    def progress(self) -> tuple[int, int]:
        """How many nodes are done, of how many."""
        counts = self.counts
        if self.state == "planning":
            return len(self.rows) - counts["waiting"], len(self.rows)
        asked = len(self.rows) - counts["left"]
        return counts["ok"] + counts["failed"] + counts["cancelled"], asked

    def is_of(self, caller: Caller) -> bool:
        """Whether it is this caller's to carry out and to cancel."""
        return (self.caller.name, self.caller.role) == (caller.name, caller.role)

    def shows_to(self, caller: Caller) -> bool:
        return self.is_of(caller) or caller.role >= self.caller.role

    def as_json(self) -> dict[str, object]:
        return {
            "operation": self.number,
            "kind": self.kind.name,
            "title": self.title,
            "state": self.state,
            "by": self.caller.name,
            "role": self.caller.role.title,
            "made": self.made,
            "begun": self.begun,
            "ended": self.ended,
            "counts": dict(self.counts),
            "wanted": self.new,
            "nodes": [
                {
                    "proxy": row.proxy,
                    "node": row.name,
                    "status": row.status,
                    "old": row.old or None,
                    "result": row.text or None,
                    "seconds": None if row.seconds is None else round(row.seconds, 3),
                }
                for row in self.rows
            ],
        }


class Operations:
    """Owns the operations; ends those that run when the frontend ends.

    Args:
        timeline: is told when one begins and when it has ended.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._kept: dict[str, Operation] = {}

    def of(self, number: str, caller: Caller) -> Operation:
        """The operation of this number.

        Raises:
            Refusal: 404, or 403 for a caller whose role is lower than its owner's.
        """
        self._forget()
        found = self._kept.get(number)
        if found is None:
            raise Refusal(404, "there is no such operation; those that ended are kept for a day, plans for 15 minutes")
        if not found.shows_to(caller):
            raise Refusal(403, f"this operation is of somebody with the role {found.caller.role.title}")
        return found

    def newest(self, caller: Caller) -> Iterator[Operation]:
        """Those that the caller may see, the newest first."""
        self._forget()
        return (it for it in reversed(list(self._kept.values())) if it.shows_to(caller))

    async def plan(self, request: web.Request, kind: Kind, values: Values, nodes: Sequence[NodeHealth]) -> Operation:
        """A new operation, whose nodes are read in the background; nothing is changed.

        Raises:
            Refusal: 400 without nodes or with too many, 503 while too many others are under way.
        """
        if not nodes:
            raise Refusal(400, "no node is chosen")
        if len(nodes) > MAX_NODES:
            raise Refusal(400, f"{len(nodes)} nodes are chosen, one operation takes at most {MAX_NODES}")
        self._room()
        made = Operation(kind, values, caller_of(request), [Row(it.proxy, it.node.name) for it in nodes])
        self._kept[made.number] = made
        self._forget()
        asked, turns = [], Turns()
        try:
            for row, health in zip(made.rows, nodes, strict=True):  # while the caller is here
                asked.append((row, Asked(request, row.proxy, health.node, kind.read(values), is_event=False)))
                await turns.next()
        except BaseException:  # it would be under way for ever
            del self._kept[made.number]
            raise
        if made.is_busy:  # nobody has cancelled it meanwhile
            self._begin(made, self._read(made, asked))
        return made

    async def start(self, request: web.Request, operation: Operation, also: Sequence[Status]) -> None:
        """Carry it out on the nodes that it changes, and on those with a status of `also`.

        Raises:
            Refusal: 403 when it is not the caller's, 409 when it is not ready, 503 while too many others are under way.
        """
        self._refuse_others(request, operation)
        if operation.state != "ready":
            raise Refusal(409, f"this operation is {operation.state}; plan it anew")
        self._room()
        taken = {"changes", *also}
        if not any(row.status in taken for row in operation.rows):
            raise Refusal(409, "there is nothing to do: no node of this plan is chosen")
        operation.state, operation.begun = "running", time.time()
        for row in operation.rows:
            if row.status in taken:
                row.status, row.text = "waiting", ""
            else:
                row.text = row.text or {"same": "is so already"}.get(row.status, "")
                row.status = "left"
        try:
            asked = await self._asked(request, operation)
        except BaseException:  # it would be under way for ever
            for row in operation.rows:
                row.status = "cancelled" if row.status == "waiting" else row.status
            operation.state, operation.ended = "cancelled", time.time()
            raise
        self._tell(operation, f"{operation.title} on {len(asked)} nodes: begun")
        self._begin(operation, self._carry_out(operation, asked))

    def cancel(self, request: web.Request, operation: Operation) -> None:
        """Begin with no further node; those that are being asked are waited for.

        Raises:
            Refusal: 403 when it is not the caller's, who is no admin.
        """
        if caller_of(request).role < Role.ADMIN:
            self._refuse_others(request, operation)
        if operation.state in ("planning", "ready"):
            if operation.task is not None:
                operation.task.cancel()
            self._end(operation, "cancelled")
        elif operation.state == "running":
            for row in operation.rows:
                if row.status == "waiting":
                    row.status = "cancelled"

    async def close(self) -> None:
        tasks = [it.task for it in self._kept.values() if it.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _asked(self, request: web.Request, operation: Operation) -> list[tuple[Row, Asked | None]]:
        """What is to be sent to those that wait, made while the caller is here."""
        question, turns = operation.kind.ask(operation.values), Turns()
        asked: list[tuple[Row, Asked | None]] = []
        for row in operation.rows:
            if row.status == "waiting":
                node = request.app[REGISTRY].node(row.proxy, row.name)
                way = None if node is None else Asked(request, row.proxy, node, question, is_event=False)
                asked.append((row, way))
                await turns.next()
        return asked

    def _refuse_others(self, request: web.Request, operation: Operation) -> None:
        if not operation.is_of(caller_of(request)):
            raise Refusal(403, f"this operation is {operation.caller.name}'s; plan one of your own")

    def _room(self) -> None:
        running = sum(it.is_busy for it in self._kept.values())
        if running >= MAX_RUNNING:
            raise Refusal(503, f"{running} operations are under way; wait for one of them", {"Retry-After": "5"})

    def _begin(self, operation: Operation, work: Coroutine[None, None, None]) -> None:
        operation.task = asyncio.create_task(work, name=f"operation {operation.number}")

    async def _read(self, operation: Operation, asked: Sequence[tuple[Row, Asked]]) -> None:
        async def one(row: Row, question: Asked) -> None:
            try:
                _planned(operation, row, await question.outcome())
            except Exception as error:
                row.status, row.text = "silent", _unforeseen(error)

        await sweep([functools.partial(one, *it) for it in asked], at_once=AT_ONCE, seconds=PLAN_SECONDS)
        for row in operation.rows:
            if row.status == "waiting":
                row.status, row.text = "silent", f"was not read: the nodes before it took {PLAN_SECONDS:g} seconds"
        operation.state = "ready"

    async def _carry_out(self, operation: Operation, asked: Sequence[tuple[Row, Asked | None]]) -> None:
        async def one(row: Row, question: Asked | None) -> None:
            if row.status != "waiting":
                return
            try:
                await _done(operation, row, question)
            except Exception as error:
                row.status, row.text = "failed", _unforeseen(error)

        try:
            await sweep([functools.partial(one, *it) for it in asked], at_once=AT_ONCE, seconds=MAX_SECONDS)
        finally:
            for row in operation.rows:
                if row.status in ("doing", "waiting"):
                    unknown = "the frontend ended, or the operation took too long; it is not known what became of it"
                    row.text = unknown if row.status == "doing" else ""
                    row.status = "failed" if row.status == "doing" else "cancelled"
            self._end(operation, "cancelled" if operation.counts["cancelled"] else "done")

    def _end(self, operation: Operation, state: State) -> None:
        operation.state, operation.ended = state, time.time()
        if operation.begun is not None:
            counts = operation.counts
            told = f"{counts['ok']} done, {counts['failed']} failed, {counts['cancelled']} not begun"
            self._tell(operation, f"{operation.title}: {told}")

    def _tell(self, operation: Operation, text: str) -> None:
        kind: Literal["setting", "operation"] = (
            "setting" if operation.kind.name in ("settings", "log-level") else "operation"
        )
        self._timeline.record(Event(kind, text, who=operation.caller.name, detail=f"/operations/{operation.number}"))

    def _forget(self) -> None:
        """Of those that are not under way the oldest, until the others fit."""
        now = time.time()
        rows = sum(len(it.rows) for it in self._kept.values())
        for number, it in list(self._kept.items()):
            old = now - it.made > (PLAN_AGE if it.state == "ready" else MAX_AGE)
            too_many = len(self._kept) > MAX_KEPT or rows > MAX_ROWS
            if not it.is_busy and (old or (too_many and number != next(reversed(self._kept)))):
                rows -= len(it.rows)
                del self._kept[number]


def _planned(operation: Operation, row: Row, outcome: Outcome) -> None:
    """What the plan says of a node, by what it told."""
    kind, values = operation.kind, operation.values
    if kind.read(values).method == "OPTIONS":  # what is there answers 405 to it
        outcome = Outcome("ok", 200) if outcome.status == 405 and outcome.by_node else outcome
    if not outcome.ok:
        row.status = "unable" if outcome.kind in _UNABLE else "silent"
        row.text = outcome.problem[:MAX_TEXT]
        return
    row.old = kind.old(outcome, values)
    if isinstance(row.old, Lacks):
        row.status, row.text = "unable", str(row.old)
    else:  # of two secrets nobody sees whether they are the same
        row.status = "same" if row.old == operation.new and MASK not in row.old else "changes"


async def _done(operation: Operation, row: Row, question: Asked | None) -> None:
    row.status = "doing"
    if question is None:
        row.status, row.text = "failed", "the node is no longer there"
        return
    began = time.monotonic()
    outcome = await question.outcome()
    row.seconds = time.monotonic() - began
    problem = operation.kind.problem(outcome) if outcome.ok else outcome.problem
    row.status = "failed" if problem or not outcome.ok else "ok"
    row.text = (problem or _said(outcome))[:MAX_TEXT]


def _unforeseen(error: Exception) -> str:
    """Of one node; the others go on."""
    logger.error("an operation failed at a node", exc_info=error)
    return f"the frontend failed: {type(error).__name__}; its log says more"


def _said(outcome: Outcome) -> str:
    """What a node says of a success, in short."""
    told = outcome.object()
    if not told:
        return " ".join(outcome.text[:MAX_TEXT].split())
    parts = (f"{name}: {value}" for name, value in told.items() if name != "status" and not isinstance(value, dict))
    return str(told.get("message") or ", ".join(parts))


OPERATIONS: web.AppKey[Operations] = web.AppKey("operations", Operations)


async def operations(app: web.Application) -> AsyncIterator[None]:
    """Ends with the application what runs."""
    app[OPERATIONS] = Operations(app[TIMELINE])
    yield
    await app[OPERATIONS].close()
