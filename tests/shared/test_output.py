"""What a program says while somebody reads it, and while nobody does."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_api.pytest_plugin import free_port
from lmcache_frontend.plugins import FILES
from lmcache_shared import output
from lmcache_shared.output import Output, printable
from tests.e2e.processes import ROOT, environment

QUICK_SECONDS = 5.0
PIPE_BYTES = 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A small one: where it is read, where it is written."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    yield ends
    for end in ends:
        os.close(end)


def logger_to(written: Output) -> logging.Logger:
    logger = logging.Logger("x")
    logger.addHandler(written)
    return logger


def test_records_and_what_is_said_keep_their_order(pipe: tuple[int, int]) -> None:
    written = Output(pipe[1], pipe[1])
    logger = logger_to(written)
    for number in range(50):
        logger.warning("record %d", number)
        written.say(f"said {number}")
    try:
        raise ValueError("a\ntraceback")
    except ValueError:
        logger.exception("failed")
    logger.warning("\x1b[31mred\x9b and half a character \udc80\r")
    written.close()
    text = os.read(pipe[0], 1 << 16).decode()
    assert text.startswith("".join(f"record {number}\nsaid {number}\n" for number in range(50)) + "failed\nTraceback ")
    assert text.endswith("ValueError: a\ntraceback\n\\x1b[31mred\\x9b and half a character \\udc80\\x0d\n")


def test_what_does_not_fit_is_dropped_and_told_when_there_is_room(pipe: tuple[int, int]) -> None:
    written = Output(pipe[1], pipe[1], most=10)
    logger = logger_to(written)
    clock = time.monotonic()
    for number in range(1000):
        logger.warning("record %d %s", number, "x" * 500)
    assert time.monotonic() - clock < 1
    lines: list[str] = []

    def read() -> None:
        with open(pipe[0], closefd=False) as file:
            for line in file:
                lines.append(line)
                if "the last" in line:
                    return

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + QUICK_SECONDS
    while _numbers(lines)[1] != 1000 and time.monotonic() < deadline:
        time.sleep(0.01)
    logger.warning("the last")
    written.close()
    reader.join(QUICK_SECONDS)
    kept, count = _numbers(lines)
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    assert 10 <= len(kept) < 900
    assert count == 1000, "every one is there, or counted"
    assert "dropped here: nobody read what this program writes\n" in lines[-2]
    assert lines[-1] == "the last\n"


def _numbers(lines: list[str]) -> tuple[list[int], int]:
    """The records that came, and how many came or were counted."""
    kept = [int(line.split()[1]) for line in lines if line.startswith("record")]
    return kept, len(kept) + sum(int(line.split()[0]) for line in lines if "dropped here" in line)


@pytest.mark.parametrize("most", [10, 10_000])
def test_the_end_does_not_wait_for_a_reader_that_does_not_come(
    pipe: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "END_SECONDS", 0.3)
    written = Output(pipe[1], pipe[1], most=most)
    for _ in range(100):
        written.say("x" * 500)
    clock = time.monotonic()
    written.close()
    assert 0.2 < time.monotonic() - clock < 1
    os.set_blocking(pipe[0], False)
    while True:  # so that the thread ends before its pipe is closed
        try:
            os.read(pipe[0], 1 << 16)
            time.sleep(0.02)
        except BlockingIOError:
            return


def test_a_file_that_does_not_wait_and_one_that_is_gone(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    written = Output(None, pipe[1])
    written.say("nobody is there")
    for number in range(100):
        written.say(f"{number} {'x' * 500}", is_error=True)
    text = b""
    while not text.endswith(b"x\n") or b"\n99 " not in text:
        text += os.read(pipe[0], 1 << 16)
    written.close()
    assert b"nobody" not in text
    read, write = os.pipe()
    os.close(read)
    broken = Output(write, write)
    broken.say("x")
    broken.close()
    os.close(write)


def test_what_a_terminal_obeys_is_not_printed() -> None:
    assert printable("a\tb\nc\x00\x1b[2J\x7f\x85é") == "a\tb\nc\\x00\\x1b[2J\\x7f\\x85é"


def _programs(folder: Path, port: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    access = "--set=internal_api_server_access_log=true"
    api = ["-m", "lmcache_api", "--log-level", "trace", "--role", "scheduler", access]
    plugin = f'{{"extra_config": {{"plugin.frontend.port": {port}, "plugin.frontend.log_level": "trace"}}}}'
    return {
        "api": ([*api, f"--set=internal_api_server_port_start={port}"], {}),
        "frontend": (["-m", "lmcache_frontend", "--log-level", "trace", "--port", str(port)], {}),
        "plugin": ([str(FILES[0])], {"LMCACHE_RUNTIME_PLUGIN_CONFIG": plugin}),
    }


@pytest.mark.parametrize("program", ["api", "frontend", "plugin"])
def test_a_program_that_nobody_listens_to_goes_on_and_ends(program: str, tmp_path: Path) -> None:
    port = free_port()
    command, more = _programs(tmp_path, port)[program]
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    child = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(**more), stdout=write, stderr=write)
    try:
        os.close(write)
        said = b""
        while b"serves on" not in said:
            said += os.read(read, 1 << 16)
        path = "/metrics" if program == "api" else "/health"
        for number in range(150):  # a line each
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}?{number:0100}", timeout=5) as response:
                response.read()
        child.send_signal(signal.SIGTERM)
        clock = time.monotonic()
        assert child.wait(20) == 0
        assert time.monotonic() - clock < QUICK_SECONDS
        assert b"Fatal" not in os.read(read, 1 << 16)
    finally:
        child.kill()
        child.wait()
        os.close(read)


def test_the_last_lines_are_written_when_they_are_read(tmp_path: Path) -> None:
    program = (
        "import asyncio, logging\nfrom lmcache_shared import program\nfrom lmcache_shared.errors import StartError\n"
        "program.configure_logging('info')\n"
        "async def serve(stop):\n"
        "    for number in range(3000):\n        logging.info('record %d', number)\n"
        "    program.say('stopping')\n    raise StartError('why\\n\\x1b[31mnot')\n"
        "raise SystemExit(program.run('prog', serve))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=30, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 2
    assert [line.split()[-1] for line in lines[:-2]] == [str(number) for number in range(3000)]
    assert lines[-2:] == ["stopping", "prog: why \\x1b[31mnot"]
