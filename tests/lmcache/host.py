"""A host process, as vLLM is one: a real LMCache with its own internal API server and ours beside it.

Run by the Python that has LMCache: `host.py CONFIG SOCKET_PREFIX_OF_OURS`. It says `READY` when both serve, obeys the
lines `stop` (our server; says `STOPPED`) and `start {JSON of settings to change}` (ours again; says `READY`), and ends
when its standard input does. Logs go to standard error.
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
        else:
            talk.write(f"no such command: {command}\n")
    server.stop()
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


def start_ours(manager: object) -> Any:
    from lmcache_api import InternalAPIServer

    server = InternalAPIServer(manager)
    server.start()
    if server.failure is not None or not server.enable:
        raise SystemExit(f"our server does not serve: {server.failure or 'it is not enabled'}")
    return server


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
