"""Chunk files of LMCache's file system connector, into the engine's local CPU: LMCache's `/cache/load-fs-chunks`."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Sequence
from typing import Any

from lmcache_api.bridge.abilities import ability
from lmcache_api.component import LoadedChunks, LoadError
from lmcache_shared.blocking import together
from lmcache_shared.config import read_yaml
from lmcache_shared.errors import ConfigError

logger = logging.getLogger(__name__)

AT_ONCE = 10
LOAD_SECONDS = 3600.0
CLOSE_SECONDS = 10.0
FILES = "fs://"
UNUSABLE = "no plain file of YAML with keys at the top, or too large"
SLASH = "-SEP-"
"""What the connector writes for a slash in a key."""


def load_chunks(engine: Any, config_path: str, max_chunks: int | None, max_failed_keys: int) -> LoadedChunks:
    """Bring the files that the configuration's `remote_url` (`fs://…`) leads to into local CPU.

    Raises:
        LoadError: the configuration cannot be used.
    """
    storage = ability(engine, "storage_manager")
    loop, cpu = ability(storage, "loop"), ability(storage, "local_cpu_backend")  # of now: it may have been recreated
    remote = _remote_backend(_configuration(config_path), ability(engine, "metadata"), loop, cpu)
    try:
        connector = ability(remote, "connection")
        names = list(asyncio.run(connector.list()))  # it scans the folder: not in the loop that serves the engine
        return _load(remote, cpu, names, max_chunks, max_failed_keys)
    finally:
        together([remote.close], at_once=1, seconds=CLOSE_SECONDS)


def _load(remote: Any, cpu: Any, names: Sequence[str], max_chunks: int | None, max_failed_keys: int) -> LoadedChunks:
    from lmcache.utils import CacheEngineKey

    def load(name: str) -> bool:
        key_text = name.replace(SLASH, "/")
        try:
            key = CacheEngineKey.from_string(key_text)
            chunk = remote.get_blocking(key)
            if chunk is None:
                return False
            cpu.submit_put_task(key, chunk)
            chunk.ref_count_down()
        except Exception as error:
            logger.warning("chunk %s is not loaded: %s", key_text, error)
            return False
        return True

    wanted = names[:max_chunks]
    calls = [functools.partial(load, name) for name in wanted]
    outcomes = zip(wanted, together(calls, at_once=AT_ONCE, seconds=LOAD_SECONDS), strict=True)
    failed = [name.replace(SLASH, "/") for name, outcome in outcomes if outcome is not True]
    return LoadedChunks(len(wanted) - len(failed), len(names), failed[:max_failed_keys])


def _configuration(path: str) -> Any:
    from lmcache.v1.config import LMCacheEngineConfig

    try:
        read_yaml(path, of_a_caller=True)  # it refuses what is too large, unfolds without end, or is no plain file
        return LMCacheEngineConfig.from_file(path)
    except ConfigError as error:  # only a system's error is told: others quote what the file holds
        raise LoadError(f"Invalid configuration file: {error.__cause__ or f'{path}: {UNUSABLE}'}") from None
    except Exception as error:
        raise LoadError(f"Invalid configuration file: {path}: {type(error).__name__}") from None


def _remote_backend(config: Any, metadata: Any, loop: Any, cpu: Any) -> Any:
    from lmcache.v1.storage_backend.remote_backend import RemoteBackend

    if not str(config.remote_url or "").startswith(FILES):
        raise LoadError(f"Failed to initialize RemoteBackend: remote_url must begin with {FILES}")
    try:
        remote = RemoteBackend(config=config, metadata=metadata, loop=loop, local_cpu_backend=cpu, dst_device="cpu")
        remote.init_connection()
    except Exception as error:
        raise LoadError(f"Failed to initialize RemoteBackend: {error}") from None
    return remote
