import asyncio
import gzip
import time
from typing import Any

import aiohttp
import pytest

from lmcache_api.common import run_script_api
from lmcache_api.pytest_plugin import RunningApi, StartApi


def form(script: str | bytes, field: str = "script", filename: str | None = "scratch.py") -> aiohttp.FormData:
    data = aiohttp.FormData(default_to_multipart=True)
    data.add_field(field, script, filename=filename)
    return data


async def post(server: RunningApi, data: Any, **options: Any) -> tuple[int, str]:
    async with server.client.post("/run_script", data=data, **options) as response:
        assert response.content_type == "text/plain"
        return response.status, await response.text()


@pytest.fixture
async def server(api_server: StartApi) -> RunningApi:
    return await api_server(
        run_script_api_enabled=True,
        script_allowed_imports=["time", "no_such_module"],
        run_script_max_bytes=2000,
        run_script_seconds=5.0,
        lmcache_instance_id="mine",
    )


async def test_off_unless_enabled(api_server: StartApi) -> None:
    status, text = await post(await api_server(), form("result = 1"))
    assert status == 404
    assert "enable it explicitly with run_script_api_enabled" in text


@pytest.mark.parametrize(
    ("script", "status", "answer"),
    [
        ("result = 1 + 1", 200, "2"),
        ("x = 1", 200, "Script executed successfully"),
        ("result = app.state.lmcache_adapter.config.lmcache_instance_id", 200, "mine"),
        ("import time\nresult = time.time() > 0", 200, "True"),
        ("def double(x): return factor * x\nfactor = 2\nresult = double(len([4]))", 200, "2"),
        ("x = 1\n1 / 0", 500, "Error executing script: division by zero"),
        ("import os", 500, "Error executing script: Import of 'os' is not allowed (script_allowed_imports: time)"),
        ("open('/etc/passwd')", 500, "Error executing script: name 'open' is not defined"),
        ("raise Exception", 500, "Error executing script: Exception"),
        ("1 +", 500, "Error executing script: invalid syntax (<script>, line 1)"),
        ("x = '\0'", 500, "Error executing script: source code string cannot contain null bytes"),
        ("f = lambda: f()\nf()", 500, "Error executing script: maximum recursion depth exceeded"),
        ("result = 'x' * 9000000", 500, "Error executing script: its result has 9000000 characters"),
    ],
)
async def test_scripts(server: RunningApi, script: str, status: int, answer: str) -> None:
    got_status, got = await post(server, form(script))
    assert got_status == status
    assert got == answer or (status == 500 and got.startswith(answer))


@pytest.mark.parametrize(
    ("data", "options", "status", "answer"),
    [
        (form("result = 1", field="other"), {}, 400, "No script file provided"),
        (form("result = 1", filename=None), {}, 400, "No script file provided"),
        ({"script": "result = 1"}, {}, 400, "No script file provided"),
        (b"", {}, 400, "No script file provided"),
        (b"x", {"headers": {"Content-Type": "multipart/form-data"}}, 400, "The form cannot be read"),
        (b"x", {"headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 400, "The form cannot be read"),
        (b"--b\r\n", {"headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 400, "The form cannot be read"),
        (b"--b\r\nContent-Disposition: form-data; name=\"script\"; filename=\"s\"\r\n\r\nresult", {
            "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 400, "The form cannot be read"),
    ],
)  # fmt: skip
async def test_forms_that_are_none(
    server: RunningApi, data: Any, options: dict[str, Any], status: int, answer: str
) -> None:
    got_status, got = await post(server, data, **options)
    assert (got_status, got[: len(answer)]) == (status, answer)


async def test_the_script_may_stand_behind_other_fields(server: RunningApi) -> None:
    data = aiohttp.FormData()
    data.add_field("note", "x")
    data.add_field("script", "result = 'found'", filename="s.py")
    assert await post(server, data) == (200, "found")
    many = aiohttp.FormData()
    for number in range(20):
        many.add_field(f"note{number}", "x", filename="x")
    status, text = await post(server, many)
    assert (status, text) == (400, "The form cannot be read: more than 16 parts")


@pytest.mark.parametrize(
    "head",
    [b"no colon at all",
     b"Content-Disposition: form-data; name=\"script\"; filename=\"s\"\r\nX: " + b"x" * 9000 + b"\0",
     b"Content-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\n--c--", b"Content-Transfer-Encoding: x-odd"],
)  # fmt: skip
async def test_odd_parts_are_no_500_of_ours(server: RunningApi, head: bytes) -> None:
    body = b"--b\r\n" + head + b"\r\n\r\nresult = 1\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    status, _ = await post(server, body, headers=headers)
    assert status in (200, 400)


async def test_a_compressed_form_is_not_unfolded(server: RunningApi) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b", "Content-Encoding": "gzip"}
    status, text = await post(server, gzip.compress(b"\n" * 40_000_000), headers=headers, skip_auto_headers=["Expect"])
    assert (status, text) == (400, "The form cannot be read: it is no whole multipart form")


@pytest.mark.parametrize(
    "script",
    [
        "raise type('Odd', (Exception,), {'__str__': lambda s: 1 / 0})()",
        "class Odd(str):\n    def encode(self, *a): return 1 / 0\nresult = Odd('x')",
        "result = type('Odd', (), {'__str__': lambda s: 1 / 0})()",
    ],
)
async def test_a_script_whose_texts_fail_does_not_block_the_next(server: RunningApi, script: str) -> None:
    assert (await post(server, form(script)))[0] in (200, 500)
    assert await post(server, form("result = 1")) == (200, "1")


async def test_sizes_are_bounded(server: RunningApi) -> None:
    status, text = await post(server, form("#" * 2000))
    assert status == 200
    status, text = await post(server, form("#" * 2001))
    assert (status, text) == (413, "The script is larger than 2000 bytes (run_script_max_bytes)")
    status, text = await post(server, form("#" * 100_000, field="other"))
    assert (status, text) == (413, "The form is larger than 67536 bytes (run_script_max_bytes and 65536 beside)")


async def test_a_script_that_runs_too_long_is_stopped(api_server: StartApi) -> None:
    server = await api_server(run_script_api_enabled=True, run_script_seconds=0.2)
    begun = time.monotonic()
    status, text = await post(server, form("while True: pass"))
    assert status == 504
    assert text == "Error executing script: not done within 0.2 seconds (run_script_seconds); it was stopped"
    assert time.monotonic() - begun < 10
    assert await post(server, form("result = 'next'")) == (200, "next")


async def test_one_script_at_a_time_and_one_that_cannot_be_stopped_says_so(
    api_server: StartApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_script_api, "STOP_SECONDS", 0.05)
    server = await api_server(run_script_api_enabled=True, run_script_seconds=0.2, script_allowed_imports=["time"])
    running = asyncio.create_task(post(server, form("import time\ntime.sleep(1)")))
    await asyncio.sleep(0.1)
    status, text = await post(server, form("result = 1"))
    assert (status, text) == (409, "Another script is still running; try again when it has ended")
    status, text = await running
    assert status == 504
    assert "it did not stop when told to and goes on" in text
    assert (await post(server, form("result = 1")))[0] == 409
    await asyncio.sleep(1)
    assert await post(server, form("result = 1")) == (200, "1")


async def test_a_caller_that_leaves_ends_its_script(api_server: StartApi) -> None:
    server = await api_server(run_script_api_enabled=True, run_script_seconds=60.0)
    with pytest.raises(asyncio.TimeoutError):
        await post(server, form("while True: pass"), timeout=aiohttp.ClientTimeout(total=0.3))
    for _ in range(100):
        status, _ = await post(server, form("result = 1"))
        if status == 200:
            return
        await asyncio.sleep(0.05)
    pytest.fail("the script runs on")


async def details(server: RunningApi, script: str) -> tuple[int, dict[str, Any]]:
    async with server.client.post("/run_script?details=true", data=form(script)) as response:
        assert response.content_type == "application/json"
        return response.status, await response.json()


async def test_details_tell_what_was_printed_and_where_it_failed(server: RunningApi) -> None:
    status, told = await details(server, "print('a', 1, sep='-', end='!')\nprint()\nresult = [1]")
    assert (status, told["result"], told["output"], told["traceback"]) == (200, "[1]", "a-1!\n", "")
    assert 0 <= told["seconds"] < 5
    status, told = await details(server, "print('before')\ndef f():\n    return {}['no']\nf()")
    assert (status, told["error"], told["output"]) == (500, "Error executing script: 'no'", "before\n")
    lines = ['  File "<script>", line 4, in <module>', "    f()", '  File "<script>", line 3, in f']
    assert told["traceback"].splitlines() == [
        "Traceback (most recent call last):", *lines, "    return {}['no']",  "KeyError: 'no'",
    ]  # fmt: skip
    status, told = await details(server, "x = 1\ny = =")
    assert (status, told["traceback"].splitlines()[1]) == (500, '  File "<script>", line 2, in <module>')


async def test_what_a_script_prints_is_bounded(server: RunningApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_script_api, "MAX_PRINTED_CHARACTERS", 5)
    status, told = await details(server, "print('abc')\nprint('defg')\nprint('h')")
    assert (status, told["output"]) == (200, "abc\nd")
