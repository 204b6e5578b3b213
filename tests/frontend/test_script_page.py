"""The tab that runs scripts."""

import json
from pathlib import Path

import pytest

from lmcache_api.pytest_plugin import RunningApi, StartApi
from lmcache_frontend.pages.asking import Outcome
from lmcache_frontend.pages.tabs.script_tab import SAMPLES, result_of
from lmcache_frontend.pytest_plugin import StartFrontend
from tests.frontend.tabs import Pages, pages_of, part


@pytest.fixture
async def worker(api_server: StartApi) -> RunningApi:
    return await api_server(run_script_api_enabled=True, script_allowed_imports=["time"], run_script_seconds=0.3)


@pytest.fixture
async def pages(worker: RunningApi, frontend_server: StartFrontend) -> Pages:
    return await pages_of(frontend_server, worker)


async def run(pages: Pages, script: str) -> str:
    return await pages.post("script/run", ("script", script), confirmed=True)


async def test_a_script_tells_its_result_its_output_and_its_error(pages: Pages) -> None:
    assert "Run script" in await pages.tabs()
    text = await run(pages, "print('<b>', 1)\r\nif True:\r\n    result = 'é'\r\n")
    assert "The script has run in" in part(text)
    assert '<pre tabindex="0">é</pre>' in text
    assert "&lt;b&gt; 1\n</pre>" in text
    text = part(await run(pages, "print('before')\n1 / 0"))
    for expected in ("The script failed after", "division by zero", "Output before", "line 2, in <module> 1 / 0"):
        assert expected in text
    text = part(await run(pages, "while True: pass"))
    assert "not done within 0.3 seconds" in text


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: str(sample[0]))
async def test_samples_run(pages: Pages, sample: tuple[str, str, str]) -> None:
    assert "The script has run in" in part(await run(pages, sample[2]))


async def test_what_is_none_is_not_run(pages: Pages) -> None:
    assert "There is no script." in await run(pages, " \n")
    assert "larger than 512 KiB" in await run(pages, "a" * (513 << 10))


async def test_limits_are_told_and_a_script_may_stand_in_the_address(pages: Pages) -> None:
    text = await pages.open("script", script="result = 1 < 2")
    assert "May import time May run for 300 ms Largest script 1 MiB" in part(text)
    assert "result = 1 &lt; 2</textarea>" in text
    assert "This frontend keeps no audit log" in part(text)


async def test_where_it_is_off_there_is_no_tab_and_the_page_says_how_to_enable_it(
    api_server: StartApi, frontend_server: StartFrontend
) -> None:
    pages = await pages_of(frontend_server, await api_server())
    assert "Run script" not in await pages.tabs()
    text = part(await pages.open("script"))
    assert "Scripts are off on this node" in text
    assert "run_script_api_enabled: true" in text
    assert "disabled" in part(await run(pages, "result = 1"))


async def test_only_admins_run_and_the_audit_log_tells(
    worker: RunningApi, frontend_server: StartFrontend, tmp_path: Path
) -> None:
    log = tmp_path / "audit"
    pages = await pages_of(frontend_server, worker, no_trust_local=True, token="a-token-of-sixteen", audit_log=str(log))
    text = await pages.open("script")
    assert "To run a script you need the role admin" in part(text)
    assert "audit log records who ran one" in part(text)
    assert "<textarea" not in text
    assert "you need the role admin" in part(await run(pages, "result = 1"))
    pages.frontend.client.headers["Authorization"] = "Bearer a-token-of-sixteen"
    assert "<textarea" in await pages.open("script")
    assert "The script has run in" in part(await run(pages, "result = 1"))
    await pages.frontend.server.stop()
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in told if "/run_script" in json.dumps(line)][-2:] == [401, 200]


def test_a_server_that_knows_no_details_tells_the_result_alone() -> None:
    for body in (b"42", b'{"result": 1}'):
        result = result_of(Outcome("ok", 200, body))
        assert result.ok
        assert result.extra["sections"] == [("Result", body.decode())]
    result = result_of(Outcome("failed", 500, b"Error executing script: x", "Error executing script: x", by_node=True))
    assert (result.ok, result.text) == (False, "Error executing script: x")
