"""Nodes of a discovery service (LMCache's, or another frontend of ours), asked at its `/lmcache_infos`."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence

import aiohttp
import msgspec
from yarl import URL

from lmcache_frontend.discovery.problems import Refused, reason
from lmcache_frontend.nodes.found import MAX_FOUND, found_proxy, read_api_address
from lmcache_frontend.nodes.node import Proxy
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.nodes.sources import Told
from lmcache_shared.address import is_loopback_host
from lmcache_shared.errors import AddressError
from lmcache_shared.secrets import MASK, is_secret

logger = logging.getLogger(__name__)

ASK_SECONDS = 10.0
"""For one answer, from connecting to its end; LMCache's frontend waits as long."""

MAX_ANSWER_BYTES = 8 << 20
MAX_PROBLEMS = 20
SHOWN_PARAMETERS = frozenset({"hour", "minute"})
"""Of the query, as a discovery service has them: how long ago who is told of was heard of last."""

MAX_PROBLEM_LENGTH = 300

FIRST_PAUSE_SECONDS = 1.0
"""After a failure; the pauses double. Where both start together, the service is there a moment later."""

LONGEST_PAUSE = 4
"""Times the interval."""


class _Infos(msgspec.Struct):
    processInfos: dict[str, msgspec.Raw]  # noqa: N815 - as it is called there


class _Info(msgspec.Struct):
    lmCacheInfoEntities: list[msgspec.Raw]  # noqa: N815


class _Entity(msgspec.Struct):
    apiAddress: str  # noqa: N815


class SupplierSource:
    """Publishes the proxies that a discovery service tells of. While it is away, what it told last stays as it is.

    Args:
        url: of the service's list; an http or https URL.
        interval: the seconds between two questions.
    """

    name = "supplier"

    def __init__(self, url: str, interval: float, registry: Registry) -> None:
        self._url = URL(url)
        self.place = _shown(self._url)
        self.problems: Sequence[str] = ["it has not answered yet"]
        self._interval = interval
        self._registry = registry
        self._near = is_loopback_host(self._url.host or "")
        self._failures = 0
        self._now = asyncio.Event()
        self._told = Told(self.name, self.place)

    async def run(self) -> None:
        while True:
            problem = await self._try()
            self._failures = 0 if problem is None else self._failures + 1
            if problem is not None:
                self.problems = [problem]
            self._told.tell(self.problems)
            self._now.clear()
            try:
                await asyncio.wait_for(self._now.wait(), pause(self._interval, self._failures))
            except asyncio.TimeoutError:
                continue

    def reload(self) -> None:
        self._now.set()

    async def _try(self) -> str | None:
        """Ask once and publish; why it failed, if it did."""
        try:
            body = await asyncio.wait_for(self._ask(), ASK_SECONDS)
            proxies, self.problems = _read(body, near=self._near)
        except asyncio.TimeoutError:
            return f"no answer within {ASK_SECONDS:g} seconds"
        except (aiohttp.ClientError, OSError, ValueError, Refused) as error:
            return reason(error)
        self._registry.publish(self.name, proxies, lasting=True)
        return None

    async def _ask(self) -> bytes:
        # A connection of its own: an interval outlasts what services keep one open for.
        async with (
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.get(self._url, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise Refused(f"it answers {response.status}")
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise Refused(f"it answers more than {MAX_ANSWER_BYTES} bytes")
            return bytes(body)


def _shown(url: URL) -> str:
    """The URL for people: of its query the parameters, and only the values that are known to hold no secret."""
    shown = str(url.with_user(None).with_query(None).with_fragment(None))
    pairs = [
        f"{name}={value if name in SHOWN_PARAMETERS else MASK}" if value and not is_secret("", name) else MASK
        for name, value in url.query.items()
    ]
    return f"{shown}?{'&'.join(pairs)}" if pairs else shown


def pause(interval: float, failures: int) -> float:
    """The seconds until the next question; spread, so that no two frontends keep coming together."""
    spread = random.uniform(0.8, 1.0)  # noqa: S311 - keeps no secret
    if failures == 0:
        return interval * spread
    return float(min(interval * LONGEST_PAUSE, FIRST_PAUSE_SECONDS * 2 ** min(failures - 1, 16))) * spread


def _read(body: bytes, *, near: bool) -> tuple[list[Proxy], list[str]]:
    """The proxies of an answer, and one line for each entry that cannot be used.

    Args:
        near: the service is on this machine, so that a loopback address of it is meant.

    Raises:
        Refused: it is no list of a discovery service.
    """
    try:
        infos = msgspec.json.decode(body, type=_Infos).processInfos
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(f"it answers no list of a discovery service: {error}") from None
    found: dict[str, Proxy] = {}
    problems: list[str] = []
    unusable = too_many = 0
    for text, why in _addresses(infos):
        try:
            if why is not None:
                raise AddressError(why)
            where = read_api_address(text)
            if where.is_loopback and not near:
                raise AddressError(f"{where}: is the reporter's own machine; it reports another with --report-host")
        except AddressError as error:
            unusable += 1
            if unusable <= MAX_PROBLEMS:
                problems.append(ascii(str(error))[1:-1][:MAX_PROBLEM_LENGTH])
            continue
        proxy = found_proxy(where)
        if len(found) < MAX_FOUND or proxy.name in found:
            found[proxy.name] = proxy
        else:
            too_many += 1
    if unusable > MAX_PROBLEMS:
        problems.append(f"and {unusable - MAX_PROBLEMS} entries more that cannot be used")
    if too_many:
        problems.append(f"{too_many} entries are left out: of one service {MAX_FOUND} are taken")
    return list(found.values()), problems


def _addresses(infos: dict[str, msgspec.Raw]) -> Iterator[tuple[str, str | None]]:
    """The address of every entity, or why it has none."""
    for key, raw in infos.items():
        try:
            entities = msgspec.json.decode(raw, type=_Info).lmCacheInfoEntities
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            yield "", f"{key[:100]!r}: {error}"
            continue
        for i, entity in enumerate(entities):
            try:
                yield msgspec.json.decode(entity, type=_Entity).apiAddress, None
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
                yield "", f"{key[:100]!r}.lmCacheInfoEntities[{i}]: {error}"
