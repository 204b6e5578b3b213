"""The discovery service: heartbeats that other frontends send here are kept, told on, and make them known.

They are kept in the store. Frontends that share one therefore share them too, whichever of them a heartbeat came to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated

import msgspec

from lmcache_frontend.nodes.found import MAX_FOUND, SCHEME, found_proxy, read_api_address
from lmcache_frontend.nodes.node import Proxy
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.nodes.sources import Told
from lmcache_frontend.nodes.stores import Store, StoreAway
from lmcache_shared.errors import AddressError, OpsError

KEEP_SECONDS = 24 * 3600.0
"""How long a heartbeat is told of in `/lmcache_infos`, whose `?hour=` asks for hours back."""

ALIVE_SECONDS = 100.0
"""Who is silent for longer is no longer a proxy here: frontends report every 30 seconds, so three were missed."""

BACK_SECONDS = 200.0
"""So long after the store was away nobody counts as silent for it: who was refused reports again within 3 minutes."""

LOOK_SECONDS = 5.0
"""How often it is looked who is silent."""

NEWS_SECONDS = 0.5
"""How often the store is asked whether others have kept heartbeats; it is read no more often than this."""

PUBLISH_SECONDS = 0.25
"""Many who report for the first time at once are published together."""

READ_SECONDS = 30.0
"""The store is read again after so long, whether it tells of a change or not."""

_Time = Annotated[float, msgspec.Meta(ge=0, le=32_503_680_000)]


class Report(msgspec.Struct, frozen=True):
    """What a heartbeat says; the times are seconds since 1970.

    Attributes:
        started: when the frontend started, as it says, or when it was first heard of.
        reported: when it was last heard of, by the clock of the frontend that heard it.
    """

    pid: int | None
    version: str
    other_info: str
    started: _Time
    reported: _Time


@dataclass(frozen=True)
class Beat:
    """A heartbeat's parameters, checked."""

    api_address: str
    pid: int | None
    version: str
    other_info: str


class Full(OpsError):
    """As many frontends as are kept report at the moment."""


class DiscoveryService:
    """Keeps heartbeats, and is the source of the proxies that send them.

    Args:
        registry: where those that are alive are published.
        store: where heartbeats are kept.
    """

    name = "heartbeats"
    place = "/heartbeat"

    def __init__(self, registry: Registry, store: Store) -> None:
        self.problems: Sequence[str] = ()
        self._registry = registry
        self._store = store
        self._reports: dict[str, Report] = {}
        self._alive: frozenset[str] = frozenset()
        self._pardoned_until = 0.0
        self._last_heard = 0.0
        """Who was heard of after this is pardoned."""
        self._proxies: dict[str, Proxy] = {}
        """By their addresses; reading those of a thousand at each change would take a while."""
        self._published = 0.0
        self._made_known = 0.0
        """When somebody new was published at once, the last time."""
        self._publishing: asyncio.TimerHandle | None = None
        self._again = False
        self._told = Told(self.name, self.place)

    async def keep(self, beat: Beat) -> None:
        """Keep a heartbeat in the place of the frontend's former one.

        Raises:
            StoreAway: it cannot be kept.
            Full: there is no room for another frontend.
        """
        now = time.time()
        former = self._reports.get(beat.api_address)
        same = former if former is not None and former.pid == beat.pid else None
        started = _startup_time(beat.other_info) or (now if same is None else same.started)
        report = Report(beat.pid, beat.version, beat.other_info, min(started, now), now)
        if not await self._report(beat.api_address, report, KEEP_SECONDS):
            await self._make_room(now)
            if not await self._report(beat.api_address, report, KEEP_SECONDS):
                raise Full
        self._reports[beat.api_address] = report
        if beat.api_address not in self._alive:
            self._publish_soon()

    def since(self, seconds: float = KEEP_SECONDS) -> dict[str, Report]:
        """The last heartbeat of every frontend that sent one in the last so many seconds, by its address."""
        earliest = time.time() - min(seconds, KEEP_SECONDS)
        return {address: report for address, report in sorted(self._reports.items()) if report.reported >= earliest}

    async def run(self) -> None:
        mark: str | None = None
        read = -READ_SECONDS
        try:
            while True:
                try:
                    now = time.monotonic()
                    before, mark = mark, await self._store.reports_mark()
                    if mark != before or self._again or now - read >= READ_SECONDS:
                        self._again, read = False, now
                        await self._read()
                    elif now - self._published >= LOOK_SECONDS:
                        self._publish()
                    self._note(None)
                except StoreAway as away:
                    mark = None
                    self._note(away)
                await asyncio.sleep(NEWS_SECONDS)
        finally:
            if self._publishing is not None:
                self._publishing.cancel()

    def reload(self) -> None:
        self._again = True

    def _note(self, away: StoreAway | None) -> None:
        now = time.time()
        if away is not None:
            if now >= self._pardoned_until:
                self._last_heard = now - ALIVE_SECONDS
            self._pardoned_until = now + BACK_SECONDS
        self.problems = () if away is None else [str(away)]
        self._told.tell(self.problems)

    async def _read(self) -> None:
        began = time.time()
        found = {}
        for address, text in (await self._store.reports()).items():
            report = _report_of(address, text)
            if report is not None:
                found[address] = report
        # What came while the store was read may not be in its answer yet.
        late = {address: report for address, report in self._reports.items() if report.reported >= began}
        # A store that was away may have lost what it had.
        before = self._reports if began < self._pardoned_until else {}
        together = {**before, **found, **late}
        latest = sorted(together.items(), key=lambda item: item[1].reported, reverse=True)
        self._reports = dict(latest[:MAX_FOUND])
        self._publish()

    def _publish(self) -> None:
        now = time.time()
        alive = self.since(ALIVE_SECONDS if now >= self._pardoned_until else now - self._last_heard)
        self._alive = frozenset(alive)
        self._proxies = {address: self._proxies.get(address) or _proxy_at(address) for address in alive}
        self._published = time.monotonic()
        self._registry.publish(self.name, self._proxies.values(), lasting=True)

    def _publish_soon(self) -> None:
        pause = self._made_known + PUBLISH_SECONDS - time.monotonic()
        if pause <= 0:
            self._publish_now()
        elif self._publishing is None:
            self._publishing = asyncio.get_running_loop().call_later(pause, self._publish_now)

    def _publish_now(self) -> None:
        self._publishing = None
        self._made_known = time.monotonic()
        self._publish()

    async def _report(self, address: str, report: Report, seconds: float) -> bool:
        text = msgspec.json.encode(report).decode()
        try:
            return await self._store.report(address, text, keep_seconds=seconds, limit=MAX_FOUND)
        except StoreAway as away:
            self._note(away)
            raise

    async def _make_room(self, now: float) -> None:
        """Forget who has been silent for longest: a day's restarts in a cluster leave many addresses behind.

        Raises:
            Full: nobody is silent.
        """
        address, report = min(self._reports.items(), key=lambda item: item[1].reported, default=("", None))
        alive_since = now - ALIVE_SECONDS if now >= self._pardoned_until else self._last_heard
        if report is None or report.reported > alive_since:
            raise Full
        await self._report(address, report, 0.001)
        self._reports.pop(address, None)
        await asyncio.sleep(0.002)


def _proxy_at(address: str) -> Proxy:
    return found_proxy(read_api_address(address))


def _report_of(address: str, text: str) -> Report | None:
    """A report as the store has it; None when nobody here wrote it."""
    try:
        report = msgspec.json.decode(text, type=Report)
        usable = address == f"{SCHEME}{read_api_address(address)}"
    except (msgspec.DecodeError, AddressError, RecursionError, UnicodeError):
        return None
    return report if usable else None


class _OtherInfo(msgspec.Struct):
    startup_time: str = ""


def _startup_time(other_info: str) -> float | None:
    """Seconds since 1970, when it says so; a time without a zone counts as this machine's."""
    try:
        text = msgspec.json.decode(other_info, type=_OtherInfo).startup_time
        seconds = datetime.fromisoformat(text).astimezone(timezone.utc).timestamp()
    except (msgspec.DecodeError, ValueError, OverflowError, OSError, RecursionError):
        return None
    return seconds if seconds > 0 else None
