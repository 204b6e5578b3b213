import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmcache_api.embedded import disk
from lmcache_api.embedded.disk import DiskError, LocalDiskBackend
from lmcache_api.embedded.layout import pattern
from tests.api.embedded.making import key_of

BLOCK = 4096
TOKEN = 64
OVERHEAD = 68
KEYS = [key_of(number) for number in range(8)]
DATA = pattern(b"data", 16 * TOKEN)

Open = Callable[..., LocalDiskBackend]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Backends that are closed at the test's end."""
    backends: list[LocalDiskBackend] = []

    def new(*, blocks: int = 100, folder: Path = tmp_path / "chunks", token_bytes: int = TOKEN) -> LocalDiskBackend:
        backends.append(LocalDiskBackend(folder, blocks * BLOCK, token_bytes))
        return backends[-1]

    yield new
    for backend in backends:
        backend.close()


def path_of(backend: LocalDiskBackend, key: bytes) -> Path:
    return backend.folder / f"{key.hex()}.kv"


def names(backend: LocalDiskBackend) -> set[str]:
    return {path.name for path in backend.folder.iterdir()} - {"lock"}


def waiting(condition: Callable[[], bool]) -> None:
    """Until it holds; the suite's timeout ends a wait in vain."""
    while not condition():
        threading.Event().wait(0.001)


class SlowWrites:
    """Holds every write back at its rename until `let` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self._go = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(4)
        replace = os.replace

        def held_back(*paths: Any) -> None:
            self.begun.set()
            assert self._go.wait(10)
            replace(*paths)

        monkeypatch.setattr(os, "replace", held_back)

    def start(self, call: Callable[[], Any]) -> Any:
        return self._pool.submit(call)

    def let(self) -> None:
        self._go.set()
        self._pool.shutdown()


def test_found_again_after_a_restart_with_the_same_bytes(opened: Open) -> None:
    first = opened()
    datas = {key: pattern(key, (1 + number) * 9 * TOKEN) for number, key in enumerate(KEYS)}
    for key, data in datas.items():
        assert first.put(key, data)
    used = first.used_bytes
    first.close()
    again = opened()
    assert {key: again.get(key) for key in KEYS} == datas
    assert (again.chunks, again.used_bytes, again.damaged) == (8, used, 0)
    assert again.clear() == sum(len(data) // TOKEN for data in datas.values())
    assert names(again) == set()


def test_a_chunk_takes_whole_blocks_of_the_budget(opened: Open) -> None:
    backend = opened()
    for size, blocks in ((BLOCK - OVERHEAD, 1), (BLOCK - OVERHEAD + 1, 2), (3 * BLOCK, 4)):
        backend.clear()
        assert backend.put(KEYS[0], bytes(size))
        assert backend.used_bytes == blocks * BLOCK
        assert path_of(backend, KEYS[0]).stat().st_size == size + OVERHEAD


def test_the_file_is_what_the_module_says(opened: Open) -> None:
    backend = opened()
    backend.put(KEYS[0], DATA)
    content = path_of(backend, KEYS[0]).read_bytes()
    header = b"LMCOPS1\n" + KEYS[0] + (16).to_bytes(4, "little") + len(DATA).to_bytes(8, "little")
    assert content == header + hashlib.blake2b(header + DATA, digest_size=32).digest() + DATA


@pytest.mark.parametrize("restart", [True, False])
def test_every_flipped_byte_and_every_cut_is_found_out(
    opened: Open, restart: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend = opened()
    backend.put(KEYS[0], DATA)
    whole = path_of(backend, KEYS[0]).read_bytes()
    flips = [*range(OVERHEAD), OVERHEAD, OVERHEAD + 500, len(whole) - 1]
    damages = [whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :] for at in flips]
    damages += [whole[:size] for size in (0, 1, 35, 36, 67, 68, 100, len(whole) - 1)] + [whole + b"x", b"x" * BLOCK]
    for number, damaged in enumerate(damages):
        backend.clear()
        assert backend.put(KEYS[0], DATA)
        before = 0 if restart else backend.damaged
        path_of(backend, KEYS[0]).write_bytes(damaged)
        if restart:
            backend.close()
            backend = opened()
        assert backend.get(KEYS[0]) is None, number
        assert KEYS[0] not in backend
        assert (backend.damaged - before, backend.chunks, backend.used_bytes) == (1, 0, 0), number
        assert names(backend) == set(), number
    assert "is dropped" in caplog.text
    assert backend.put(KEYS[0], DATA)
    assert backend.get(KEYS[0]) == DATA


def test_a_file_of_another_name_or_layout_is_removed(opened: Open) -> None:
    backend = opened()
    backend.put(KEYS[0], DATA)
    path_of(backend, KEYS[0]).rename(path_of(backend, KEYS[1]))
    assert backend.get(KEYS[0]) is None
    backend.put(KEYS[2], DATA)
    backend.close()
    other_layout = opened(token_bytes=2 * TOKEN)
    assert (other_layout.chunks, other_layout.damaged, other_layout.used_bytes) == (0, 2, 0)
    assert names(other_layout) == set()


def test_a_file_that_vanishes_is_not_found_and_takes_no_budget(opened: Open) -> None:
    backend = opened()
    backend.put(KEYS[0], DATA)
    path_of(backend, KEYS[0]).unlink()
    assert backend.get(KEYS[0]) is None
    assert (backend.used_bytes, backend.chunks, backend.damaged) == (0, 0, 1)


def test_leftovers_are_removed_and_foreign_files_left_alone(opened: Open, tmp_path: Path) -> None:
    folder = tmp_path / "chunks"
    folder.mkdir()
    foreign = ["notes.txt", "notes.tmp", "abc.kv", f"{KEYS[0].hex()}.kv.bak", f"{KEYS[0].hex().upper()}.kv"]
    for name in [*foreign, f"{KEYS[0].hex()}.0a1b2c3d.tmp"]:
        (folder / name).write_text("x")
    (folder / f"{KEYS[1].hex()}.kv").mkdir()
    (tmp_path / "elsewhere").write_text("x")
    (folder / f"{KEYS[2].hex()}.kv").symlink_to(tmp_path / "elsewhere")
    backend = opened(folder=folder)
    assert names(backend) == {*foreign, f"{KEYS[1].hex()}.kv", f"{KEYS[2].hex()}.kv"}
    backend.clear()
    assert (backend.chunks, backend.used_bytes) == (0, 0)
    assert names(backend) >= set(foreign)


def test_the_budget_is_kept_and_the_least_recently_used_leave_first(opened: Open) -> None:
    backend = opened(blocks=3)
    for key in KEYS[:3]:
        assert backend.put(key, DATA)
    assert backend.get(KEYS[0]) == DATA
    assert backend.get(KEYS[1], touch=False) == DATA
    assert backend.put(KEYS[3], DATA)
    assert [key in backend for key in KEYS[:4]] == [True, False, True, True]
    assert names(backend) == {f"{key.hex()}.kv" for key in (KEYS[0], KEYS[2], KEYS[3])}
    assert backend.used_bytes == 3 * BLOCK


def test_a_chunk_larger_than_the_budget_makes_nothing_leave(opened: Open) -> None:
    backend = opened(blocks=2)
    assert backend.put(KEYS[0], DATA)
    assert not backend.put(KEYS[1], bytes(2 * BLOCK))
    assert backend.get(KEYS[0]) == DATA


def test_a_restart_with_a_smaller_budget_keeps_the_youngest(opened: Open) -> None:
    backend = opened()
    for number, key in enumerate(KEYS):
        backend.put(key, DATA)
        os.utime(path_of(backend, key), (1000, 1000 - number))  # the last is the oldest
    backend.close()
    smaller = opened(blocks=3)
    assert [key in smaller for key in KEYS] == [True] * 3 + [False] * 5
    assert smaller.used_bytes == 3 * BLOCK
    assert len(names(smaller)) == 3


def test_a_folder_that_another_backend_holds_is_refused(opened: Open, tmp_path: Path) -> None:
    first = opened()
    with pytest.raises(
        DiskError, match=rf"{tmp_path}/chunks: another engine \(pid {os.getpid()}\) keeps its chunks there"
    ):
        opened()
    first.put(KEYS[0], DATA)
    script = f"from lmcache_api.embedded.disk import *; LocalDiskBackend(Path({str(first.folder)!r}), 9, 9)"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"another engine (pid {os.getpid()}) keeps its chunks there" in child.stderr
    assert first.get(KEYS[0]) == DATA
    first.close()
    assert opened().get(KEYS[0]) == DATA


def test_folders_that_cannot_be_used_are_refused_with_their_name(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DiskError, match=f"{folder}: cannot be used for chunks: "):
            opened(folder=folder)
        with pytest.raises(DiskError, match=f"{folder}: cannot be used for chunks: "):
            disk.check_usable(folder)


def test_a_folder_that_cannot_be_listed_is_refused_and_let_go(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(DiskError, match="chunks: cannot be read: Permission denied"):
            opened()
    assert opened().put(KEYS[0], DATA)  # nobody holds the folder


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from lmcache_api.embedded import disk
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for use in (disk.check_usable, lambda folder: disk.LocalDiskBackend(folder, 9, 9)):
    try:
        use(Path(sys.argv[1]))
    except disk.DiskError as error:
        print(error)
"""


@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_a_folder_without_permission_is_refused(mode: int) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        if os.getuid() == 0:
            os.chown(folder, 65534, 65534)
        folder.chmod(mode)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", UNPRIVILEGED, str(folder)]
        child = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert child.stdout.splitlines() == [
            f"{folder}: cannot be used for chunks: it cannot be read and written",
            f"{folder}: cannot be used for chunks: it cannot be read and written",
        ], child.stderr
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


@pytest.fixture
def tiny_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 64 KiB; where none may be mounted, writing fails as on one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    is_mounted = subprocess.run(command, capture_output=True).returncode == 0
    if not is_mounted:

        def open_unless_full(path: Path, mode: str) -> Any:
            used = sum(-(-file.stat().st_size // BLOCK) * BLOCK for file in folder.rglob("*.kv"))
            if mode == "wb" and used + BLOCK > 1 << 16:
                raise OSError(errno.ENOSPC, "No space left on device")
            return open(path, mode)

        monkeypatch.setattr(disk, "open", open_unless_full, raising=False)
    yield folder
    if is_mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_a_warning_and_the_chunk(
    opened: Open, tiny_disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(folder=tiny_disk / "w", blocks=1000)
    datas = {key_of(number): pattern(key_of(number), 3000) for number in range(40)}
    kept = {key for key, data in datas.items() if backend.put(key, data)}
    assert 8 <= len(kept) <= 16  # 64 KiB hold no more
    assert (backend.failed_puts, backend.chunks) == (40 - len(kept), len(kept))
    assert backend.used_bytes == len(kept) * BLOCK
    assert names(backend) == {f"{key.hex()}.kv" for key in kept}
    assert {key: backend.get(key) for key in kept} == {key: datas[key] for key in kept}
    assert not any(key in backend for key in datas.keys() - kept)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "is not stored: [Errno 28] No space left on device" in caplog.text

    missing = next(iter(datas.keys() - kept))
    now = disk.time.monotonic()
    with monkeypatch.context() as later:
        later.setattr(disk.time, "monotonic", lambda: now + 59.0)
        assert not backend.put(missing, datas[missing])
        assert len(caplog.records) == 1
        later.setattr(disk.time, "monotonic", lambda: now + 61.0)
        assert not backend.put(missing, datas[missing])
        assert len(caplog.records) == 2

    backend.clear()
    assert backend.put(missing, datas[missing])
    assert backend.get(missing) == datas[missing]
    assert backend.used_bytes == BLOCK


LIMITED = """
import resource, sys
from pathlib import Path
from lmcache_api.embedded.disk import LocalDiskBackend
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
backend = LocalDiskBackend(Path(sys.argv[1]), 1 << 20, 64)
put = [backend.put(bytes([n]) * 16, bytes([n]) * size) for n, size in enumerate((4096, 16384, 1 << 19, 4096))]
print(put, backend.used_bytes, backend.failed_puts, backend.chunks, backend.get(bytes([3]) * 16) == bytes([3]) * 4096)
print(sorted(path.name[:2] + path.suffix for path in Path(sys.argv[1]).iterdir() if path.name != "lock"))
"""


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    expected = "[True, False, False, True] 16384 2 2 True\n['00.kv', '03.kv']\n"
    assert (child.returncode, child.stdout) == (0, expected), child.stderr
    assert child.stderr.count("is not stored: [Errno 27]") == 1


def test_a_clear_during_a_write_leaves_no_file_and_no_budget(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened()
    backend.put(KEYS[1], DATA)
    writes = SlowWrites(monkeypatch)
    written = writes.start(lambda: backend.put(KEYS[0], DATA))
    assert writes.begun.wait(10)
    assert backend.used_bytes == 2 * BLOCK  # what is being written counts
    assert not backend.put(KEYS[0], DATA)  # it is not there yet
    assert backend.clear() == 16
    assert backend.used_bytes == BLOCK
    writes.let()
    assert written.result() is False
    assert (backend.used_bytes, backend.chunks, names(backend)) == (0, 0, set())
    assert backend.put(KEYS[0], DATA)
    assert backend.get(KEYS[0]) == DATA


def test_what_is_being_written_is_not_evicted_and_keeps_others_out(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(blocks=2)
    backend.put(KEYS[0], DATA)
    writes = SlowWrites(monkeypatch)
    written = [writes.start(lambda: backend.put(KEYS[1], DATA))]
    waiting(lambda: backend.used_bytes == 2 * BLOCK)
    written.append(writes.start(lambda: backend.put(KEYS[2], DATA)))  # evicts the first
    waiting(lambda: KEYS[0] not in backend)
    assert not backend.put(KEYS[3], DATA)
    assert backend.used_bytes == 2 * BLOCK
    writes.let()
    assert [each.result() for each in written] == [True, True]
    assert (backend.used_bytes, backend.chunks) == (2 * BLOCK, 2)


def test_closing_waits_for_what_is_being_written(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened()
    writes = SlowWrites(monkeypatch)
    written = writes.start(lambda: backend.put(KEYS[0], DATA))
    assert writes.begun.wait(10)
    closed = writes.start(backend.close)
    waiting(lambda: backend._closed)
    assert not closed.done()
    with pytest.raises(DiskError, match="another engine"):
        opened()
    writes.let()
    closed.result()
    assert written.result() is True
    assert not backend.put(KEYS[1], DATA)
    assert backend.get(KEYS[0]) is None
    backend.close()
    assert opened().get(KEYS[0]) == DATA


def test_closing_does_not_wait_for_ever(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened()
    monkeypatch.setattr(disk, "CLOSE_SECONDS", 0.05)
    writes = SlowWrites(monkeypatch)
    written = writes.start(lambda: backend.put(KEYS[0], DATA))
    assert writes.begun.wait(10)
    backend.close()
    again = opened()  # and takes the unfinished file for what a kill left over
    writes.let()
    assert written.result() is False
    assert KEYS[0] not in backend
    assert (names(again), again.used_bytes) == (set(), 0)


def test_in_parallel_the_budget_holds_and_every_chunk_is_right(opened: Open) -> None:
    backend = opened(blocks=20)
    datas = {key_of(number): pattern(key_of(number), (1 + number % 40) * 3 * TOKEN) for number in range(60)}
    served: Counter[bool] = Counter()

    def churn(first: int) -> None:
        for turn in range(400):
            key = key_of((turn * 7 + first * 13) % 60)
            backend.put(key, datas[key])
            data = backend.get(key_of((turn * 11 + first) % 60))
            served[data is not None] += 1
            assert data is None or data == datas[key_of((turn * 11 + first) % 60)]
            assert 0 <= backend.used_bytes <= 20 * BLOCK
            if turn % 150 == 149:
                backend.clear()

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(churn, first) for first in range(4)]:
            each.result()
    assert served[True] > 50
    assert (backend.damaged, backend.failed_puts) == (0, 0)
    files = {path.name: path.stat().st_size for path in backend.folder.glob("*.kv")}
    assert names(backend) == files.keys()
    assert len(files) == backend.chunks
    assert backend.used_bytes == sum(-(-size // BLOCK) * BLOCK for size in files.values())
    backend.clear()
    assert (backend.used_bytes, names(backend)) == (0, set())


class DiskMachine(RuleBasedStateMachine):
    """Against a list of chunks, the least recently used first, and the folder's files."""

    @initialize(blocks=st.integers(0, 8))
    def begin(self, blocks: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lmc"))
        self.blocks = blocks
        self.chunks: dict[bytes, bytes] = {}
        self.broken: set[bytes] = set()
        self.written: dict[bytes, int] = {}
        self.clock = 0
        self.backend = LocalDiskBackend(self.folder, blocks * BLOCK, TOKEN)

    def space(self) -> int:
        return sum(-(-(len(data) + OVERHEAD) // BLOCK) for data in self.chunks.values())

    @rule(key=st.sampled_from(KEYS), blocks=st.integers(1, 4))
    def put(self, key: bytes, blocks: int) -> None:
        data = pattern(key + bytes([self.clock % 256]), blocks * BLOCK - 128)
        self.clock += 1
        expected = key in self.chunks
        if not expected and blocks <= self.blocks:
            while self.space() + blocks > self.blocks:
                del self.chunks[next(iter(self.chunks))]
            self.chunks[key] = data
            self.written[key] = self.clock
            self.broken.discard(key)
            expected = True
        assert self.backend.put(key, data) == expected

    @rule(key=st.sampled_from(KEYS), touch=st.booleans())
    def get(self, key: bytes, touch: bool) -> None:
        data = self.chunks.pop(key, None) if touch or key in self.broken else self.chunks.get(key)
        if key in self.broken:
            data = None
        elif touch and data is not None:
            self.chunks[key] = data
        assert self.backend.get(key, touch=touch) == data

    @rule(key=st.sampled_from(KEYS), at=st.integers(OVERHEAD - 32, OVERHEAD + 999))
    def damage(self, key: bytes, at: int) -> None:
        """What no look at the header can tell."""
        if key in self.chunks and key not in self.broken:
            self.broken.add(key)
            content = bytearray(path_of(self.backend, key).read_bytes())
            content[at] ^= 0xFF
            path_of(self.backend, key).write_bytes(content)

    @rule()
    def clear(self) -> None:
        assert self.backend.clear() == sum(len(data) // TOKEN for data in self.chunks.values())
        self.chunks.clear()

    @rule(blocks=st.integers(0, 8), leftover=st.sampled_from(KEYS))
    def restart(self, blocks: int, leftover: bytes) -> None:
        self.backend.close()
        for key in self.chunks:
            os.utime(path_of(self.backend, key), (self.written[key], self.written[key]))
        (self.folder / f"{leftover.hex()}.0a1b2c3d.tmp").write_bytes(b"x")
        self.blocks = blocks
        self.chunks = {key: self.chunks[key] for key in sorted(self.chunks, key=lambda key: self.written[key])}
        while self.space() > blocks:
            del self.chunks[next(iter(self.chunks))]
        self.backend = LocalDiskBackend(self.folder, blocks * BLOCK, TOKEN)

    @invariant()
    def is_the_model(self) -> None:
        self.broken &= self.chunks.keys()
        assert self.backend.used_bytes == self.space() * BLOCK <= self.blocks * BLOCK
        assert self.backend.chunks == len(self.chunks)
        assert {key for key in KEYS if key in self.backend} == self.chunks.keys()
        assert names(self.backend) == {f"{key.hex()}.kv" for key in self.chunks}

    def teardown(self) -> None:
        if hasattr(self, "backend"):
            self.backend.close()
            shutil.rmtree(self.folder)


TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_cannot_be_read_now_is_not_dropped(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files, say: the chunk may be whole."""
    backend = opened()
    assert backend.put(KEYS[0], DATA)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "open", refuse, raising=False)
        assert backend.get(KEYS[0]) is None
    assert backend.get(KEYS[0]) == DATA


def test_a_link_that_somebody_else_has_put_there_is_not_followed(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    backend = opened()
    monkeypatch.setattr(os, "urandom", bytes)
    (backend.folder / f"{KEYS[0].hex()}.00000000.tmp").symlink_to(victim)
    assert not backend.put(KEYS[0], DATA)
    assert victim.read_text() == "precious"
    backend.close()
    lock = backend.folder / "lock"
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(DiskError, match="cannot be used for chunks"):
        opened()


def test_files_are_for_their_owner_alone(opened: Open) -> None:
    backend = opened()
    backend.put(KEYS[0], DATA)
    assert {path.stat().st_mode & 0o777 for path in backend.folder.iterdir()} == {0o600}


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(DiskError, match=rf"it belongs to another user \(uid {owner}\)"):
        disk.check_usable(tmp_path)
