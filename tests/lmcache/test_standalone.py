"""`python -m lmcache_api --engine lmcache`: LMCache's standalone engine, started by us."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.lmcache.processes import (
    START_SECONDS,
    WORKER_PORT,
    Child,
    ask,
    client_of,
    running_program,
    short_folder,
)

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(300)]


def wait_until_it_serves(program: Child) -> None:
    program.wait_until(lambda: " serves on " in program.tail(), seconds=START_SECONDS, what="lmcache_api")


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ((), [2, 2, 256, 4, 16]),
        (("--set", "engine_use_mla=true", "--set", "engine_dtype=bfloat16"), [2, 1, 256, 1, 16]),
        (("--role", "worker", "--worker-id", "0", "--workers", "2", "--set", "engine_layers=3"), [3, 2, 256, 4, 16]),
    ],
    ids=["as it is", "MLA", "one of two"],
)
async def test_it_stores_and_finds_real_chunks(lmcache_python: str, options: tuple[str, ...], shape: list[int]) -> None:
    with short_folder() as folder, running_program(lmcache_python, folder, *options) as program:
        await asyncio.to_thread(wait_until_it_serves, program)
        socket = folder / f"lm_{WORKER_PORT}"
        async with client_of(socket) as client:
            assert (await ask(client, "POST", "/cache/store?tokens_mock=0,600")).json()["num_tokens"] == 600
            found = (await ask(client, "POST", "/cache/retrieve?tokens_mock=0,600")).json()
            assert found == {"status": "success", "num_tokens": 600, "num_retrieved": 512}
            assert (await ask(client, "GET", "/meta?names=kv_shape")).json() == {"kv_shape": shape}
            assert len((await ask(client, "GET", "/cache/kvcache/info")).json()["layers"]) == shape[0]
            assert (await ask(client, "GET", "/conf?names=internal_api_server_enabled")).json() == {
                "internal_api_server_enabled": True
            }
            threads = (await ask(client, "GET", "/threads?name=api-server-thread")).text
            assert "Total threads: 0" in threads  # LMCache's own server is not there
        program.process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(program.process.wait, 30) == 0
        assert not socket.exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--set", "chunk_size=abc"), "--set chunk_size: LMCache cannot use 'abc'"),
        (("--set", "no_such=1"), "--set no_such: LMCache has no such setting"),
        (("--set", "engine_layers=x"), '--set engine_layers: expected int, found "x"'),
        (("--config", "/no/such.yaml"), "/no/such.yaml: cannot read the configuration: No such file or directory"),
        (("--set", "internal_api_server_socket_path_prefix=/proc/nope/s"), "/proc/nope/s_7000: cannot make its folder"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_what_cannot_start_is_one_line_and_code_2(
    lmcache_python: str, options: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    with short_folder() as folder, running_program(lmcache_python, folder, "--log-level", "error", *options) as program:
        assert program.process.wait(START_SECONDS) == 2
        said = [line for line in program.tail().splitlines() if line.startswith("lmcache-api: ")]
        assert said[-1].startswith(f"lmcache-api: {text}")
        assert "Traceback" not in program.tail()


def test_a_setting_that_turns_it_off(lmcache_python: str) -> None:
    off = {"LMCACHE_INTERNAL_API_SERVER_ENABLED": "false"}
    with short_folder() as folder, running_program(lmcache_python, folder, **off) as program:
        assert program.process.wait(START_SECONDS) == 0
        assert "internal API is off" in program.log.read_text()
