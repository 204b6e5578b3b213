"""LMCache's own standalone engine, started in this process with our internal API server in the place of its own."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lmcache_api.bridge.manager import ManagerComponent
from lmcache_shared.config import CONFIG_FILE_VARIABLE, convert, from_object, read_yaml
from lmcache_shared.errors import ConfigError, StartError
from lmcache_shared.settings import DEFINITIONS, EXTRA, Settings

logger = logging.getLogger(__name__)

INSTALL = "pip install lmcache"

LEAVE_SECONDS = 0.3


class StandaloneEngine:
    """What `python -m lmcache.v1.standalone` runs, without its server and its waiting.

    Starting it takes seconds and blocks; the settings are LMCache's file, environment and checks.

    Args:
        path: its configuration, by default what `LMCACHE_CONFIG_FILE` names, without that none.
        overrides: each `key=value`, over file and environment.
        worker_id: which worker it is.
        world_size: among how many.
        log_level: of LMCache's loggers, unless `LMCACHE_LOG_LEVEL` says otherwise.

    Raises:
        StartError: LMCache is not installed, or its engine does not start.
        ConfigError: a setting cannot be used.
    """

    def __init__(
        self, path: str | None, overrides: Sequence[str], *, worker_id: int, world_size: int, log_level: str
    ) -> None:
        os.environ.setdefault("LMCACHE_LOG_LEVEL", log_level.upper())  # it is read when LMCache is imported
        try:
            import torch
            from lmcache.v1.metadata import LMCacheMetadata
            from lmcache.v1.standalone.__main__ import LMCacheStandaloneStarter, parse_kvcache_shape_spec
        except ImportError as error:
            raise StartError(f"--engine lmcache: LMCache is not installed here ({error}); {INSTALL}") from None
        self._config, enabled = _configuration(path or os.environ.get(CONFIG_FILE_VARIABLE), overrides)
        settings = from_object(self._config, "LMCache's configuration", own_engine=True)
        metadata = LMCacheMetadata(
            model_name=settings.engine_model_name,
            world_size=world_size,
            local_world_size=world_size,
            worker_id=worker_id,
            local_worker_id=worker_id,
            kv_dtype=getattr(torch, settings.engine_dtype),
            kv_shape=_chunk_shape(settings, self._config.chunk_size),
            role="worker",
            use_mla=settings.engine_use_mla,
        )
        self._config.internal_api_server_enabled = False  # its own server is not to be made
        if settings.engine_use_mla:  # LMCache would broadcast to the other workers, and this process has none
            self._config.extra_config = {"save_only_first_rank": False, **(self._config.extra_config or {})}
        try:
            groups = parse_kvcache_shape_spec(_layers(settings))
            self._starter = LMCacheStandaloneStarter(self._config, metadata, groups, "cpu")
            self._starter.start()
        except Exception as error:
            starter = getattr(self, "_starter", None)
            if starter is not None:
                starter._manager.stop_services()
            raise StartError(f"LMCache's engine does not start: {type(error).__name__}: {error}") from error
        self._config.internal_api_server_enabled = enabled
        manager = self._starter._manager
        if getattr(manager, "_init_failed", False):
            reason = str(getattr(manager, "_init_failed_reason", "")).strip().splitlines()[-1:]
            self.stop()
            raise StartError(f"LMCache's engine does not start: {' '.join(reason)}")
        self.component = ManagerComponent(manager)

    def stop(self) -> None:
        """Takes seconds and blocks."""
        _leave_controller(self._starter._manager)
        self._starter.stop()


def _leave_controller(manager: Any) -> None:
    """Tell LMCache's controller that its worker goes, if there is one.

    LMCache puts the message into a queue and ends the queue's loop before anything is sent, so that the controller
    keeps the worker; and one of the tasks there cannot be cancelled, of which asyncio tells at length.
    """
    worker = getattr(getattr(manager, "lmcache_engine", None), "lmcache_worker", None)
    if worker is None:
        return

    async def leave() -> None:
        worker.deregister()
        await asyncio.sleep(LEAVE_SECONDS)
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)

    try:
        asyncio.run_coroutine_threadsafe(leave(), worker.loop).result(2 * LEAVE_SECONDS)
    except Exception as error:
        logger.warning("LMCache's worker did not leave its controller: %s: %s", type(error).__name__, error)


def _configuration(path: str | None, overrides: Sequence[str]) -> tuple[Any, bool]:
    """LMCache's configuration, and whether it lets us serve: run by hand it does, unless something says no."""
    from lmcache.v1.config import _CONFIG_DEFINITIONS, LMCacheEngineConfig
    from lmcache.v1.config_base import validate_and_set_config_value

    given: set[str] = set()
    try:
        if path is None:
            config = LMCacheEngineConfig.from_env()
        else:
            given.update(read_yaml(path))
            config = LMCacheEngineConfig.from_file(path)
            config.update_config_from_env()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path or 'environment'}: LMCache cannot use it: {error}") from None
    extra: dict[str, Any] = dict(config.extra_config or {})
    for override in overrides:
        key, equals, value = override.partition("=")
        name = key.strip().removeprefix(f"{EXTRA}.")
        if not equals or not name:
            raise ConfigError(f"--set {override}: expected key=value")
        if name in DEFINITIONS and DEFINITIONS[name].section == EXTRA:
            extra[name] = convert(value, DEFINITIONS[name], f"--set {key.strip()}")
        elif name not in _CONFIG_DEFINITIONS:
            raise ConfigError(f"--set {key}: LMCache has no such setting")
        elif not validate_and_set_config_value(config, name, value):
            raise ConfigError(f"--set {key}: LMCache cannot use {value!r}")
        given.add(name)
    config.extra_config = extra or None
    switch = "internal_api_server_enabled"
    is_given = switch in given or DEFINITIONS[switch].env_name in os.environ
    return config, bool(config.internal_api_server_enabled) or not is_given


def _chunk_shape(settings: Settings, chunk_size: int) -> tuple[int, ...]:
    heads = 1 if settings.engine_use_mla else settings.engine_heads
    return (settings.engine_layers, 1 if settings.engine_use_mla else 2, chunk_size, heads, settings.engine_head_size)


def _layers(settings: Settings) -> str:
    """The layers' tensors, as LMCache writes them: `(2,2,256,4,16):float16:2`."""
    shape: Mapping[bool, tuple[int, ...]] = {
        False: (
            2,
            settings.engine_blocks,
            settings.engine_block_size,
            settings.engine_heads,
            settings.engine_head_size,
        ),
        True: (settings.engine_blocks, settings.engine_block_size, settings.engine_head_size),
    }
    numbers = ",".join(map(str, shape[settings.engine_use_mla]))
    return f"({numbers}):{settings.engine_dtype}:{settings.engine_layers}"
