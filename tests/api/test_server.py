import asyncio
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from lmcache_api import ComponentServer, InternalAPIServer, create_app
from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.pytest_plugin import client_for, free_port
from lmcache_shared.errors import AddressInUse, ConfigError, RouteError
from lmcache_shared.settings import Settings


def manager(worker_id: int | None = None, **config: Any) -> SimpleNamespace:
    """An object with the attributes of LMCache's manager."""
    settings = SimpleNamespace(internal_api_server_enabled=True, **config)
    metadata = SimpleNamespace(worker_id=worker_id, role="worker", model_name="m")
    engine = None if worker_id is None else SimpleNamespace(config=settings, metadata=metadata)
    return SimpleNamespace(config=settings, lmcache_engine=engine, lmcache_engine_metadata=metadata if engine else None)


async def ask(server: InternalAPIServer | ComponentServer, path: str) -> tuple[int, str]:
    inner = server if isinstance(server, ComponentServer) else server._server
    assert inner is not None
    async with client_for(inner.placement.address) as client, client.get(path) as response:
        return response.status, await response.text()


async def test_a_managers_worker_is_served_from_a_thread(tmp_path: Path) -> None:
    server = InternalAPIServer(manager(2, internal_api_server_socket_path_prefix=f"{tmp_path}/s"))
    assert (server.enable, server.failure, server.address) == (True, None, f"{tmp_path}/s_7002")
    server.start()
    server.start()  # a second call changes nothing
    assert "api-server-thread" in [thread.name for thread in threading.enumerate()]
    assert (tmp_path / "s_7002").stat().st_mode & 0o777 == 0o660
    status, text = await ask(server, "/meta?names=worker_id,role,nope")
    assert (status, text) == (200, '{\n  "worker_id": 2,\n  "role": "worker"\n}')
    assert (await ask(server, "/metrics"))[0] == 200
    assert (await ask(server, "/periodic-threads"))[0] == 200
    assert (await ask(server, "/version")) == (200, '"unknown"')  # this process has no LMCache
    status, text = await ask(server, "/threads?name=api-server")
    assert "Total threads: 1" in text
    server.stop()
    server.stop()
    assert not (tmp_path / "s_7002").exists()
    server.start()  # once more, as an engine that restarts its services does
    assert (await ask(server, "/version"))[0] == 200
    server.stop()
    assert not (tmp_path / "s_7002").exists()
    assert "api-server-thread" not in [thread.name for thread in threading.enumerate()]


async def test_one_that_could_not_serve_starts_when_it_can(tmp_path: Path) -> None:
    made = manager(0, internal_api_server_socket_path_prefix=f"{tmp_path}/s")
    first, second = InternalAPIServer(made), InternalAPIServer(made)
    first.start()
    second.start()
    assert isinstance(second.failure, AddressInUse)
    first.stop()
    second.start()
    assert second.failure is None
    assert (await ask(second, "/version"))[0] == 200
    second.stop()
    assert not (tmp_path / "s_7000").exists()


async def test_one_that_is_stopped_before_it_listens_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    start = ComponentServer.start

    async def slow(self: ComponentServer) -> None:
        await asyncio.to_thread(gate.wait, 10)
        await start(self)

    monkeypatch.setattr(ComponentServer, "start", slow)
    monkeypatch.setattr("lmcache_api.server.START_SECONDS", 0.1)
    monkeypatch.setattr("lmcache_api.server.STOP_SECONDS_BEYOND_DRAIN", 0.1)
    given_up = InternalAPIServer(
        manager(
            0,
            internal_api_server_socket_path_prefix=f"{tmp_path}/s",
            extra_config={"internal_api_server_drain_seconds": 0},
        )
    )
    given_up.start()  # gives up waiting
    thread = next(thread for thread in threading.enumerate() if thread.name == "api-server-thread")
    given_up.stop()
    gate.set()
    await asyncio.to_thread(thread.join, 5)
    assert not thread.is_alive()
    assert not (tmp_path / "s_7000").exists()


async def test_without_an_engine_the_manager_is_a_scheduler_and_lacks_what_it_lacks() -> None:
    port = free_port()
    server = InternalAPIServer(manager(internal_api_server_port_start=port))
    server.start()
    try:
        assert server.address == f"127.0.0.1:{port}"
        assert await ask(server, "/meta") == (200, "{}")
        async with aiohttp.ClientSession() as client, client.post(f"http://{server.address}/metrics/reset") as response:
            assert response.status == 503
            assert await response.json() == {"detail": "this process has no LMCache metrics to reset"}
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("made", "index"),
    [
        (manager(0, internal_api_server_include_index_list=[0]), 1),
        (SimpleNamespace(config=SimpleNamespace(internal_api_server_enabled=False), lmcache_engine=None), 0),
    ],
)
def test_a_component_that_shall_not_serve_does_not(made: SimpleNamespace, index: int) -> None:
    server = InternalAPIServer(made)
    assert (server.enable, server.failure, server.address) == (False, None, None)
    server.start()
    server.stop()


def test_nothing_takes_the_host_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = InternalAPIServer(manager(0, internal_api_server_socket_path_prefix=f"{tmp_path}/s"))
    first.start()
    second = InternalAPIServer(manager(0, internal_api_server_socket_path_prefix=f"{tmp_path}/s"))
    second.start()
    assert isinstance(second.failure, AddressInUse)
    second.stop()
    assert (tmp_path / "s_7000").exists()
    first.stop()
    long = InternalAPIServer(manager(0, internal_api_server_socket_path_prefix="/" + "x" * 120))
    assert isinstance(long.failure, ConfigError)
    long.start()
    long.stop()
    assert isinstance(InternalAPIServer(object()).failure, ConfigError)
    assert "worker_id: expected a number from 0, found -1" in str(InternalAPIServer(manager(-1)).failure)
    assert "but its lmcache_engine has no config" in str(
        InternalAPIServer(SimpleNamespace(config=1, lmcache_engine=object())).failure
    )

    class Raising:
        @property
        def lmcache_engine(self) -> None:
            raise RuntimeError("boom")

    assert str(InternalAPIServer(Raising()).failure) == "RuntimeError: boom"
    (tmp_path / "leaving_api.py").write_text("import sys\nsys.exit(3)")
    leaving = manager(0, extra_config={"internal_api_server_route_folders": [str(tmp_path)]})
    assert isinstance(InternalAPIServer(leaving).failure, RouteError)
    broken = manager(0, extra_config={"internal_api_server_route_folders": ["/no/such/folder"]})
    assert isinstance(InternalAPIServer(broken).failure, RouteError)
    assert caplog.text.count("internal API does not serve: ") == 8


async def test_in_the_callers_loop(tmp_path: Path) -> None:
    settings = Settings(internal_api_server_socket_path_prefix=f"{tmp_path}/s")
    async with ComponentServer(EmbeddedComponent(settings, 0)) as server:
        assert (await ask(server, "/version"))[0] == 200
        with pytest.raises(AddressInUse):
            await ComponentServer(EmbeddedComponent(settings, 0)).start()
        assert (await ask(server, "/version"))[0] == 200
    assert list(tmp_path.iterdir()) == []


async def test_requests_in_flight_end_and_new_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "slow_api.py").write_text(
        "import asyncio\nfrom aiohttp import web\nrouter = web.RouteTableDef()\n"
        "@router.get('/slow/{seconds}')\nasync def slow(request):\n"
        "    await asyncio.sleep(float(request.match_info['seconds']))\n    return web.Response(text='done')\n"
    )
    settings = Settings(
        internal_api_server_socket_path_prefix=f"{tmp_path}/s",
        internal_api_server_route_folders=[str(tmp_path)],
        internal_api_server_drain_seconds=0.6,
    )
    server = ComponentServer(EmbeddedComponent(settings, 0))
    await server.start()
    short = asyncio.create_task(ask(server, "/slow/0.3"))
    long = asyncio.create_task(ask(server, "/slow/30"))
    await asyncio.sleep(0.1)
    stopping = asyncio.create_task(server.stop())
    await asyncio.sleep(0.1)
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask(server, "/version")
    assert not (tmp_path / "s_6999").exists()
    assert await short == (200, "done")
    with pytest.raises(aiohttp.ClientConnectionError):  # cut off; the client tries again and finds nobody
        await long
    await asyncio.wait_for(stopping, 5)


async def test_a_drain_time_of_nothing_is_short_and_not_endless(tmp_path: Path) -> None:
    settings = Settings(internal_api_server_socket_path_prefix=f"{tmp_path}/s", internal_api_server_drain_seconds=0.0)
    server = ComponentServer(EmbeddedComponent(settings, 0))
    await server.start()
    _, writer = await asyncio.open_unix_connection(f"{tmp_path}/s_6999")
    writer.write(b"POST /run_script HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
    await asyncio.sleep(0.1)
    await asyncio.wait_for(server.stop(), 5)
    writer.close()


async def test_a_new_endpoint_in_a_folder_or_with_chosen_categories(tmp_path: Path) -> None:
    (tmp_path / "made_here_api.py").write_text(
        "from aiohttp import web\nfrom lmcache_api.app import COMPONENT\nrouter = web.RouteTableDef()\n"
        "@router.get('/made_here')\nasync def mine(request):\n"
        "    return web.json_response({'role': request.app[COMPONENT].role})\n"
    )
    settings = Settings(internal_api_server_route_folders=[str(tmp_path)])
    app = create_app(EmbeddedComponent(settings, 1), categories=["common"])
    paths = {resource.canonical for resource in app.router.resources()}
    assert {"/made_here", "/metrics", "/version"} <= paths
    assert not {"/backends", "/cache/clear", "/controller/workers", "/lookup"} & paths


def test_a_hosts_thread_asks_with_a_plain_client() -> None:
    port = free_port()
    server = InternalAPIServer(manager(internal_api_server_port_start=port))
    server.start()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/loglevel", timeout=10) as response:
            assert response.read().startswith(b"=== Loggers and Levels ===\n")
    finally:
        server.stop()


async def test_settings_of_the_host_are_read_as_they_are_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = manager(0, internal_api_server_socket_path_prefix=f"{tmp_path}/s", extra_config={})
    server = InternalAPIServer(made)
    assert server._server is not None
    component = server._server.component
    assert not component.settings.run_script_api_enabled
    made.config.run_script_api_enabled = True
    made.config.extra_config["run_script_max_bytes"] = 7
    assert component.settings.run_script_api_enabled
    assert component.settings.run_script_max_bytes == 7
    made.config.extra_config["run_script_max_bytes"] = "many"
    assert component.settings.run_script_max_bytes == 7
    assert component.settings.run_script_max_bytes == 7
    assert caplog.text.count("settings stay as they were") == 1


async def test_a_handler_that_returns_no_response_is_a_500_in_the_one_shape(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wrong_api.py").write_text(
        "from aiohttp import web\nrouter = web.RouteTableDef()\n"
        "@router.get('/wrong')\nasync def wrong(request):\n    return 'text'\n"
    )
    settings = Settings(
        internal_api_server_socket_path_prefix=f"{tmp_path}/s", internal_api_server_route_folders=[str(tmp_path)]
    )
    async with ComponentServer(EmbeddedComponent(settings, 0)) as server:
        assert await ask(server, "/wrong") == (500, '{"detail":"Internal Server Error"}')
    assert "the handler of /wrong returned a str and no response" in caplog.text


async def test_a_slash_too_many_is_taken_off(tmp_path: Path) -> None:
    settings = Settings(internal_api_server_socket_path_prefix=f"{tmp_path}/s")
    async with (
        ComponentServer(EmbeddedComponent(settings, 0)) as server,
        client_for(server.placement.address) as client,
    ):
        async with client.get("/metrics/?a=b", allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (307, "/metrics?a=b")
        async with client.get("/metrics/") as response:
            assert response.status == 200
        async with client.get("/nope/") as response:
            assert response.status == 404
