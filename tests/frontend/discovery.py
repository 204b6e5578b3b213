"""A discovery service that keeps every heartbeat, and answers as a test wants it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.test_utils import TestServer

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def success(request: web.Request) -> web.StreamResponse:
    return web.json_response({"status": "success"})


@dataclass
class Service:
    """`url` is where heartbeats go; each is kept with the time at which it came."""

    answer: Answer = success
    url: str = ""
    heartbeats: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.heartbeats.append(dict(request.query))
        self.times.append(time.monotonic())
        self._news.set()
        return await self.answer(request)

    async def receive(self, count: int, seconds: float = 10.0) -> list[dict[str, str]]:
        """The heartbeats, once so many have come."""
        deadline = time.monotonic() + seconds
        while len(self.heartbeats) < count:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), deadline - time.monotonic())
        return self.heartbeats


@contextlib.asynccontextmanager
async def discovery_service(answer: Answer = success) -> AsyncIterator[Service]:
    service = Service(answer)
    app = web.Application()
    app.router.add_get("/heartbeat", service.handle)
    async with TestServer(app, host="127.0.0.1") as server:
        service.url = str(server.make_url("/heartbeat"))
        yield service
