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
back as it was before ours is made of the manager. LMCache's runtime plugins are told the configuration when they are
started, and one of them may be our frontend: they are held back in the same way, and started by LMCache's launcher when
ours serves. This takes two functions of LMCache and two attributes; a subclass of the adapter would need copies of two
constructors, and a copy that has fallen behind stops an engine.

This module is imported where vLLM and LMCache are, and by nothing of ours.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from lmcache.integration.vllm.utils import lmcache_get_or_create_config
from lmcache.logging import init_logger
from lmcache.v1.config_base import validate_and_set_config_value
from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1

from lmcache_api.server import InternalAPIServer

logger = logging.getLogger(__name__)

MEANWHILE: Mapping[str, object] = {"internal_api_server_enabled": False, "runtime_plugin_locations": None}
"""LMCache's settings while the connector is made: no server of its own, no plugins yet."""


class LMCacheOpsConnector(LMCacheConnectorV1):  # type: ignore[misc]
    """vLLM calls the constructor and `shutdown`; everything between is LMCache's."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._internal_api: InternalAPIServer | None = None
        transfer = vllm_config.kv_transfer_config
        if transfer.get_from_extra_config("use_native", False):
            # vLLM's older copy of the adapter has settings of its own, no manager, and starts LMCache's server itself.
            super().__init__(vllm_config, role, kv_cache_config)
            return
        with _settings_meanwhile(transfer.kv_connector_extra_config or {}):
            super().__init__(vllm_config, role, kv_cache_config)
        manager = getattr(self._lmcache_engine, "_manager", None)
        if not logging.getLogger("lmcache_api").hasHandlers():
            init_logger("lmcache_api")  # our lines beside LMCache's
        try:
            self._internal_api = _serve(manager)
        except Exception:  # no thread can be started, say
            logger.exception("no internal API in this process")
        try:
            _launch_plugins(manager)
        except Exception:
            logger.exception("LMCache's runtime plugins are not started")

    def shutdown(self) -> Any:
        """Our server first, so that nobody asks what is being closed."""
        if self._internal_api is not None:
            try:
                self._internal_api.stop()
            except Exception:
                logger.exception("our internal API server did not stop")
        return super().shutdown()


@contextlib.contextmanager
def _settings_meanwhile(extra: dict[str, Any]) -> Iterator[None]:
    """Hold LMCache's configuration at `MEANWHILE`, and what the command line, `extra`, says over it."""
    config = lmcache_get_or_create_config()  # the same object for all in this process
    given = {key: extra[key] for name in MEANWHILE if (key := f"lmcache.{name}") in extra}
    for key, value in given.items():
        validate_and_set_config_value(config, key.removeprefix("lmcache."), value)
    wanted = {name: getattr(config, name) for name in MEANWHILE if hasattr(config, name)}
    extra.update({key: MEANWHILE[key.removeprefix("lmcache.")] for key in given})
    for name in wanted:
        setattr(config, name, MEANWHILE[name])
    try:
        yield
    finally:
        extra.update(given)
        for name, value in wanted.items():
            setattr(config, name, value)


def _serve(manager: Any) -> InternalAPIServer | None:
    """Our server, in each process for which LMCache has made one of its own, which is off.

    It makes none beyond data parallel rank 0, and none for a worker whose engine did not start.
    """
    if getattr(manager, "api_server", None) is None:
        logger.info("no internal API in this process: LMCache has made no server for it")
        return None
    server = InternalAPIServer(manager)
    server.start()
    return server


def _launch_plugins(manager: Any) -> None:
    """What LMCache would have done while it was made; there is no launcher beyond data parallel rank 0."""
    launcher = getattr(manager, "_runtime_plugin_launcher", None)
    if launcher is not None:
        launcher.launch_plugins()
