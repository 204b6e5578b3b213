"""What both programs do alike: logging, signals, the event loop, and ending with one line when they cannot start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from lmcache_shared import output
from lmcache_shared.errors import START_FAILED, StartError

TRACE = 5

MAX_OPEN_FILES = 65536
"""As many files and connections as a program raises its own limit to, where the system lets it."""

LOG_LEVELS: dict[str, int] = {
    "critical": logging.CRITICAL,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": TRACE,
}


def configure_logging(level: str) -> None:
    """Log to standard error from `level` (a key of `LOG_LEVELS`) on; whoever logs never waits for its reader."""
    logging.addLevelName(TRACE, "TRACE")
    if not logging.getLogger().handlers:
        handlers = [output.of_this_process()]
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(level=LOG_LEVELS[level], format=form, handlers=handlers)


def run(program: str, serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> int:
    """Run `serve(stop)` to its end and return the exit code; a `StartError` becomes one line and exit code 2.

    The first SIGINT or SIGTERM sets `stop`, from before anything is bound; a second one ends the process at once.
    """
    # libuv looks names up in 4 threads, so that a few that hang would hold every other one up
    os.environ.setdefault("UV_THREADPOOL_SIZE", "64")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MAX_OPEN_FILES)), hard))
    try:
        uvloop.run(_until_served(serve))
    except StartError as error:
        return refuse(program, error)
    return 0


def refuse(program: str, error: StartError) -> int:
    """Say in one line why the program does not start; its exit code."""
    _tell(f"{program}: {' '.join(str(error).splitlines())}", is_error=True)
    return START_FAILED


def say(text: str) -> None:
    """Tell the operator on standard output; that nobody reads it, or that it cannot be written, stops no server."""
    _tell(text, is_error=False)


def _tell(text: str, *, is_error: bool) -> None:
    written = output.installed()
    if written is not None:
        written.say(text, is_error=is_error)
        return
    with contextlib.suppress(OSError, ValueError):
        print(output.printable(text), file=sys.stderr if is_error else sys.stdout, flush=True)


async def _until_served(serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def first_signal() -> None:
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, first_signal)
    await serve(stop)
