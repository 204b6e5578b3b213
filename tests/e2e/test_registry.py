"""What the frontend remembers and notices, as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_api.pytest_plugin import free_port
from tests.e2e.processes import read_until, running


@contextlib.contextmanager
def frontend(port: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with running("-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(port), *arguments) as child:
        read_until(child, "frontend serves")
        yield child


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def nodes(port: int) -> list[str]:
    _, body = ask(port, "GET", "/api/nodes")
    return [child["name"] for proxy in body["nodes"] for child in proxy["children"]]


def until(port: int, wanted: list[str], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while (found := nodes(port)) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


@pytest.mark.parametrize("round_", range(3))
def test_after_kill_9_every_acknowledged_node_is_there(tmp_path: Path, round_: int) -> None:
    port, kept = free_port(), f"sqlite:{tmp_path}/nodes.db"
    acknowledged: list[str] = []

    def add(thread: int) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            for number in range(10_000):
                name = f"n{thread}_{number}"
                node = {"name": name, "host": "10.0.0.1", "port": 7000}
                status, _ = ask(port, "POST", "/api/proxies/local_proxy/nodes", node)
                if status == 200:
                    acknowledged.append(name)

    with frontend(port, "--registry", kept) as child:
        threads = [threading.Thread(target=add, args=(thread,)) for thread in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(random.uniform(0.3, 1.0))
        os.kill(child.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
    assert acknowledged
    with frontend(port, "--registry", kept):
        assert set(acknowledged) <= set(nodes(port))
        status, _ = ask(port, "DELETE", f"/api/nodes/{acknowledged[0]}")
        assert status == 200


def test_a_node_file_is_read_again_when_it_changes_and_on_sighup(tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "nodes.json"

    def write(*items: object) -> None:
        new = tmp_path / "new.json"
        new.write_text(json.dumps(items))
        new.replace(file)

    a, b = ({"name": name, "host": "10.0.0.1", "port": 7000} for name in "ab")
    write(a)
    with frontend(port, "--config", str(file)) as child:
        assert nodes(port) == ["a"]
        write(a, {"name": "broken"}, b)
        until(port, ["a", "b"])
        _, told = ask(port, "GET", "/api/sources")
        (problem,) = told["sources"][0]["problems"]
        assert problem == f"{file}: [1]: expected a node {{name, host, port}}: Object missing required field `host`"
        file.write_text("[{")
        deadline = time.monotonic() + 10
        while "expected a JSON list" not in str(ask(port, "GET", "/api/sources")[1]["sources"][0]["problems"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert nodes(port) == ["a", "b"]  # what was last read of it stays
        stamp = file.stat()
        file.write_text(json.dumps([b]))
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        child.send_signal(signal.SIGHUP)
        until(port, ["b"])


def test_an_lmcache_yaml_implies_nodes(tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "lmcache.yaml"
    file.write_text("internal_api_server_port_start: 7100\nlmcache_instance_id: rack\n")
    with frontend(port, "--lmcache-config", str(file), "--lmcache-workers", "2"):
        assert nodes(port) == ["rack_scheduler", "rack_worker0", "rack_worker1"]
        file.write_text("internal_api_server_port_start: 7100\nlmcache_instance_id: other\n")
        until(port, ["other_scheduler", "other_worker0", "other_worker1"])


def test_a_store_that_cannot_be_used_refuses_changes_and_nothing_else(tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "no_folder"
    file.write_text("")
    node = {"name": "n", "host": "10.0.0.1", "port": 7000}
    line = ["-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(port)]
    with running(*line, "--registry", f"sqlite:{file}/nodes.db") as child:
        assert "(0 nodes; nodes by hand have not been read yet: " in read_until(child, "serves on")
    with frontend(port, "--registry", f"sqlite:{file}/nodes.db", "--nodes", json.dumps([node])):
        assert nodes(port) == ["n"]
        status, body = ask(port, "POST", "/api/proxies/local_proxy/nodes", {**node, "name": "m"})
        assert (status, body["detail"].startswith("nothing was changed: ")) == (503, True)
        assert str(file) in body["detail"]
        assert ask(port, "GET", "/api/sources")[1]["sources"][-1]["problems"] != []


def test_a_node_file_is_read_again_by_a_process_with_many_files(tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "nodes.json"
    file.write_text("[]")
    program = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096));"
        " kept = [os.open('/dev/null', os.O_RDONLY) for _ in range(1100)];"
        " sys.argv[0] = 'lmcache_frontend'; from lmcache_frontend.__main__ import main; sys.exit(main())"
    )
    with running("-c", program, "--host", "127.0.0.1", "--port", str(port), "--config", str(file)) as child:
        read_until(child, "frontend serves")
        file.write_text(json.dumps([{"name": "a", "host": "10.0.0.1", "port": 7000}]))
        until(port, ["a"])


def test_sighup_does_not_end_one_that_only_sends_heartbeats() -> None:
    service = f"http://127.0.0.1:{free_port()}/heartbeat"
    with running("-m", "lmcache_frontend", "--no-http", "--heartbeat-url", service) as child:
        read_until(child, "sends heartbeats and serves nothing")
        child.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
