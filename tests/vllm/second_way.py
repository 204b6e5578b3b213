"""LMCache's manager of a vLLM scheduler, made by a service factory that hands it our `InternalAPIServer`.

`second_way.py MODEL`; the settings are the environment's. It says `READY`, and ends when its standard input does.
"""

import os
import sys
from typing import Any


def main(model: str) -> None:
    talk = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from lmcache.integration.vllm.utils import lmcache_get_or_create_config
    from lmcache.integration.vllm.vllm_service_factory import VllmServiceFactory
    from lmcache.v1.manager import LMCacheManager
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    from lmcache_api import InternalAPIServer

    class ServiceFactory(VllmServiceFactory):  # type: ignore[misc]
        def maybe_create_internal_api_server(self, lmcache_manager: Any) -> InternalAPIServer:
            return InternalAPIServer(lmcache_manager)

    transfer = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
    vllm_config = EngineArgs(model, enforce_eager=True, kv_transfer_config=transfer).create_engine_config()
    config = lmcache_get_or_create_config()
    manager = LMCacheManager(config, ServiceFactory(config, vllm_config, "scheduler"))
    manager.start_services()
    talk.write("READY\n")
    sys.stdin.read()
    manager.stop_services()
    talk.write("ENDED\n")


if __name__ == "__main__":
    main(sys.argv[1])
