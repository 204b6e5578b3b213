"""Heartbeats: this frontend tells a discovery service, again and again, where it is and what it knows.

One is `GET <url>?api_address=…&pid=…&version=…&other_info=…`, as LMCache's frontend sends it, so that its services
understand ours. Whatever the service does, the frontend goes on: time and answers are bounded, failures are told once
and tried again after longer and longer pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import socket
from collections.abc import Sequence
from datetime import datetime, timezone

import aiohttp
from aiohttp import web
from yarl import URL

from lmcache_frontend.discovery.problems import Refused, reason
from lmcache_frontend.discovery.version import first_version
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.telemetry.health.board import HealthBoard
from lmcache_shared.address import TcpAddress

logger = logging.getLogger(__name__)

SEND_SECONDS = 10.0
"""For one heartbeat, from connecting to the end of its answer; LMCache's frontend waits as long."""

MAX_ANSWER_BYTES = 64 << 10
"""What is read of an answer; only its status counts."""

MAX_PAUSE_SECONDS = 180.0
"""The longest pause after failures, unless the interval is longer."""

VERSION_WHEN_NONE_ANSWERS = "1.0.0"
"""As LMCache's frontend reports it."""

LOOPBACK = "127.0.0.1"


class Heartbeat:
    """Reports to one service at a time, in the event loop that starts it.

    Args:
        registry: whose nodes are counted.
        health: knows their version.
        port: the port that is reported.
        report_host: the host that is reported; without one this machine's address on the way to the service.
    """

    def __init__(self, registry: Registry, health: HealthBoard, *, port: int, report_host: str | None = None) -> None:
        self._registry = registry
        self._health = health
        self._port = port
        self._report_host = report_host
        self._startup_time = _now()
        self._host = report_host or LOOPBACK
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._problem: str | None = None
        self._where: tuple[URL, float] | None = None

    def start(self, url: str, *, initial_delay: float = 0.0, interval: float = 30.0) -> bool:
        """Send heartbeats to `url` from now on; not, when they are sent already.

        Args:
            url: an http or https URL.
            initial_delay: the seconds before the first one.
            interval: the seconds between two.
        """
        if self._running:
            return False
        self._failures, self._problem = 0, None
        self._where = URL(url), interval
        self._task = asyncio.create_task(self._send_all(URL(url), initial_delay, interval), name="heartbeat")
        return True

    async def stop(self) -> bool:
        """Send no more, at once; whether any were sent."""
        task, self._task = self._task, None
        if task is None or task.done():
            return False
        while not task.done():
            task.cancel()  # up to Python 3.11 `wait_for` forgets it when what it waits for ends at the same moment
            await asyncio.wait([task], timeout=0.1)
        return True

    def sends(self, url: str, interval: float) -> bool:
        """Whether heartbeats go to this URL so often."""
        return self._running and self._where == (URL(url), interval)

    def status(self) -> dict[str, object]:
        """What `GET /api/heartbeat/status` answers: LMCache's four fields, where they go, how the last one went."""
        url, interval = self._where if self._running and self._where is not None else (None, None)
        return {
            "running": self._running,
            "local_ip": self._host,
            "startup_time": self._startup_time,
            "current_time": _now(),
            "heartbeat_url": None if url is None else shown(url),
            "interval": interval,
            "failures": self._failures,
            "problem": self._problem,
        }

    @property
    def _running(self) -> bool:
        return self._task is not None and not self._task.done()

    async def _send_all(self, url: URL, initial_delay: float, interval: float) -> None:
        await asyncio.sleep(initial_delay)
        while True:
            self._note(url, await self._try(url))
            await asyncio.sleep(pause(interval, self._failures))

    async def _try(self, url: URL) -> str | None:
        """Send one; why it failed, if it did. No failure ends the heartbeats."""
        try:
            await asyncio.wait_for(self._send(url), SEND_SECONDS)
        except asyncio.TimeoutError:
            return f"no answer within {SEND_SECONDS:g} seconds"
        except Exception as error:
            return reason(error)
        return None

    async def _send(self, url: URL) -> None:
        if self._report_host is None:
            self._host = await address_towards(url)
        version = await first_version(self._health) or VERSION_WHEN_NONE_ANSWERS
        count = sum(1 for _ in self._registry.nodes())
        other = {"startup_time": self._startup_time, "nodes_count": count}
        parameters = {
            "api_address": f"http://{TcpAddress(self._host.strip('[]'), self._port)}",
            "pid": str(os.getpid()),
            "version": version,
            "other_info": json.dumps(other),
        }
        # A connection of its own: an interval outlasts what services keep one open for.
        async with (
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.get(url.update_query(parameters), allow_redirects=False) as response,
        ):
            if not 200 <= response.status < 300:
                raise Refused(f"it answers {response.status}")
            await response.content.read(MAX_ANSWER_BYTES)

    def _note(self, url: URL, problem: str | None) -> None:
        """Tell of the first failure, of another reason, and of the end; the ones between are for debugging."""
        where = shown(url)
        if problem is not None:
            self._failures += 1
            level = logging.DEBUG if problem == self._problem else logging.WARNING
            logger.log(level, "the heartbeat to %s failed (%d in a row): %s", where, self._failures, problem)
        elif self._failures:
            logger.warning("the heartbeat to %s is answered again, after %d failures", where, self._failures)
            self._failures = 0
        self._problem = problem


def shown(url: URL) -> str:
    """The URL, for people: a user, a password and a query, which may hold a token, are left out."""
    return str(url.with_user(None).with_query(None).with_fragment(None))


def pause(interval: float, failures: int) -> float:
    """The seconds until the next heartbeat after so many failures in a row.

    They double with each failure, and no two frontends that lost one service come back together.
    """
    if failures == 0:
        return interval
    longest = max(interval, MAX_PAUSE_SECONDS)
    doubled = interval * 2 ** min(failures - 1, 16)
    return float(min(longest, doubled)) * random.uniform(0.5, 1.0)  # noqa: S311 - spreads, keeps no secret


async def address_towards(url: URL) -> str:
    """The address of this machine that it uses towards the URL's host; nothing is sent for it.

    Raises:
        OSError: there is no such host, or no way to it.
    """
    assert url.host is not None and url.port is not None, "checked when the options are read"
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_DGRAM)
    return _source_address(found)


def _source_address(found: Sequence[tuple[int, int, int, str, tuple[object, ...]]]) -> str:
    problem: OSError = OSError("no address was found")
    for family, kind, protocol, _, where in found:
        with contextlib.closing(socket.socket(family, kind, protocol)) as sock:
            try:
                sock.connect(where)  # a datagram socket: only the route is looked up
            except OSError as error:
                problem = error
                continue
            return str(sock.getsockname()[0])
    raise problem


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()


HEARTBEAT: web.AppKey[Heartbeat] = web.AppKey("heartbeat", Heartbeat)
