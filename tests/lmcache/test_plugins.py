"""Our plugins, started by LMCache's own launchers with whatever `python` they find."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lmcache_api.pytest_plugin import free_port
from tests.frontend.discovery import discovery_service
from tests.frontend.installation import MULTIPROCESS, installed_python, plugin_of
from tests.frontend.upstream import Upstream, serving
from tests.lmcache.processes import (
    START_SECONDS,
    WORKER_PORT,
    Child,
    Engine,
    ask,
    client_of,
    lmcache_environ,
    short_folder,
)

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(300)]

SERVE_SECONDS = 30.0
END_SECONDS = 2.0


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the frontend, and not LMCache."""
    return installed_python(tmp_path_factory.mktemp("installed"))


@contextlib.contextmanager
def launching(lmcache_python: str, **what: Any) -> Iterator[Child]:
    """LMCache's launcher, in a process of its own, once it has started its plugins."""
    with short_folder() as folder:
        command = [lmcache_python, str(Path(__file__).with_name("plugin_host.py")), json.dumps(what)]
        log = folder / "host.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=lmcache_environ(folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
            )
        host = Child(process, log)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"READY\n":
                host.fail("the launcher did not start")
            yield host
        finally:
            host.end(ask=process.stdin.close)
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def write_config(folder: Path, engine: Engine, port: int, locations: str, extra: str = "") -> str:
    """An `lmcache.yaml` as people write it, for a deployment whose worker is the engine."""
    prefix = str(engine.socket).removesuffix(f"_{WORKER_PORT}")
    config = folder / "lmcache.yaml"
    config.write_text(f"""chunk_size: 256
local_cpu: True
max_local_cpu_size: 1
lmcache_instance_id: "demo"

internal_api_server_enabled: True
internal_api_server_port_start: {WORKER_PORT - 1}
internal_api_server_socket_path_prefix: "{prefix}"

{locations}
extra_config:
  plugin.frontend.port: {port}
  plugin.frontend.host: 127.0.0.1
{extra}""")
    return str(config)


def serves(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_until_it_serves(host: Child, port: int) -> None:
    host.wait_until(lambda: serves(port), seconds=SERVE_SECONDS, what="the plugin")


def seconds_until_it_is_gone(port: int) -> float:
    clock = time.monotonic()
    while serves(port):
        assert time.monotonic() - clock < 20, "it serves on"
        time.sleep(0.02)
    return time.monotonic() - clock


@pytest.mark.parametrize(
    ("key", "older"),
    [("runtime_plugin_locations", False), ("plugin_locations", False), ("runtime_plugin_locations", True)],
    ids=["as it is", "the older key", "the older environment"],
)
async def test_lmcache_starts_the_frontend_for_its_nodes(
    lmcache_python: str,
    installed: Path,
    engine: Engine,
    direct: aiohttp.ClientSession,
    key: str,
    older: bool,
    tmp_path: Path,
) -> None:
    port = free_port()
    config = write_config(tmp_path, engine, port, f'{key}: ["{plugin_of(installed)}"]')
    with launching(lmcache_python, config=config, role="scheduler", workers=2, older=older) as host:
        await asyncio.to_thread(wait_until_it_serves, host, port)
        async with client_of(f"http://127.0.0.1:{port}") as client:
            (local,) = (await ask(client, "GET", "/api/nodes")).json()["nodes"]
            assert [node["name"] for node in local["children"]] == ["demo_scheduler", "demo_worker0", "demo_worker1"]
            assert [node["port"] for node in local["children"]][1] == str(engine.socket)
            through = await ask(client, "GET", "/proxy2/demo_worker0/version")
            assert through == await ask(direct, "GET", "/version")
            assert (await ask(client, "POST", "/proxy2/demo_worker0/cache/store?tokens_mock=0,512")).status == 200
            assert (await ask(client, "GET", "/proxy2/demo_worker1/version")).status == 502, "there is none"
        await asyncio.to_thread(
            host.wait_until, lambda: "frontend serves on" in host.tail(), seconds=5, what="what LMCache logs"
        )
        assert f"[{plugin_of(installed)}] frontend serves on http://127.0.0.1:{port} (3 nodes)" in host.tail()
        host.kill()
        assert await asyncio.to_thread(seconds_until_it_is_gone, port) < END_SECONDS


def test_a_folder_and_the_end_of_lmcache(lmcache_python: str, installed: Path, engine: Engine, tmp_path: Path) -> None:
    port = free_port()
    config = write_config(tmp_path, engine, port, f"runtime_plugin_locations: [{plugin_of(installed).parent}]")
    with launching(lmcache_python, config=config, role="scheduler", workers=1) as host:
        wait_until_it_serves(host, port)
        assert host.tail().count("Launched runtime plugin") == 1, "the other files of the folder are for others"
        assert host.process.stdin is not None
        host.process.stdin.close()
        host.process.wait(END_SECONDS * 5)
        assert seconds_until_it_is_gone(port) < END_SECONDS


def test_a_worker_starts_none(lmcache_python: str, installed: Path, engine: Engine, tmp_path: Path) -> None:
    config = write_config(tmp_path, engine, free_port(), f"runtime_plugin_locations: [{plugin_of(installed)}]")
    with launching(lmcache_python, config=config, role="worker", workers=1) as host:
        assert f"Skipping {plugin_of(installed)}: requires role SCHEDULER" in host.tail()
        assert "Launched" not in host.tail()


def test_what_cannot_start_is_in_lmcaches_log(
    lmcache_python: str, installed: Path, engine: Engine, tmp_path: Path
) -> None:
    location = f"runtime_plugin_locations: [{plugin_of(installed)}]"
    config = write_config(tmp_path, engine, free_port(), location, extra="  plugin.frontend.prot: 1\n")
    with launching(lmcache_python, config=config, role="scheduler", workers=1) as host:
        host.wait_until(lambda: "exited with code 2" in host.tail(), seconds=START_SECONDS, what="the plugin")
        assert (
            "plugin.frontend.prot: the frontend has no such option (did you mean plugin.frontend.port?)" in host.tail()
        )
        assert "Traceback" not in host.tail()


async def test_the_multiprocess_mode_sends_heartbeats(lmcache_python: str, installed: Path) -> None:
    version = b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"0.5.6"'
    async with discovery_service() as service, serving(Upstream(version)) as server:
        mp = {
            "locations": [str(plugin_of(installed, MULTIPROCESS))],
            "extra_config": {"plugin.frontend.heartbeat_url": service.url, "plugin.frontend.heartbeat_interval": 1},
            "port": server.port,
        }
        start = contextlib.ExitStack()
        try:
            host = await asyncio.to_thread(start.enter_context, launching(lmcache_python, mp=mp))
            first, second = (await service.receive(2, SERVE_SECONDS))[:2]
            assert first == second
            assert first["api_address"] == f"http://127.0.0.1:{server.port}"
            assert first["version"] == "0.5.6"
            assert json.loads(first["other_info"])["nodes_count"] == 1
            host.kill()
            await asyncio.sleep(END_SECONDS)
            count = len(service.heartbeats)
            await asyncio.sleep(END_SECONDS)
            assert len(service.heartbeats) == count
        finally:
            await asyncio.to_thread(start.close)
