"""Our internal API server beside LMCache's own, in one process and on one manager: both asked the same, live."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lmcache_shared.secrets import MASK
from tests.lmcache.processes import ROOT, SECRETS, Answer, Host, ask, lmcache_environ, short_folder

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(300)]

RECORDED = Path(__file__).parents[1] / "contract" / "common.jsonl"
"""Exchanges with a real LMCache, one a line."""

LIVE = [
    {"method": method, "path": path}
    for method, path in [
        ("GET", "/env"),
        ("GET", "/loglevel"),
        ("GET", "/loglevel?logger_name=&level="),
        ("GET", "/loglevel?logger_name=root"),
        ("GET", "/loglevel?logger_name=lmcache.not.there"),
        ("GET", "/loglevel?logger_name=lmcache.demo&level=10"),
        ("GET", "/loglevel?logger_name=lmcache.demo&level=warn"),
        ("GET", "/loglevel?logger_name=lmcache.%C3%BC&level=Error"),
        ("GET", "/meta?names="),
        ("GET", "/meta?names=role,nope,role"),
        ("GET", "/meta?names=__class__,kv_shape,kv_dtype"),
        ("GET", "/metrics"),
        ("GET", "/periodic-threads?level="),
        ("GET", "/periodic-threads?level=LOW"),
        ("GET", "/periodic-threads?level=critical&level=low"),
        ("GET", "/periodic-threads?active_only=1"),
        ("GET", "/periodic-threads?running_only=off"),
        ("GET", "/periodic-threads?running_only="),
        ("GET", "/periodic-threads?running_only=maybe&active_only=2"),
        ("GET", "/threads"),
        ("GET", "/threads?name=API-server&unknown=1"),
        ("GET", "/threads?thread_id="),
        ("GET", "/threads?thread_id=7.0"),
        ("GET", "/threads?thread_id=7.5"),
        ("GET", "/threads?thread_id=0x7"),
        ("POST", "/version"),
        ("PUT", "/metrics/reset"),
        ("GET", "/metrics/reset"),
        ("GET", "/run_script"),
        ("POST", "/run_script"),
        ("POST", "/nope"),
        ("GET", "/"),
    ]
]
"""Further questions, of which no answer is recorded."""

VARIES = {"last_run_time", "last_run_ago", "total_runs", "success_rate", "timestamp", "duration_ms"}
"""Fields that differ from one moment to the next; of these the type is compared."""

SCRIPTS = {
    "a result": "result = 1 + 1",
    "no result": "x = 1",
    "the engine": "result = app.state.lmcache_adapter.lmcache_engine.metadata.worker_id",
    "the settings": "result = (app.state.lmcache_adapter.config.chunk_size, dict(a=1), str(2.50), set([3]))",
    "an allowed import": "import json\nresult = json.dumps({'a': [1, None]})",
    "what it raises": "result = 1 / 0",
    "no such attribute": "app.state.lmcache_adapter.nope",
    "a builtin that is not there": "open('f')",
    "text beyond ASCII": "result = '\u00fc \u2713'",
    "nothing": "",
}

NO_SCRIPTS: dict[str, Callable[[], aiohttp.FormData | None]] = {
    "no body": lambda: None,
    "no multipart": lambda: aiohttp.FormData({"script": "result = 1"}),
    "a field and no file": lambda: aiohttp.FormData({"script": "result = 1"}, default_to_multipart=True),
    "another file": lambda: form(other=("s.py", "result = 1")),
}


def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDED.read_text().splitlines()]


def recorded_answer(exchange: Mapping[str, Any]) -> Answer:
    media_type, _, charset = exchange["content_type"].partition("; charset=")
    body = exchange["body"]
    text = body if media_type == "text/plain" and isinstance(body, str) else json.dumps(body)
    return Answer(exchange["status"], media_type, charset or None, text.encode())


def name_of(exchange: Mapping[str, Any]) -> str:
    return f"{exchange['method']} {exchange['path']}"


async def send(client: aiohttp.ClientSession, exchange: Mapping[str, Any]) -> Answer:
    how: dict[str, Any] = {key: exchange[key] for key in ("json", "data") if key in exchange}
    if "file" in exchange:
        how["data"] = form(**exchange["file"])
    return await ask(client, exchange["method"], exchange["path"], **how)


def form(**files: tuple[str, str]) -> aiohttp.FormData:
    data = aiohttp.FormData()
    for field, (filename, content) in files.items():
        data.add_field(field, content.encode(), filename=filename)
    return data


def meaning(path: str, answer: Answer) -> object:
    """The answer as it is compared: its JSON, its families of metrics, its threads, otherwise its text."""
    endpoint = path.partition("?")[0]
    if answer.status == 200 and endpoint == "/metrics":
        return families(answer.text)
    if answer.status == 200 and endpoint == "/threads":
        lines = answer.text.splitlines()
        return [line for line in lines if line.startswith(("Thread: ", "=== ", "Total threads: "))]
    try:
        content = answer.json()
    except ValueError:
        return answer.text
    if endpoint == "/env":
        content.update(dict.fromkeys(SECRETS, MASK))
    return without_what_varies(content)


def without_what_varies(content: object) -> object:
    if isinstance(content, dict):
        return {
            key: kind(value) if key in VARIES else without_what_varies(value) for key, value in sorted(content.items())
        }
    if isinstance(content, list):
        return [without_what_varies(value) for value in content]
    return content


def kind(value: object) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


def families(exposition: str) -> dict[str, tuple[str, str, list[str]]]:
    """Of each family its type, its help, and its samples without their values."""
    return {
        family.name: (
            family.type,
            family.documentation,
            sorted(f"{sample.name}{sorted(sample.labels.items())}" for sample in family.samples),
        )
        for family in text_string_to_metric_families(exposition)
    }


def value_of(exposition: str, sample_name: str) -> float:
    samples = [s for family in text_string_to_metric_families(exposition) for s in family.samples]
    return sum(sample.value for sample in samples if sample.name == sample_name)


@pytest.mark.parametrize("exchange", [*recorded(), *LIVE], ids=name_of)
async def test_both_servers_answer_alike(
    theirs: aiohttp.ClientSession, ours: aiohttp.ClientSession, exchange: dict[str, Any]
) -> None:
    await send(ours, exchange)  # what a first call starts, such as a thread, is there for both of those that count
    expected, answer = await send(theirs, exchange), await send(ours, exchange)
    assert answer.head == expected.head
    assert meaning(exchange["path"], answer) == meaning(exchange["path"], expected)


@pytest.mark.parametrize("exchange", recorded(), ids=name_of)
async def test_what_is_recorded_is_still_so(theirs: aiohttp.ClientSession, exchange: dict[str, Any]) -> None:
    """LMCache's own server answers as the contract says, which other tests hold our servers to."""
    expected, answer = recorded_answer(exchange), await send(theirs, exchange)
    assert answer.head == expected.head
    if not expected.text.startswith("<text: "):  # a description instead of a text that is never the same
        assert meaning(exchange["path"], answer) == meaning(exchange["path"], expected)


async def test_lmcache_families_are_among_our_metrics(ours: aiohttp.ClientSession) -> None:
    answer = await ask(ours, "GET", "/metrics")
    assert "lmcache:num_store_requests" in families(answer.text)


async def test_our_reset_sets_their_counters_back(theirs: aiohttp.ClientSession, ours: aiohttp.ClientSession) -> None:
    counter, histogram = "lmcache:num_store_requests_total", "lmcache:time_to_store_count"
    stored = await ask(theirs, "POST", "/cache/store?tokens_mock=0,512")
    assert stored.status == 200
    deadline = time.monotonic() + 60
    while value_of((await ask(ours, "GET", "/metrics")).text, counter) == 0:
        assert time.monotonic() < deadline, "LMCache has not counted the store after a minute"
        await asyncio.sleep(0.5)
    assert value_of((await ask(ours, "GET", "/metrics")).text, histogram) > 0
    assert (await ask(ours, "POST", "/metrics/reset")).text == "ok"
    for server in (theirs, ours):
        exposition = (await ask(server, "GET", "/metrics")).text
        assert value_of(exposition, counter) == 0
        assert value_of(exposition, histogram) == 0


async def test_a_level_set_by_one_is_read_by_the_other(
    theirs: aiohttp.ClientSession, ours: aiohttp.ClientSession
) -> None:
    for setter, reader, level in [(ours, theirs, "DEBUG"), (theirs, ours, "ERROR")]:
        await ask(setter, "GET", f"/loglevel?logger_name=lmcache.of.the.tests&level={level}")
        answer = await ask(reader, "GET", "/loglevel?logger_name=lmcache.of.the.tests")
        assert answer.text == f"lmcache.of.the.tests: {level}"


async def test_secrets_are_masked_and_nothing_else(theirs: aiohttp.ClientSession, ours: aiohttp.ClientSession) -> None:
    """On purpose: LMCache's own server tells them to whoever asks."""
    plain, masked = [(await ask(server, "GET", "/env")).json() for server in (theirs, ours)]
    assert SECRETS.items() <= plain.items()
    assert masked == {**plain, **dict.fromkeys(SECRETS, MASK)}


async def test_a_level_without_a_logger_is_refused(theirs: aiohttp.ClientSession, ours: aiohttp.ClientSession) -> None:
    """On purpose: LMCache's own server answers `null`, as if it had done something."""
    path = "/loglevel?level=INFO"
    assert (await ask(theirs, "GET", path)).json() is None
    answer = await ask(ours, "GET", path)
    assert (answer.status, list(answer.json())) == (400, ["detail"])


async def test_the_metrics_tell_their_format(theirs: aiohttp.ClientSession, ours: aiohttp.ClientSession) -> None:
    """On purpose: Prometheus 3 wants the version of the text format."""
    async with ours.get("/metrics") as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    async with theirs.get("/metrics") as answer:
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.fixture
def host_with_scripts(host: Host) -> Iterator[Host]:
    """`/run_script` turned on, in LMCache's own server and in ours."""
    restart(host, {"run_script_api_enabled": True, "script_allowed_imports": ["json"]})
    yield host
    restart(host, {"run_script_api_enabled": False, "script_allowed_imports": None})


def restart(host: Host, settings: Mapping[str, Any]) -> None:
    host.tell("stop", "STOPPED")
    host.tell(f"start {json.dumps(settings)}", "READY")


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
async def test_scripts_answer_alike(
    host_with_scripts: Host, theirs: aiohttp.ClientSession, ours: aiohttp.ClientSession, script: str
) -> None:
    expected, answer = [
        await ask(server, "POST", "/run_script", data=form(script=("s.py", script))) for server in (theirs, ours)
    ]
    assert answer == expected


@pytest.mark.parametrize("make_body", NO_SCRIPTS.values(), ids=NO_SCRIPTS)
async def test_no_script_is_refused_alike(
    host_with_scripts: Host,
    theirs: aiohttp.ClientSession,
    ours: aiohttp.ClientSession,
    make_body: Callable[[], aiohttp.FormData | None],
) -> None:
    expected, answer = [await ask(server, "POST", "/run_script", data=make_body()) for server in (theirs, ours)]
    assert answer == expected
    assert (answer.status, answer.text) == (400, "No script file provided")


async def test_an_import_is_refused_alike(
    host_with_scripts: Host, theirs: aiohttp.ClientSession, ours: aiohttp.ClientSession
) -> None:
    """On purpose: ours also says what may be imported."""
    expected, answer = [
        await ask(server, "POST", "/run_script", data=form(script=("s.py", "import os"))) for server in (theirs, ours)
    ]
    assert answer.head == expected.head
    assert answer.status == 500
    assert answer.text.startswith(expected.text)


async def test_a_stopped_server_removes_its_socket(host: Host, theirs: aiohttp.ClientSession) -> None:
    assert host.ours.is_socket()
    host.tell("stop", "STOPPED")
    assert not host.ours.exists()
    assert host.theirs.is_socket()
    assert (await ask(theirs, "GET", "/version")).status == 200
    host.tell("start {}", "READY")
    assert host.ours.is_socket()


def test_our_api_imports_no_engine(lmcache_python: str) -> None:
    """In LMCache's environment, where all three could be imported, were it only by accident."""
    code = "import lmcache_api, lmcache_api.bridge.manager, sys; print({n.partition('.')[0] for n in sys.modules})"
    with short_folder() as folder:
        environ = lmcache_environ(folder, PYTHONPATH=os.fspath(ROOT / "src"))
        done = subprocess.run(
            [lmcache_python, "-c", code], env=environ, cwd=folder, capture_output=True, timeout=60, check=True
        )
    loaded = done.stdout.decode()
    assert "'lmcache_api'" in loaded
    for engine in ("lmcache", "torch", "vllm"):
        assert f"'{engine}'" not in loaded
