"""Mixed load through the proxy for some minutes: no wrong byte, and in the end nothing is left of it.

A frontend of its own process stands before targets on a TCP port and a Unix socket, and one that is killed and begun
again all the time. Callers ask for small and large bodies, send some, read slowly, leave at any moment, listen to
events, speak through tunnels. Targets die in the middle of a head or a body, by an end or a reset, hang, answer garbage
or twice, and hang up between two requests. Every byte is compared, and half an answer must never look whole.
After a warm-up, and again after the load, tasks, connections and descriptors have to be as many as at the beginning.

It ends with 1 when anything of that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import soak_host
import uvloop
from proxy import free_port

HERE = Path(__file__).parent
LIBRARIES = ("lmcache-ops", "aiohttp", "uvloop", "httptools")

CALLERS = 40
REQUEST_SECONDS = 45.0
"""No request may take longer, whatever its target does; those that hang are left by their callers."""

SETTLE_SECONDS = 30.0
"""For so long what the load took may stay: a kept connection for 4 seconds and its sweep, an unread body for 10."""

MAX_GROWN_MIB = 16.0
MAX_TOLD = 20
MIB = 1 << 20


class Wrong(Exception):
    """What may not happen."""


class Cut(Exception):
    """An answer ended before its end, and one could see it."""


@dataclass
class Tally:
    """What has been done, by kind, and what was wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    received: int = 0
    sent: int = 0
    wrong: list[str] = field(default_factory=list)


class Caller:
    """A connection to the frontend, and a reader of answers that is as strict as can be."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tally: Tally) -> None:
        self.reader = reader
        self.writer = writer
        self.tally = tally
        self.is_kept = True
        self.before = "nothing"
        self.status = 0
        self.fields: dict[str, str] = {}

    async def ask(self, method: str, path: str, *fields: str) -> None:
        lines = "".join(f"{line}\r\n" for line in fields)
        self.writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())

    async def head(self, *, interim: bool = False) -> int:
        """The head of the next answer; interim ones are passed over unless they are asked for."""
        while True:
            try:
                lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            except asyncio.IncompleteReadError as error:
                raise Cut("without an answer" if not error.partial else "in the middle of a head") from None
            if not lines[0].startswith("HTTP/1.1 "):
                raise Wrong(f"no answer: {lines[0][:60]!r}")
            self.status = int(lines[0][9:12])
            self.fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:-2])}
            self.is_kept = self.is_kept and self.fields.get("connection") != "close"
            if self.status >= 200 or self.status == 101 or interim:
                return self.status

    async def pieces(self, most: int = 1 << 16) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            Cut: it ends before its end.
            Wrong: its framing is none.
        """
        try:
            if "content-length" in self.fields:
                async for piece in self._exactly(int(self.fields["content-length"]), most):
                    yield piece
                return
            if self.fields.get("transfer-encoding") != "chunked":
                raise Wrong("a body without an end")
            size = 1
            while size:
                line = await self.reader.readuntil(b"\r\n")
                if line.strip(b"0123456789abcdef\r\n") or len(line) < 3:
                    raise Wrong(f"no chunk: {line[:40]!r}")
                size = int(line, 16)
                async for piece in self._exactly(size, most):
                    yield piece
                if await self.reader.readexactly(2) != b"\r\n":
                    raise Wrong("trailers, or a chunk that is longer than it says")
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Cut("in the middle of a body") from None

    async def _exactly(self, size: int, most: int) -> AsyncIterator[bytes]:
        while size:
            piece = await self.reader.read(min(most, size))
            if not piece:
                raise Cut("in the middle of a body")
            size -= len(piece)
            yield piece

    async def body(self, key: int, size: int, *, most: int = 1 << 16, pause: float = 0.0) -> None:
        """The whole body, compared.

        Raises:
            Cut: it is cut; what came of it was right.
        """
        start = 0
        async for piece in self.pieces(most):
            if piece != soak_host.content(key, start, len(piece)):
                raise Wrong(f"wrong bytes behind {start}")
            start += len(piece)
            self.tally.received += len(piece)
            if pause:
                await asyncio.sleep(pause)
        if start != size:
            raise Wrong(f"{start} of {size} bytes, and a clean end")

    async def text(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    def leave(self, with_reset: bool) -> None:
        if with_reset:
            soak_host.reset(self.writer)
        self.writer.close()
        self.is_kept = False


@dataclass
class Job:
    """One thing that a caller does: on which connection, at which target, with which random numbers."""

    caller: Caller
    prefix: str
    random: random.Random
    key: int

    def path(self, what: str, size: int = 0, extra: int = 0) -> str:
        return f"{self.prefix}/{what}/{self.key}/{size}/{extra}"

    def size(self, most: int) -> int:
        return self.random.choice((0, 1, self.random.randrange(1000), self.random.randrange(most), most))

    async def answered(self, status: int) -> None:
        found = await self.caller.head()
        if found != status:
            raise Wrong(f"{found} for {status}: {(await self.caller.text())[:200]!r}")


async def small(job: Job) -> None:
    size = job.size(2000)
    await job.caller.ask("GET", job.path(job.random.choice(("sized", "chunked")), size))
    await job.answered(200)
    await job.caller.body(job.key, size)


async def download(job: Job) -> None:
    size = job.random.randrange(4 * MIB)
    await job.caller.ask("GET", job.path(job.random.choice(("sized", "chunked", "until_end")), size))
    await job.answered(200)
    await job.caller.body(job.key, size)


async def slow_reader(job: Job) -> None:
    size = job.random.randrange(MIB, 3 * MIB)
    await job.caller.ask("GET", job.path(job.random.choice(("sized", "chunked")), size))
    await job.answered(200)
    await job.caller.body(job.key, size, most=size // 60, pause=0.02)


async def send(job: Job, size: int, *, chunked: bool, pause: float = 0.0) -> None:
    writer, start = job.caller.writer, 0
    while start < size:
        step = min(size - start, job.random.choice((1, 3_000, 65_536, soak_host.LARGEST)))
        piece = soak_host.content(job.key, start, step)
        writer.write(b"%x\r\n%b\r\n" % (step, piece) if chunked else piece)
        await writer.drain()
        start += step
        job.caller.tally.sent += step
        if pause:
            await asyncio.sleep(pause)
    if chunked:
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def framing(size: int, chunked: bool) -> str:
    return "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"


async def upload(job: Job) -> None:
    size, chunked, held_back = job.size(2 * MIB), job.random.random() < 0.5, job.random.random() < 0.3
    expect = ["Expect: 100-continue"] if held_back and size else []
    await job.caller.ask("POST", job.path("digest"), framing(size, chunked), *expect)
    if expect and await job.caller.head(interim=True) != 100:
        raise Wrong(f"{job.caller.status} for 100")
    await send(job, size, chunked=chunked, pause=0.01 if job.random.random() < 0.2 else 0.0)
    await job.answered(200)
    digest = hashlib.sha256()
    for start in range(0, size, soak_host.LARGEST):
        digest.update(soak_host.content(job.key, start, min(size - start, soak_host.LARGEST)))
    if await job.caller.text() != digest.hexdigest().encode():
        raise Wrong("the target got another body")


async def both_ways(job: Job) -> None:
    size, chunked = job.random.randrange(1, MIB), job.random.random() < 0.5
    await job.caller.ask("PUT", job.path("echo"), framing(size, chunked))
    sending = asyncio.ensure_future(send(job, size, chunked=chunked))
    try:
        await job.answered(200)
        await job.caller.body(job.key, size)
        await sending
    finally:
        sending.cancel()


async def events(job: Job) -> None:
    await job.caller.ask("GET", job.path("events", 2000))
    await job.answered(200)
    await job.caller.body(job.key, 2000)


async def tunnel(job: Job) -> None:
    size = job.random.randrange(1, 300_000)
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    await job.caller.ask("GET", job.path("tunnel", size), *upgrade, "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
    await job.answered(101)
    job.caller.is_kept = False
    sending = asyncio.ensure_future(send(job, size, chunked=False))
    try:
        got = 0
        while piece := await job.caller.reader.read(1 << 16):
            if piece != soak_host.content(job.key, got, len(piece)):
                raise Wrong(f"wrong bytes behind {got} of a tunnel")
            got += len(piece)
            job.caller.tally.received += len(piece)
        if got != size:
            raise Wrong(f"{got} of {size} bytes of a tunnel")
    finally:
        sending.cancel()


async def leaves(job: Job) -> None:
    """Any of the others, left at any moment."""
    what = job.random.choice((small, download, slow_reader, upload, both_ways, events, tunnel, interim))
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(what(job), job.random.choice((0.0, 0.001, 0.02, 0.3)) * job.random.random())
    job.caller.leave(job.random.random() < 0.5)


async def hangs(job: Job) -> None:
    """The target never answers, or stops in the middle, until the caller leaves."""
    begun = job.random.randrange(2)
    body = job.random.random() < 0.3
    await job.caller.ask(
        *(("POST", job.path("hang", 0, begun), "Content-Length: 1000") if body else ("GET", job.path("hang", 0, begun)))
    )
    if begun:
        await job.answered(200)
        if await job.caller.reader.readexactly(2) != b"no":
            raise Wrong("wrong bytes of an answer that hangs")
    await asyncio.sleep(job.random.random() * 0.5)
    job.caller.leave(job.random.random() < 0.5)


async def cut_body(job: Job) -> None:
    size = job.random.randrange(10, 2 * MIB)
    at = job.random.randrange(1, size)
    kinds = ["sized", "chunked"] + ["until_end"] * (job.prefix == "/proxy2/tcp")  # a Unix socket knows no reset
    await job.caller.ask("GET", job.path(job.random.choice(kinds), size, at))
    try:
        if await job.caller.head() == 502:  # it died before anything of the body went on
            await job.caller.text()
            return
        await job.caller.body(job.key, size)
    except Cut:
        job.caller.leave(False)
        return
    raise Wrong("a cut body looks whole")


async def half_head(job: Job) -> None:
    await job.caller.ask(job.random.choice(("GET", "DELETE")), job.path("half_head", 0, job.random.randrange(40)))
    await job.answered(502)
    await job.caller.text()


async def garbage(job: Job) -> None:
    await job.caller.ask("GET", job.path("garbage", job.random.randrange(100_000)))
    await job.answered(502)
    await job.caller.text()


async def stale(job: Job) -> None:
    """Kept connections that are closed: what may be asked twice never fails."""
    size = job.random.randrange(1000)
    await job.caller.ask("GET", job.path("stale", size, job.random.randrange(2)))
    await job.answered(200)
    await job.caller.body(job.key, size)


async def surplus(job: Job) -> None:
    size = job.random.randrange(1000)
    await job.caller.ask("GET", job.path("surplus", size, job.random.randrange(1, 50)))
    await job.answered(200)
    await job.caller.body(job.key, size)


async def interim(job: Job) -> None:
    size = job.random.randrange(1000)
    await job.caller.ask("GET", job.path("interim", size, 3))
    await job.answered(200)
    await job.caller.body(job.key, size)


async def early(job: Job) -> None:
    """The target refuses a large body and hangs up; whether that can still be told is a matter of moments."""
    await job.caller.ask("POST", job.path("early"), "Content-Length: 3000000")
    sending = asyncio.ensure_future(send(job, 3_000_000, chunked=False))
    try:
        if await job.caller.head() not in (413, 502):
            raise Wrong(f"{job.caller.status} for 413")
        job.caller.tally.outcomes[f"early: {job.caller.status}"] += 1
    finally:
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await sending
        job.caller.leave(True)


async def mortal(job: Job) -> None:
    """At the target that is killed all the time everything may fail, and nothing may be wrong."""
    size = job.random.randrange(MIB)
    await job.caller.ask("GET", f"/proxy2/mortal/{job.random.choice(('sized', 'chunked'))}/{job.key}/{size}/0")
    try:
        status = await job.caller.head()
        if status in (502, 503):
            await job.caller.text()
        elif status == 200:
            await job.caller.body(job.key, size)
        else:
            raise Wrong(f"{status} of a target that dies")
        job.caller.tally.outcomes[f"mortal: {status}"] += 1
    except Cut:
        job.caller.tally.outcomes["mortal: cut"] += 1
        job.caller.leave(False)


JOBS: dict[Callable[[Job], Awaitable[None]], int] = {
    small: 30, download: 6, slow_reader: 4, upload: 8, both_ways: 6, events: 4, tunnel: 6, leaves: 15, hangs: 3,
    cut_body: 6, half_head: 4, garbage: 4, stale: 8, surplus: 6, interim: 3, early: 2, mortal: 6,
}  # fmt: skip


async def one_caller(number: int, port: int, seed: int, until: float, tally: Tally) -> None:
    chance = random.Random(f"{seed} {number}")
    jobs, weights = list(JOBS), list(JOBS.values())
    caller: Caller | None = None
    while time.monotonic() < until:
        if caller is None:
            caller = Caller(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 18), tally)
        what = chance.choices(jobs, weights)[0]
        name = what.__name__
        job = Job(caller, chance.choice(("/proxy2/tcp", "/proxy2/unix")), chance, chance.randrange(1 << 16))
        try:
            await asyncio.wait_for(what(job), REQUEST_SECONDS)
            tally.counts[name] += 1
            caller.before = name
        except asyncio.TimeoutError:
            tally.wrong.append(f"{name}: not done within {REQUEST_SECONDS} s ({job.prefix}, after {caller.before})")
            caller.leave(True)
        except (Wrong, Cut, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            if name != "leaves" or isinstance(error, Wrong):
                tally.wrong.append(f"{name}: {type(error).__name__}: {error} ({job.prefix}, after {caller.before})")
            caller.leave(True)
        if not caller.is_kept or chance.random() < 0.02:
            caller.writer.close()
            caller = None
    if caller is not None:
        caller.writer.close()


@contextlib.asynccontextmanager
async def process(*arguments: str, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("ab") as errors:
        child = await asyncio.create_subprocess_exec(
            sys.executable, str(HERE / "soak_host.py"), *arguments, stdout=asyncio.subprocess.PIPE, stderr=errors
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def dying(place: str, seed: int, log: Path) -> None:
    """A target that is killed after a moment, and begun again after another one."""
    chance = random.Random(seed)
    while True:
        async with process("target", place, str(seed), log=log):
            await until_there(int(place))
            await asyncio.sleep(chance.random() * 3)
        await asyncio.sleep(chance.random())


@dataclass
class Held:
    """What the frontend holds at a moment."""

    tasks: int
    descriptors: int
    connections: int
    resident: float
    """MiB."""
    names: list[str]

    def is_more_than(self, other: Held) -> bool:
        return self.tasks > other.tasks or self.descriptors > other.descriptors or self.connections > other.connections


async def held(frontend: asyncio.subprocess.Process) -> Held:
    assert frontend.stdout is not None
    frontend.send_signal(signal.SIGUSR1)
    while True:
        line = await asyncio.wait_for(frontend.stdout.readline(), 30)
        if not line:
            raise harness.BenchmarkError("the frontend has ended")
        words = line.decode().split()
        if words[:1] == ["soak"]:
            break
    folder = Path(f"/proc/{frontend.pid}")
    sockets, descriptors = set(), 0
    for entry in os.scandir(folder / "fd"):
        descriptors += 1
        with contextlib.suppress(OSError):
            text = os.readlink(entry.path)
            if text.startswith("socket:["):
                sockets.add(text[8:-1])
    connections = 0
    for table, column, states in (("tcp", 9, {"01", "04", "05", "06", "08", "09", "0B"}), ("unix", 6, {"03"})):
        for row in (folder / "net" / table).read_text(encoding="ascii", errors="replace").splitlines()[1:]:
            cells = row.split()
            state = cells[3] if table == "tcp" else cells[5]
            connections += state in states and cells[column] in sockets
    status = (folder / "status").read_text(encoding="ascii")
    resident = int(status.partition("VmRSS:")[2].split()[0]) / 1024
    return Held(int(words[1]), descriptors, connections, resident, words[2].split(","))


async def at_rest(frontend: asyncio.subprocess.Process) -> Held:
    """What is held before anything happens: the same twice."""
    found = await held(frontend)
    while True:
        await asyncio.sleep(0.3)
        before, found = found, await held(frontend)
        if not before.is_more_than(found) and not found.is_more_than(before):
            return found


async def settled(frontend: asyncio.subprocess.Process, before: Held) -> Held:
    """What is held when it is no more than before, or when `SETTLE_SECONDS` have passed."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = await held(frontend)
        if not now.is_more_than(before) or time.monotonic() > deadline:
            return now
        await asyncio.sleep(0.5)


async def load(port: int, seed: int, seconds: float) -> Tally:
    tally = Tally()
    until = time.monotonic() + seconds
    await asyncio.gather(*(one_caller(number, port, seed, until, tally) for number in range(CALLERS)))
    return tally


async def soak(seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    port, tcp, mortal_port = free_port(), free_port(), free_port()
    nodes = [
        {"name": "tcp", "host": "127.0.0.1", "port": tcp},
        {"name": "unix", "host": "localhost", "port": f"{folder}/unix"},
        {"name": "mortal", "host": "127.0.0.1", "port": mortal_port},
    ]
    log = folder / "log"
    options = ["--host", "127.0.0.1", "--port", str(port), "--nodes", json.dumps(nodes), "--registry", "memory"]
    async with contextlib.AsyncExitStack() as stack:
        frontend = await stack.enter_async_context(
            process("frontend", *options, "--health-interval", "3600", "--log-level", "error", log=log)
        )
        for place in (str(tcp), f"{folder}/unix"):
            await stack.enter_async_context(process("target", place, str(seed), log=folder / "targets"))
        await until_there(port, tcp)
        begun = await at_rest(frontend)
        killing = asyncio.ensure_future(dying(str(mortal_port), seed, folder / "targets"))
        try:
            harness.progress("warm-up")
            warm = await load(port, seed + 1, min(15.0, max(2.0, seconds / 4)))
            before = await settled(frontend, begun)
            harness.progress(f"load for {seconds:g} s")
            tally = await load(port, seed, seconds)
            peak = (await held(frontend)).resident
            after = await settled(frontend, begun)
        finally:
            killing.cancel()
            await asyncio.gather(killing, return_exceptions=True)
        tally.wrong = warm.wrong + tally.wrong
        tally.wrong += left_over(begun, before, after)
        logged = log.read_text(encoding="utf-8", errors="replace").strip()
        if logged:
            tally.wrong.append(f"the frontend logged: {logged[:2000]}")
    return {"tally": tally, "begun": begun, "before": before, "after": after, "peak": peak}


def left_over(begun: Held, before: Held, after: Held) -> list[str]:
    wrong = [
        f"left over: {name}: {getattr(after, name)} after the load, {getattr(begun, name)} before"
        for name in ("tasks", "descriptors", "connections")
        if getattr(after, name) > getattr(begun, name)
    ]
    if after.tasks > begun.tasks:
        wrong.append(f"tasks: {Counter(after.names) - Counter(begun.names)}")
    if after.resident - before.resident > MAX_GROWN_MIB:
        wrong.append(f"memory grew from {before.resident:.1f} to {after.resident:.1f} MiB")
    return wrong


async def until_there(*ports: int) -> None:
    for port in ports:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            if time.monotonic() > deadline:
                raise harness.BenchmarkError(f"nobody listens on port {port}")
            await asyncio.sleep(0.1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    machine = harness.describe_machine(LIBRARIES)
    print(harness.machine_text(machine))
    with harness.short_folder() as folder:
        found = uvloop.run(soak(options.seconds, options.seed, folder))
    tally: Tally = found["tally"]
    print()
    print(harness.table_text(("what", "times"), [[name, str(count)] for name, count in sorted(tally.counts.items())]))
    print()
    moments = [
        ("at the beginning", found["begun"]),
        ("after the warm-up", found["before"]),
        ("in the end", found["after"]),
    ]
    rows = [
        [name, str(one.tasks), str(one.connections), str(one.descriptors), f"{one.resident:.1f}"]
        for name, one in moments
    ]
    print(harness.table_text(("", "tasks", "connections", "descriptors", "resident, MiB"), rows))
    print()
    outcomes = ", ".join(f"{name} {count}" for name, count in sorted(tally.outcomes.items()))
    print(f"{tally.received / MIB:.0f} MiB received and compared, {tally.sent / MIB:.0f} MiB sent; {outcomes}")
    print(f"seed {options.seed}, {options.seconds:g} s; wrong: {len(tally.wrong)}")
    for line in tally.wrong[:MAX_TOLD]:
        print(f"  {line}")
    if tally.wrong:
        raise harness.BenchmarkError(f"{len(tally.wrong)} things went wrong")
    return {"machine": machine, "counts": tally.counts, "memory": [one.resident for _, one in moments]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="of load, the warm-up aside (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (default: %(default)s)")
    return harness.run("soak", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
