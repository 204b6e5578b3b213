"""`--workers`: several processes on one port, as callers and operators see them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lmcache_api.pytest_plugin import free_port
from tests.e2e.processes import ROOT, children_of, environment, read_until, running, wait_until_gone

ELSEWHERE = {"X-Forwarded-For": "192.0.2.7"}
"""Says that the caller is not on this machine."""

MANY = 40
"""So many connections are spread over all processes, but for one run in a million."""


class Target(BaseHTTPRequestHandler):
    """Answers with what it was asked; `/held` when it may."""

    protocol_version = "HTTP/1.1"
    held: queue.SimpleQueue[str] = queue.SimpleQueue()
    may = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/held":
            self.held.put(self.path)
            self.may.wait(20)
        self._answer({"path": self.path})

    def do_POST(self) -> None:
        self._answer({"path": self.path, "length": len(self.rfile.read(int(self.headers["Content-Length"])))})

    def _answer(self, what: object) -> None:
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def target() -> Iterator[int]:
    """The port of a target."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Target)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Running:
    """A frontend with its workers."""

    child: subprocess.Popen[str]
    port: int
    said: str

    @property
    def workers(self) -> list[int]:
        return sorted(children_of(self.child.pid))

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def owner(self, connection: http.client.HTTPConnection) -> int:
        """The process that serves a connection."""
        ours = connection.sock.getsockname()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            ends = [int(end.split(":")[1], 16) for end in fields[1:3]]
            if ends == [self.port, ours]:
                return self._holder(f"socket:[{fields[9]}]")
        raise AssertionError("nobody has it")

    def _holder(self, wanted: str) -> int:
        for pid in [self.child.pid, *self.workers]:
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(entry) == wanted:
                        return pid
        raise AssertionError(f"{wanted} is nobody's")

    def at_a_worker(self) -> http.client.HTTPConnection:
        """A connection that a worker serves."""
        for _ in range(MANY):
            connection = self.connect()
            assert ask(connection, "GET", "/proxy2/up/")[0] == 200
            if self.owner(connection) != self.child.pid:
                return connection
            connection.close()
        raise AssertionError("every connection is served by the main process")

    def metric(self, name: str, labels: str = "") -> int:
        """The sum of a metric's samples that have these labels."""
        _, text = get(self.port, "/metrics?node=")
        found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
        return int(sum(float(value) for found_labels, value in found if labels in found_labels))


@contextlib.contextmanager
def frontend(target: int, *arguments: str, workers: int = 3, host: str = "127.0.0.1") -> Iterator[Running]:
    port = free_port()
    nodes = json.dumps([{"name": "up", "host": "127.0.0.1", "port": target}])
    command = ["-m", "lmcache_frontend", "--host", host, "--port", str(port), "--workers", str(workers)]
    with running(*command, "--nodes", nodes, *arguments) as child:
        yield Running(child, port, read_until(child, "frontend serves"))


@pytest.fixture(scope="module")
def shared(target: int) -> Iterator[Running]:
    """One for the tests that break nothing."""
    with frontend(target) as found:
        assert "3 processes" in found.said and len(found.workers) == 2
        yield found


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, str]:
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def get(
    port: int, path: str, headers: dict[str, str] | None = None, method: str = "GET", body: object = None
) -> tuple[int, str]:
    """Over a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        return ask(connection, method, path, None if body is None else json.dumps(body).encode(), **(headers or {}))
    finally:
        connection.close()


def until(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for somebody to look how it ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_requests_are_spread_and_counted_together(shared: Running) -> None:
    by_code = 'code="2xx",node="up",proxy="local_proxy"'
    before = shared.metric("lmcache_frontend_proxy_requests_total", by_code)
    served = [shared.metric("lmcache_frontend_worker_requests_total", f'worker="{one}"') for one in range(3)]
    for _ in range(MANY):
        assert get(shared.port, "/proxy2/up/version") == (200, '{"path": "/version"}')
    until(lambda: shared.metric("lmcache_frontend_proxy_requests_total", by_code) == before + MANY)
    for worker, former in enumerate(served):
        assert shared.metric("lmcache_frontend_worker_requests_total", f'worker="{worker}"') > former
    assert shared.metric("lmcache_frontend_workers") == 3
    assert shared.metric("lmcache_frontend_proxy_request_seconds_count", 'kind="node"') == before + MANY


def test_every_process_knows_of_a_node_as_soon_as_its_change_is_answered(shared: Running, target: int) -> None:
    changes = [
        ("POST", "/api/proxies/local_proxy/nodes", target, {200}),
        ("PUT", "/api/nodes/added", free_port(), {502, 503}),
        ("DELETE", "/api/nodes/added", 1, {404}),
    ]
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(contextlib.closing(shared.connect())) for _ in range(MANY)]
        assert {ask(connection, "GET", "/proxy2/added/a")[0] for connection in held} == {404}
        assert {shared.owner(connection) for connection in held} == {shared.child.pid, *shared.workers}
        for method, path, port, statuses in changes:
            node = {"name": "added", "host": "127.0.0.1", "port": port}
            assert get(shared.port, path, None, method, node)[0] < 300
            assert {ask(connection, "GET", "/proxy2/added/a")[0] for connection in held} <= statuses


def test_what_a_workers_caller_changes_is_in_the_timeline(shared: Running) -> None:
    with contextlib.closing(shared.at_a_worker()) as connection:
        assert ask(connection, "GET", "/proxy2/up/loglevel?logger_name=of.a.worker&level=info")[0] == 200
        assert shared.owner(connection) != shared.child.pid

    def newest() -> list[str]:
        return [event["text"] for event in json.loads(get(shared.port, "/api/timeline?limit=20")[1])["events"]]

    until(lambda: newest().count("GET /loglevel at up") == 1)


def test_a_connection_moves_with_the_first_request_of_another_kind(shared: Running) -> None:
    connection = shared.at_a_worker()
    assert ask(connection, "GET", "/proxy2/up/1")[1] == '{"path": "/1"}'
    worker = shared.owner(connection)
    assert worker in shared.workers
    status, text = ask(connection, "GET", "/api/nodes")
    assert status == 200 and json.loads(text)["nodes"]
    assert shared.owner(connection) == shared.child.pid
    assert ask(connection, "GET", "/proxy2/up/2") == (200, '{"path": "/2"}')
    assert "<html" in ask(connection, "GET", "/")[1]
    assert shared.owner(connection) == shared.child.pid
    connection.close()


@pytest.mark.parametrize("length", [0, 10, 3_000_000])
def test_a_body_goes_through_whoever_has_the_connection(shared: Running, length: int) -> None:
    connection = shared.at_a_worker()
    wanted = (200, json.dumps({"path": "/in", "length": length}))
    assert ask(connection, "POST", "/proxy2/up/in", b"x" * length) == wanted
    assert ask(connection, "POST", "/proxy2/up/in", b"x" * length) == wanted
    connection.close()


def test_pipelined_requests_of_both_kinds_are_answered_in_their_order(shared: Running) -> None:
    connection = shared.at_a_worker()
    paths = ["/proxy2/up/1", "/proxy2/up/2", "/health", "/proxy2/up/3", "/api/sources", "/proxy2/up/4"]
    heads = [f"GET {path} HTTP/1.1\r\nHost: localhost\r\n" for path in paths]
    connection.sock.sendall(("\r\n".join(heads) + "Connection: close\r\n\r\n").encode())
    answer = b""
    while data := connection.sock.recv(65536):
        answer += data
    found = re.findall(rb'"path": "(/\d)"|"(health)y"|"(sources)"', answer)
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == len(paths)
    assert [b"".join(groups) for groups in found] == [b"/1", b"/2", b"health", b"/3", b"sources", b"/4"], answer
    connection.close()


def test_what_is_no_http_is_answered_as_ever(shared: Running) -> None:
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", shared.port), 10) as sock:
            sock.sendall(b"no http\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.0 400 Bad Request\r\n")


def test_a_second_start_is_refused(shared: Running) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(shared.port), "--workers=2"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert second.returncode == 2
    assert second.stderr.endswith("the port is in use; stop what listens there or choose another port\n")
    assert get(shared.port, "/proxy2/up/")[0] == 200


def test_of_two_that_start_together_one_serves() -> None:
    port = str(free_port())
    command = ["-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", port, "--workers", "2"]
    with running(*command) as one, running(*command) as other:
        until(lambda: None not in (one.poll(), other.poll()) or {one.poll(), other.poll()} == {None, 2}, 20)
        assert {one.poll(), other.poll()} == {None, 2}
        loser = one if one.poll() == 2 else other
        assert "the port is in use" in loser.communicate()[1]


def test_signals_for_the_terminals_group_leave_workers_to_the_main_process(shared: Running) -> None:
    before = shared.workers
    for pid in before:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGHUP)
    os.kill(shared.child.pid, signal.SIGHUP)
    for _ in range(MANY):
        assert get(shared.port, "/proxy2/up/")[0] == 200
    assert shared.workers == before


def test_access_is_the_same_in_every_process(target: int, tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    with frontend(target, "--audit-log", str(audit), "--viewers", "token", host="0.0.0.0") as found:
        found.said += read_until(found.child, "sign-in")
        token = found.said.partition("token=")[2].split()[0]
        assert token not in " ".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in found.workers)
        for _ in range(MANY // 2):
            assert get(found.port, "/proxy2/up/env", ELSEWHERE)[0] == 401
            assert get(found.port, "/proxy2/up/env", {**ELSEWHERE, "Authorization": "Bearer wrong-wrong-wrong"})[0] in (
                401,
                429,
            )
            assert get(found.port, "/proxy2/up/env", {**ELSEWHERE, "Authorization": f"Bearer {token}"})[0] == 200
            assert get(found.port, f"/proxy/127.0.0.1/{found.port}/health")[0] == 200, "a loopback port, from here"
            elsewhere = get(found.port, f"/proxy/127.0.0.1/{found.port}/health", ELSEWHERE)
            assert elsewhere[0] in (401, 403)
        found.child.send_signal(signal.SIGTERM)
        assert found.child.wait(20) == 0
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        assert sum(line["path"] == "/proxy2/up/env" and line["status"] == 200 for line in lines) == MANY // 2


def test_a_worker_that_is_killed_leaves_no_hole_and_comes_again(target: int) -> None:
    with frontend(target) as found:
        stop, failed, answered = threading.Event(), [], []

        def load() -> None:
            while not stop.is_set():
                try:
                    answered.append(get(found.port, "/proxy2/up/")[0])
                except (OSError, http.client.HTTPException) as error:
                    failed.append(error)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        before = found.workers
        try:
            until(lambda: len(answered) > 50)
            os.kill(before[0], signal.SIGKILL)
            until(lambda: len(found.workers) == 2 and found.workers != before)
            until(lambda: found.metric("lmcache_frontend_workers") == 3)
            count = len(answered)
            until(lambda: len(answered) > count + 50)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert set(answered) == {200}
        assert len(failed) <= len(threads), "only what the worker had in its hands"
        assert before[1] in found.workers
        found.child.send_signal(signal.SIGTERM)
        _, errors = found.child.communicate(timeout=20)
        assert f"(process {before[0]}) was ended by SIGKILL; it is started again in 0.5 seconds" in errors


def test_sigterm_ends_all_and_lets_requests_in_flight_end(target: int) -> None:
    with frontend(target) as found, contextlib.ExitStack() as stack:
        workers = found.workers
        held = [stack.enter_context(contextlib.closing(found.connect())) for _ in range(10)]
        for connection in held:
            connection.request("GET", "/proxy2/up/held")
        for _ in held:
            Target.held.get(timeout=20)
        found.child.send_signal(signal.SIGTERM)
        read_until(found.child, "stopping")
        Target.may.set()
        assert {connection.getresponse().read() for connection in held} == {b'{"path": "/held"}'}
        assert found.child.wait(20) == 0
        assert wait_until_gone(workers, 0.5) == []
        with pytest.raises(ConnectionRefusedError):
            get(found.port, "/proxy2/up/")


def test_workers_end_with_the_main_process(target: int) -> None:
    with frontend(target) as found:
        workers = found.workers
        found.child.kill()
        until(lambda: all(has_ended(pid) for pid in workers), 5)


def test_a_name_with_two_addresses_is_shared_on_both(target: int) -> None:
    with frontend(target, workers=2, host="localhost") as found:
        for host in {info[4][0] for info in socket.getaddrinfo("localhost", found.port, type=socket.SOCK_STREAM)}:
            for _ in range(MANY // 2):
                with contextlib.closing(http.client.HTTPConnection(host, found.port, timeout=10)) as connection:
                    assert ask(connection, "GET", "/proxy2/up/")[0] == 200


def test_ten_thousand_nodes_are_known_everywhere(target: int, tmp_path: Path) -> None:
    file = tmp_path / "nodes.json"
    nodes = [{"name": f"n{number}", "host": "localhost", "port": f"/nowhere/{number}"} for number in range(9_998)]
    file.write_text(json.dumps([*nodes, {"name": "last", "host": "127.0.0.1", "port": target}]))
    with frontend(target, "--config", str(file), workers=2) as found:
        for _ in range(MANY // 2):
            assert get(found.port, "/proxy2/last/x")[0] == 200


def test_a_plugin_has_workers_too(target: int) -> None:
    port = free_port()
    configuration = {
        "extra_config": {
            "plugin.frontend.workers": 2,
            "plugin.frontend.port": port,
            "plugin.frontend.host": "127.0.0.1",
        }
    }
    plugin = ROOT / "src/lmcache_frontend/plugins/scheduler_lmc_frontend_plugin.py"
    child = subprocess.Popen(
        [sys.executable, str(plugin)],
        env=environment(LMCACHE_RUNTIME_PLUGIN_CONFIG=json.dumps(configuration)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "2 processes" in read_until(child, "frontend serves")
        workers = children_of(child.pid)
        assert len(workers) == 1
    finally:
        child.terminate()
        child.communicate(timeout=20)
    assert child.returncode == 0 and wait_until_gone(workers, 0.5) == []
