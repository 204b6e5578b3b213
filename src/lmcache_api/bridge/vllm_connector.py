"""LMCache's connector for vLLM, with our internal API server in the place of its own; nothing is patched.

vLLM loads it by name, in the scheduler and in every worker:

    --kv-transfer-config '{"kv_connector": "LMCacheOpsConnector", "kv_role": "kv_both",
                           "kv_connector_module_path": "lmcache_api.bridge.vllm_connector"}'

It is vLLM's own `LMCacheConnectorV1`, which holds LMCache's adapter. LMCache's package has a connector as well
(`LMCacheConnectorV1Dynamic`), but vLLM's keeps up with the vLLM that calls it: it resets the state of layerwise loads
at each step and passes KV events on, which the other does not.

LMCache's adapter names the manager and the service factory that it makes by their classes, and starts what they made
before its constructor returns: no argument and no method lets another server in. So LMCache's setting
`internal_api_server_enabled` is false while the connector is made, as in a deployment without that server, and is put
back as it was before ours is made of the manager. This takes two functions of LMCache and the adapter's manager; a
subclass of the adapter would need copies of two constructors, and a copy that has fallen behind stops an engine.
One thing sees the false value: the configuration that LMCache's runtime plugins are given at their start.

This module is imported where vLLM and LMCache are, and by nothing of ours.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from lmcache.integration.vllm.utils import lmcache_get_or_create_config
from lmcache.logging import init_logger
from lmcache.v1.config_base import validate_and_set_config_value
from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1

from lmcache_api.server import InternalAPIServer

logger = logging.getLogger(__name__)

SWITCH = "internal_api_server_enabled"


class LMCacheOpsConnector(LMCacheConnectorV1):  # type: ignore[misc]
    """vLLM calls the constructor and `shutdown`; everything between is LMCache's."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        with _without_own_server(vllm_config.kv_transfer_config):
            super().__init__(vllm_config, role, kv_cache_config)
        self._internal_api = _serve(getattr(self._lmcache_engine, "_manager", None))

    def shutdown(self) -> Any:
        """Our server first, so that nobody asks what is being closed."""
        if self._internal_api is not None:
            self._internal_api.stop()
        return super().shutdown()


@contextlib.contextmanager
def _without_own_server(kv_transfer_config: Any) -> Iterator[None]:
    """LMCache's server is off meanwhile: in its configuration, and in what the command line says over that."""
    config = lmcache_get_or_create_config()  # the same object for all in this process
    extra = kv_transfer_config.kv_connector_extra_config or {}
    key = f"lmcache.{SWITCH}"
    given = {key: extra[key]} if key in extra else {}
    if given:
        validate_and_set_config_value(config, SWITCH, given[key])
        extra[key] = False
    wanted = getattr(config, SWITCH)
    setattr(config, SWITCH, False)
    try:
        yield
    finally:
        setattr(config, SWITCH, wanted)
        extra.update(given)


def _serve(manager: Any) -> InternalAPIServer | None:
    """Our server, in each process for which LMCache has made one of its own, which is off.

    It makes none beyond data parallel rank 0, and none for a worker whose engine did not start.
    """
    if not logging.getLogger("lmcache_api").hasHandlers():
        init_logger("lmcache_api")  # our lines beside LMCache's
    if getattr(manager, "api_server", None) is None:
        logger.info("no internal API in this process: LMCache has made no server for it")
        return None
    try:
        server = InternalAPIServer(manager)
        server.start()
    except Exception:  # no thread can be started, say
        logger.exception("no internal API in this process")
        return None
    return server
