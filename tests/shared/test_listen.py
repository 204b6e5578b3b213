import asyncio
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from lmcache_shared.address import Address, TcpAddress, UnixAddress
from lmcache_shared.errors import AddressError, AddressInUse
from lmcache_shared.listen import bind_unix_socket, check_address_free, make_site

Start = Callable[..., Coroutine[Any, Any, web.AppRunner]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def begin(address: Address, mode: int = 0o660) -> web.AppRunner:
            runner = web.AppRunner(web.Application(), shutdown_timeout=1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await make_site(runner, address, socket_mode=mode).start()
            return runner

        yield begin


async def test_a_socket_has_its_folder_and_mode_and_leaves_nothing(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "s"
    runner = await start(UnixAddress(str(path)), 0o600)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await runner.cleanup()
    assert not path.exists()


async def test_a_stale_socket_is_replaced(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists()
    await start(UnixAddress(str(path)))
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    assert b"404" in await reader.readline()
    writer.close()


async def test_a_live_socket_is_left_alone_and_named(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "s"
    code = (
        "import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen();"
        " print(); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        inode = path.stat().st_ino
        with pytest.raises(AddressInUse, match=f"process {child.pid} .*python.* listens on this socket"):
            await start(UnixAddress(str(path)))
        with pytest.raises(AddressInUse, match=f"process {child.pid} "):
            check_address_free(UnixAddress(str(path)))
        assert path.stat().st_ino == inode
    finally:
        child.kill()
        child.communicate()


async def test_a_live_socket_with_a_full_queue_lives_too(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(str(path))
        busy.listen(0)
        first.connect(str(path))
        with pytest.raises(AddressInUse, match="too busy to answer"):
            await start(UnixAddress(str(path)))


async def test_what_is_no_socket_is_not_removed(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(AddressError, match="exists and is no socket"):
        await start(UnixAddress(str(path)))
    assert path.read_text() == "precious"


async def test_a_folder_that_cannot_be_made(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    address = UnixAddress(str(tmp_path / "file" / "s"))
    with pytest.raises(AddressError, match="cannot make its folder"):
        await start(address)
    with pytest.raises(AddressError, match="is no folder"):
        check_address_free(address)


async def test_a_successors_socket_is_not_removed(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = await start(UnixAddress(str(path)))
    path.unlink()
    await start(UnixAddress(str(path)))
    await first.cleanup()
    assert path.exists()


def test_of_many_that_start_together_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    won: list[socket.socket] = []
    lost: list[AddressInUse] = []
    barrier = threading.Barrier(8)

    def compete() -> None:
        barrier.wait()
        try:
            won.append(bind_unix_socket(UnixAddress(str(path)), 0o600))
        except AddressInUse as error:
            lost.append(error)

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    won[0].close()


async def test_a_port_in_use(start: Start) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        address = TcpAddress("127.0.0.1", sock.getsockname()[1])
        with pytest.raises(AddressInUse, match=f"{address}: the port is in use"):
            await start(address)
        with pytest.raises(AddressInUse, match="the port is in use"):
            check_address_free(address)
    check_address_free(address)


async def test_a_host_of_another_machine(start: Start) -> None:
    address = TcpAddress("192.0.2.1", 8080)
    with pytest.raises(AddressError, match="192.0.2.1:8080: cannot listen there"):
        await start(address)
    with pytest.raises(AddressError, match="192.0.2.1:8080: cannot listen there"):
        check_address_free(address)


def test_a_folder_that_cannot_be_written() -> None:
    folder = tempfile.mkdtemp(prefix="lmc")
    Path(folder).chmod(0o555)
    code = (
        "import os, sys\n"
        "from lmcache_shared.address import UnixAddress\n"
        "from lmcache_shared.listen import bind_unix_socket, check_address_free\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"  # root may write everywhere
        "for use in (check_address_free, lambda a: bind_unix_socket(a, 0o600)):\n"
        "    try: use(UnixAddress(sys.argv[1]))\n"
        "    except Exception as e: print(type(e).__name__, e)\n"
    )
    try:
        run = subprocess.run([sys.executable, "-c", code, f"{folder}/s"], capture_output=True, text=True, timeout=30)
    finally:
        Path(folder).rmdir()
    assert run.stdout.splitlines() == [
        f"AddressError {folder}/s: cannot create the socket: {folder} is not writable",
        f"AddressError {folder}/s: cannot create the socket: Permission denied",
    ], run.stderr
