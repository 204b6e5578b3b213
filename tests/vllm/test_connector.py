"""The connector around a stand-in of LMCache's: what it switches, what it gives back, and when it serves."""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.lmcache.processes import ROOT, ask, client_of, short_folder
from tests.vllm.processes import connector as connector_option

CONNECTOR = "lmcache_api.bridge.vllm_connector"
SWITCH = "internal_api_server_enabled"


class Deployment:
    """One process with LMCache's configuration and a stand-in of vLLM's connector for it."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "ops_6999"
        self.config = SimpleNamespace(
            internal_api_server_enabled=True,
            internal_api_server_socket_path_prefix=str(folder / "ops"),
            runtime_plugin_locations=["plugin.py"],
        )
        self.extra: dict[str, Any] = {}
        self.seen: list[object] = []
        """What LMCache found of the switch while the connector was made."""
        self.plugins: list[object] = []
        """What of it each plugin was told, and whether our server was there."""
        self.fails: Exception | None = None
        self.makes_server = True
        self.metadata: object = None
        self.socket_at_shutdown: bool | None = None
        self.module: Any = None

    def connector(self) -> Any:
        transfer = SimpleNamespace(kv_connector_extra_config=self.extra, get_from_extra_config=self.extra.get)
        return self.module.LMCacheOpsConnector(SimpleNamespace(kv_transfer_config=transfer), "scheduler", None)

    def made(self, connector: Any) -> None:
        """What LMCache's constructors do: the command line over the file, then a server if that says so."""
        for key, value in self.extra.items():
            setattr(self.config, key.removeprefix("lmcache."), value)
        self.seen.append(self.config.internal_api_server_enabled)
        if self.fails is not None:
            raise self.fails
        server = SimpleNamespace() if self.makes_server else None
        manager = SimpleNamespace(lmcache_engine=None, config=self.config, api_server=server)
        manager.lmcache_engine_metadata = self.metadata
        manager._runtime_plugin_launcher = SimpleNamespace(launch_plugins=self.launch)
        self.launch()
        connector._lmcache_engine = SimpleNamespace(_manager=manager)

    def launch(self) -> None:
        for _ in self.config.runtime_plugin_locations or ():
            self.plugins.append((self.config.internal_api_server_enabled, self.socket.exists()))


@pytest.fixture
def deployment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    with short_folder() as folder:
        deployment = Deployment(folder)

        class LMCacheConnectorV1:
            def __init__(self, vllm_config: object, role: object, kv_cache_config: object) -> None:
                deployment.made(self)

            def shutdown(self) -> None:
                deployment.socket_at_shutdown = deployment.socket.exists()

        stand_ins: dict[str, dict[str, object]] = {
            "lmcache.integration.vllm.utils": {"lmcache_get_or_create_config": lambda: deployment.config},
            "lmcache.logging": {"init_logger": logging.getLogger},
            "lmcache.v1.config_base": {"validate_and_set_config_value": setattr},
            "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector": {
                "LMCacheConnectorV1": LMCacheConnectorV1
            },
        }
        for path, names in stand_ins.items():
            parts = path.split(".")
            for end in range(1, len(parts)):
                monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
            module = ModuleType(path)
            vars(module).update(names)
            monkeypatch.setitem(sys.modules, path, module)
        monkeypatch.delitem(sys.modules, CONNECTOR, raising=False)
        deployment.module = importlib.import_module(CONNECTOR)
        yield deployment
        sys.modules.pop(CONNECTOR, None)


@pytest.mark.parametrize(
    "extra",
    [{}, {f"lmcache.{SWITCH}": True, "lmcache.runtime_plugin_locations": ["another.py"], "lmcache.chunk_size": 16}],
)
def test_ours_serves_in_the_place_of_lmcaches(deployment: Deployment, extra: dict[str, Any]) -> None:
    """Whether the file or the command line asks for it; both are as they were afterwards."""
    deployment.extra = dict(extra)
    connector = deployment.connector()
    assert deployment.seen == [False]
    assert deployment.config.internal_api_server_enabled is True
    assert deployment.config.runtime_plugin_locations == extra.get("lmcache.runtime_plugin_locations", ["plugin.py"])
    assert deployment.plugins == [(True, True)]
    assert deployment.extra == extra
    assert deployment.socket.is_socket()
    connector.shutdown()
    assert deployment.socket_at_shutdown is False
    assert not deployment.socket.exists()


async def test_meta_tells_no_secret_of_the_command_line(deployment: Deployment) -> None:
    deployment.metadata = SimpleNamespace(
        model_name="m", kv_connector_extra_config={"redis_password": "x", "lmcache.remote_url": "redis://u:x@h", "n": 1}
    )
    connector = deployment.connector()
    async with client_of(deployment.socket) as client:
        told = (await ask(client, "GET", "/meta")).json()
    connector.shutdown()
    extra = {"redis_password": "***", "lmcache.remote_url": "***", "n": 1}
    assert told == {"model_name": "m", "kv_connector_extra_config": extra}


def test_the_command_line_may_switch_it_on_or_off(deployment: Deployment) -> None:
    deployment.config.internal_api_server_enabled = False
    deployment.extra = {f"lmcache.{SWITCH}": True}
    connector = deployment.connector()
    assert deployment.socket.is_socket()
    connector.shutdown()
    deployment.extra = {f"lmcache.{SWITCH}": False}
    connector = deployment.connector()
    assert deployment.config.internal_api_server_enabled is False
    assert not deployment.socket.exists()
    connector.shutdown()


def test_an_engine_that_does_not_start_leaves_the_settings_as_they_were(deployment: Deployment) -> None:
    deployment.extra = {f"lmcache.{SWITCH}": True}
    deployment.fails = RuntimeError("no GPU")
    with pytest.raises(RuntimeError, match="no GPU"):
        deployment.connector()
    assert deployment.config.internal_api_server_enabled is True
    assert deployment.extra == {f"lmcache.{SWITCH}": True}


def test_where_lmcache_has_no_server_neither_have_we(deployment: Deployment) -> None:
    """Beyond data parallel rank 0, say: two would want one address."""
    deployment.makes_server = False
    connector = deployment.connector()
    assert not deployment.socket.exists()
    connector.shutdown()
    assert deployment.socket_at_shutdown is False


def test_a_server_that_raises_does_not_hinder_the_engine(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(manager: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(deployment.module, "InternalAPIServer", broken)
    connector = deployment.connector()
    assert "no internal API in this process" in caplog.text
    connector.shutdown()
    assert deployment.config.internal_api_server_enabled is True


def test_a_server_that_does_not_stop_does_not_hinder_lmcaches_end(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    connector = deployment.connector()
    stop = connector._internal_api.stop

    def broken() -> None:
        stop()
        raise RuntimeError("no")

    monkeypatch.setattr(connector._internal_api, "stop", broken)
    connector.shutdown()
    assert deployment.socket_at_shutdown is False  # LMCache's own shutdown ran
    assert "our internal API server did not stop" in caplog.text


def test_an_adapter_without_a_manager_does_not_hinder_the_engine(deployment: Deployment) -> None:
    made = deployment.made

    def without_manager(connector: Any) -> None:
        made(connector)
        del connector._lmcache_engine._manager

    deployment.made = without_manager  # type: ignore[method-assign]
    deployment.connector().shutdown()
    assert not deployment.socket.exists()


def test_vllms_own_copy_of_the_adapter_is_left_alone(deployment: Deployment) -> None:
    deployment.extra = {"use_native": True, f"lmcache.{SWITCH}": True}
    deployment.connector().shutdown()
    assert deployment.seen == [True]
    assert not deployment.socket.exists()


def test_plugins_that_cannot_be_started_do_not_hinder_the_engine(deployment: Deployment) -> None:
    def broken() -> None:
        raise OSError("no more processes")

    made = deployment.made

    def with_broken_launcher(connector: Any) -> None:
        made(connector)
        connector._lmcache_engine._manager._runtime_plugin_launcher.launch_plugins = broken

    deployment.made = with_broken_launcher  # type: ignore[method-assign]
    connector = deployment.connector()
    assert deployment.socket.is_socket()
    connector.shutdown()


def test_the_documented_line_is_the_tested_one() -> None:
    line = re.search(r"--kv-transfer-config '(.*)'", (ROOT / "docs" / "vllm.md").read_text())
    assert line
    assert json.loads(line[1]) == json.loads(connector_option())


def test_vllms_version_is_in_what_its_connector_tells() -> None:
    """LMCache 0.5.6's manager passes that on, and no version."""
    from lmcache_api.bridge.manager import ManagerInference

    assert (
        ManagerInference(SimpleNamespace(get_inference_info=lambda: {"vllm_version": "0.32.0"})).version() == "0.32.0"
    )
    assert ManagerInference(SimpleNamespace(get_inference_version=lambda: "0.33.0")).version() == "0.33.0"
