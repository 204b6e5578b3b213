"""The internal API server of one component: which address it has, how it starts and how it stops.

`ComponentServer` lives in the caller's event loop. `InternalAPIServer` runs one in a thread of its own, inside a host
process that may know nothing of asyncio: the place of LMCache's class of that name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from types import TracebackType

import uvloop

from lmcache_api.app import create_app
from lmcache_api.component import Component
from lmcache_shared.errors import OpsError
from lmcache_shared.listen import make_runner, make_site
from lmcache_shared.placement import place, serves

logger = logging.getLogger(__name__)

START_SECONDS = 15.0
"""How long `InternalAPIServer.start` waits for its thread to listen."""

STOP_SECONDS_BEYOND_DRAIN = 2.0


class ComponentServer:
    """Serves one component on the address its settings give it, in the event loop that starts it.

        async with ComponentServer(component) as server:
            print(server.placement.address)

    Raises:
        ConfigError: the settings give the component no usable address.
        RouteError: a route module is broken, or two claim one route.
    """

    def __init__(self, component: Component) -> None:
        self.component = component
        self.placement = place(component.settings, component.index)
        settings = component.settings
        self._runner = make_runner(
            create_app(component),
            drain_seconds=settings.internal_api_server_drain_seconds,
            access_log=logger.getChild(self.placement.name) if settings.internal_api_server_access_log else None,
        )

    async def start(self) -> None:
        """Listen.

        Raises:
            AddressInUse: somebody serves there already.
            AddressError: the address cannot be listened on.
        """
        await self._runner.setup()
        mode = self.component.settings.internal_api_server_socket_mode
        try:
            await make_site(self._runner, self.placement.address, socket_mode=mode).start()
        except BaseException:
            await self._runner.cleanup()
            raise

    async def stop(self) -> None:
        """Take no more connections, remove the socket, let requests in flight end within the drain time."""
        await self._runner.cleanup()

    async def __aenter__(self) -> ComponentServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


class _Run:
    """One start of a server in a thread, and how it is told to end: also before it listens."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.thread: threading.Thread | None = None
        self._ending = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    async def until_end(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.ready.set()
        if not self._ending.is_set():  # or it was ended when there was no loop to tell
            await self._stop.wait()

    def end(self) -> None:
        self._ending.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed already
                self._loop.call_soon_threadsafe(self._stop.set)


class InternalAPIServer:
    """The server in a thread of its own, with the constructor and methods of LMCache's class of that name.

    Nothing that goes wrong here takes the host process down: what cannot be served is logged in one line and kept
    in `failure`, and the engine goes on without its API, as with LMCache's own.

    Args:
        lmcache_manager: an object with the attributes of LMCache's manager, or a `Component`.

    Attributes:
        enable: whether the settings let this component serve.
        failure: why it does not serve although it should, or `None`.
    """

    def __init__(self, lmcache_manager: object) -> None:
        self.enable = False
        self.failure: OpsError | None = None
        self._manager = lmcache_manager
        self._stopped = False
        self._run: _Run | None = None
        self._server: ComponentServer | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Make the server that the settings ask for now."""
        try:
            component = _component(self._manager)
            settings = component.settings
            self.enable = settings.internal_api_server_enabled and serves(settings, component.index)
            if self.enable:
                self._server = ComponentServer(component)
            else:
                logger.info(
                    "internal API of %s (index %d) is off: internal_api_server_enabled=%s, include list %s",
                    component.role,
                    component.index,
                    settings.internal_api_server_enabled,
                    settings.internal_api_server_include_index_list,
                )
        except OpsError as error:
            self._fail(error)
        except Exception as error:  # an attribute of the host's object that raises, say
            logger.debug("what went wrong", exc_info=True)
            self._fail(OpsError(f"{type(error).__name__}: {error}"))

    @property
    def address(self) -> str | None:
        """Where it serves, or would: `host:port` or a socket's path."""
        return str(self._server.placement.address) if self._server else None

    def start(self) -> None:
        """Serve from a thread named `api-server-thread`; returns when it listens or has failed.

        After `stop`, or when it could not serve, it starts anew, with the settings as they are then.
        """
        run = self._run
        if run is not None and run.thread is not None and run.thread.is_alive():
            return
        if run is not None or self._stopped:
            self._stopped = False
            self.failure = None
            self._server = None
            self._prepare()
        if self._server is None:
            return
        run = self._run = _Run()
        thread = run.thread = threading.Thread(
            target=self._serve_in_thread, args=(self._server, run), name="api-server-thread", daemon=True
        )
        thread.start()
        if not run.ready.wait(START_SECONDS):
            logger.error("internal API on %s: not listening after %g seconds", self.address, START_SECONDS)
        elif self.failure is not None:
            thread.join(STOP_SECONDS_BEYOND_DRAIN)  # it has failed, and ends

    def stop(self) -> None:
        """Stop serving; returns when the socket is gone and requests in flight have ended, within the drain time."""
        run, server = self._run, self._server
        if run is None or run.thread is None or server is None:
            return
        run.end()
        run.thread.join(server.component.settings.internal_api_server_drain_seconds + STOP_SECONDS_BEYOND_DRAIN)
        if run.thread.is_alive():
            logger.warning("internal API on %s: it did not end in time; its thread is left", self.address)
        self._run = None
        self._stopped = True
        self._server = None

    def _serve_in_thread(self, server: ComponentServer, run: _Run) -> None:
        loop = uvloop.new_event_loop()
        try:
            loop.run_until_complete(self._serve(server, run))
        finally:
            run.ready.set()
            loop.close()

    async def _serve(self, server: ComponentServer, run: _Run) -> None:
        try:
            async with server:
                logger.info("internal API of %s serves on %s", server.placement.name, server.placement.address)
                await run.until_end()
        except OpsError as error:
            self._fail(error)
        except Exception as error:
            logger.debug("what went wrong", exc_info=True)
            self._fail(OpsError(f"{type(error).__name__}: {error}"))

    def _fail(self, error: OpsError) -> None:
        self.failure = error
        logger.error("internal API does not serve: %s", error)


def _component(manager: object) -> Component:
    """A component is taken as it is; anything else is looked at as LMCache's manager."""
    if hasattr(manager, "periodic_threads") and hasattr(manager, "metrics"):
        return manager  # type: ignore[return-value]
    from lmcache_api.bridge.manager import ManagerComponent

    return ManagerComponent(manager)
