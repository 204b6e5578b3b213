"""What becomes of a request whose component raises, hangs, lacks something, or is asked nonsense."""

import asyncio
import concurrent.futures
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import yarl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_api import create_app
from lmcache_api.component import Category, LoadError, Unavailable
from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.pytest_plugin import RunningApi, StartApi
from lmcache_shared.errors import Failure
from lmcache_shared.settings import DEFINITIONS, Settings

OF_THE_ENGINE = {
    "GET /backends": "list backends",
    "POST /backends": "create backends",
    "DELETE /backends/x": "close backend",
    "POST /backends/x/recreate": "recreate backend",
    "GET /bypass/list": "list bypassed backends",
    "PUT /bypass/add?backend_name=x": "add bypass backend",
    "PUT /bypass/remove?backend_name=x": "remove bypass backend",
    "PUT /freeze/enable": "enable freeze mode",
    "PUT /freeze/disable": "disable freeze mode",
    "GET /freeze/status": "get freeze mode status",
    "PUT /hot_cache/enable": "enable hot cache",
    "PUT /hot_cache/disable": "disable hot cache",
    "GET /hot_cache/status": "get hot cache status",
    "POST /cache/store?tokens_mock=0,1": "store cache",
    "POST /cache/retrieve?tokens_mock=0,1": "retrieve cache",
    "GET /cache/lookup?tokens_mock=0,1": "look up cache",
    "POST /cache/lookup?tokens_mock=0,1": "look up cache",
    "DELETE /cache/clear": "clear cache",
    "POST /cache/kvcache/record_slot": "set record slot status",
    "POST /cache/load-fs-chunks": "load chunks from FSConnector",
}
OF_THE_COMPONENT = {
    "GET /cache/kvcache/info": "get kvcache info",
    "GET /cache/kvcache/check?slot_mapping=0&chunk_size=1": "compute checksums",
    "GET /lookup/info": "get lookup info",
    "POST /lookup/close": "close lookup",
    "POST /lookup/create": "create lookup",
    "POST /lookup/recreate": "recreate lookup",
    "GET /inference_info": "get inference info",
    "GET /inference_version": "get inference version",
    "POST /chunk_statistics/start": "start",
    "POST /chunk_statistics/stop": "stop",
    "POST /chunk_statistics/reset": "reset",
    "GET /chunk_statistics/status": "get status",
}
OPERATIONS = {**OF_THE_ENGINE, **OF_THE_COMPONENT}


class Everything:
    """An engine, its backends, a KV cache, a lookup: whatever is asked of it, `behave` is called."""

    def __init__(self, behave: Callable[[], Any]) -> None:
        self._behave = behave

    @property
    def backends(self) -> Any:
        return self

    @property
    def statistics(self) -> Any:
        return self

    def gauges(self) -> dict[str, float]:
        """Of the statistics, for the metrics: they wait for no engine."""
        return {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **more: self._behave()


def behaving(behave: Callable[[], Any] | None) -> Callable[[Settings, int], EmbeddedComponent]:
    """A component of which every ability behaves so; without a way to behave it has none."""
    what = None if behave is None else Everything(behave)

    class Behaving(EmbeddedComponent):
        kv_caches = what
        lookup_client = what

        def __init__(self, settings: Settings, index: int) -> None:
            super().__init__(settings, index)
            assert self.engine is not None
            self._real = self.engine
            self.engine = self.lookup = self.inference = what

        def stop(self) -> None:
            self.engine = self._real
            super().stop()

    return Behaving


async def ask(server: RunningApi, name: str, **more: Any) -> tuple[int, Any, str]:
    method, path = name.split(" ", 1)
    if path == "/cache/load-fs-chunks":
        more = {"json": {"config_path": "x"}, **more}
    async with server.client.request(method, path, **more) as response:
        text = await response.text()
        if path not in ("/threads", "/env"):
            assert "Traceback" not in text
            assert ".py" not in text
        answer = json.loads(text) if response.content_type == "application/json" else text
        return response.status, answer, text


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("it did not happen within ten seconds")


# It raises


async def test_what_an_engine_cannot_do_is_a_500_that_says_why(
    api_server: StartApi, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("the disk is full")

    worker = await api_server(component=behaving(fail))
    for name, what in OPERATIONS.items():
        caplog.clear()
        expected = {"error": f"Failed to {what}", "message": "the disk is full"}
        assert await ask(worker, name) == (500, expected, json.dumps(expected, indent=2))
        assert f"failed to {what}" in caplog.text  # and the log has it in full
        assert "RuntimeError: the disk is full" in caplog.text


async def test_what_an_engine_lacks_is_a_503(api_server: StartApi, caplog: pytest.LogCaptureFixture) -> None:
    def lack() -> None:
        raise Unavailable("no such part")

    worker = await api_server(component=behaving(lack))
    for name in OPERATIONS:
        status, answer, _ = await ask(worker, name)
        assert (status, answer) == (503, {"error": "API unavailable", "message": "no such part"}), name
    assert caplog.text == ""


async def test_an_engine_may_refuse_by_itself(api_server: StartApi) -> None:
    def refuse() -> None:
        raise Failure(409, "Busy", "later")

    worker = await api_server(component=behaving(refuse))
    for name in OPERATIONS:
        assert (await ask(worker, name))[:2] == (409, {"error": "Busy", "message": "later"})


async def test_a_configuration_of_chunk_files_that_cannot_be_used_is_a_400(api_server: StartApi) -> None:
    def fail() -> None:
        raise LoadError("leads nowhere")

    worker = await api_server(component=behaving(fail))
    assert (await ask(worker, "POST /cache/load-fs-chunks"))[:2] == (400, {"detail": "leads nowhere"})


@pytest.mark.parametrize(
    "error",
    [
        StopIteration("x"),
        concurrent.futures.CancelledError("x"),
        asyncio.CancelledError("x"),
        GeneratorExit("x"),
        SystemExit("x"),
        KeyboardInterrupt("x"),
        asyncio.TimeoutError("x"),
        MemoryError("x"),
        RecursionError("x"),
    ],
    ids=lambda error: type(error).__module__.partition(".")[0] + "." + type(error).__name__,
)
async def test_whatever_an_engine_raises_is_answered(api_server: StartApi, error: BaseException) -> None:
    def fail() -> None:
        raise error

    worker = await api_server(component=behaving(fail))
    for name in ("GET /freeze/status", "GET /lookup/info", "POST /cache/store?tokens_mock=0,1"):
        status, answer, _ = await ask(worker, name)
        assert (status, answer["error"]) == (500, f"Failed to {OPERATIONS[name]}")
        assert answer["message"] in ("x", f"{type(error).__name__}: x")


async def test_an_error_without_words_is_named(api_server: StartApi) -> None:
    def fail() -> None:
        raise AssertionError

    worker = await api_server(component=behaving(fail))
    assert (await ask(worker, "GET /freeze/status"))[1]["message"] == "AssertionError"


async def test_what_is_no_json_is_told_as_text(api_server: StartApi) -> None:
    worker = await api_server(component=behaving(lambda: {"far": float("inf"), "near": float("nan")}))
    status, _, text = await ask(worker, "GET /lookup/info")
    assert (status, json.loads(text, parse_constant=pytest.fail)) == (200, {"far": "inf", "near": "nan"})


# It is not there


async def test_a_component_that_lacks_everything(api_server: StartApi) -> None:
    worker = await api_server(component=behaving(None))
    for name in OPERATIONS:
        status, answer, text = await ask(worker, name)
        expected = 404 if "/kvcache/" in name and "record_slot" not in name else 503
        assert (status, list(answer)) == (expected, ["error", "message"]), name
        assert text == json.dumps(answer, indent=2)
    for name in ("GET /conf", "GET /meta", "GET /metrics", "GET /threads", "GET /version", "GET /env"):
        assert (await ask(worker, name))[0] == 200
    for name in ("GET /controller/key-stats", "GET /controller/workers"):
        assert (await ask(worker, name))[:2] == (503, {"detail": "Controller manager not available"})


async def test_an_engine_without_a_storage_manager(api_server: StartApi) -> None:
    class Engine:
        backends = None

        def close(self) -> None: ...

    class Component(EmbeddedComponent):
        kv_caches = None

        def _make_engine(self) -> None:
            self.engine = Engine()

    worker = await api_server(component=Component)
    for name in list(OF_THE_ENGINE)[:7]:
        api = "Bypass API" if "/bypass" in name else "/backends API"
        message = "StorageManager not initialized." if api == "Bypass API" else "LMCache engine not configured."
        expected = {"error": f"{api} is unavailable", "message": message}
        assert (await ask(worker, name))[:2] == (503, expected)


# It hangs


class Gate:
    """Calls wait at it until it is opened."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.waiting = 0
        self.passed = 0

    def wait(self) -> Any:
        self.waiting += 1
        self.event.wait(30)
        self.passed += 1
        return True


@pytest.fixture
def gate() -> Any:
    gate = Gate()
    yield gate
    gate.event.set()


async def test_past_the_deadline_it_is_a_504_that_says_so(api_server: StartApi, gate: Gate) -> None:
    for names in (list(OPERATIONS)[:16], list(OPERATIONS)[16:]):
        worker = await api_server(component=behaving(gate.wait), internal_api_server_call_seconds=0.1)
        answers = await asyncio.gather(*(ask(worker, name) for name in names))
        for name, (status, answer, _) in zip(names, answers, strict=True):
            begins = f"{OPERATIONS[name]}: not done within 0.1 seconds; "
            assert status == 504
            assert answer["detail"] in (f"{begins}it may still finish", f"{begins}it was not begun")


async def test_what_was_late_does_finish(api_server: StartApi, gate: Gate) -> None:
    worker = await api_server(component=behaving(gate.wait), internal_api_server_call_seconds=0.05)
    assert (await ask(worker, "PUT /freeze/enable"))[0] == 504
    assert (gate.waiting, gate.passed) == (1, 0)
    gate.event.set()
    await until(lambda: gate.passed == 1)
    assert (await ask(worker, "GET /freeze/status"))[:2] == (
        200,
        {"status": "success", "freeze": True, "message": "Freeze mode is enabled"},
    )


async def test_while_the_engine_hangs_all_else_is_told(api_server: StartApi, gate: Gate) -> None:
    worker = await api_server(component=behaving(gate.wait), internal_api_server_call_seconds=30.0)
    status, answer, _ = await ask(worker, "POST /conf", json={"internal_api_server_call_seconds": 0.05})
    assert (status, answer) == (200, {"updated": {"internal_api_server_call_seconds": 0.05}})
    connector = worker.address.connector(limit=100, keepalive_timeout=15)
    async with aiohttp.ClientSession("http://localhost", connector=connector) as client:
        many = RunningApi(worker.component, worker.address, worker.node, client)
        late = await asyncio.gather(*(ask(many, "GET /freeze/status") for _ in range(68)))
    assert {status for status, _, _ in late} == {504}
    await ask(worker, "POST /conf", json={"internal_api_server_call_seconds": 30})
    for name, what in OPERATIONS.items():  # four hang, 64 stand in line
        method, path = name.split(" ", 1)
        body = {"json": {"config_path": "x"}} if "load-fs" in path else {}
        async with worker.client.request(method, path, **body) as response:
            assert (response.status, response.headers.get("Retry-After")) == (503, "1"), name
            assert await response.json() == {"detail": f"{what}: too many calls wait already; try again later"}
    for name in ("GET /metrics", "GET /conf", "GET /threads", "GET /version", "GET /meta", "GET /periodic-threads"):
        assert (await ask(worker, name, timeout=aiohttp.ClientTimeout(10)))[0] == 200, name
    assert (await ask(worker, "POST /conf", json={"min_retrieve_tokens": 3}))[0] == 200
    async with worker.client.get("/threads?name=engine") as response:
        assert (await response.text()).count("in wait") >= 4
    gate.event.set()
    await until(lambda: gate.passed == 4)  # the others were given up in line, and are never made
    assert (await ask(worker, "GET /freeze/status"))[0] == 200


# Nonsense

PARAMETERS = [
    "tokens_mock", "slot_mapping", "chunk_size", "layerwise", "backend_name", "locations", "names", "dryrun",
    "enabled", "format", "x",
]  # fmt: skip
VALUES = st.one_of(
    st.text(max_size=12).map(quote),
    st.binary(max_size=8).map(lambda data: "".join(f"%{byte:02x}" for byte in data)),
    st.sampled_from(
        ["true", "false", "0,32", "0,600", "-5,5", "[0,9],3", "0", "1", "16", "-1", "LocalCPUBackend", "chunk_size"]
    ),
    st.sampled_from(["9" * 500, "0," + "9" * 18, "[0,99999999]", "%", "%zz", "NaN", "1e999"]),
)
HARMLESS = [name for name, row in DEFINITIONS.items() if not row.mutable or row.kind is bool or "location" in name] + [
    "min_retrieve_tokens",
    "pin_timeout_sec",
    "max_local_cpu_size",
    "tokens",
    "config_path",
    "max_chunks",
    "x",
]
"""Settings and fields that no value makes slow or writes to a disk with."""

CONTENT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    CONTENT.map(json.dumps).map(str.encode),
    st.dictionaries(st.sampled_from(HARMLESS), CONTENT, max_size=4).map(json.dumps).map(str.encode),
    st.integers(1, 2000).map(lambda depth: b'{"config_path":' + b"[" * depth + b"]" * depth + b"}"),
)


def routes(*categories: Category) -> list[tuple[str, str]]:
    app = create_app(EmbeddedComponent(Settings(), 1), categories)
    return sorted({(route.method, route.resource.canonical) for route in app.router.routes() if route.resource})


def test_every_operation_is_tried() -> None:
    served = {f"{method} {path}" for method, path in routes("vllm") if method != "HEAD"}
    tried = {name.partition("?")[0].replace("/x", "/{backend_name}") for name in OPERATIONS}
    assert served == tried


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    route=st.sampled_from([*routes("vllm", "controller"), *((method, "/conf") for method in ("GET", "HEAD", "POST"))]),
    name=VALUES,
    query=st.lists(st.tuples(st.sampled_from(PARAMETERS), VALUES), max_size=3),
    body=BODIES,
)
async def test_no_request_is_a_server_error(
    both: list[RunningApi], route: tuple[str, str], name: str, query: list[tuple[str, str]], body: bytes
) -> None:
    method, path = route
    path = path.replace("{backend_name}", name.replace("/", "%2F").replace(".", "%2E") or "x")
    url = yarl.URL(f"{path}?{'&'.join(f'{key}={value}' for key, value in query)}", encoded=True)
    for server in both:
        async with server.client.request(method, url, data=body, allow_redirects=False) as response:
            text = await response.text()
            assert response.status in (200, 400, 404, 413, 422, 503), text
            if response.status == 503:
                assert "error" in text or "Controller" in text or method == "HEAD"
            in_text = route[1] in ("/conf", "/meta") and (method, response.status) in (("GET", 200), ("HEAD", 200))
            assert response.content_type == ("text/plain" if in_text else "application/json")
            assert "Traceback" not in text
            if method != "HEAD":
                json.loads(text, parse_constant=pytest.fail)
        async with server.client.get("/version") as response:
            assert response.status == 200


@pytest.fixture
async def both(api_server: StartApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunningApi]:
    monkeypatch.chdir(tmp_path)
    small = {"engine_layers": 1, "chunk_size": 16, "local_disk": f"{tmp_path}/disk", "max_local_disk_size": 0.001}
    return [await api_server(**small), await api_server(role="scheduler", **small)]
