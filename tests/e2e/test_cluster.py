"""`make run`'s cluster: real processes, sockets and signals."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_api.pytest_plugin import free_port
from tests.e2e.processes import ROOT, children_of, environment, read_until, running, wait_until_gone

CLUSTER = "tools/local_cluster.py"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for sockets in it."""
    made = tempfile.mkdtemp(prefix="lmc")
    yield Path(made)
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def arguments(folder: Path) -> list[str]:
    """The seed configuration with its sockets in a folder of the test's own, and a free port."""
    text = (ROOT / "config" / "lmcache.yaml").read_text()
    assert "/tmp/lmcache_internal_api_server/socket" in text
    (folder / "lmcache.yaml").write_text(text.replace("/tmp/lmcache_internal_api_server", f"{folder}/run"))
    return ["--config", f"{folder}/lmcache.yaml", "--port", str(free_port())]


def test_it_says_when_it_is_ready_and_ctrl_c_stops_all_of_it(folder: Path, arguments: list[str]) -> None:
    with running(CLUSTER, *arguments) as cluster:
        text = read_until(cluster, "Ctrl-C")
        names = ["lmcache_scheduler", "lmcache_worker0", "lmcache_worker1", "lmcache_controller"]
        for name, port in zip(names, (6999, 7000, 7001, 9000), strict=True):
            assert re.search(rf"{name} +{folder}/run/socket_{port}\n", text)
        dashboard = re.search(r"Dashboard: (\S+)", text)
        assert dashboard
        with urllib.request.urlopen(dashboard[1], timeout=10) as response:
            assert b"4 up" in response.read()
        curls = re.findall(r"^  (curl .*)$", text, re.MULTILINE)
        assert len(curls) == 2
        answers = [subprocess.run(c, shell=True, capture_output=True, text=True, timeout=20).stdout for c in curls]
        assert answers[0] == '"0.1.0-embedded"'
        assert "lmcache:periodic_threads_total_count" in answers[1]
        assert "%252F" in curls[1]
        nodes = json.loads(urllib.request.urlopen(f"{dashboard[1]}api/nodes", timeout=10).read())
        assert [child["name"] for child in nodes["nodes"][0]["children"]] == names
        controller = f"{dashboard[1]}proxy2/lmcache_controller"
        deadline = time.monotonic() + 20
        while _json(f"{controller}/controller/workers")["total_count"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert _json(f"{controller}/meta") == {"role": "controller"}
        _ask_as_the_readme_does(folder, arguments[-1])
        children = children_of(cluster.pid)
        assert len(children) == 3
        begun = time.monotonic()
        os.kill(cluster.pid, signal.SIGINT)
        assert cluster.wait(10) == 0
        assert time.monotonic() - begun < 2
        assert wait_until_gone(children, 0.5) == []
        assert list((folder / "run").iterdir()) == []


def _ask_as_the_readme_does(folder: Path, port: str) -> None:
    """Every curl line of the README, with this cluster's port and folder in it."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("curl")]
    assert len(lines) >= 6
    for line in lines:
        there = line.replace("/tmp/lmcache_internal_api_server", f"{folder}/run").replace(":8080", f":{port}")
        there = there.replace("%252Ftmp%252Flmcache_internal_api_server", f"{folder}/run".replace("/", "%252F"))
        assert there != line
        done = subprocess.run(f"{there} --fail --silent", shell=True, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, (there, done.stderr)
        assert done.stdout


@pytest.mark.parametrize("load", ["20", "0"])
def test_made_up_conversations_keep_it_busy_unless_they_are_off(arguments: list[str], load: str) -> None:
    with running(CLUSTER, *arguments, "--load", load) as cluster:
        read_until(cluster, "Ctrl-C")
        proxy = f"http://127.0.0.1:{arguments[-1]}/proxy2"
        deadline = time.monotonic() + 20
        while (runs := _json(f"{proxy}/lmcache_scheduler/periodic-threads/load-thread")["total_runs"]) < 2:
            assert time.monotonic() < deadline, runs
            time.sleep(0.1)
        sent = _json(f"{proxy}/lmcache_scheduler/chunk_statistics/status")["total_requests"]
        for worker in ("lmcache_worker0", "lmcache_worker1"):
            with urllib.request.urlopen(f"{proxy}/{worker}/metrics", timeout=10) as response:
                text = response.read().decode()
            stored = re.search(r"^lmcache:num_stored_tokens_total\{.*\} (.*)$", text, re.MULTILINE)
            assert stored
            assert (float(stored[1]) > 0) is (load == "20")
        assert (sent >= 20) is (load == "20")


def test_where_others_reach_it_the_token_is_told(arguments: list[str]) -> None:
    with running(CLUSTER, *arguments, "--host", "0.0.0.0", "--workers", "0") as cluster:
        read_until(cluster, "Ctrl-C")
        assert "/sign-in?token=" in read_until(cluster, "to change something from another machine: http://")


def test_a_load_that_is_no_number(arguments: list[str]) -> None:
    with running(CLUSTER, *arguments, "--load", "much") as cluster:
        assert cluster.wait(20) == 2


def _json(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as response:
        return dict(json.loads(response.read()))


def test_run_script_as_the_docs_write_it(folder: Path) -> None:
    """`curl -X POST http://localhost:8080/proxy/localhost/8081/run_script -F "script=@scratch.py"`, ports adapted."""
    text = (ROOT / "docs" / "internal-api.md").read_text()
    line = re.search(r"^curl -X POST .*/8081/run_script .*$", text, re.MULTILINE)
    script = re.search(r"```python\n(# scratch\.py\n.*?)```", text, re.DOTALL)
    assert line
    assert script
    (folder / "scratch.py").write_text(script[1])
    api_port, port = str(free_port()), str(free_port())
    settings = [f"internal_api_server_port_start={api_port}", "run_script_api_enabled=true"]
    options = [f"--set={setting}" for setting in settings]
    with (
        running("-m", "lmcache_api", "--role", "scheduler", *options) as api,
        running("-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", port) as frontend,
    ):
        read_until(api, "serves on")
        read_until(frontend, "serves on")
        there = line[0].replace(":8080", f":{port}").replace("/8081/", f"/{api_port}/")
        done = subprocess.run(f"{there} -s", shell=True, capture_output=True, text=True, timeout=20, cwd=folder)
    assert done.stdout == api_port


def test_requests_in_flight_do_not_hold_ctrl_c_up(folder: Path, arguments: list[str]) -> None:
    config = folder / "lmcache.yaml"
    config.write_text(config.read_text() + f"  internal_api_server_route_folders: [{folder}]\n")
    (folder / "slow_api.py").write_text(
        "import asyncio\nfrom aiohttp import web\nrouter = web.RouteTableDef()\n"
        "@router.get('/slow')\nasync def slow(request):\n    await asyncio.sleep(100)\n"
    )
    with running(CLUSTER, *arguments) as cluster:
        read_until(cluster, "Ctrl-C")
        with socket.create_connection(("127.0.0.1", int(arguments[-1]))) as caller:
            caller.sendall(b"GET /proxy2/lmcache_worker0/slow HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.3)
            begun = time.monotonic()
            os.kill(cluster.pid, signal.SIGINT)
            assert cluster.wait(10) == 0
            assert time.monotonic() - begun < 2
        assert list((folder / "run").iterdir()) == []


def test_when_it_is_killed_its_children_end_too(folder: Path, arguments: list[str]) -> None:
    with running(CLUSTER, *arguments) as cluster:
        read_until(cluster, "Ctrl-C")
        children = children_of(cluster.pid)
        cluster.kill()
        cluster.wait()
        assert wait_until_gone(children, 5) == []
        assert list((folder / "run").iterdir()) == []


def test_a_child_that_ends_ends_the_cluster(folder: Path, arguments: list[str]) -> None:
    with running(CLUSTER, *arguments) as cluster:
        read_until(cluster, "Ctrl-C")
        victim, *others = children_of(cluster.pid)
        os.kill(victim, signal.SIGKILL)
        assert cluster.wait(10) == 1
        assert len(others) == 2
        assert wait_until_gone(others, 0.5) == []
        assert cluster.stderr is not None
        assert " ended with code -9 (killed by SIGKILL)" in cluster.stderr.read()


def refused(arguments: list[str], user: int | None = None) -> str:
    """The one line on standard error of a cluster that does not start."""
    with running(CLUSTER, *arguments, user=user) as cluster:
        out, err = cluster.communicate(timeout=20)
    assert (cluster.returncode, out) == (2, "")
    assert err.count("\n") == 1
    return err


def test_a_port_in_use(folder: Path, arguments: list[str]) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", int(arguments[-1])))
        sock.listen()
        message = f"make run: 127.0.0.1:{arguments[-1]}: the port is in use; stop what listens there or choose another"
        assert refused(arguments).startswith(message)
    assert not (folder / "run").exists()


@pytest.mark.parametrize("port", [7001, 9000])
def test_a_server_that_still_lives(folder: Path, arguments: list[str], port: int) -> None:
    (folder / "run").mkdir()
    path = folder / "run" / f"socket_{port}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        assert refused(arguments).startswith(f"make run: {path}: process {os.getpid()} (")
    assert list((folder / "run").iterdir()) == [path]


def test_a_folder_that_cannot_be_written(folder: Path, arguments: list[str]) -> None:
    blocked = folder / "run"
    blocked.write_text("a file where the folder should be")
    assert refused(arguments) == (f"make run: {blocked}/socket_6999: cannot make its folder: {blocked} is no folder\n")


def test_a_configuration_that_is_broken(folder: Path, arguments: list[str]) -> None:
    (folder / "lmcache.yaml").write_text("internal_api_server_port_start: x")
    assert refused(arguments) == (
        f'make run: {folder}/lmcache.yaml: internal_api_server_port_start: expected int, found "x"\n'
    )


@pytest.mark.parametrize(
    ("line", "more", "message"),
    [
        ("internal_api_server_enabled: false", [], "internal_api_server_enabled is false; there is nothing to start"),
        ("internal_api_server_include_index_list: [9]", [], "[9]: none of the components is in it"),
        ("  controller_port: 7000", [], "controller_port=7000: lmcache_worker0 has "),
        ("", ["--workers", "-1"], "WORKERS=-1: expected 0 to 1024"),
        ("", ["--port", "80x"], "PORT=80x: '80x': expected a port from 1 to 65535"),
    ],
)
def test_what_leaves_nothing_to_start(
    folder: Path, arguments: list[str], line: str, more: list[str], message: str
) -> None:
    file = folder / "lmcache.yaml"
    file.write_text(file.read_text().replace("internal_api_server_enabled: True", "") + f"\n{line}\n")
    assert message in refused([*arguments, *more])


def test_of_two_at_once_one_serves_and_the_other_never_says_that_it_is_ready(
    folder: Path, arguments: list[str]
) -> None:
    other = [*arguments[:2], "--port", str(free_port())]
    with running(CLUSTER, *arguments) as first, running(CLUSTER, *other) as second:
        deadline = time.monotonic() + 20
        while first.poll() is None and second.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        loser, winner = (first, second) if first.poll() is not None else (second, first)
        assert loser.returncode == 2
        assert loser.stdout is not None
        assert loser.stdout.read() == ""
        read_until(winner, "Ctrl-C")


def test_the_seed_configuration_by_hand(folder: Path, arguments: list[str]) -> None:
    """`python -m lmcache_api --config` serves 6999 and 7000; `config.json` lists these two for the frontend."""
    nodes = (ROOT / "config" / "config.json").read_text().replace("/tmp/lmcache_internal_api_server", f"{folder}/run")
    (folder / "config.json").write_text(nodes)
    port = arguments[-1]
    with running("-m", "lmcache_api", *arguments[:2]) as api:
        read_until(api, "worker0")
        frontend_arguments = ["--config", f"{folder}/config.json", "--port", port, "--host", "127.0.0.1"]
        with running("-m", "lmcache_frontend", *frontend_arguments) as frontend:
            read_until(frontend, f"frontend serves on http://127.0.0.1:{port} (2 nodes)")
            for name in ("lmcache_scheduler", "lmcache_worker0"):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/proxy2/{name}/version", timeout=10) as response:
                    assert response.read() == b'"0.1.0-embedded"'
            second = subprocess.run(
                [frontend.args[0], "-m", "lmcache_frontend", *frontend_arguments],  # type: ignore[index]
                capture_output=True, text=True, timeout=20, env=environment(), cwd=ROOT,
            )  # fmt: skip
            assert (second.returncode, second.stdout) == (2, "")
            assert second.stderr.startswith(f"lmcache-frontend: 127.0.0.1:{port}: the port is in use")
            frontend.send_signal(signal.SIGTERM)
            assert frontend.wait(10) == 0
        api.send_signal(signal.SIGTERM)
        assert api.wait(10) == 0
