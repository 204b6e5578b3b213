"""A manager that lacks something: that ability is missing, and nothing becomes a 500.

What a whole manager answers is asked of a real LMCache, in tests/lmcache.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_api.bridge.manager import ManagerComponent
from lmcache_api.pytest_plugin import RunningApi, StartApi
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
