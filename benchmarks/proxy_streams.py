"""What idle event streams cost the frontend: resident memory with thousands of them open, and what is left behind.

The targets are in this process, on Unix sockets; each answers with the head of an event stream and one event, and is
silent from then on. The frontend is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import proxy

EVENT = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n"
SETTLE_SECONDS = 60.0


async def _stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # cancelled: at the end, with asyncio.run; up to Python 3.11 asyncio would print a traceback for each
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(EVENT)
        await reader.read()
    writer.close()


async def _open(port: int, path: str) -> asyncio.StreamWriter:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: text/event-stream\r\n\r\n".encode())
    await asyncio.wait_for(reader.readuntil(b"data: 1"), SETTLE_SECONDS)
    return writer


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def _measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    names = [f"target{number}" for number in range(options.targets)]
    servers = [await asyncio.start_unix_server(_stream, f"{folder}/{name}", backlog=1024) for name in names]
    port = proxy.free_port()
    nodes = json.dumps([{"name": name, "host": "localhost", "port": f"{folder}/{name}"} for name in names])
    command = [sys.executable, "-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(port), "--nodes", nodes]
    with proxy.process(*command, "--registry", "memory", log=folder / "frontend.log") as frontend:
        await asyncio.to_thread(proxy.wait_for_port, port)
        await (await _open(port, f"/proxy2/{names[0]}/")).drain()
        before, open_before = _resident(frontend), _descriptors(frontend.pid)
        writers = []
        for start in range(0, options.streams, 100):
            paths = [
                f"/proxy2/{names[number % len(names)]}/" for number in range(start, min(start + 100, options.streams))
            ]
            writers += await asyncio.gather(*(_open(port, path) for path in paths))
        during = _resident(frontend)
        for writer in writers:
            writer.transport.abort()
        for _ in range(int(SETTLE_SECONDS * 10)):
            if _descriptors(frontend.pid) <= open_before:
                break
            await asyncio.sleep(0.1)
        left = max(0, _descriptors(frontend.pid) - open_before)
    for server in servers:
        server.close()
    return {"streams": options.streams, "before": before, "during": during, "descriptors_left": left}


def _resident(process: subprocess.Popen[bytes]) -> float:
    return proxy.memory(process.pid, "VmRSS") / 1024


def measure(options: argparse.Namespace) -> dict[str, Any]:
    machine = harness.describe_machine(proxy.LIBRARIES)
    print(harness.machine_text(machine))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with harness.short_folder() as folder:
        found = asyncio.run(_measured(folder, options))
    print()
    heads = ("streams", "MiB before", "MiB with them", "KiB for each", "descriptors left")
    each = (found["during"] - found["before"]) * 1024 / options.streams
    row = [str(options.streams), f"{found['before']:.0f}", f"{found['during']:.0f}", f"{each:.1f}"]
    print(harness.table_text(heads, [[*row, str(found["descriptors_left"])]]))
    return {"machine": machine, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=5000, help="at once (default: %(default)s)")
    parser.add_argument("--targets", type=int, default=5, help="that they are spread over (default: %(default)s)")
    return harness.run("proxy-streams", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
