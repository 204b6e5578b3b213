"""The controller's endpoints: who may report, who is asked, what is refused; LMCache's words if it has any."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yarl
from aiohttp import web

from lmcache_api import ComponentServer
from lmcache_api.component import ControllerError, Operation, WorkerReport
from lmcache_api.embedded import EmbeddedControllerComponent, controller, fan_out
from lmcache_api.embedded.controller import EmbeddedController
from lmcache_api.pytest_plugin import RunningApi, StartApi, client_for, free_port
from lmcache_shared.address import TcpAddress, UnixAddress
from lmcache_shared.listen import make_runner, make_site
from lmcache_shared.placement import MAX_WORKERS
from lmcache_shared.settings import Settings

SMALL = {"chunk_size": 16, "engine_layers": 1, "engine_heads": 1, "engine_head_size": 2, "engine_block_size": 64}
CPU = "LocalCPUBackend"
ANSWER_SECONDS = 0.3
SLACK = 1.0
OPERATIONS = (
    "lookup", "clear", "pin", "compress", "decompress", "move", "health", "query_instance", "check_finish",
    "query_worker_info",
)  # fmt: skip
NO_INTEGER = "Input should be a valid integer, unable to parse string as an integer"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def ask(server: RunningApi, method: str, path: str, **more: Any) -> tuple[int, Any]:
    async with server.client.request(method, path, **more) as response:
        assert response.content_type == "application/json"
        return response.status, json.loads(await response.text(), parse_constant=pytest.fail)


async def report(server: RunningApi, port: object, **more: Any) -> tuple[int, Any]:
    body = {"instance_id": "one", "worker_id": 0, "port": port, "key_count": 0, **more}
    return await ask(server, "POST", "/controller/workers", json=body)


async def workers_of(server: RunningApi) -> list[tuple[str, int, str, int, int]]:
    status, answer = await ask(server, "GET", "/controller/workers")
    assert status == 200
    assert answer["total_count"] == len(answer["workers"])
    names = ("instance_id", "worker_id", "ip", "port", "key_count")
    return [tuple(worker[name] for name in names) for worker in answer["workers"]]


@pytest.fixture
async def here(api_server: StartApi) -> RunningApi:
    """A controller on a Unix socket, which workers on this machine call."""
    return await api_server("controller", controller_answer_seconds=ANSWER_SECONDS)


TOKEN = "of-the-whole-deployment"


@pytest.fixture
async def by_port(api_server: StartApi) -> RunningApi:
    return await api_server(
        "controller", tcp=True, controller_answer_seconds=ANSWER_SECONDS, internal_api_server_token=TOKEN
    )


Serve = Callable[[Handler], Awaitable[int]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Whatever a worker may answer: serves the handler for every path, and gives its port."""
    runners: list[web.AppRunner] = []

    async def begin(handler: Handler) -> int:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", handler)
        runners.append(make_runner(app, drain_seconds=0, access_log=None))
        await runners[-1].setup()
        port = free_port()
        await make_site(runners[-1], TcpAddress("127.0.0.1", port)).start()
        return port

    yield begin
    await asyncio.gather(*(runner.cleanup() for runner in runners))


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of one that takes connections and never says a word."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


# A controller as such


async def test_it_serves_the_common_and_its_own_endpoints_and_no_engines(here: RunningApi) -> None:
    assert await ask(here, "GET", "/version") == (200, here.component.version.whole)
    for path in ("/freeze/status", "/cache/lookup", "/backends"):
        assert await ask(here, "GET", path) == (404, {"detail": "Not Found"})
    async with here.client.get("/meta") as response:
        assert json.loads(await response.text()) == {"role": "controller"}
    async with here.client.get("/conf") as response:
        told = json.loads(await response.text())
    assert (told["controller_answer_seconds"], told["controller_port"]) == (ANSWER_SECONDS, 9000)
    assert "chunk_size" not in told
    status, answer = await ask(here, "POST", "/conf", json={"controller_port": 9001, "chunk_size": 16})
    assert (status, answer["updated"], list(answer["errors"])) == (400, {}, ["controller_port", "chunk_size"])
    async with here.client.get("/metrics") as response:
        text = await response.text()
    assert "lmcache:cache_controller_registered_workers_count" in text
    status, answer = await ask(here, "GET", "/periodic-threads-health")
    assert (status, answer["healthy"]) == (200, True)


async def test_its_gauges_tell_the_present(here: RunningApi) -> None:
    for worker in range(3):
        assert (await report(here, "8000", worker_id=worker, key_count=7))[0] == 200
    async with here.client.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    told = {line.split("{")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("lmcache:cache_c")}
    assert told["lmcache:cache_controller_registered_workers_count"] == 3
    assert told["lmcache:cache_controller_kv_pool_keys_count"] == 21


async def test_nothing_is_known_at_first(here: RunningApi) -> None:
    empty = {"total_key_count": 0, "total_instance_count": 0, "total_worker_count": 0, "instances": []}
    assert await ask(here, "GET", "/controller/key-stats") == (200, empty)
    assert await ask(here, "GET", "/controller/workers") == (200, {"workers": [], "total_count": 0})
    for query in ("instance_id=one", "instance_id=&worker_id="):
        assert (await ask(here, "GET", f"/controller/workers?{query}"))[0] in (404, 422)
    status, answer = await ask(here, "POST", "/lookup", json={"tokens": [1]})
    assert (status, answer["layout_info"], answer["workers"]) == (200, {}, [])
    status, answer = await ask(here, "POST", "/query_worker_info", json={"instance_id": "all"})
    assert (status, answer["worker_infos"]) == (200, [])


async def test_what_is_told_of_workers(here: RunningApi) -> None:
    before = time.time()
    for instance, worker, keys in (("two", 1, 5), ("one", 0, 1), ("two", 0, 3)):
        status, answer = await report(here, f"80{worker:02}", instance_id=instance, worker_id=worker, key_count=keys)
        assert (status, answer) == (200, {"status": "success", "timeout_seconds": 10.0})
    assert await workers_of(here) == [
        ("one", 0, "127.0.0.1", 8000, 1), ("two", 0, "127.0.0.1", 8000, 3), ("two", 1, "127.0.0.1", 8001, 5),
    ]  # fmt: skip
    assert await ask(here, "GET", "/controller/key-stats") == (200, {
        "total_key_count": 9, "total_instance_count": 2, "total_worker_count": 3,
        "instances": [{"instance_id": "one", "key_count": 1, "worker_count": 1},
                      {"instance_id": "two", "key_count": 8, "worker_count": 2}],
    })  # fmt: skip
    status, two = await ask(here, "GET", "/controller/workers?instance_id=two")
    assert (status, two["total_count"], [worker["worker_id"] for worker in two["workers"]]) == (200, 2, [0, 1])
    status, worker = await ask(here, "GET", "/controller/workers?instance_id=two&worker_id=1")
    assert worker == two["workers"][1]
    assert before <= worker["registration_time"] == worker["last_heartbeat_time"] <= time.time()
    assert worker["peer_init_url"] is None
    assert (await report(here, "8001", instance_id="two", worker_id=1, key_count=6))[0] == 200
    status, later = await ask(here, "GET", "/controller/workers?instance_id=two&worker_id=1")
    assert later["registration_time"] == worker["registration_time"] < later["last_heartbeat_time"]
    assert later["key_count"] == 6
    for query, detail in (
        ("instance_id=nope", "No workers found for instance nope"),
        ("instance_id=one&worker_id=7", "Worker (one, 7) not found"),
    ):
        assert await ask(here, "GET", f"/controller/workers?{query}") == (404, {"detail": detail})
    told = {key: value for key, value in two["workers"][0].items() if key != "key_count"}
    for body, expected in (
        ({"instance_id": "two", "worker_ids": [0, 9]}, [told]),
        ({"instance_id": "two", "worker_ids": ["0"]}, [told]),
        ({"instance_id": "nope"}, []),
    ):
        status, answer = await ask(here, "POST", "/query_worker_info", json=body)
        assert (status, answer["worker_infos"]) == (200, expected)
        assert answer["event_id"].startswith("QueryWorkerInfo")
    for ids in (None, []):
        status, answer = await ask(here, "POST", "/query_worker_info", json={"instance_id": "all", "worker_ids": ids})
        assert len(answer["worker_infos"]) == 3
    status, answer = await ask(here, "POST", "/query_instance", json={"event_id": "x", "ip": "127.0.0.1"})
    assert (status, answer["res"]) == (200, "one")
    status, answer = await ask(here, "POST", "/query_instance", json={"event_id": "x", "ip": "192.0.2.7"})
    assert (status, answer) == (
        404,
        {
            "detail": "no instance is registered at 192.0.2.7; "
            "GET /controller/workers lists the workers and their addresses"
        },
    )


# Who has none


@pytest.mark.parametrize("role", ["scheduler", "worker"])
async def test_schedulers_and_workers_have_none(api_server: StartApi, role: str) -> None:
    server = await api_server(role, **SMALL)
    none = (503, {"detail": "Controller manager not available"})
    assert await ask(server, "GET", "/controller/key-stats") == none
    assert await ask(server, "GET", "/controller/workers?instance_id=x&worker_id=3") == none
    assert await report(server, "8000") == none
    assert await ask(server, "DELETE", "/controller/workers?instance_id=x&worker_id=3") == none
    for operation in OPERATIONS:
        assert await ask(server, "POST", f"/{operation}", json={}) == none
    for method in ("GET", "DELETE"):  # what is no number is one first, as with LMCache
        status, answer = await ask(server, method, "/controller/workers?instance_id=x&worker_id=y")
        problem = {"type": "int_parsing", "loc": ["query", "worker_id"], "msg": NO_INTEGER, "input": "y"}
        assert (status, answer) == (422, {"detail": [problem]})


async def test_other_methods(here: RunningApi) -> None:
    async with here.client.head("/controller/workers") as response:
        assert (response.status, await response.read()) == (200, b"")
    for path, allowed in (
        ("/controller/key-stats", "GET,HEAD"),
        ("/controller/workers", "DELETE,GET,HEAD,POST"),
        *((f"/{operation}", "POST") for operation in OPERATIONS),
    ):
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - set(allowed.split(",")):
            async with here.client.request(method, path) as response:
                assert (response.status, await response.json()) == (405, {"detail": "Method Not Allowed"})
                assert sorted(response.headers["Allow"].split(",")) == allowed.split(",")


# Bodies


@pytest.mark.parametrize(
    ("operation", "body", "problems"),
    [
        ("lookup", {}, [("missing", ["tokens"], "Field required")]),
        ("lookup", {"tokens": "x"}, [("list_type", ["tokens"], "Input should be a valid list")]),
        ("lookup", {"tokens": None}, [("list_type", ["tokens"], "Input should be a valid list")]),
        ("lookup", {"tokens": ["x", 1]}, [("int_parsing", ["tokens", 0], NO_INTEGER)]),
        ("lookup", {"tokens": [1, [1]]}, [("int_type", ["tokens", 1], "Input should be a valid integer")]),
        ("lookup", {"tokens": [1, 1 << 64]}, [("int_type", ["tokens", 1], "Input should be a valid integer")]),
        ("health", {"instance_id": 7}, [("string_type", ["instance_id"], "Input should be a valid string")]),
        ("clear", {}, [("missing", ["instance_id"], "Field required"), ("missing", ["location"], "Field required")]),
        ("query_worker_info", {"instance_id": "x", "worker_ids": 7},
         [("list_type", ["worker_ids"], "Input should be a valid list")]),
        ("move", {"old_position": ["x", 1], "new_position": []},
         [("string_type", ["old_position", 1], "Input should be a valid string")]),
        ("check_finish", {"event_id": None}, [("string_type", ["event_id"], "Input should be a valid string")]),
    ],
)  # fmt: skip
async def test_what_is_no_body(
    here: RunningApi, operation: str, body: Any, problems: list[tuple[str, list[Any], str]]
) -> None:
    status, answer = await ask(here, "POST", f"/{operation}", json=body)
    assert status == 422
    found = [(problem["type"], problem["loc"], problem["msg"]) for problem in answer["detail"]]
    assert found == [(kind, ["body", *where], message) for kind, where, message in problems]


async def test_tokens_as_pydantic_reads_them(here: RunningApi) -> None:
    for tokens in (["7", 7.0, " 8 "], [-(1 << 63)], []):
        status, answer = await ask(here, "POST", "/lookup", json={"tokens": tokens, "other": 1})
        assert (status, answer["layout_info"]) == (200, {})


async def test_too_many_tokens_and_too_large_bodies(api_server: StartApi, here: RunningApi) -> None:
    server = await api_server("controller", internal_api_server_max_tokens=100)
    assert (await ask(server, "POST", "/lookup", json={"tokens": [1] * 100}))[0] == 200
    message = "101 tokens, but internal_api_server_max_tokens allows 100 at once"
    for operation, more in (("lookup", {}), ("pin", {"instance_id": "x", "location": "y"})):
        status, answer = await ask(server, "POST", f"/{operation}", json={"tokens": [1] * 101, **more})
        assert (status, answer) == (400, {"detail": message})
        large = b'{"tokens": [' + b"1" * 6000 + b"]}"
        assert (await ask(server, "POST", f"/{operation}", data=large))[0] == 413
    assert (await ask(here, "POST", "/health", data=io.BytesIO(b" " * (1 << 20) + b"x")))[0] == 413
    assert (await report(server, "8000", other="x" * 5000))[0] == 413
    deep = b'{"tokens": ' + b"[" * 1000 + b"]" * 1000 + b"}"
    assert (await ask(server, "POST", "/lookup", data=deep))[0] == 422


@pytest.mark.parametrize("operation", ["pin", "compress", "decompress", "move"])
async def test_what_is_not_possible_says_so(here: RunningApi, operation: str) -> None:
    body = {
        "instance_id": "one", "location": CPU, "method": "none", "tokens": [1],
        "old_position": ["one", CPU], "new_position": ["two", CPU],
    }  # fmt: skip
    detail = f"{operation} is not possible on embedded workers: their engine has no such operation"
    assert await ask(here, "POST", f"/{operation}", json=body) == (501, {"detail": detail})


async def test_instances_and_events_that_nobody_knows(here: RunningApi) -> None:
    long = "x" * 5000
    for operation, body in (
        ("clear", {"instance_id": long, "location": CPU}),
        ("health", {"instance_id": long}),
        ("check_finish", {"event_id": long}),
        ("query_instance", {"event_id": "", "ip": long}),
    ):
        status, answer = await ask(here, "POST", f"/{operation}", json=body)
        assert status == 404
        assert "x" * 256 in answer["detail"]
        assert len(answer["detail"]) < 400


# Reports


@pytest.mark.parametrize(
    "more",
    [
        {"instance_id": ""},
        {"instance_id": "x" * 257},
        {"worker_id": -1},
        {"worker_id": MAX_WORKERS},
        {"key_count": -1},
        {"key_count": 1 << 41},
        {"instance_id": "all"},
        {"instance_id": "a\nb"},
        {"instance_id": "\x1b[2J"},
        {"instance_id": "\ud800"},
        {"port": "\ud800"},
        {"port": "/\ud800"},
        {"port": "/tmp/\udc80_7000"},
        {"host": "\ud800"},
        {"port": "0"},
        {"port": "65536"},
        {"port": ""},
        {"port": "8000/../x"},
        {"host": "local host"},
        {"host": "127.0.0.1@evil"},
        {"host": "x" * 4000},
    ],
    ids=str,
)
async def test_reports_that_make_no_sense(by_port: RunningApi, more: dict[str, Any]) -> None:
    status, answer = await report(by_port, **{"port": "8000", **more})
    assert status in (400, 403, 413)
    assert len(answer["detail"]) < 500
    assert await workers_of(by_port) == []


@pytest.mark.parametrize(
    "more",
    [{"worker_id": "x"}, {"key_count": 1.5}, {"port": 8000}, {"host": 7}, {"instance_id": None}],
    ids=str,
)
async def test_reports_of_the_wrong_type(by_port: RunningApi, more: dict[str, Any]) -> None:
    assert (await report(by_port, **{"port": "8000", **more}))[0] == 422
    assert await workers_of(by_port) == []


@pytest.mark.parametrize("host", ["192.0.2.1", "10.0.0.1", "::2", "fe80::1%eth0", "example.org", "[::2]", "0.0.0.0"])
async def test_nobody_reports_for_somebody_else(by_port: RunningApi, here: RunningApi, host: str) -> None:
    for server, caller in ((by_port, "127.0.0.1"), (here, "None")):
        status, answer = await report(server, "8000", host=host)
        assert (status, answer) == (403, {"detail": f"host {host}: a worker reports itself, and this is {caller}"})
        assert await workers_of(server) == []


@pytest.mark.parametrize("header", ["Via", "X-Forwarded-For", "Forwarded", "X-Real-IP"])
async def test_nobody_reports_through_a_proxy(by_port: RunningApi, header: str) -> None:
    assert (await report(by_port, "8000"))[0] == 200
    body = {"instance_id": "two", "worker_id": 0, "port": "8000", "key_count": 0}
    for method, more in (("POST", {"json": body}), ("DELETE", {"params": {"instance_id": "one", "worker_id": 0}})):
        status, answer = await ask(by_port, method, "/controller/workers", headers={header: "x"}, **more)
        assert status == 401  # nobody knows whose address it is, and no token says so
        shown = {header: "x", "Authorization": f"Bearer {TOKEN}"}
        status, answer = await ask(by_port, method, "/controller/workers", headers=shown, **more)
        assert (status, "not through a proxy" in answer["detail"]) == (403, True)
    assert await workers_of(by_port) == [("one", 0, "127.0.0.1", 8000, 0)]


def reporter(**settings: Any) -> EmbeddedController:
    return EmbeddedController(lambda: Settings(**settings))


REPORTED = WorkerReport("one", 0, "8000", 0)


@pytest.mark.parametrize(
    ("host", "caller", "ip"),
    [
        (None, "10.1.2.3", "10.1.2.3"),
        ("10.1.2.3", "10.1.2.3", "10.1.2.3"),
        ("10.1.2.3", "::ffff:10.1.2.3", "10.1.2.3"),
        (None, "::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:0::0007", "2001:db8::7", "2001:db8::7"),
        ("fe80::1%theirs", "fe80::1%ours", "fe80::1%ours"),
        (None, "fe80::1%ours", "fe80::1%ours"),
        ("127.0.0.2", "127.0.0.1", "127.0.0.2"),
        ("::1", "127.0.0.1", "::1"),
        ("[::1]", "127.0.0.1", "::1"),
        ("::1%lo", "127.0.0.1", "::1"),
        ("localhost.", "127.0.0.1", "localhost."),
        ("[2001:db8::7]", "2001:db8::7", "2001:db8::7"),
        ("localhost", "::1", "localhost"),
        ("localhost", None, "localhost"),
        (None, None, "127.0.0.1"),
        ("", "::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
async def test_a_worker_is_where_it_calls_from(host: str | None, caller: str | None, ip: str) -> None:
    made = reporter()
    await made.report(WorkerReport("one", 0, "8000", 0, host), caller)
    (worker,) = (await made.workers(None, None))["workers"]
    assert (worker["ip"], worker["port"]) == (ip, 8000)
    assert (await made.operate(Operation("query_instance", {"ip": ip, "event_id": ""})))["res"] == "one"
    for other in ("10.9.9.9", "fe80::2%ours"):
        with pytest.raises(ControllerError, match="a worker leaves by itself") as refused:
            await made.leave("one", 0, other)
        assert refused.value.status == 403
    await made.leave("one", 0, caller)
    assert (await made.workers(None, None))["total_count"] == 0
    with pytest.raises(ControllerError, match=r"Worker \(one, 0\) not found"):
        await made.leave("one", 0, caller)


@pytest.mark.parametrize("caller", ["10.1.2.3", "::ffff:10.1.2.3", "fe80::1%eth0", "strange"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "10.1.2.4", "::ffff:10.1.2.5", "fe80::2%eth0"])
async def test_a_worker_elsewhere_is_not_here(host: str, caller: str) -> None:
    with pytest.raises(ControllerError) as refused:
        await reporter().report(WorkerReport("one", 0, "8000", 0, host), caller)
    assert refused.value.status == 403


PREFIX = "/run/lm/socket"


@pytest.mark.parametrize(
    "path",
    [
        "/run/docker.sock", f"{PREFIX}/../../docker.sock", f"{PREFIX}_1/../x", f"{PREFIX}_", f"{PREFIX}x_1",
        f"{PREFIX}_1x", f"{PREFIX}_123456", f"{PREFIX}_7000\n", f"{PREFIX}_\u0661", f"x{PREFIX}_1", f"//{PREFIX}_1",
        PREFIX, "/",
    ],
)  # fmt: skip
async def test_sockets_that_are_none_of_the_deployment(path: str) -> None:
    for settings in ({"internal_api_server_socket_path_prefix": PREFIX}, {}):
        for caller in (None, "127.0.0.1"):
            with pytest.raises(ControllerError) as refused:
                await reporter(**settings).report(WorkerReport("one", 0, path, 0), caller)
            assert refused.value.status in (400, 403)


async def test_a_socket_is_on_this_machine() -> None:
    made = reporter(internal_api_server_socket_path_prefix=PREFIX)
    for caller in (None, "127.0.0.1", "::ffff:127.0.0.1"):
        await made.report(WorkerReport("one", 0, f"{PREFIX}_7000", 0, "elsewhere"), caller)
    (worker,) = (await made.workers("one", None))["workers"]
    assert (worker["ip"], worker["port"]) == ("localhost", 0)
    with pytest.raises(ControllerError, match="a socket is on this machine, and this is 10.1.2.3"):
        await made.report(WorkerReport("one", 1, f"{PREFIX}_7001", 0), "10.1.2.3")
    with pytest.raises(ControllerError, match="a worker leaves by itself"):
        await made.leave("one", 0, "10.1.2.3")
    await made.leave("one", 0, "127.0.0.1")


async def test_so_many_workers_and_no_more() -> None:
    seconds = 3600.0
    made = EmbeddedController(lambda: Settings(controller_worker_seconds=seconds))

    async def report_all() -> list[int]:
        refused = []
        for number in range(5000):
            instance, worker = divmod(number, MAX_WORKERS)
            try:
                await made.report(WorkerReport(f"i{instance}", worker, "8000", 1), f"10.0.{instance}.1")
            except ControllerError as error:
                assert error.status == 503
                refused.append(number)
        return refused

    began = time.monotonic()
    assert await report_all() == list(range(4096, 5000))
    assert time.monotonic() - began < 5
    stats = await made.key_stats()
    assert (stats["total_worker_count"], stats["total_key_count"]) == (4096, 4096)
    await made.report(WorkerReport("i0", 7, "8000", 2), "10.0.0.1")  # one that is known may go on
    seconds = 0.1
    while (await made.key_stats())["total_worker_count"]:
        await asyncio.sleep(0.05)
    await made.report(WorkerReport("new", 0, "8000", 1), "10.0.0.1")  # those that are silent make room
    assert (await made.key_stats())["total_worker_count"] == 1


@pytest.mark.parametrize("hosts", [["10.0.0.1"], ["localhost", "::1", "127.0.0.9", "[::1]"]])
async def test_no_host_takes_the_room_of_the_others(hosts: list[str]) -> None:
    made = reporter(controller_worker_seconds=3600.0)
    caller = hosts[0] if len(hosts) == 1 else "127.0.0.1"

    async def report_as(number: int, host: str, by: str) -> None:
        instance, worker = divmod(number, MAX_WORKERS)
        await made.report(WorkerReport(f"i{instance}", worker, "8000", 1, host), by)

    for number in range(MAX_WORKERS):
        await report_as(number, hosts[number % len(hosts)], caller)
    with pytest.raises(ControllerError, match="1024 workers of .* are registered; no further one is taken") as refused:
        await report_as(MAX_WORKERS, hosts[0], caller)
    assert refused.value.status == 503
    await report_as(MAX_WORKERS, "10.0.0.2", "10.0.0.2")
    await report_as(5, hosts[0], caller)  # one that is known may go on


async def test_one_that_is_silent_is_forgotten_and_comes_back_as_new(api_server: StartApi) -> None:
    server = await api_server("controller", controller_worker_seconds=0.3)
    assert (await report(server, "8000"))[1]["timeout_seconds"] == 0.3
    before = (await ask(server, "GET", "/controller/workers?instance_id=one&worker_id=0"))[1]["registration_time"]
    while await workers_of(server):
        await asyncio.sleep(0.02)
    assert 0.3 < time.time() - before < 0.3 + SLACK
    for path in ("?instance_id=one&worker_id=0", "?instance_id=one"):
        assert (await ask(server, "GET", f"/controller/workers{path}"))[0] == 404
    assert (await ask(server, "DELETE", "/controller/workers?instance_id=one&worker_id=0"))[0] == 404
    assert (await ask(server, "POST", "/health", json={"instance_id": "one"}))[0] == 404
    await report(server, "8000")
    after = (await ask(server, "GET", "/controller/workers?instance_id=one&worker_id=0"))[1]["registration_time"]
    assert after - before > 0.3


async def test_two_deployments_of_one_name_do_not_take_each_others_place() -> None:
    made = reporter(controller_worker_seconds=0.3)
    await made.report(WorkerReport("lmcache", 0, "7000", 5), "10.0.0.1")
    for port, caller in (("7000", "10.0.0.2"), ("7100", "10.0.0.1")):
        with pytest.raises(ControllerError) as refused:
            await made.report(WorkerReport("lmcache", 0, port, 9), caller)
        assert refused.value.status == 409
        assert str(refused.value).startswith(
            f"worker 0 of lmcache is at 10.0.0.1:7000, and this one is at {caller}:{port}: each deployment needs"
        )
    with pytest.raises(ControllerError):  # nor does it leave for the other
        await made.leave("lmcache", 0, "10.0.0.2")
    assert (await made.key_stats())["total_key_count"] == 5
    await made.report(WorkerReport("lmcache", 0, "7000", 6), "::ffff:10.0.0.1")  # another spelling of its address
    await asyncio.sleep(0.35)
    await made.report(WorkerReport("lmcache", 0, "7000", 9), "10.0.0.2")  # it has moved
    assert (await made.workers("lmcache", 0))["address"] == "10.0.0.2:7000"
    await made.close()


async def test_arrivals_and_losses_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lmcache_api")
    made = reporter(controller_worker_seconds=0.3)

    def told() -> list[tuple[str, str]]:
        found = [(record.levelname, record.message) for record in caplog.records]
        caplog.clear()
        return found

    for worker in range(8):
        await made.report(WorkerReport("one", worker, "7000", 5), f"10.0.0.{worker}")
        await made.report(WorkerReport("one", worker, "7000", 5), f"10.0.0.{worker}")
    await made.leave("one", 7, "10.0.0.7")
    names = [f"one worker {worker} at 10.0.0.{worker}:7000" for worker in range(8)]
    assert told() == [*(("INFO", f"{name} is here") for name in names), ("INFO", f"{names[7]} has left")]
    deadline = time.monotonic() + 5
    while not caplog.records:  # nobody asks, and it is told
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert told() == [("WARNING", f"no report for 0.3 seconds, forgotten: {', '.join(names[:5])} and 2 more")]
    await made.report(WorkerReport("one", 0, "7000", 5), "10.0.0.9")
    await made.close()
    await asyncio.sleep(0.5)
    assert told() == [("INFO", "one worker 0 at 10.0.0.9:7000 is here")]  # and no look after the end


async def test_workers_of_one_number_and_of_one_machine(here: RunningApi) -> None:
    for instance, worker in (("one", 0), ("one", 1), ("two", 1)):
        await report(here, "8000", instance_id=instance, worker_id=worker)
    status, answer = await ask(here, "GET", "/controller/workers?worker_id=1")
    assert [(told["instance_id"], told["worker_id"]) for told in answer["workers"]] == [("one", 1), ("two", 1)]
    assert (status, answer["total_count"]) == (200, 2)
    for ip in ("localhost", "127.0.0.1", "::1", "127.0.0.9"):
        status, answer = await ask(here, "POST", "/query_instance", json={"event_id": "", "ip": ip})
        assert (status, answer.get("res")) == (200, "one")
    socket_path = f"{here.component.settings.internal_api_server_socket_path_prefix}_7000"
    assert (await report(here, socket_path, instance_id="three"))[0] == 200
    status, told = await ask(here, "GET", "/controller/workers?instance_id=three&worker_id=0")
    assert (told["ip"], told["port"], told["address"]) == ("localhost", 0, socket_path)


# What workers answer


FOUND = {"status": "success", "num_hit_tokens": 512, "spans": [{"locations": [CPU, "LocalDiskBackend"]}]}
HIT = {"status": "success", "num_hit_tokens": 512, "location": CPU}


def answers(body: object, status: int = 200, **headers: str) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return web.Response(body=content, status=status, headers=headers)

    return answer


async def lookup(server: RunningApi, within: float = ANSWER_SECONDS) -> Any:
    """What the controller tells of a lookup, and of each worker by its number."""
    began = time.monotonic()
    status, answer = await ask(server, "POST", "/lookup", json={"tokens": list(range(600))})
    assert status == 200
    assert time.monotonic() - began < within + SLACK
    told = {int(worker["worker"].split()[2]): worker for worker in answer["workers"]}
    return answer, {number: {k: v for k, v in worker.items() if k != "worker"} for number, worker in told.items()}


USELESS: dict[str, tuple[bytes | dict[str, Any] | list[Any], str]] = {
    "empty": (b"", "no answer that can be used: "),
    "garbage": (b"\xff\x00nope", "no answer that can be used: "),
    "text": (b"hello", "no answer that can be used: "),
    "list": ([], "no answer that can be used: Expected `object`, got `array`"),
    "null": (b"null", "no answer that can be used: Expected `object`, got `null`"),
    "no count": ({"spans": []}, "no answer that can be used: "),
    "bool": ({**FOUND, "num_hit_tokens": True}, "no answer that can be used: Expected `int`, got `bool`"),
    "negative": ({**FOUND, "num_hit_tokens": -1}, "no answer that can be used: Expected `int` >= 0"),
    "float": ({**FOUND, "num_hit_tokens": 1.5}, "no answer that can be used: Expected `int`, got `float`"),
    "text count": ({**FOUND, "num_hit_tokens": "5"}, "no answer that can be used: Expected `int`, got `str`"),
    "infinite": (b'{"num_hit_tokens": 1e999, "spans": []}', "no answer that can be used: "),
    "more than a cache holds": ({**FOUND, "num_hit_tokens": 1 << 50}, "no answer that can be used: Expected `int` <= "),
    "huge count": ({**FOUND, "num_hit_tokens": 1 << 64}, "no answer that can be used: Expected `int` <= "),
    "spans are numbers": ({**FOUND, "spans": [1]}, "no answer that can be used: Expected `object`, got `int`"),
    "spans are an object": ({**FOUND, "spans": {"0": 1}}, "no answer that can be used: Expected `array`"),
    "spans are null": ({**FOUND, "spans": None}, "no answer that can be used: Expected `array`, got `null`"),
    "locations are text": ({**FOUND, "spans": [{"locations": CPU}]}, "no answer that can be used: Expected `array`"),
    "locations are numbers": ({**FOUND, "spans": [{"locations": [7]}]}, "no answer that can be used: Expected `str`"),
    "deep": (b'{"spans": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "no answer that can be used: "),
    "deep elsewhere": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "no answer that can be used: "),
    "too large": (b" " * (1 << 20) + b"{}", "its answer is larger than 1048576 bytes"),
}


@pytest.mark.parametrize("name", USELESS)
async def test_an_answer_that_is_of_no_use(here: RunningApi, serve: Serve, name: str) -> None:
    content, why = USELESS[name]
    await report(here, str(await serve(answers(content))), worker_id=0)
    await report(here, str(await serve(answers(FOUND))), worker_id=1)
    await report(here, str(await serve(answers(FOUND))), instance_id="two", worker_id=2)
    answer, told = await lookup(here)
    assert (told[0]["status"], told[0].keys()) == ("error", {"status", "error"})
    assert told[0]["error"].startswith(why)
    assert len(told[0]["error"]) <= 256
    assert (told[1], told[2]) == (HIT, HIT)
    assert answer["layout_info"] == {"two": [CPU, 512]}
    status, finished = await ask(here, "POST", "/check_finish", json={"event_id": answer["event_id"]})
    assert (status, finished) == (200, {"status": "finished", "workers": answer["workers"]})


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (answers({"detail": "not now"}, 503), "it answers 503: not now"),
        (answers({"error": "API", "message": "no engine"}, 503), "it answers 503: API: no engine"),
        (answers({"detail": [{"msg": "x"}]}, 422), "it answers 422"),
        (answers(b"<html>", 500), "it answers 500"),
        (answers({"detail": "x" * 9000}, 500), f"it answers 500: {'x' * 240}"),
        (answers(b"[" * 9000, 500), "it answers 500"),
        (answers(FOUND, 201), "it answers 201"),
        (answers(FOUND, 307, Location="http://127.0.0.1:9/"), "it answers 307"),
    ],
)
async def test_an_answer_that_is_a_refusal(here: RunningApi, serve: Serve, handler: Handler, why: str) -> None:
    await report(here, str(await serve(handler)))
    _, told = await lookup(here)
    assert told == {0: {"status": "error", "error": why}}


async def test_good_answers_of_other_shapes(api_server: StartApi, serve: Serve) -> None:
    here = await api_server("controller", controller_answer_seconds=20)  # a megabyte takes its time on a busy machine
    many = {**FOUND, "spans": [{"start": 0, "end": 512, "chunks": 2, "locations": [CPU], "x": [1]}] * 9000}
    kinds: list[tuple[object, dict[str, Any]]] = [
        ({**FOUND, "spans": [], "num_hit_tokens": 0}, {**HIT, "num_hit_tokens": 0, "location": ""}),
        ({**FOUND, "spans": [{"locations": []}]}, {**HIT, "location": ""}),
        ({**FOUND, "spans": [{"locations": ["x" * 999]}]}, {**HIT, "location": "x" * 256}),
        (many, HIT),
        (b" \n" * 100_000 + json.dumps(FOUND).encode(), HIT),
    ]
    for number, (body, _) in enumerate(kinds):
        assert not isinstance(body, dict) or len(json.dumps(body)) < 1 << 20
        await report(here, str(await serve(answers(body))), worker_id=number)
    _, told = await lookup(here)
    assert told == {number: expected for number, (_, expected) in enumerate(kinds)}


async def test_an_answer_in_pieces_is_read_to_its_end(here: RunningApi, serve: Serve) -> None:
    async def piecewise(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for byte in json.dumps(FOUND).encode():
            await response.write(bytes([byte]))
            await asyncio.sleep(0)
        return response

    await report(here, str(await serve(piecewise)))
    assert (await lookup(here))[1] == {0: HIT}


async def test_a_worker_that_claims_more_than_was_asked(here: RunningApi, serve: Serve) -> None:
    await report(here, str(await serve(answers({**FOUND, "num_hit_tokens": 10**12}))))
    answer, _ = await lookup(here)
    assert answer["layout_info"] == {"one": [CPU, 600]}


async def test_a_worker_that_never_reads_is_cut_off_at_the_deadline(silent: int, tmp_path: Path) -> None:
    """What was written to it waits to be read, also when the connection is closed."""
    asks = fan_out.FanOut()
    question = fan_out.Question("POST", "/cache/lookup", fan_out.Found, body=bytes(16 << 20))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{tmp_path}/s")
        sock.listen()
        await asks.ask(TcpAddress("127.0.0.1", silent), question, 0.1)  # what is made once is made
        before = len(os.listdir("/proc/self/fd"))
        for address in (TcpAddress("127.0.0.1", silent), UnixAddress(f"{tmp_path}/s")):
            for _ in range(3):
                told = await asyncio.gather(*(asks.ask(address, question, 0.2) for _ in range(8)))
                assert told == [{"status": "error", "error": "no answer within 0.2 seconds"}] * 8
        await asyncio.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) <= before + 1


async def test_without_file_descriptors_it_is_503_and_says_so(here: RunningApi, serve: Serve) -> None:
    for number in range(3):
        await report(here, str(await serve(answers(FOUND))), worker_id=number)
    assert (await lookup(here))[0]["layout_info"]  # and the connection to the controller is open
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    body = json.dumps({"tokens": list(range(600))})
    kept: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 1024), limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                kept.append(os.open("/dev/null", os.O_RDONLY))
        status, answer = await ask(here, "POST", "/lookup", data=body)
    finally:
        for number in kept:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert status == 503
    assert answer["detail"].startswith("3 of 3 workers were not asked: the controller has no file descriptor left")
    assert (await lookup(here))[0]["layout_info"] == {"one": [CPU, 512]}, "and on it goes"


async def test_what_never_ends_delays_nobody(api_server: StartApi, serve: Serve, silent: int) -> None:
    server = await api_server("controller", controller_answer_seconds=ANSWER_SECONDS, controller_operation_seconds=1.0)

    async def drips(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.05)

    async def hangs(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(100)
        raise AssertionError

    ports = [await serve(drips), await serve(hangs), silent, await serve(answers(FOUND))]
    for number, port in enumerate(ports):
        await report(server, str(port), worker_id=number)
    began = time.monotonic()
    answer, told = await lookup(server)
    assert told == {0: {"status": "pending"}, 1: {"status": "pending"}, 2: {"status": "pending"}, 3: HIT}
    status, running = await ask(server, "POST", "/check_finish", json={"event_id": answer["event_id"]})
    assert (status, running["status"]) == (200, "running")
    while running["status"] == "running":
        assert time.monotonic() - began < 1 + SLACK
        await asyncio.sleep(0.02)
        _, running = await ask(server, "POST", "/check_finish", json={"event_id": answer["event_id"]})
    assert [worker.get("error") for worker in running["workers"]] == ["no answer within 1 seconds"] * 3 + [None]


async def test_an_answer_comes_before_the_calls_deadline(api_server: StartApi, serve: Serve) -> None:
    server = await api_server("controller", controller_answer_seconds=60, internal_api_server_call_seconds=3)

    async def hangs(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(100)
        raise AssertionError

    await report(server, str(await serve(hangs)))
    _, told = await lookup(server, within=3)
    assert told == {0: {"status": "pending"}}


async def test_clear_and_health_and_what_they_ask(here: RunningApi, serve: Serve) -> None:
    asked: list[tuple[str, str]] = []

    def worker(cleared: object, healthy: object) -> Handler:
        async def answer(request: web.Request) -> web.Response:
            asked.append((request.method, request.path_qs))
            is_clear = request.path == "/cache/clear"
            return web.json_response({"num_removed": cleared} if is_clear else {"healthy": healthy})

        return answer

    for number, (cleared, healthy) in enumerate([(512, True), (0, False), (True, 1), (-5, "yes"), ("9", None)]):
        await report(here, str(await serve(worker(cleared, healthy))), worker_id=number)
    odd = "Local&x=1 #?/é"
    status, answer = await ask(here, "POST", "/clear", json={"instance_id": "one", "location": odd})
    assert (status, answer["num_tokens"]) == (200, 512)
    assert answer["event_id"].startswith("Clear")
    assert [worker["status"] for worker in answer["workers"]] == ["success"] * 2 + ["error"] * 3
    assert {method for method, _ in asked} == {"DELETE"}
    assert {str(yarl.URL(path).query) for _, path in asked} == {str(yarl.URL("/").with_query(locations=odd).query)}
    status, answer = await ask(here, "POST", "/health", json={"instance_id": "one"})
    assert (status, answer["error_codes"]) == (200, {"0": 0, "1": 1, "2": 2, "3": 2, "4": 2})


# Bounds


async def test_a_worker_that_hangs_has_few_questions_at_once(
    api_server: StartApi, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fan_out, "ASKED_OF_ONE", 3)
    here = await api_server("controller", controller_answer_seconds=3)
    asked = 0

    async def hangs(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        await asyncio.sleep(100)
        raise AssertionError

    await report(here, str(await serve(hangs)))
    await report(here, str(await serve(answers(FOUND))), worker_id=1)
    found = [told for _, told in await asyncio.gather(*(lookup(here, within=3) for _ in range(5)))]
    refused = {"status": "error", "error": "it has not answered 3 earlier questions"}
    assert sorted(str(told[0]) for told in found) == sorted(map(str, [refused] * 2 + [{"status": "pending"}] * 3))
    assert sum(told[1] == HIT for told in found) >= 3
    assert asked == 3


async def test_so_many_are_asked_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    now = most = 0

    async def busy(request: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return web.json_response({"healthy": True})

    monkeypatch.setattr(fan_out, "ASKED_AT_ONCE", 5)
    asking = fan_out.FanOut()
    question = fan_out.Question("GET", "/x", fan_out.Healthy)
    address = TcpAddress("127.0.0.1", await serve(busy))
    found = await asyncio.gather(*(asking.ask(address, question, 10) for _ in range(fan_out.ASKED_OF_ONE)))
    assert found == [{"status": "success", "healthy": True}] * 8
    assert most == 5
    assert asking._asked == {}  # nothing is kept of addresses that were asked once


async def test_events_are_bounded(monkeypatch: pytest.MonkeyPatch, here: RunningApi, serve: Serve) -> None:
    monkeypatch.setattr(controller, "MAX_EVENTS", 4)
    gate = asyncio.Event()

    async def waits(request: web.Request) -> web.Response:
        await gate.wait()
        return web.json_response({"healthy": True})

    await report(here, str(await serve(waits)))
    await report(here, str(await serve(answers({"healthy": True}))), instance_id="two")

    async def health(instance: str) -> tuple[int, Any]:
        return await ask(here, "POST", "/health", json={"instance_id": instance})

    async def known(event: Any) -> tuple[int, str | None]:
        status, answer = await ask(here, "POST", "/check_finish", json={"event_id": event[1]["event_id"]})
        return status, answer.get("status")

    waiting = await health("one")
    done = [await health("two") for _ in range(5)]
    assert [(await known(event))[0] for event in done] == [404, 404, 200, 200, 200]
    assert await known(waiting) == (200, "running")  # what goes on is not forgotten for what is done
    more = [await health("one") for _ in range(3)]
    status, answer = await health("two")
    assert (status, "too many operations" in answer["detail"]) == (503, True)
    gate.set()
    for event in (waiting, *more):
        while (await known(event))[1] == "running":
            await asyncio.sleep(0.01)
        assert await known(event) == (200, "finished")
    assert (await health("two"))[0] == 200
    assert (await known(waiting))[0] == 404
    monkeypatch.setattr(controller, "MAX_EVENT_WORKERS", 2)
    last = [await health("two") for _ in range(3)]
    assert [(await known(event))[0] for event in last] == [404, 200, 200]


async def test_when_the_caller_leaves_a_question_ends_and_a_clear_goes_on(api_server: StartApi, serve: Serve) -> None:
    server = await api_server("controller", controller_answer_seconds=30)
    begun: list[str] = []
    ended: list[str] = []

    async def hangs(request: web.Request) -> web.StreamResponse:
        begun.append(request.path)
        try:
            await asyncio.sleep(100)
        finally:
            ended.append(request.path)
        raise AssertionError

    await report(server, str(await serve(hangs)))
    bodies = {"health": {"instance_id": "one"}, "clear": {"instance_id": "one", "location": CPU}}
    callers = [asyncio.create_task(ask(server, "POST", f"/{name}", json=body)) for name, body in bodies.items()]
    while len(begun) < 2:
        await asyncio.sleep(0.01)
    for caller in callers:
        caller.cancel()
    while not ended:
        await asyncio.sleep(0.01)
    made = server.component.controller
    assert isinstance(made, EmbeddedController)
    (event,) = made._events.values()
    assert event.event_id.startswith("Clear")
    assert ended == ["/periodic-threads-health"]
    assert event.waiting


async def test_the_end_of_the_server_ends_what_goes_on(tmp_path: Path, serve: Serve) -> None:
    ended = asyncio.Event()

    async def hangs(request: web.Request) -> web.StreamResponse:
        try:
            await asyncio.sleep(100)
        finally:
            ended.set()
        raise AssertionError

    settings = Settings(
        internal_api_server_enabled=True, internal_api_server_socket_path_prefix=f"{tmp_path}/s",
        controller_answer_seconds=0.05, internal_api_server_drain_seconds=0.1,
    )  # fmt: skip
    with EmbeddedControllerComponent(settings) as component:
        async with ComponentServer(component) as server, client_for(server.placement.address) as client:
            made = component.controller
            await made.report(WorkerReport("one", 0, str(await serve(hangs)), 0), None)
            async with client.post("/health", json={"instance_id": "one"}) as response:
                assert (await response.json())["error_codes"] == {"0": 2}
            (event,) = made._events.values()
            assert event.task is not None
            assert not event.task.done()
    assert event.task.cancelled()
    await asyncio.wait_for(ended.wait(), 5)


async def test_a_million_tokens_to_many_workers_leave_the_loop_free(here: RunningApi, serve: Serve) -> None:
    size = 1 << 20
    sizes: list[int] = []

    async def swallows(request: web.Request) -> web.Response:
        got = 0
        async for piece in request.content.iter_chunked(1 << 16):
            got += len(piece)
        sizes.append(got)
        return web.json_response(FOUND)

    for number in range(16):
        await report(here, str(await serve(swallows)), worker_id=number)
    tokens = [str(token) for token in range(100_000, 100_000 + size)]  # each is looked at, unlike plain numbers
    body = json.dumps({"tokens": tokens}, separators=(",", ":")).encode()
    longest, stop = 0.0, asyncio.Event()

    async def ticks() -> None:
        nonlocal longest
        while not stop.is_set():
            began = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - began)

    ticking = asyncio.create_task(ticks())
    async with here.client.post("/lookup", data=io.BytesIO(body), timeout=aiohttp.ClientTimeout(50)) as response:
        answer = await response.json()
    deadline = time.monotonic() + 30
    while len(sizes) < 16:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    stop.set()
    await ticking
    assert response.status == 200
    assert len(answer["workers"]) == 16
    assert len(set(sizes)) == 1
    assert sizes[0] > 7 * size
    assert longest < 0.35, longest  # parsed, checked and written on the loop it is more than a second


async def test_a_report_that_is_nan_or_infinite(by_port: RunningApi) -> None:
    for value in (math.nan, math.inf, -math.inf):
        assert (await report(by_port, "8000", key_count=value))[0] == 422
