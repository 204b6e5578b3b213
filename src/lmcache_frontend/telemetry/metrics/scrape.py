"""Every node's metrics, asked for at once: each within its bounds, all within one deadline, merged as they come.

Whatever a node does, it costs its own samples alone: one that hangs gives its turn to the next, one that sends too much
is cut off, one that sends no Prometheus text is left out of the merge.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from lmcache_frontend.nodes.node import Node, Proxy
from lmcache_frontend.telemetry.client import Answer, NoAnswer, ask, request_bytes
from lmcache_frontend.telemetry.metrics.exposition import ExpositionError, Merge, parse_match
from lmcache_frontend.telemetry.names import Names, NotAsked
from lmcache_shared.blocking import BlockingPool
from lmcache_shared.errors import Refusal

T = TypeVar("T")

logger = logging.getLogger(__name__)

SCRAPES_AT_ONCE = 64

TURNS = 8
"""A node that has not answered within this part of a round's time gives its turn to the next, and is still waited for:
nodes that hang take no time from those behind them, and at most `SCRAPES_AT_ONCE * TURNS` connections are open.
"""

MAX_NODE_BYTES = 8 << 20
"""Of one node's exposition, uncompressed: a hundred times that of a worker."""

MAX_BYTES = 512 << 20
"""Of all expositions that are held at once, those of other rounds among them: 9,000 nodes of 57 KB, with up to 750
samples each (`exposition.MAX_SAMPLES`), and a machine that serves a dashboard for so many has it.
"""

MAX_ROUNDS = 8
"""Rounds that run at once; those with the same parameters at the same moment are one.

Those that are over and still read are bounded by the bytes that they hold: a few slow readers keep nobody else waiting.
"""

MAX_OWN_BYTES = 64 << 20
"""Of the frontend's own expositions that are held at once: they have room when the nodes' is full. One before 10,000
nodes has 5 MiB.
"""

INLINE_BYTES = 128 << 10
"""An exposition of up to this size is merged between two turns of the event loop, which takes a few milliseconds. A
thread would be slower: it and the loop would wait for each other's hold of the interpreter (5 ms a time).
"""

MERGE_SECONDS = 30.0
"""For a large exposition in its thread."""

PIECE_BYTES = 256 << 10
"""What is inflated before the event loop has its turn."""

OURS = b"lmcache_frontend_"
"""What the names of the frontend's own families begin with. No node has such: it could tell of others in our name."""

_SENDS_OURS = re.compile(rb"^[ \t]*(?:#[ \t]*[A-Z]+[ \t]+)?" + OURS, re.MULTILINE)

_END = b"# EOF\n"

MAX_LINES = 20
"""What the log gets of one round."""

_ACCEPT = "text/plain;version=0.0.4;q=1,*/*;q=0.1"
_TOO_LARGE = f"/metrics is larger than {MAX_NODE_BYTES} bytes"


@dataclass(frozen=True)
class Leaf:
    """A node, and the name of its proxy: together they are unique."""

    node: Node
    proxy: str

    @property
    def labels(self) -> dict[str, str]:
        """What each of its samples is labelled with."""
        return {"node": self.node.name, "proxy": self.proxy, "instance": str(self.node.address)}


@dataclass(frozen=True)
class Outcome:
    """How a node's scrape went; without a `problem` its samples are in the merge."""

    leaf: Leaf
    seconds: float = 0.0
    bytes: int = 0
    samples: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What a round is for; two of the same are one round.

    `matches` are series selectors, of which a sample must match one, when there are any. `tells_own` says whether the
    frontend's own metrics are told, beside those of the scrapes.
    """

    leaves: tuple[Leaf, ...]
    matches: tuple[str, ...]
    seconds: float
    tells_own: bool


@dataclass(frozen=True)
class Result:
    """What came of a round: the nodes' metrics, and the frontend's own, which have a place when the nodes' are full."""

    nodes: Merge
    own: Merge

    def write(self, *, openmetrics: bool) -> Iterator[bytes]:
        """Both as one exposition, in pieces. No name is in both (`OURS`)."""
        if openmetrics:
            yield from _without_end(self.nodes.write(openmetrics=True))
        else:
            yield from self.nodes.write(openmetrics=False)
        yield from self.own.write(openmetrics=openmetrics)


def _without_end(pieces: Iterator[bytes]) -> Iterator[bytes]:
    tail = b""
    for piece in pieces:
        whole = tail + piece
        yield whole[: -len(_END)]
        tail = whole[-len(_END) :]
    assert tail == _END, "so ends OpenMetrics"


Describe = Callable[[Wanted, Sequence[Outcome], int], Callable[[], bytes]]
"""The frontend's own exposition after a round, with its outcomes and how many types conflict: what it is made of is
looked at in the event loop, and written in a thread.
"""


class ScrapeError(NoAnswer):
    """A node's metrics cannot be had; the text says why."""


def leaves_of(proxies: Sequence[Proxy]) -> tuple[Leaf, ...]:
    return tuple(Leaf(node, proxy.name) for proxy in proxies for node in proxy.nodes)


class Scraper:
    """Scrapes nodes for everybody who asks; callers that want the same at the same time share one round.

    Args:
        describe: what is added to a round's merge, as the frontend's own.
        is_registered: whether there is a node, by its proxy and its name; of others no problem is remembered.
        max_bytes, max_own_bytes: of all expositions that are held at once, the nodes' and the frontend's own.
    """

    def __init__(
        self,
        describe: Describe,
        is_registered: Callable[[str, str], bool],
        *,
        max_bytes: int = MAX_BYTES,
        max_own_bytes: int = MAX_OWN_BYTES,
    ) -> None:
        self._describe = describe
        self._is_registered = is_registered
        self._room = Room(max_bytes)
        self._own_room = Room(max_own_bytes)
        self._rounds: dict[Wanted, _Round] = {}
        """Those that run, which others may share."""
        self._held: set[_Round] = set()
        """Those that are in memory, be it for a reader that is slow."""
        self._pool = BlockingPool("metrics", threads=2, waiting=64)
        self._names = Names()
        self._problems: dict[tuple[str, str], str] = {}
        """Why a node's last scrape failed, by proxy and name."""

    @contextlib.asynccontextmanager
    async def round(self, wanted: Wanted) -> AsyncIterator[Result]:
        """A round of scrapes; its result is kept in memory until the last one who shares it is done.

        Raises:
            Refusal: 503 when too many different rounds are under way, or too much is held for others.
        """
        shared = self._rounds.get(wanted)
        if shared is None:
            if len(self._rounds) >= MAX_ROUNDS:
                raise Refusal(503, "too many different scrapes at once; try again later", {"Retry-After": "1"})
            shared = self._rounds[wanted] = _Round(self._room, self._own_room)
            shared.task = asyncio.create_task(self._scrape(wanted, shared), name="scrape")
            # Who asks later asks anew: samples are of the moment in which they are asked for.
            shared.task.add_done_callback(functools.partial(self._ended, wanted))
            self._held.add(shared)
        shared.users += 1
        try:
            yield await asyncio.shield(shared.task)
        finally:
            shared.users -= 1
            if shared.users == 0:
                self._ended(wanted, shared.task)
                self._held.discard(shared)
                await shared.close()

    def _ended(self, wanted: Wanted, task: asyncio.Future[Result]) -> None:
        running = self._rounds.get(wanted)
        if running is not None and running.task is task:
            del self._rounds[wanted]

    async def in_thread(self, call: Callable[[], T]) -> T:
        """What `call()` gives, made off the event loop.

        Raises:
            Refusal: 503 or 504, when it cannot be made in time.
        """
        return await self._pool.run(call, seconds=MERGE_SECONDS, what="writing the metrics")

    async def close(self) -> None:
        for shared in list(self._held):
            await shared.close()
        await self._names.close()
        self._pool.close()

    async def _scrape(self, wanted: Wanted, shared: _Round) -> Result:
        matchers = [parse_match(match) for match in wanted.matches]
        merge = Merge(matchers=matchers or None)
        run = _Run(merge, self._pool, self._names, shared, wanted.seconds)
        # Those that failed last time come last: they wait for others, and others not for them.
        places = range(len(wanted.leaves))
        line = sorted(places, key=lambda i: (wanted.leaves[i].proxy, wanted.leaves[i].node.name) in self._problems)
        try:
            outcomes = await run.scrape_all([wanted.leaves[i] for i in line])
        finally:
            await run.close()
        in_order = [outcome for _, outcome in sorted(zip(line, outcomes, strict=True), key=lambda pair: pair[0])]
        self._note(in_order)
        own = Merge(matchers=matchers or None)
        describe = self._describe(wanted, in_order, merge.conflicts)

        def write() -> int:
            text = describe()
            own.add({}, text)
            return len(text)

        try:
            shared.take_own(await self.in_thread(write))
        except ScrapeError:
            raise Refusal(503, "too much is held for other scrapes; try again later", {"Retry-After": "1"}) from None
        return Result(merge, own)

    def _note(self, outcomes: Sequence[Outcome]) -> None:
        """Log each reason once, when it appears, changes or goes; of many at once the first few."""
        told: list[str] = []
        for outcome in outcomes:
            key = (outcome.leaf.proxy, outcome.leaf.node.name)
            before = self._problems.pop(key, None)
            where = f"{key[1]} of {key[0]} ({outcome.leaf.node.address})"
            if outcome.problem is not None:
                self._problems[key] = outcome.problem
                if outcome.problem != before:
                    told.append(f"no metrics of {where}: {outcome.problem}")
            elif before is not None:
                told.append(f"{where} has metrics again")
        for line in told[:MAX_LINES]:
            logger.warning("%s", line)
        if len(told) > MAX_LINES:
            logger.warning("and %d more nodes whose metrics are missing or back", len(told) - MAX_LINES)
        for gone in [key for key in self._problems if not self._is_registered(*key)]:
            del self._problems[gone]


class Room:
    """The bytes that expositions may take in memory."""

    def __init__(self, size: int) -> None:
        self._free = size

    def take(self, size: int) -> None:
        """Raises:
        ScrapeError: there is no such room.
        """
        if size > self._free:
            raise ScrapeError("the metrics of all nodes together are too large")
        self._free -= size

    def give_back(self, size: int) -> None:
        self._free += size


class _Round:
    """A round that may be shared: who uses it, and the room that it has taken."""

    def __init__(self, room: Room, own_room: Room) -> None:
        self.task: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.users = 0
        self._room = room
        self._own_room = own_room
        self._taken = self._own_taken = 0

    def take_own(self, size: int) -> None:
        self._own_room.take(size)
        self._own_taken += size

    def take(self, size: int) -> None:
        self._room.take(size)
        self._taken += size

    def give_back(self, size: int) -> None:
        self._room.give_back(size)
        self._taken -= size

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.give_back(self._taken)
        self._own_room.give_back(self._own_taken)
        self._own_taken = 0


class _Run:
    """One round while it runs."""

    def __init__(self, merge: Merge, pool: BlockingPool, names: Names, shared: _Round, seconds: float) -> None:
        self._merge = merge
        self._pool = pool
        self._shared = shared
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._line: Iterator[tuple[int, Leaf]] = iter(())
        self._outcomes: dict[int, Outcome] = {}
        self._workers: set[asyncio.Task[None]] = set()
        self._merging = asyncio.Lock()
        self._names = names

    async def scrape_all(self, leaves: Sequence[Leaf]) -> list[Outcome]:
        """Their outcomes, in their order."""
        self._line = iter(enumerate(leaves))
        for _ in range(min(SCRAPES_AT_ONCE, len(leaves))):
            self._start_worker()
            await asyncio.sleep(0)  # connecting to all of them at once would hold the event loop
        while self._workers:
            done, _ = await asyncio.wait(self._workers)
            self._workers -= done
            for worker in done:
                worker.result()
        return [self._outcomes[number] for number in range(len(leaves))]

    def _start_worker(self) -> None:
        self._workers.add(asyncio.create_task(self._work(), name="scrape nodes"))

    async def _work(self) -> None:
        """Node after node, until there are no more or one takes so long that another worker has been started."""
        for number, leaf in self._line:
            turn = _Turn(self._seconds / TURNS, self._start_worker)
            self._outcomes[number] = await self._scrape(leaf, turn)
            if turn.is_given_up:
                return

    async def _scrape(self, leaf: Leaf, turn: _Turn) -> Outcome:
        """A node's outcome; nothing that the node does is raised."""
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            return Outcome(leaf, problem="not asked within the time for all nodes")
        body = b""
        try:
            with turn:
                body = await asyncio.wait_for(self._fetch(leaf.node, seconds + 1), seconds)
            return Outcome(leaf, turn.seconds, len(body), await self.merge_in(leaf.labels, body))
        except asyncio.TimeoutError:
            return Outcome(leaf, turn.seconds, problem=f"no answer within {self._seconds:g} seconds")
        except (NoAnswer, NotAsked, ExpositionError, Refusal) as error:
            self._shared.give_back(len(body))
            return Outcome(leaf, turn.seconds, len(body), problem=_problem(error))

    async def merge_in(self, labels: dict[str, str], body: bytes) -> int:
        """Into the merge, one at a time, with a turn of the event loop between two; the number of its samples."""
        async with self._merging:
            if len(body) > INLINE_BYTES:
                add = lambda: self._merge.add(labels, body)  # noqa: E731 - a name for it says no more
                return await self._pool.run(add, seconds=MERGE_SECONDS, what="merging the metrics")
            samples = self._merge.add(labels, body)
            await asyncio.sleep(0)
            return samples

    async def _fetch(self, node: Node, seconds: float) -> bytes:
        """Raises:
        ScrapeError, NoAnswer, NotAsked: there is nothing to be had.
        """
        reach = node.reach
        request = request_bytes(reach.address, f"{reach.prefix}/metrics", accept=_ACCEPT, token=reach.token)
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            self._shared.take(size)
            taken += size

        try:
            answer = await ask(reach.address, request, self._names, seconds=seconds, most=MAX_NODE_BYTES, take=take)
            if answer.status != 200:
                raise ScrapeError(f"/metrics answers {answer.status}")
            if answer.body is None:
                raise ScrapeError(_TOO_LARGE)
            body = answer.body if answer.encoding in ("", "identity") else await _inflated(answer, take)
            if OURS in body and _SENDS_OURS.search(body):
                raise ScrapeError(f"has {OURS.decode()}* metrics, so it is a frontend; make it a proxy with its nodes")
            if (answer.is_sized or answer.encoding == "gzip") and not body.endswith(b"\n"):
                body += b"\n"  # it is whole, and Prometheus' lexer adds it too
        except BaseException:
            self._shared.give_back(taken)
            raise
        self._shared.give_back(taken - len(body))
        return body

    async def close(self) -> None:
        self._until = 0.0  # up to Python 3.11 `wait_for` can forget that its caller was cancelled: no further node
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)


class _Turn:
    """A node's turn: how long it takes, and that somebody hears of it when that is longer than the patience."""

    def __init__(self, patience: float, give_up: Callable[[], None]) -> None:
        self.seconds = 0.0
        self.is_given_up = False
        self._patience = patience
        self._tell = give_up
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(self._patience, self._give_up)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self.seconds = time.monotonic() - self._began

    def _give_up(self) -> None:
        self.is_given_up = True
        self._tell()


async def _inflated(answer: Answer, take: Callable[[int], None]) -> bytes:
    """The body, which the node compresses unasked; no piece of it is larger than `PIECE_BYTES`."""
    if answer.encoding != "gzip":
        raise ScrapeError(f"/metrics comes in the encoding {answer.encoding[:40]!r}, which was not asked for")
    inflating = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    rest, body = answer.body or b"", bytearray()
    while rest and not inflating.eof:
        try:
            piece = inflating.decompress(rest, PIECE_BYTES)
        except zlib.error as error:
            raise ScrapeError(f"/metrics is no gzip: {error}") from None
        if len(body) + len(piece) > MAX_NODE_BYTES:
            raise ScrapeError(_TOO_LARGE)
        take(len(piece))
        body += piece
        rest = inflating.unconsumed_tail
        await asyncio.sleep(0)
    body += inflating.flush()  # no input is left but a few bits: at most some kilobytes
    if inflating.unused_data:
        raise ScrapeError("/metrics goes on behind the end of its gzip")
    if not inflating.eof:
        raise ScrapeError("/metrics breaks off in its gzip")
    return bytes(body)


def _problem(error: Exception) -> str:
    text = str(error.detail) if isinstance(error, Refusal) else str(error)
    return text.encode("utf-8", "replace").decode()
