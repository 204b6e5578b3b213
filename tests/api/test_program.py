"""`python -m lmcache_api` as a process."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmcache_api.pytest_plugin import free_port

Start = Callable[..., subprocess.Popen[str]]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}


@pytest.fixture
def start() -> Iterator[Start]:
    children: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **environ: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lmcache_api", *arguments]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=CLEAN | environ
        )
        children.append(child)
        return child

    yield begin
    for child in children:
        child.kill()
        child.communicate()


def lines(child: subprocess.Popen[str], count: int) -> list[str]:
    assert child.stdout is not None
    return [child.stdout.readline().rstrip("\n") for _ in range(count)]


def finished(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=20)
    return child.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_scheduler_and_workers_until_a_signal(start: Start, tmp_path: Path, number: int) -> None:
    prefix = f"--set=internal_api_server_socket_path_prefix={tmp_path}/s"
    child = start("--workers", "2", prefix)
    assert lines(child, 3) == [
        f"lmcache_scheduler (scheduler) serves on {tmp_path}/s_6999",
        f"lmcache_worker0 (worker) serves on {tmp_path}/s_7000",
        f"lmcache_worker1 (worker) serves on {tmp_path}/s_7001",
    ]
    child.send_signal(number)
    assert finished(child) == (0, "stopping\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_ends_it_at_once(start: Start, tmp_path: Path) -> None:
    (tmp_path / "slow_api.py").write_text(
        "import asyncio\nfrom aiohttp import web\nrouter = web.RouteTableDef()\n"
        "@router.get('/slow')\nasync def slow(request):\n    await asyncio.sleep(100)\n"
    )
    child = start(
        "--role", "scheduler", f"--set=internal_api_server_socket_path_prefix={tmp_path}/s",
        f"--set=internal_api_server_route_folders={tmp_path}", "--set=internal_api_server_drain_seconds=60",
    )  # fmt: skip
    lines(child, 1)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"{tmp_path}/s_6999")
        sock.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        lines(child, 1)
        time.sleep(0.3)
        assert child.poll() is None  # it waits for the request
        child.send_signal(signal.SIGTERM)
        assert finished(child)[0] == -signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--role", "scheduler"], ["lmcache_scheduler"]),
        (["--role", "worker", "--worker-id", "3"], ["lmcache_worker3"]),
        (["--role", "worker", "--workers", "2"], ["lmcache_worker0", "lmcache_worker1"]),
        (["--set", "internal_api_server_include_index_list=0,2", "--workers", "2"],
         ["lmcache_scheduler", "lmcache_worker1"]),
        ([], ["lmcache_scheduler", "lmcache_worker0"]),
    ],
)  # fmt: skip
def test_roles(start: Start, tmp_path: Path, arguments: list[str], names: list[str]) -> None:
    child = start(*arguments, f"--set=internal_api_server_socket_path_prefix={tmp_path}/s")
    assert [line.split()[0] for line in lines(child, len(names))] == names
    assert len(list(tmp_path.iterdir())) == len(names)


def test_ports_hosts_and_the_environment(start: Start) -> None:
    port = free_port()
    child = start("--role", "scheduler", "--host", "127.0.0.2", LMCACHE_INTERNAL_API_SERVER_PORT_START=str(port))
    assert lines(child, 1) == [f"lmcache_scheduler (scheduler) serves on 127.0.0.2:{port}"]
    with socket.create_connection(("127.0.0.2", port), timeout=10):
        pass


def test_a_configuration_that_disables_it_ends_with_0(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "lm.yaml"
    file.write_text("internal_api_server_enabled: false")
    code, out, err = finished(start("--config", str(file)))
    assert (code, err) == (0, "")
    assert out == "internal API is off: internal_api_server_enabled is false in the settings; nothing to serve\n"
    code, out, _ = finished(start("--set", "internal_api_server_include_index_list=7"))
    assert code == 0
    assert "internal_api_server_include_index_list [7] has none of the indexes [0, 1]" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "/no/such.yaml"], "/no/such.yaml: cannot read the configuration: No such file or directory"),
        (
            ["--set", "internal_api_server_port_start=x"],
            '--set internal_api_server_port_start: expected int, found "x"',
        ),
        (["--worker-id", "1"], "--worker-id 1: goes with --role worker"),
        (
            ["--role", "worker", "--worker-id", "2", "--workers", "2"],
            "--worker-id 2: there are --workers 2, counted from 0",
        ),
        (["--role", "worker", "--workers", "0"], "--role worker --workers 0: there is nothing to serve"),
        (["--engine", "lmcache"], "--engine lmcache: LMCache is not installed here"),
        (["--role", "worker", "--worker-id", "-1"], "--worker-id -1: expected 0 to 1023"),
        (["--workers", "2000"], "--workers 2000: expected 0 to 1024"),
        (["--set", "internal_api_server_route_folders=/no/such"], "route folder /no/such: is no folder"),
        (["--set", "internal_api_server_socket_path_prefix=/proc/nope/s"], "/proc/nope/s_6999: cannot make its folder"),
    ],
)
def test_what_cannot_start_is_one_line_and_code_2(start: Start, arguments: list[str], message: str) -> None:
    code, out, err = finished(start(*arguments))
    assert (code, out) == (2, "")
    assert err.startswith(f"lmcache-api: {message}")
    assert err.count("\n") == 1


def test_a_port_that_is_taken_leaves_nothing_half_started(start: Start) -> None:
    with socket.socket() as sock:
        scheduler_port = free_port()
        while True:  # a port whose neighbour is free as well
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", scheduler_port + 1))
                break
            scheduler_port = free_port()
        sock.listen()
        port = scheduler_port + 1
        child = start("--workers", "1", "--set", f"internal_api_server_port_start={port - 1}")
        code, _, err = finished(child)
    assert code == 2
    assert err == f"lmcache-api: 127.0.0.1:{port}: the port is in use; stop what listens there or choose another port\n"


def test_after_a_kill_the_sockets_are_taken_over(start: Start, tmp_path: Path) -> None:
    prefix = f"--set=internal_api_server_socket_path_prefix={tmp_path}/s"
    first = start(prefix)
    lines(first, 2)
    code, _, err = finished(start(prefix))
    assert code == 2
    assert f"s_6999: process {first.pid} (" in err
    first.kill()
    first.wait()
    assert len(list(tmp_path.iterdir())) == 2
    second = start(prefix)
    assert len(lines(second, 2)) == 2
    second.terminate()
    assert finished(second)[0] == 0
    assert list(tmp_path.iterdir()) == []
