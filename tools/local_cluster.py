"""`make run`: a local cluster of a scheduler, workers and a controller, with the frontend before them, until Ctrl-C.

Everything is looked at before anything is started, so that a port in use, a live socket or a folder that cannot be
written is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from lmcache_shared import config
from lmcache_shared.address import TcpAddress, tcp_address
from lmcache_shared.errors import START_FAILED, AddressError, ConfigError, StartError
from lmcache_shared.listen import check_address_free
from lmcache_shared.placement import CONTROLLER_INDEX, MAX_WORKERS, Placement, place, serves
from lmcache_shared.settings import Settings

READY_SECONDS = 20.0
STOP_SECONDS = 1.5
DRAIN_SECONDS = 1.0
ANY_IPV4 = "0.0.0.0"  # noqa: S104 - compared, not bound
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Start a local LMCache control plane and stop it with Ctrl-C.")
    parser.add_argument("--config", default="config/lmcache.yaml", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--load", default="2", help="made-up requests a second, 0 for none (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="where the frontend listens (default: %(default)s)")
    parser.add_argument("--port", default="8080", help="the frontend's port (default: %(default)s)")
    options = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    children: list[Child] = []
    try:
        return _run(options, stop, children)
    except StartError as error:
        print(f"make run: {error}", file=sys.stderr)
        return START_FAILED
    except BrokenPipeError:  # `make run | head`
        sys.stdout = None
        return 1
    finally:
        end(children)


def _run(options: argparse.Namespace, stop: threading.Event, children: list[Child]) -> int:
    settings = config.load(options.config)
    placements = _placements(options, settings)
    frontend = _frontend_address(options)
    for address in [frontend, *(placement.address for placement in placements)]:
        check_address_free(address)
    api = ["lmcache_api", "--config", options.config, "--log-level", "warning"]
    api += ["--set", f"internal_api_server_drain_seconds={DRAIN_SECONDS}"]
    workers = [
        "--workers",
        str(options.workers),
        "--set",
        "enable_controller=true",
        "--set",
        f"engine_load={options.load}",
    ]
    if settings.controller_address is not None:  # in this cluster the workers report to this controller
        workers += ["--set", f"controller_address={placements[-1].address}"]
    nodes = ["--registry", "memory", "--nodes", json.dumps([placement.node for placement in placements])]
    prefix = ["--socket-prefix", settings.internal_api_server_socket_path_prefix or ""]
    listen = ["--host", options.host, "--port", str(frontend.port)]
    for name, command, servers in (
        ("the controller", [*api, "--role", "controller"], 1),
        ("the internal API servers", [*api, *workers], len(placements) - 1),
        ("the frontend", ["lmcache_frontend", *listen, *prefix, *nodes], 1),
    ):
        child = Child(name, command)
        children.append(child)
        if not wait_until_serving(child, servers, stop):
            return child.process.returncode or 1  # it has said why
    if not stop.is_set():
        print(_welcome(placements, frontend), flush=True)
    while not stop.wait(0.2):
        for child in children:
            child.read()  # or a script that prints would one day wait for room in the pipe
            while child.told:
                print(child.told.pop(0), flush=True)
            if child.ended:
                print(f"make run: {child.name} ended with code {_code(child.process.returncode)}", file=sys.stderr)
                return 1
    print("\nstopped", flush=True)
    return 0


def _code(code: int) -> str:
    """What a program ended with, for people: -9 is a signal."""
    try:
        return f"{code} (killed by {signal.Signals(-code).name})" if code < 0 else str(code)
    except ValueError:
        return str(code)


def _placements(options: argparse.Namespace, settings: Settings) -> list[Placement]:
    """Those of the scheduler and the workers that serve, and at the end the controller's."""
    if "internal_api_server_enabled" in settings.given and not settings.internal_api_server_enabled:
        raise ConfigError(f"{options.config}: internal_api_server_enabled is false; there is nothing to start")
    if not 0 <= options.workers <= MAX_WORKERS:
        raise ConfigError(f"WORKERS={options.workers}: expected 0 to {MAX_WORKERS}")
    placements = [place(settings, index) for index in range(1 + options.workers) if serves(settings, index)]
    if not placements:
        included = settings.internal_api_server_include_index_list
        raise ConfigError(f"internal_api_server_include_index_list {included}: none of the components is in it")
    placements.append(place(settings, CONTROLLER_INDEX))
    for placement in placements[:-1]:
        if placement.address == placements[-1].address:
            raise ConfigError(
                f"controller_port={settings.controller_port}: {placement.name} has {placement.address} too"
            )
    return placements


def wait_until_serving(child: Child, servers: int, stop: threading.Event) -> bool:
    """Whether the child serves, or is no longer wanted; not, when it has ended."""
    deadline = time.monotonic() + READY_SECONDS
    while not stop.is_set() and child.serving < servers:
        if child.ended:
            return False
        if time.monotonic() > deadline:
            raise StartError(f"{child.name} did not get ready within {READY_SECONDS:g} seconds")
        stop.wait(0.02)
        child.read()
    return True


def _frontend_address(options: argparse.Namespace) -> TcpAddress:
    try:
        return tcp_address(options.host, options.port)
    except AddressError as error:
        raise ConfigError(f"HOST={options.host} PORT={options.port}: {error}") from None


class Child:
    """A program of ours, in a session of its own: Ctrl-C reaches `make run` alone, which ends its children in order.

    `serving` counts the servers that it has said to serve; only what a child says itself counts, because on the same
    address somebody else may answer. `told` are the lines that people need: the URL with a token that a frontend makes.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.name = name
        self.serving = 0
        self.told: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            # It ends with us, however we end; this program has one thread, so the call between fork and exec is safe.
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509
        )
        assert self.process.stdout is not None, "it was started with a pipe"
        self._output = self.process.stdout.fileno()
        os.set_blocking(self._output, False)

    def read(self) -> None:
        """Take what the child has printed since; a line is printed in one piece."""
        with contextlib.suppress(BlockingIOError):
            text = os.read(self._output, 1 << 16).decode(errors="replace")
            self.serving += text.count(" serves on ")
            self.told += [line for line in text.splitlines() if line.startswith("to change something")]

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None


def _welcome(placements: Sequence[Placement], frontend: TcpAddress) -> str:
    host = "localhost" if frontend.host in ("127.0.0.1", ANY_IPV4, "::", "::1") else frontend.url_host
    url = f"http://{host}:{frontend.port}"
    width = max(len(placement.name) for placement in placements)
    first = placements[0]
    servers = "\n".join(f"  {placement.name:<{width}}  {placement.address}" for placement in placements)
    return f"""The cluster is ready.

{servers}

Dashboard: {url}/

Try:
  {first.address.curl("/version")}
  curl "{url}{first.address.proxy_path()}/metrics"

Ctrl-C stops all of it."""


def end(children: Sequence[Child]) -> None:
    """Ask every child to end, and end those that have not after a while."""
    for child in children:
        if not child.ended:
            child.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()


if __name__ == "__main__":
    sys.exit(main())
