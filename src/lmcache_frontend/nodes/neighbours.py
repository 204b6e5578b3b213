"""The nodes behind other frontends: each proxy is asked for its `/api/nodes`, again and again, all at the same time.

LMCache's frontend answers `{"nodes": [proxy with children, …]}`; asked with `?detail=true`, which that one passes over,
ours adds to each node the path under which it serves it, the frontend whose own node it is, and the frontends between.
By these a chain of frontends knows its circles, and a node that is known on several ways is counted once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp
import msgspec

from lmcache_frontend.nodes.node import LOCAL_PROXY, MAX_NODES, Node, Proxy, named_path
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.proxy.transport import Target, reason
from lmcache_shared import address
from lmcache_shared.errors import AddressError, OpsError

ASK_SECONDS = 5.0
"""For one frontend, as LMCache's frontend waits."""

AT_ONCE = 32
MAX_ANSWER_BYTES = 16 << 20
MAX_THROUGH = 8
"""A node behind more frontends is not taken."""

MAX_PATH_LENGTH = 2000
LOOK_SECONDS = 0.5
"""How often it is looked whether there is a new proxy to ask."""


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
    is_self: bool = False


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
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        """Ask until cancelled; a new proxy at once."""
        try:
            while True:
                self._look()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            tasks = [asked.task for asked in self._asked.values() if asked.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def problem(self, proxy: str) -> str | None:
        """Why a proxy's nodes are not known, or not anew."""
        asked = self._asked.get(proxy)
        return asked.problem if asked is not None else None

    async def refresh(self, proxy: Proxy) -> None:
        """Ask a proxy now.

        Raises:
            NeighbourError: it does not tell; what was known of it stays.
        """
        asked = self._asked.setdefault(proxy.name, _Asked(proxy, 0.0))
        asked.head = proxy
        await self._ask(asked)
        if asked.problem is not None:
            raise NeighbourError(asked.problem)

    def _look(self) -> None:
        now = time.monotonic()
        heads = {head.name: head for head in self._registry.heads()}
        for name in self._asked.keys() - heads.keys():
            gone = self._asked.pop(name)
            if gone.task is not None:
                gone.task.cancel()
        for name, head in heads.items():
            asked = self._asked.setdefault(name, _Asked(head, now))
            if asked.head.address != head.address:
                # What the former address told is not what this one has.
                if asked.task is not None:
                    asked.task.cancel()
                self._registry.forget_neighbours(name)
                asked = self._asked[name] = _Asked(head, now)
            asked.head = head
            if asked.due <= now and (asked.task is None or asked.task.done()):
                # Spread, so that many proxies that came together are not asked together for ever.
                asked.due = now + self._interval * random.uniform(0.8, 1.2)  # noqa: S311 - keeps no secret
                asked.task = asyncio.create_task(self._ask(asked), name="neighbour")
        self._registry.publish_selves(name for name, asked in self._asked.items() if asked.is_self)

    async def _ask(self, asked: _Asked) -> None:
        head = asked.head
        async with self._gate:
            try:
                answer = await asyncio.wait_for(_fetch(head), ASK_SECONDS)
            except asyncio.TimeoutError:
                asked.problem = f"no answer within {ASK_SECONDS:g} seconds"
                return
            except (aiohttp.ClientError, OSError, ValueError) as error:
                asked.problem = ascii(reason(error))[1:-1]  # half a character fits into no answer
                return
        if self._asked.get(head.name) is not asked or asked.head.address != head.address:
            return  # it has another address by now
        if answer is None:
            asked.problem = None if head.found else "it is no frontend: it has no /api/nodes"
            if head.found:
                self._registry.publish_neighbours(head.name, ())
            return
        asked.problem = None
        asked.is_self = answer.frontend == self._registry.identity
        children = () if asked.is_self else _children(answer, self._registry.identity)
        self._registry.publish_neighbours(head.name, children)


async def _fetch(head: Proxy) -> _Answer | None:
    """What the proxy tells; None when it is no frontend.

    Raises:
        ValueError: it answers with an error of its own, or more than it may.
    """
    target = Target(head.address)
    try:
        async with target.session.get(target.url("/api/nodes?detail=true"), allow_redirects=False) as response:
            body = await _read(response)
    finally:
        await target.session.close()
    if response.status >= 500:
        raise ValueError(f"/api/nodes answers {response.status}")
    if response.status != 200:
        return None
    try:
        return msgspec.json.decode(body, type=_Answer)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise ValueError(f"/api/nodes answers more than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _children(answer: _Answer, identity: str) -> list[Node]:
    """The leaves, each under a name of its own; one that cannot be used is passed over."""
    found: dict[str, Node] = {}
    for proxy, child in _leaves(answer):
        if len(found) >= MAX_NODES:
            break
        name = child.name if child.name not in found else f"{child.name}@{proxy}"
        node = _node(answer.frontend, proxy, child, name)
        if node is not None and name not in found and identity not in node.through:
            found[name] = node
    return list(found.values())


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
    through = tuple(child.through) if frontend is None else (frontend, *child.through)
    usable = (
        0 < len(name) <= 512
        and name.isprintable()
        and len(through) <= MAX_THROUGH
        and all(len(one) <= 64 for one in through)
        and path.startswith("/proxy2/")
        and len(path) <= MAX_PATH_LENGTH
        and path.isascii()
        and path.isprintable()
        and not set(path) & set(" ?#")
    )
    if not usable:
        return None
    origin = child.origin or (None if frontend is None else (frontend, path))
    try:
        where = address.from_node(child.host, child.port)
    except AddressError:
        return None
    return Node(name, child.host, child.port, where, path=path.rstrip("/"), through=through, origin=origin)
