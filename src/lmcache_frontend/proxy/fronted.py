"""A server with the front before it: the runner of the frontend's application, whose sites make front's connections."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from lmcache_frontend.proxy.front import Front, Others


class FrontedRunner(web.AppRunner):
    """Runs an application with a `Front` before aiohttp's server.

    Args:
        app: the application.
        access_log: where a line for each request goes.
        shutdown_timeout: half of how long requests may take at the end.
        **options: as of `web.AppRunner`.
    """

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(app, **options)
        self._access_log = options["access_log"]
        self._half_drain_seconds: float = options["shutdown_timeout"]
        self._front: Front | None = None
        self.others: Others = _nobody
        """Goes on with connections that carry other requests than the front serves, from `setup` on."""

    @property
    def server(self) -> Any:
        """What makes the protocol of a connection: a site asks for it."""
        return self._front

    async def setup(self) -> None:
        await super().setup()
        server = super().server
        assert server is not None, "it has been made"
        self.others = handing_to(server)
        self._front = Front(self.app, self.others, access_log=self._access_log)

    async def shutdown(self) -> None:
        self.others = _nobody
        await super().shutdown()
        server = super().server
        if self._front is not None and server is not None:  # aiohttp's waits twice: for requests, and for connections
            both = (self._front.shutdown(2 * self._half_drain_seconds), server.shutdown(self._half_drain_seconds))
            await asyncio.gather(*both)


def _nobody(transport: asyncio.Transport, data: bytes) -> None:
    """Before the start and after the end."""
    transport.abort()


def handing_to(server: web.Server) -> Others:
    """Makes a server of aiohttp's go on with connections."""

    def hand_over(transport: asyncio.Transport, data: bytes) -> None:
        handler = server()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        handler.data_received(data)

    return hand_over
