"""`make run`: a local cluster of a scheduler and workers, with the frontend before them, until Ctrl-C.

Everything is looked at before anything is started, so that a port in use, a live socket or a folder that cannot be
written is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from lmcache_shared import config
from lmcache_shared.address import Address, TcpAddress, UnixAddress, tcp_address
from lmcache_shared.errors import START_FAILED, StartError
from lmcache_shared.listen import check_address_free
from lmcache_shared.placement import Placement, place, serves

READY_SECONDS = 20.0
STOP_SECONDS = 1.5
DRAIN_SECONDS = 1.0
ANY_IPV4 = "0.0.0.0"  # noqa: S104 - compared, not bound
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Start a local LMCache control plane and stop it with Ctrl-C.")
    parser.add_argument("--config", default="config/lmcache.yaml", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="where the frontend listens (default: %(default)s)")
    parser.add_argument("--port", default="8080", help="the frontend's port (default: %(default)s)")
    options = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    children: list[subprocess.Popen[bytes]] = []
    try:
        return _run(options, stop, children)
    except StartError as error:
        print(f"make run: {error}", file=sys.stderr)
        return START_FAILED
    finally:
        _end(children)


def _run(options: argparse.Namespace, stop: threading.Event, children: list[subprocess.Popen[bytes]]) -> int:
    settings = config.load(options.config)
    placements = [place(settings, index) for index in range(1 + options.workers) if serves(settings, index)]
    frontend = tcp_address(options.host, options.port)
    for address in [frontend, *(placement.address for placement in placements)]:
        check_address_free(address)
    prefix = settings.internal_api_server_socket_path_prefix or ""
    api = ["lmcache_api", "--config", options.config, "--workers", str(options.workers), "--log-level", "warning"]
    drain = ["--set", f"internal_api_server_drain_seconds={DRAIN_SECONDS}"]
    nodes = ["--nodes", json.dumps([placement.node for placement in placements])]
    listen = ["--host", options.host, "--port", str(frontend.port), "--socket-prefix", prefix]
    programs = [
        ([*api, *drain], [placement.address for placement in placements]),
        (["lmcache_frontend", *listen, *nodes], [frontend]),
    ]
    for command, addresses in programs:
        children.append(_start(command))
        code = _wait_until(lambda addresses=addresses: all(map(_answers, addresses)), children, stop)  # type: ignore[misc]
        if stop.is_set() or code is not None:
            return 0 if stop.is_set() else code or 1
    print(_welcome(placements, frontend), flush=True)
    while not stop.wait(0.2):
        for child in children:
            if child.poll() is not None:
                print(f"make run: process {child.pid} ended with code {child.returncode}", file=sys.stderr)
                return 1
    print("\nstopped", flush=True)
    return 0


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C reaches this program alone, which then ends its children in order."""
    libc = ctypes.CDLL(None, use_errno=True)
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        # It ends with us, however we end; this program has one thread, so that the call between fork and exec is safe.
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509
    )


def _wait_until(
    ready: Callable[[], bool], children: Sequence[subprocess.Popen[bytes]], stop: threading.Event
) -> int | None:
    """`None` when ready; otherwise the code of the child that ended, which has said why."""
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        for child in children:
            if child.poll() is not None:
                return child.returncode or 1
        if time.monotonic() > deadline:
            print(f"make run: not ready after {READY_SECONDS:g} seconds", file=sys.stderr)
            return 1
        if stop.wait(0.05):
            return None
    return None


def _answers(address: Address) -> bool:
    family = socket.AF_UNIX if isinstance(address, UnixAddress) else socket.AF_UNSPEC
    try:
        if family == socket.AF_UNIX:
            with socket.socket(family) as sock:
                sock.settimeout(1)
                sock.connect(str(address))
        else:
            assert isinstance(address, TcpAddress)
            host = {ANY_IPV4: "127.0.0.1", "::": "::1"}.get(address.host, address.host)
            socket.create_connection((host, address.port), timeout=1).close()
    except OSError:
        return False
    return True


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


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask every child to end, and end those that have not after a while."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


if __name__ == "__main__":
    sys.exit(main())
