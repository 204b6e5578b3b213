import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache_api.embedded.disk import DiskError, LocalDiskBackend
from tests.api.embedded.making import CHUNK, CHUNK_BYTES, CHUNK_SPACE, CPU, DISK, Made, gib, make

NewEngine = Callable[..., Made]
TOKENS = range(8 * CHUNK)


@pytest.fixture
def both(made: NewEngine, tmp_path: Path) -> Made:
    return made(cpu_chunks=50, disk_chunks=50, local_disk=tmp_path / "a")


def test_what_the_settings_ask_for_is_there_memory_first(made: NewEngine, both: Made, tmp_path: Path) -> None:
    assert list(both.engine.backends.classes().items()) == [(CPU, CPU), (DISK, DISK)]
    assert both.engine.backends.create() == {}
    for given in ({}, {"local_disk": tmp_path / "x"}, {"disk_chunks": 5}, {"local_disk": " , ", "disk_chunks": 5}):
        assert list(made(**given).engine.backends.classes()) == [CPU]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", [CPU, DISK])
def test_closed_it_serves_nothing_and_made_again_as_new(both: Made, name: str) -> None:
    engine, other = both.engine, DISK if name == CPU else CPU
    engine.store(TOKENS)
    assert engine.backends.close(name)
    assert not engine.backends.close(name)
    assert engine.backends.recreate(name) is None
    assert engine.backends.classes() == {other: other}
    assert [span.locations for span in engine.lookup(TOKENS)] == [(other,)]
    engine.backends.close(other)
    engine.store(range(1000, 1100))
    assert (engine.lookup(TOKENS), engine.retrieve(TOKENS), engine.clear(None)) == ([], 0, 0)
    assert engine.backends.create() == {CPU: CPU, DISK: DISK}
    assert list(engine.backends.classes()) == [CPU, DISK]
    assert [span.locations for span in engine.lookup(TOKENS)] == [(DISK,)]  # its files stayed
    assert engine.retrieve(TOKENS) == len(TOKENS)


def test_recreated_memory_is_empty_and_disk_found_again(both: Made) -> None:
    both.engine.store(TOKENS)
    assert both.engine.backends.recreate(CPU) == {CPU: CPU}
    assert [span.locations for span in both.engine.lookup(TOKENS)] == [(DISK,)]
    assert both.engine.backends.recreate(DISK) == {DISK: DISK}
    assert both.engine.retrieve(TOKENS) == len(TOKENS)


def test_new_budgets_count_when_it_is_made_again(both: Made) -> None:
    both.engine.store(TOKENS)
    both.set(max_local_cpu_size=gib(3 * CHUNK_BYTES), max_local_disk_size=gib(5 * CHUNK_SPACE))
    both.engine.store(range(2000, 2000 + 3 * CHUNK))
    assert both.engine.backends.cpu is not None
    assert both.engine.backends.cpu.chunks == 11
    for name in (CPU, DISK):
        both.engine.backends.recreate(name)
    assert both.engine.backends.disk is not None
    assert both.engine.backends.disk.chunks == len(both.files()) == 5
    both.engine.store(TOKENS)
    assert (both.engine.backends.cpu.chunks, both.engine.backends.disk.chunks) == (3, 5)


def test_a_new_folder_counts_when_it_is_made_again(both: Made, tmp_path: Path) -> None:
    both.engine.store(TOKENS)
    both.set(local_disk=f"file://{tmp_path}/b")
    old = both.engine.backends.disk
    assert both.engine.backends.recreate(DISK) == {DISK: DISK}
    assert both.engine.backends.disk is not old
    both.engine.store(TOKENS)
    assert len(list((tmp_path / "a" / "worker").glob("*.kv"))) == 8
    assert len(list((tmp_path / "b" / "worker").glob("*.kv"))) == 8
    assert old is not None
    LocalDiskBackend(old.folder, 1, 1).close()  # it was let go
    both.set(max_local_disk_size=0.0)
    assert both.engine.backends.recreate(DISK) == {}
    assert list(both.engine.backends.classes()) == [CPU]


def test_a_recreate_with_an_unusable_folder_leaves_the_old_one_serving(both: Made, tmp_path: Path) -> None:
    engine = both.engine
    engine.store(TOKENS)
    (tmp_path / "file").write_text("x")
    held = LocalDiskBackend(tmp_path / "held" / "worker", 1 << 20, 64)
    for folder, message in (("file/x", "cannot be used"), ("file", "cannot be used"), ("held", "another engine")):
        both.set(local_disk=str(tmp_path / folder))
        with pytest.raises(DiskError, match=message):
            engine.backends.recreate(DISK)
        assert list(engine.backends.classes()) == [CPU, DISK]
        assert [span.locations for span in engine.lookup(TOKENS)] == [(CPU, DISK)]
        engine.store(range(5000, 5000 + CHUNK))
        assert [span.locations for span in engine.lookup(range(5000, 5000 + CHUNK))] == [(CPU, DISK)]
    held.close()
    assert engine.backends.recreate(DISK) == {DISK: DISK}


def test_the_same_folder_by_another_way_is_the_same_folder(both: Made, tmp_path: Path) -> None:
    both.engine.store(TOKENS)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    both.set(local_disk=str(tmp_path / "link"))
    assert both.engine.backends.recreate(DISK) == {DISK: DISK}
    both.engine.clear([CPU])
    assert both.engine.retrieve(TOKENS) == len(TOKENS)


def test_an_unusable_folder_does_not_cost_the_memory(both: Made, tmp_path: Path) -> None:
    backends = both.engine.backends
    (tmp_path / "file").write_text("x")
    both.set(local_disk=str(tmp_path / "file"))
    backends.close(DISK)
    with pytest.raises(DiskError):
        backends.recreate(CPU)
    assert list(backends.classes()) == [CPU]
    both.engine.store(TOKENS)
    assert both.engine.retrieve(TOKENS) == len(TOKENS)


def test_workers_share_the_folders_out_and_each_has_its_own_below(made: NewEngine, tmp_path: Path) -> None:
    folders = f"{tmp_path}/a, file://{tmp_path}/b"
    for worker in range(3):
        one = make(worker_id=worker, local_disk=folders, disk_chunks=5)
        assert one.engine.backends.disk is not None
        assert one.engine.backends.disk.folder == tmp_path / "aba"[worker] / "worker"
        one.engine.close()
    assert made(local_disk=folders, disk_chunks=5).engine.backends.disk is not None
    with pytest.raises(DiskError, match=rf"another engine \(pid {os.getpid()}\) keeps its chunks there"):
        make(local_disk=folders, disk_chunks=5)


def test_an_owner_stays_below_the_folder(tmp_path: Path) -> None:
    from lmcache_api.embedded.backends import StorageBackends
    from tests.api.embedded.making import settings_of

    settings = settings_of(local_disk=tmp_path / "d", disk_chunks=5)
    for owner in ("../up", "/etc", "a/b"):
        backends = StorageBackends(lambda: settings, 64, lambda *_: None, owner=owner, worker_id=0)
        assert backends.disk is not None
        assert backends.disk.folder.resolve().parent == tmp_path / "d"
        backends.close_all()


def test_bypassed_it_is_neither_stored_to_nor_looked_up_in(both: Made) -> None:
    engine = both.engine
    engine.store(TOKENS)
    assert engine.backends.set_bypass(CPU, True) is False
    assert engine.backends.set_bypass(CPU, True) is True
    assert engine.backends.bypassed() == [CPU]
    assert [span.locations for span in engine.lookup(TOKENS)] == [(DISK,)]
    other = range(5000, 5000 + 2 * CHUNK)
    engine.store(other)
    assert engine.retrieve(other) == len(other)  # which promotes nothing into what is bypassed
    assert engine.backends.set_bypass(CPU, False) is True
    assert engine.backends.bypassed() == []
    assert [span.locations for span in engine.lookup(other)] == [(DISK,)]
    engine.backends.set_bypass(CPU, True)
    engine.backends.set_bypass(DISK, True)
    assert engine.lookup(TOKENS) == []
    assert engine.retrieve(TOKENS) == 0
    assert engine.clear(None) == 2 * len(TOKENS) + len(other)  # what is bypassed is cleared all the same


def test_a_recreation_on_the_same_folder_that_fails_leaves_the_old_one(
    made: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(local_disk=tmp_path, disk_chunks=20)
    one.engine.store(range(64))
    before = one.engine.backends.disk
    assert before is not None

    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(LocalDiskBackend, "_find", refuse)
        with pytest.raises(DiskError):
            one.engine.backends.recreate(DISK)
    assert one.engine.backends.disk is before
    one.engine.clear([CPU])
    assert one.engine.retrieve(range(64)) == 64
    one.engine.store(range(100, 164))
    assert before.chunks == 8
    assert one.engine.backends.recreate(DISK) == {DISK: "LocalDiskBackend"}
    after = one.engine.backends.disk
    assert after is not None
    assert after is not before
    assert after.chunks == 8
    with pytest.raises(DiskError, match="another engine"):
        LocalDiskBackend(after.folder, 1, 1)
