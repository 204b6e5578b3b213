"""The nodes behind other frontends: each proxy is asked for its `/api/nodes`, again and again, all at the same time.

LMCache's frontend answers `{"nodes": [proxy with children, …]}`; asked with `?detail=true`, which that one passes over,
ours adds to each node the path under which it serves it, the frontend whose own node it is, and the frontends between.
By these a chain of frontends knows its circles, and a node that is known on several ways is counted once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp
import msgspec

from lmcache_frontend.nodes.node import LOCAL_PROXY, MAX_NODES, Node, Proxy, named_path
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.proxy.plain import PlainTransport, reason
from lmcache_shared import address
from lmcache_shared.blocking import BlockingPool
from lmcache_shared.errors import AddressError, OpsError, Refusal

logger = logging.getLogger(__name__)

ASK_SECONDS = 5.0
"""For one frontend, as LMCache's frontend waits."""

AT_ONCE = 32
NEW_AT_ONCE = 16
"""Of proxies that were only found and never asked."""

SLOW_AT_ONCE = 16
"""Of those that have failed more than once: those that hang take no turn of those that answer, or are new."""

MAX_ANSWER_BYTES = 16 << 20
MAX_LOOKED_AT = 5 * MAX_NODES
"""JSON objects in an answer."""

MAX_TOLD = 2 * MAX_NODES
"""Nodes behind all proxies together."""

INLINE_BYTES = 32 << 10
"""A larger answer is read in a thread, one at a time: it takes seconds, and memory."""

READ_SECONDS = 20.0
MAX_THROUGH = 8
"""A node behind more frontends is not taken."""

MAX_PATH_LENGTH = 2000
MAX_PAUSES = 8
"""Of a proxy that does not answer the pauses double, up to so many intervals."""

MAX_ID_LENGTH = 64
LOOK_SECONDS = 0.5
"""How often it is looked whether there is a new proxy to ask."""

_HALF_CHARACTER = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)


class NeighbourError(OpsError):
    """A proxy does not tell of its nodes; the text says why, in one line."""


class _Child(msgspec.Struct):
    name: str
    host: str
    port: int | str
    path: str | None = None
    origin: tuple[str, str] | None = None
    through: list[str] = []


class _Item(msgspec.Struct):
    name: str
    host: str = ""
    port: int | str = 0
    is_proxy: bool = False
    children: list[msgspec.Raw] | None = None


class _Answer(msgspec.Struct):
    nodes: list[msgspec.Raw]
    frontend: str | None = None


@dataclass
class _Asked:
    head: Proxy
    due: float
    task: asyncio.Task[None] | None = None
    problem: str | None = None
    failures: int = 0
    wanted: asyncio.Task[None] | None = None
    """A question that somebody waits for."""
    has_answered: bool = False
    """It ever did."""
    is_partial: bool = False
    """The problem is that some of its nodes were left out."""
    is_self: bool = False
    told: int = 0
    """How many nodes it has told of."""

    def cancel(self) -> None:
        for task in (self.task, self.wanted):
            if task is not None:
                task.cancel()


class Neighbours:
    """Keeps the registry's knowledge of what is behind its proxies.

    Args:
        registry: whose proxies are asked.
        interval: the seconds between two questions to one proxy.
    """

    def __init__(self, registry: Registry, interval: float) -> None:
        self._registry = registry
        self._interval = interval
        self._asked: dict[str, _Asked] = {}
        self._proven = asyncio.Semaphore(AT_ONCE)
        self._new = asyncio.Semaphore(NEW_AT_ONCE)
        self._slow = asyncio.Semaphore(SLOW_AT_ONCE)
        self._wanted = asyncio.Semaphore(AT_ONCE)
        """For callers who want one asked now."""
        self._pool = BlockingPool("neighbours", threads=1, waiting=2 * AT_ONCE + NEW_AT_ONCE + SLOW_AT_ONCE)

    async def run(self) -> None:
        """Ask until cancelled; a new proxy at once."""
        try:
            while True:
                self._look()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            asked = self._asked.values()
            tasks = [task for one in asked for task in (one.task, one.wanted) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._pool.close()

    def problems(self) -> list[tuple[str, str]]:
        """Each proxy that does not tell of its nodes, or is none, with its address; and why."""
        return [
            (f"{name} ({asked.head.address})", "it is this frontend itself" if asked.is_self else str(asked.problem))
            for name, asked in self._asked.items()
            if asked.problem is not None or asked.is_self
        ]

    def problem(self, proxy: str) -> str | None:
        """Why a proxy's nodes are not known, or not anew."""
        asked = self._asked.get(proxy)
        return asked.problem if asked is not None else None

    async def refresh(self, proxy: Proxy) -> None:
        """Ask a proxy now.

        Raises:
            NeighbourError: it does not tell; what was known of it stays.
        """
        self._look()  # it may be new, or have another address since
        asked = self._asked.setdefault(proxy.name, _Asked(proxy, 0.0))
        if asked.wanted is None or asked.wanted.done():  # callers at the same time share one question
            asked.wanted = asyncio.create_task(self._ask_now(asked), name="neighbour")
        await asyncio.wait({asked.wanted})
        if asked.problem is not None and not asked.is_partial:
            raise NeighbourError(asked.problem)

    async def told_by(self, head: Proxy) -> int:
        """Ask a frontend that may be nobody's proxy yet how many nodes it tells of; nothing is kept of it.

        Raises:
            NeighbourError: it does not tell, or is none.
        """
        try:
            body = await asyncio.wait_for(_fetch(head), ASK_SECONDS)
            told = None if body is None else await self._read(body)
        except asyncio.TimeoutError:
            raise NeighbourError(f"no answer within {ASK_SECONDS:g} seconds") from None
        except (aiohttp.ClientError, OSError, ValueError, Refusal) as error:
            raise NeighbourError(_problem(error)) from None
        if told is None:
            raise NeighbourError("it is no frontend: it has no /api/nodes")
        if told.frontend == self._registry.identity:
            raise NeighbourError("it is this frontend itself")
        return len(told.nodes)

    def _look(self) -> None:
        now = time.monotonic()
        heads = {head.name: head for head in self._registry.heads()}
        for name in self._asked.keys() - heads.keys():
            gone = self._asked.pop(name)
            gone.cancel()
        for name, head in heads.items():
            asked = self._asked.setdefault(name, _Asked(head, now))
            if asked.head.address != head.address:
                # What the former address told is not what this one has.
                asked.cancel()
                self._registry.forget_neighbours(name)
                asked = self._asked[name] = _Asked(head, now)
            asked.head = head
            if asked.due <= now and (asked.task is None or asked.task.done()):
                # Spread, so that many proxies that came together are not asked together for ever.
                asked.due = now + self._interval * random.uniform(0.8, 1.2)  # noqa: S311 - keeps no secret
                asked.due += self._interval * min(2 ** min(asked.failures, 16) - 1, MAX_PAUSES - 1)
                asked.task = asyncio.create_task(self._ask_in_turn(asked), name="neighbour")
        self._registry.publish_selves(name for name, asked in self._asked.items() if asked.is_self)

    async def _ask_in_turn(self, asked: _Asked) -> None:
        lane = self._proven
        if asked.failures > 1:
            lane = self._slow
        elif asked.head.found and not asked.has_answered:
            lane = self._new
        async with lane:
            await self._ask(asked)

    async def _ask_now(self, asked: _Asked) -> None:
        async with self._wanted:
            await self._ask(asked)

    async def _ask(self, asked: _Asked) -> None:
        head = asked.head
        try:
            body = await asyncio.wait_for(_fetch(head), ASK_SECONDS)
            told = None if body is None else await self._read(body)
        except asyncio.TimeoutError:
            self._note(asked, f"no answer within {ASK_SECONDS:g} seconds", failed=True)
            return
        except (aiohttp.ClientError, OSError, ValueError, Refusal) as error:
            self._note(asked, _problem(error), failed=True)
            return
        if self._asked.get(head.name) is not asked or asked.head.address != head.address:
            return  # it has another address by now
        if told is None:
            self._note(asked, None if head.found else "it is no frontend: it has no /api/nodes", failed=False)
            asked.is_self, asked.told = False, 0
            self._registry.publish_neighbours(head.name, ())
            return
        asked.is_self = told.frontend == self._registry.identity
        room = MAX_TOLD - sum(other.told for other in self._asked.values() if other is not asked)
        nodes = [] if asked.is_self else told.nodes[:room]
        asked.told = len(nodes)
        too_many = f"{len(told.nodes) - room} of its nodes are left out: {MAX_TOLD} behind all proxies are kept"
        is_partial = len(told.nodes) > room and not asked.is_self
        self._note(asked, too_many if is_partial else None, failed=False)
        asked.is_partial = is_partial
        self._registry.publish_neighbours(head.name, nodes)

    async def _read(self, body: bytes) -> _Told | None:
        identity = self._registry.identity
        if len(body) <= INLINE_BYTES:
            return _read(body, identity)
        return await self._pool.run(lambda: _read(body, identity), seconds=READ_SECONDS, what="reading its nodes")

    def _note(self, asked: _Asked, problem: str | None, *, failed: bool) -> None:
        asked.failures = asked.failures + 1 if failed else 0
        asked.has_answered = asked.has_answered or not failed
        asked.is_partial = False
        if asked.failures > 1:
            asked.is_self = False  # whoever is there now, it is not known
        if problem != asked.problem:
            where = f"{asked.head.name} ({asked.head.address})"
            if problem is not None:
                logger.warning("%s does not tell of its nodes: %s", where, problem)
            else:
                logger.info("%s tells of its nodes again", where)
        asked.problem = problem


def _problem(error: Exception) -> str:
    if isinstance(error, Refusal):
        return str(error.detail)
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.errno or 0  # asyncio's own text names the address again; a failed name lookup has another kind
        return os.strerror(number) if number > 0 else error.os_error.strerror or "cannot connect"
    return ascii(reason(error))[1:-1]  # half a character fits into no answer


async def _fetch(head: Proxy) -> bytes | None:
    """What the proxy answers; None when it is no frontend.

    Raises:
        ValueError: it answers with an error of its own, or more than it may.
    """
    target = PlainTransport(head.address)
    shown = {} if head.token is None else {"Authorization": f"Bearer {head.token}"}
    try:
        async with target.session.get(
            target.url("/api/nodes?detail=true"), headers=shown, allow_redirects=False
        ) as response:
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise ValueError(f"/api/nodes answers more than {MAX_ANSWER_BYTES} bytes")
    finally:
        await target.close()
    if response.status >= 500:
        raise ValueError(f"/api/nodes answers {response.status}")
    return bytes(body) if response.status == 200 else None


class _Told(NamedTuple):
    frontend: str | None
    nodes: list[Node]


def _read(body: bytes, identity: str) -> _Told | None:
    """The leaves, each under a name of its own; one that cannot be used is passed over. None when it is no such list.

    Raises:
        ValueError: there are more things in it than in any list of nodes.
    """
    if body.count(b"{") > MAX_LOOKED_AT or body.count(b",") > 20 * MAX_LOOKED_AT:
        raise ValueError("/api/nodes lists more than nodes")
    try:
        try:
            answer = msgspec.json.decode(body, type=_Answer)
        except msgspec.DecodeError:
            # Half a character in one name, which JSON can spell and nobody can write, costs that name alone.
            whole = _HALF_CHARACTER.sub(lambda found: found[0] if len(found[0]) == 12 else rb"\ufffd", body)
            answer = msgspec.json.decode(whole, type=_Answer)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    frontend = answer.frontend if answer.frontend is None or len(answer.frontend) <= MAX_ID_LENGTH else None
    found: dict[str, Node] = {}
    for proxy, child in _leaves(answer):
        if len(found) >= MAX_NODES:
            break
        name = child.name if child.name not in found else f"{child.name}@{proxy}"
        node = _node(frontend, proxy, child, name)
        if node is not None and name not in found and identity not in node.through:
            found[name] = node
    return _Told(frontend, list(found.values()))


def _leaves(answer: _Answer) -> Iterator[tuple[str, _Child]]:
    """Each leaf with the name of its proxy there. What is in the list without children is itself one."""
    for text in answer.nodes:
        try:
            item = msgspec.json.decode(text, type=_Item)
            if not item.children:
                if not item.is_proxy:
                    yield LOCAL_PROXY, msgspec.json.decode(text, type=_Child)
                continue
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            continue
        for child_text in item.children:
            try:
                yield item.name, msgspec.json.decode(child_text, type=_Child)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                continue


def _node(frontend: str | None, proxy: str, child: _Child, name: str) -> Node | None:
    path = child.path or (
        named_path(child.name) if proxy == LOCAL_PROXY else named_path(proxy) + named_path(child.name)
    )
    through = () if frontend is None else (frontend, *child.through)
    usable = (
        0 < len(name) <= 512
        and name.isprintable()
        and len(through) <= MAX_THROUGH
        and all(len(one) <= MAX_ID_LENGTH for one in through)
        and path.startswith("/proxy2/")
        and len(path) <= MAX_PATH_LENGTH
        and path.isascii()
        and path.isprintable()
        and not set(path) & set(" ?#")
    )
    if not usable:
        return None
    try:
        where = address.from_node(child.host, child.port)
    except AddressError:
        return None
    path = path.rstrip("/")
    return Node(name, child.host, child.port, where, path=path, through=through, origin=_origin(through, child, path))


def _origin(through: tuple[str, ...], child: _Child, path: str) -> tuple[str, str] | None:
    """Whose own node it is. A frontend is believed about its own nodes, and that others are further away than it is."""
    if not through:
        return None
    if child.origin is not None and child.origin[0] == through[-1]:
        return child.origin
    return (through[0], path) if len(through) == 1 else None
