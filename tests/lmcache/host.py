"""A host process, as vLLM is one: a real LMCache worker and scheduler, each with LMCache's own server and ours.

Run by the Python that has LMCache: `host.py CONFIG SOCKET_PREFIX_OF_OURS`. It says `READY` when all serve, and ends
when its standard input does. Logs go to standard error. It obeys the lines

- `stop`: our server of the worker; says `STOPPED`;
- `start {JSON of settings to change}`: ours again; says `READY`;
- `kv [SHAPE, DTYPE]` (JSON): the worker's KV caches are two layers of this shape, filled; says `FILLED`;
- `record N`: the scheduler's lookup client records a request of N tokens; says `RECORDED`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

KV_SHAPE = (2, 2, 256, 4, 16)


def main(config_path: str, our_prefix: str) -> int:
    talk = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what LMCache prints is no answer of ours

    starter, config = start_lmcache(config_path)
    config.internal_api_server_socket_path_prefix = our_prefix  # LMCache's own server has read its prefix by now
    server = start_ours(starter._manager)
    scheduler = start_scheduler(config_path)
    scheduler.config.internal_api_server_socket_path_prefix = our_prefix
    scheduler_server = start_ours(scheduler)
    talk.write("READY\n")
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "stop":
            server.stop()
            talk.write("STOPPED\n")
        elif command == "start":
            for name, value in json.loads(argument).items():
                setattr(config, name, value)
            server = start_ours(starter._manager)
            talk.write("READY\n")
        elif command == "kv":
            starter.kv_caches = kv_caches(*json.loads(argument))
            talk.write("FILLED\n")
        elif command == "record":
            scheduler.lookup_client.recorder.record_async(list(range(int(argument))), argument)
            talk.write("RECORDED\n")
        else:
            talk.write(f"no such command: {command}\n")
    server.stop()
    scheduler_server.stop()
    scheduler.stop_services()
    starter.stop()
    return 0


def start_lmcache(config_path: str) -> tuple[Any, Any]:
    """What `python -m lmcache.v1.standalone --config CONFIG` does, without its waiting loop."""
    import torch
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.standalone.__main__ import LMCacheStandaloneStarter, parse_kvcache_shape_spec

    config = LMCacheEngineConfig.from_file(config_path)
    metadata = LMCacheMetadata(
        model_name="standalone_model",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.float16,
        kv_shape=KV_SHAPE,
        role="worker",
    )
    starter = LMCacheStandaloneStarter(config, metadata, parse_kvcache_shape_spec("(2,2,256,4,16):float16:2"), "cpu")
    starter.start()
    return starter, config


def start_scheduler(config_path: str) -> Any:
    """LMCache's manager as it is in a scheduler: a lookup client and no engine."""
    import torch
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.lookup_client.factory import LookupClientFactory
    from lmcache.v1.manager import LMCacheManager
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.standalone.standalone_service_factory import StandaloneServiceFactory

    class SchedulerFactory(StandaloneServiceFactory):  # type: ignore[misc]
        def get_or_create_lmcache_engine(self) -> None:
            return None

        def maybe_create_lookup_client(self) -> Any:
            return LookupClientFactory.create_lookup_client(self._config, self._metadata, None)

    config = LMCacheEngineConfig.from_file(config_path)
    config.enable_chunk_statistics = True
    config.extra_config = {"chunk_statistics_mem_bf_expected_chunks": 1000}  # LMCache counts the bits one by one
    config.lmcache_instance_id = "scheduler_of_the_tests"
    metadata = LMCacheMetadata(
        model_name="standalone_model",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.float16,
        kv_shape=KV_SHAPE,
        role="scheduler",
        engine_id="engine_of_the_tests",
    )
    manager = LMCacheManager(config, SchedulerFactory(config, metadata, None, None, None))
    manager.start_services()
    return manager


def kv_caches(shape: list[int], dtype: str) -> dict[str, Any]:
    import torch

    torch.manual_seed(1)
    names = ("model.layers.10", "model.layers.9")  # in this order, which is not that of the names
    return {name: (torch.rand(shape) * 100).to(getattr(torch, dtype)) for name in names}


def start_ours(manager: object) -> Any:
    from lmcache_api import InternalAPIServer

    server = InternalAPIServer(manager)
    server.start()
    if server.failure is not None or not server.enable:
        raise SystemExit(f"our server does not serve: {server.failure or 'it is not enabled'}")
    return server


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
