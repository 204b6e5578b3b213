"""LMCache's own controller manager, started in this process in an event loop and a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from lmcache_api.bridge.controller import ControllerComponent
from lmcache_api.bridge.standalone import INSTALL
from lmcache_shared.address import tcp_address
from lmcache_shared.config import CONFIG_FILE_VARIABLE, load, read_yaml
from lmcache_shared.errors import AddressError, ConfigError, StartError
from lmcache_shared.settings import Settings

logger = logging.getLogger(__name__)

START_SECONDS = 15.0
STOP_SECONDS = 5.0
END_SECONDS = 1.0
"""For what still goes on when it is stopped."""

PAUSE_SECONDS = 0.1
"""Before a handler begins again, so that one that cannot is no busy loop."""


class StandaloneController:
    """LMCache's controller manager, started in a thread of its own.

    Args:
        path: LMCache's controller configuration, by default what `LMCACHE_CONTROLLER_CONFIG_FILE` names.
        overrides: each `key=value`: a key of that configuration, or a setting of our server.
        log_level: of LMCache's loggers, unless `LMCACHE_LOG_LEVEL` says otherwise.

    Raises:
        StartError: LMCache is not installed, or its controller does not start.
        ConfigError: a setting cannot be used.
    """

    def __init__(self, path: str | None, overrides: Sequence[str], *, log_level: str) -> None:
        os.environ.setdefault("LMCACHE_LOG_LEVEL", log_level.upper())  # it is read when LMCache is imported
        try:
            from lmcache.v1.cache_controller.controller_manager import LMCacheControllerManager
        except ImportError as error:
            raise StartError(f"--engine lmcache: LMCache is not installed here ({error}); {INSTALL}") from None
        config, settings = _configuration(path, overrides)
        urls = urls_of(config.controller_host, config.controller_monitor_ports)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lmcache-controller", daemon=True)
        self._thread.start()

        async def make() -> Any:
            return LMCacheControllerManager(urls, config.health_check_interval, config.lmcache_worker_timeout)

        try:
            self._manager = asyncio.run_coroutine_threadsafe(make(), self._loop).result(START_SECONDS)
        except Exception as error:
            self._end_loop()
            raise StartError(f"LMCache's controller does not start: {type(error).__name__}: {error}") from None
        self._serving = asyncio.run_coroutine_threadsafe(_serve(self._manager), self._loop)
        self.component = ControllerComponent(self._manager, self._loop, config, settings)

    def stop(self) -> None:
        """End the manager; blocks for a moment."""
        closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        try:
            closing.result(STOP_SECONDS)
        except concurrent.futures.TimeoutError:
            logger.warning("LMCache's controller did not end within %g seconds; its thread is left", STOP_SECONDS)
        except Exception as error:
            logger.warning("LMCache's controller did not end as it should: %s: %s", type(error).__name__, error)
        self._end_loop()

    async def _close(self) -> None:
        """Without waiting for messages to workers that are gone, which zmq keeps for ever."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=END_SECONDS)
        self._manager.zmq_context.destroy(linger=0)
        self._manager.close()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)


async def _serve(manager: Any) -> None:
    """What LMCache's `start_all` runs, begun again when it ends."""
    handlers: dict[str, Callable[[], Awaitable[object]]] = {
        "pull": lambda: manager.handle_batched_push_request(manager.controller_pull_socket),
        "reply": lambda: manager.handle_batched_req_request(manager.controller_reply_socket),
    }
    if manager.controller_heartbeat_socket is not None:
        handlers["heartbeat"] = lambda: manager.handle_heartbeat_request(manager.controller_heartbeat_socket)
    await asyncio.gather(*(kept_up(name, handle) for name, handle in handlers.items()))


async def kept_up(name: str, handle: Callable[[], Awaitable[object]]) -> None:
    """Begin `handle` again whenever it ends: at LMCache one message that cannot be read ends it, and nobody is told."""
    while True:
        try:
            await handle()
            why = "it ended"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        logger.warning("LMCache's controller: what came at its %s port cannot be used, and it goes on: %s", name, why)
        await asyncio.sleep(PAUSE_SECONDS)


def _configuration(path: str | None, overrides: Sequence[str]) -> tuple[Any, Settings]:
    """LMCache's controller configuration, and our server's settings: its host and port, sockets if they are set."""
    from lmcache.v1.cache_controller.config import (
        _CONTROLLER_CONFIG_DEFINITIONS,
        load_controller_config_with_overrides,
    )
    from lmcache.v1.config_base import validate_and_set_config_value

    path = path or os.environ.get("LMCACHE_CONTROLLER_CONFIG_FILE") or os.environ.get(CONFIG_FILE_VARIABLE)
    if path is not None:
        read_yaml(path)
    theirs = [text for text in overrides if text.partition("=")[0].strip() in _CONTROLLER_CONFIG_DEFINITIONS]
    ours = [text for text in overrides if text not in theirs or text.startswith("controller_port=")]
    try:
        config = load_controller_config_with_overrides(config_file_path=path, overrides={})
    except Exception as error:
        raise ConfigError(f"{path or 'environment'}: LMCache cannot use it: {error}") from None
    for override in theirs:
        key, _, value = override.partition("=")
        if not validate_and_set_config_value(config, key.strip(), value):
            raise ConfigError(f"--set {key}: LMCache cannot use {value!r}")
    where = [f"internal_api_server_host={config.controller_host}", f"controller_port={config.controller_port}"]
    settings = load(path, overrides=["internal_api_server_enabled=true", *where, *ours])
    return config, settings


def urls_of(host: str, monitor_ports: object) -> dict[str, str | None]:
    """Where LMCache's controller binds its sockets; it would fail in a thread, or take port 0 for any.

    Raises:
        ConfigError: one is missing, is no port, or is there twice.
    """
    ports = monitor_ports if isinstance(monitor_ports, Mapping) else {}
    if "pull" not in ports or "reply" not in ports:
        raise ConfigError('controller_monitor_ports: expected {"pull": PORT, "reply": PORT}')
    urls: dict[str, str | None] = {}
    for name in ("pull", "reply", "heartbeat"):
        port = ports.get(name)
        if name == "heartbeat" and port is None:
            urls[name] = None
            continue
        try:
            urls[name] = str(tcp_address(host, str(port)))
        except AddressError as error:
            raise ConfigError(f"controller_monitor_ports: {name}: {error}") from None
    found = [url for url in urls.values() if url is not None]
    if len(set(found)) < len(found):
        raise ConfigError(f"controller_monitor_ports: {dict(ports)}: each needs a port of its own")
    return urls
