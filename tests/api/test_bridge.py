"""A manager that lacks something: that ability is missing, and nothing becomes a 500.

What a whole manager answers is asked of a real LMCache, in tests/lmcache.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import types
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from prometheus_client import REGISTRY, Gauge

from lmcache_api.bridge import turns
from lmcache_api.bridge.controller import ControllerMetrics, ManagerController
from lmcache_api.bridge.manager import ManagerComponent
from lmcache_api.bridge.standalone_controller import kept_up, urls_of
from lmcache_api.component import ControllerError, Operation
from lmcache_api.pytest_plugin import RunningApi, StartApi
from lmcache_shared.errors import ConfigError, Refusal
from lmcache_shared.settings import Settings

QUESTIONS = [
    ("GET", "/backends"),
    ("POST", "/backends"),
    ("DELETE", "/backends/X"),
    ("POST", "/backends/X/recreate"),
    ("GET", "/bypass/list"),
    ("PUT", "/bypass/add?backend_name=X"),
    ("PUT", "/bypass/remove?backend_name=X"),
    ("PUT", "/freeze/enable"),
    ("PUT", "/freeze/disable"),
    ("GET", "/freeze/status"),
    ("PUT", "/hot_cache/enable"),
    ("PUT", "/hot_cache/disable"),
    ("GET", "/hot_cache/status"),
    ("POST", "/cache/store?tokens_mock=0,512"),
    ("POST", "/cache/retrieve?tokens_mock=0,512"),
    ("GET", "/cache/lookup?tokens_mock=0,512"),
    ("DELETE", "/cache/clear"),
    ("GET", "/lookup/info"),
    ("POST", "/lookup/close"),
    ("POST", "/lookup/create"),
    ("POST", "/lookup/recreate"),
    ("GET", "/chunk_statistics/status"),
    ("POST", "/chunk_statistics/start"),
    ("GET", "/inference_info"),
    ("GET", "/inference_version"),
    ("POST", "/cache/load-fs-chunks"),
    ("GET", "/conf"),
]


def bare(role: str) -> Any:
    """The least that is a manager: a configuration, and for a worker an engine that knows which one it is."""

    def manager(settings: Settings, index: int) -> ManagerComponent:
        config = SimpleNamespace(
            internal_api_server_enabled=True,
            internal_api_server_socket_path_prefix=settings.internal_api_server_socket_path_prefix,
            internal_api_server_port_start=settings.internal_api_server_port_start,
        )
        engine = SimpleNamespace(config=config, metadata=SimpleNamespace(worker_id=index - 1))
        with_engine = {"lmcache_engine": engine} if role == "worker" else {}
        return ManagerComponent(SimpleNamespace(config=config, **with_engine))

    return manager


@pytest.fixture(params=["worker", "scheduler"])
async def server(request: pytest.FixtureRequest, api_server: StartApi) -> RunningApi:
    return await api_server(role=request.param, component=bare(request.param))


@pytest.mark.parametrize(("method", "path"), QUESTIONS, ids=str)
async def test_what_a_manager_lacks_is_a_503(server: RunningApi, method: str, path: str) -> None:
    body = {"json": {"config_path": "/no/such"}} if path.endswith("load-fs-chunks") else {}
    async with server.client.request(method, path, **body) as response:
        assert response.status == 503
        answer = await response.json()
    assert answer.keys() == {"error", "message"}
    assert answer["message"]


async def test_settings_asked_by_name_need_no_definitions(server: RunningApi) -> None:
    async with server.client.get("/conf?names=internal_api_server_enabled,nope,__class__") as response:
        assert await response.json(content_type="text/plain") == {"internal_api_server_enabled": True}


async def test_what_needs_no_engine_is_told(server: RunningApi) -> None:
    for path in ("/version", "/meta", "/metrics", "/threads", "/periodic-threads", "/env"):
        async with server.client.get(path) as response:
            assert response.status == 200, path
    async with server.client.get("/cache/kvcache/info") as response:
        assert response.status == 404


async def test_an_engine_that_goes_is_an_ability_that_goes(api_server: StartApi) -> None:
    engine = SimpleNamespace(is_frozen=lambda: True, metadata=SimpleNamespace(worker_id=0))
    manager = SimpleNamespace(lmcache_engine=engine)

    def component(settings: Settings, index: int) -> ManagerComponent:
        engine.config = SimpleNamespace(
            internal_api_server_enabled=True,
            internal_api_server_socket_path_prefix=settings.internal_api_server_socket_path_prefix,
        )
        return ManagerComponent(manager)

    worker = await api_server(role="worker", component=component)
    async with worker.client.get("/freeze/status") as response:
        assert (await response.json())["freeze"] is True
    manager.lmcache_engine = None
    async with worker.client.get("/freeze/status") as response:
        assert response.status == 503


async def test_what_an_engine_raises_is_told_without_a_traceback(api_server: StartApi) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("the disk is on fire")

    def component(settings: Settings, index: int) -> ManagerComponent:
        config = SimpleNamespace(
            internal_api_server_enabled=True,
            internal_api_server_socket_path_prefix=settings.internal_api_server_socket_path_prefix,
        )
        engine = SimpleNamespace(config=config, metadata=SimpleNamespace(worker_id=0), clear=fail)
        return ManagerComponent(SimpleNamespace(lmcache_engine=engine))

    worker = await api_server(role="worker", component=component)
    async with worker.client.delete("/cache/clear") as response:
        assert response.status == 500
        assert await response.json() == {"error": "Failed to clear cache", "message": "the disk is on fire"}


def manager_of(settings: Settings, **parts: Any) -> Any:
    config = SimpleNamespace(
        internal_api_server_enabled=True,
        internal_api_server_socket_path_prefix=settings.internal_api_server_socket_path_prefix,
        extra_config=None,
    )
    return SimpleNamespace(config=config, **parts)


async def test_a_scheduler_may_have_an_engine(api_server: StartApi) -> None:
    """With `enable_scheduler_bypass_lookup`: its port is an engine's, its lookup is the client."""
    called: list[str] = []

    def component(settings: Settings, index: int) -> ManagerComponent:
        manager = manager_of(
            settings,
            lmcache_engine_metadata=SimpleNamespace(role="scheduler"),
            close_lookup_client=lambda: called.append("client") or {"old": "Client"},
            close_lookup_server=lambda: called.append("server") or {"old": "Server"},
        )
        manager.lmcache_engine = SimpleNamespace(config=manager.config, metadata=SimpleNamespace(worker_id=0))
        return ManagerComponent(manager)

    server = await api_server(role="worker", component=component)
    async with server.client.post("/lookup/close") as response:
        assert await response.json() == {"old": "Client", "role": "scheduler"}
    assert called == ["client"]


async def test_changes_are_made_one_at_a_time(api_server: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMCache's manager takes no locks: two recreations at once would leak a client."""
    monkeypatch.setattr(turns, "WAIT_SECONDS", 0.2)
    inside, most, gate = [], [], threading.Event()

    def recreate() -> dict[str, str]:
        inside.append(1)
        most.append(len(inside))
        gate.wait(10)
        inside.pop()
        return {"old": "Client", "new": "Client"}

    server = await api_server(
        role="scheduler",
        component=lambda settings, index: ManagerComponent(manager_of(settings, recreate_lookup_client=recreate)),
    )

    async def ask() -> int:
        async with server.client.post("/lookup/recreate") as response:
            return response.status

    waiting = [asyncio.create_task(ask()) for _ in range(3)]
    refused = asyncio.as_completed(waiting)
    for _ in range(2):
        assert await next(refused) == 503
    gate.set()
    assert sorted(await asyncio.gather(*waiting)) == [200, 503, 503]
    assert most == [1]


class Definitions(types.ModuleType):
    """LMCache's definitions of two settings, and its way to set one."""

    _CONFIG_DEFINITIONS = {  # noqa: RUF012
        "extra_config": {"type": Optional[dict], "default": None},  # noqa: UP045 - as LMCache writes it
        "run_script_api_enabled": {"type": bool, "default": False, "description": "Runs code."},
    }

    @staticmethod
    def validate_and_set_config_value(config: Any, name: str, value: Any) -> bool:
        setattr(config, name, value)
        return True


async def test_what_protects_the_host_is_not_undone_over_http(
    api_server: StartApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lmcache.v1.config", "lmcache.v1.config_base"):
        monkeypatch.setitem(sys.modules, name, Definitions(name))
    configs: list[Any] = []

    def component(settings: Settings, index: int) -> ManagerComponent:
        manager = manager_of(settings)
        manager.config.extra_config = {"internal_api_server_env_mask": ["*URL*"], "other": 1}
        configs.append(manager.config)
        return ManagerComponent(manager)

    server = await api_server(role="scheduler", component=component)
    for given in ({}, {"internal_api_server_env_mask": [], "new": 2}, None):
        async with server.client.post("/conf", json={"extra_config": given}) as response:
            assert response.status == 200
        assert configs[0].extra_config == {"internal_api_server_env_mask": ["*URL*"], **({"new": 2} if given else {})}
    async with server.client.post("/conf", json={"run_script_api_enabled": True}) as response:
        assert (response.status, await response.json()) == (
            400,
            {"updated": {}, "errors": {"run_script_api_enabled": "Config is not mutable at runtime"}},
        )
    async with server.client.get("/conf/definitions") as response:
        assert await response.json() == {
            "extra_config": {"type": "mapping", "optional": True, "default": None, "mutable": True},
            "run_script_api_enabled": {
                "type": "bool", "optional": False, "default": False, "mutable": False, "help": "Runs code.",
            },
        }  # fmt: skip
    async with server.client.post("/conf", json={"extra_config": {"a": "***"}}) as response:
        assert (response.status, list((await response.json())["errors"])) == (400, ["extra_config"])


# LMCache's controller


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        (None, 'expected {"pull": PORT, "reply": PORT}'),
        ([1], 'expected {"pull": PORT, "reply": PORT}'),
        ({"pull": 1}, 'expected {"pull": PORT, "reply": PORT}'),
        ({"pull": 0, "reply": 1}, "pull: '0': expected a port from 1 to 65535"),
        ({"pull": 1, "reply": -1}, "reply: '-1': expected a port from 1 to 65535"),
        ({"pull": 1, "reply": 65536}, "reply: '65536': expected a port from 1 to 65535"),
        ({"pull": True, "reply": 2}, "pull: 'True': expected a port from 1 to 65535"),
        ({"pull": None, "reply": 2}, "pull: 'None': expected a port from 1 to 65535"),
        ({"pull": 1, "reply": 2, "heartbeat": 0}, "heartbeat: '0': expected a port from 1 to 65535"),
        ({"pull": 1, "reply": 1}, "each needs a port of its own"),
    ],
)
def test_monitor_ports_that_cannot_be(ports: object, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        urls_of("127.0.0.1", ports)
    assert str(refused.value).startswith("controller_monitor_ports: ")
    assert message in str(refused.value)


def test_monitor_ports() -> None:
    assert urls_of("h", {"pull": 1, "reply": 2}) == {"pull": "h:1", "reply": "h:2", "heartbeat": None}
    assert urls_of("::1", {"pull": 1, "reply": 2, "heartbeat": 3})["heartbeat"] == "[::1]:3"


async def test_metrics_are_rendered_where_the_sockets_live() -> None:
    """LMCache's gauges look at the sockets of the manager's loop."""
    threads: list[threading.Thread] = []
    gauge = Gauge("where_it_is_rendered", "x")
    gauge.set_function(lambda: float(threads.append(threading.current_thread()) or 0))
    try:
        metrics = ControllerMetrics(asyncio.get_running_loop(), 5)
        assert b"where_it_is_rendered 0.0" in await asyncio.to_thread(metrics.exposition)
    finally:
        REGISTRY.unregister(gauge)
    assert threads == [threading.current_thread()]


async def test_metrics_of_a_loop_that_hangs() -> None:
    never = asyncio.new_event_loop()
    metrics = ControllerMetrics(never, 0.05)
    for ask in (metrics.exposition, metrics.reset):
        with pytest.raises(Refusal, match="its event loop hangs") as refused:
            await asyncio.to_thread(ask)
        assert refused.value.status == 504
    never.call_soon(never.stop)
    await asyncio.to_thread(never.run_forever)  # what was asked is given up
    never.close()


async def test_a_handler_that_ends_begins_again(caplog: pytest.LogCaptureFixture) -> None:
    begun = 0

    async def handle() -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise ValueError("no message")
        if begun > 2:
            await asyncio.Event().wait()

    keeping = asyncio.create_task(kept_up("pull", handle))
    deadline = time.monotonic() + 5
    while begun < 3:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping
    told = "LMCache's controller: what came at its pull port cannot be used, and it goes on: "
    assert [record.message for record in caplog.records] == [f"{told}ValueError: no message", f"{told}it ended"]


async def test_lmcaches_controller_follows_no_events() -> None:
    made = ManagerController(None, asyncio.get_running_loop(), Settings())
    with pytest.raises(ControllerError, match="follows no events") as refused:
        await made.operate(Operation("check_finish", {"event_id": "x"}))
    assert refused.value.status == 501
