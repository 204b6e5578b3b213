"""Chunks on disk: one file each, written whole or not at all, found again after a restart, damaged ones dropped.

A file is a header (`_HEADER`: magic, key, tokens, bytes, and the BLAKE2b of what comes before and after it) and the
chunk's bytes. It is written beside its place under a name that is no chunk's, and renamed: whoever opens the folder
after a kill finds whole chunks and such leftovers, which are removed. There is no fsync: after a power failure a file
may be damaged, which its checksum tells, and a cache may lose what it can compute again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmcache_api.embedded.keys import KEY_BYTES
from lmcache_shared.errors import OpsError

logger = logging.getLogger(__name__)

NAME = "LocalDiskBackend"
CLOSE_SECONDS = 5.0

_MAGIC = b"LMCOPS1\n"
_HEADER = struct.Struct(f"<8s{KEY_BYTES}sIQ")
_DIGEST_BYTES = 32
_OVERHEAD = _HEADER.size + _DIGEST_BYTES
_BLOCK = 4096
"""Files take whole blocks of the disk; so does the budget."""

_FILE = re.compile(rf"([0-9a-f]{{{2 * KEY_BYTES}}})\.kv")
_UNFINISHED = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}\.[0-9a-f]{{8}}\.tmp")
_LOCK = "lock"
MAX_PID = 32
_WARN_SECONDS = 60.0


class DiskError(OpsError):
    """A folder cannot be used; the text names it and says why."""


@dataclass(frozen=True)
class Stored:
    """A chunk file that is whole: how many tokens it has, and what it takes of the budget."""

    tokens: int
    space: int


class LocalDiskBackend:
    """At most `max_bytes` of chunk files in `folder`, which no other backend uses at the same time.

    In memory each file costs some 300 bytes. `lock` is the lock of the backend that this one follows on its folder.

    Raises:
        DiskError: the folder cannot be made, read or written, or another backend uses it.
    """

    def __init__(self, folder: Path, max_bytes: int, token_bytes: int, *, lock: int | None = None) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._token_bytes = token_bytes
        self._lock = threading.Condition()
        self._files: OrderedDict[bytes, Stored] = OrderedDict()  # the least recently used first
        self._writing: dict[bytes, int] = {}  # and the space that is kept for each
        self._used = 0
        self._generation = 0
        self._closed = False
        self._frozen = False
        self._warned_at = float("-inf")
        self.failed_puts = 0
        self.damaged = 0
        self._lock_file = _own(folder) if lock is None else lock
        try:
            self._find()
        except OSError as error:
            os.close(self._lock_file)
            raise DiskError(f"{folder}: cannot be read: {error.strerror}") from None

    def put(self, key: bytes, data: bytes) -> bool:
        """Keep a chunk; whether it is here now. What the disk refuses costs a warning and the chunk."""
        space = _space(len(data))
        with self._lock:
            if key in self._files:
                return True
            if self._closed or self._frozen or key in self._writing or not self._make_room(space):
                return False
            self._used += space
            self._writing[key] = space
            generation = self._generation
        written = False
        try:
            written = self._write(key, data)
        finally:
            with self._lock:
                del self._writing[key]
                self._lock.notify_all()
                kept = written and generation == self._generation and not self._frozen
                if kept:
                    self._files[key] = Stored(len(data) // self._token_bytes, space)
                else:
                    self._used -= space
                    if written:  # it was cleared or frozen while it was written
                        self._unlink(key)
        return kept

    def set_frozen(self, frozen: bool) -> None:
        """Frozen, it admits nothing, also nothing that is being written now."""
        with self._lock:
            self._frozen = frozen

    def get(self, key: bytes, *, touch: bool = True) -> bytes | None:
        """A chunk's bytes; `touch` makes it the most recently used. A damaged one is dropped and not found."""
        with self._lock:
            stored = self._files.get(key)
            if stored is None:
                return None
            if touch:
                self._files.move_to_end(key)
        try:
            _, data = read_chunk(self._path(key), key, stored.space)
        except FileNotFoundError:  # evicted since, or removed by somebody else
            self._drop(key, stored)
            return None
        except ValueError as error:
            self._warn("chunk %s is dropped: %s", self._path(key), error)
            self._drop(key, stored)
            return None
        except OSError as error:  # too many open files, say: the chunk may be whole
            self._warn("chunk %s cannot be read: %s", self._path(key), error)
            return None
        return data

    def __contains__(self, key: bytes) -> bool:
        return key in self._files

    def clear(self) -> int:
        """Forget every chunk; how many tokens those had."""
        with self._lock:
            self._generation += 1
            gone = [(key, stored) for key, stored in self._files.items() if self._unlink(key)]
            for key, stored in gone:
                del self._files[key]
                self._used -= stored.space
            return sum(stored.tokens for _, stored in gone)

    def close(self) -> None:
        """Let go of the folder; the files stay. Waits a while for those that are being written."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._lock.wait_for(lambda: not self._writing, CLOSE_SECONDS)
                self._files.clear()
                os.close(self._lock_file)

    @contextlib.contextmanager
    def handing_over(self) -> Iterator[int]:
        """For one that follows on the same folder: a copy of the lock, while nothing is written here.

        When the other cannot be made, this one goes on.
        """
        with self._lock:
            self._closed = True
            self._lock.wait_for(lambda: not self._writing, CLOSE_SECONDS)
            lock = os.dup(self._lock_file)
        try:
            yield lock
        except BaseException:
            with self._lock:
                self._closed = False
            raise
        with self._lock:
            self._files.clear()
            os.close(self._lock_file)

    @property
    def chunks(self) -> int:
        return len(self._files)

    @property
    def used_bytes(self) -> int:
        """What the files take, those that are being written among them."""
        return self._used

    def _find(self) -> None:
        """Take over the whole chunks in the folder, the oldest first, and remove what is none."""
        found: list[tuple[float, bytes, Stored]] = []
        for path, written_at, size in _entries(self.folder):
            name = _FILE.fullmatch(path.name)
            if name is None:
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink(missing_ok=True)
                continue
            key = bytes.fromhex(name[1])
            try:
                tokens = _read_header(path, key, size)
                if tokens * self._token_bytes != size - _OVERHEAD:
                    raise ValueError("the KV of another layout")
            except ValueError as error:
                self.damaged += 1
                self._warn("chunk %s is dropped: %s", path, error)
                path.unlink(missing_ok=True)
                continue
            except FileNotFoundError:  # the backend before this one was cleared meanwhile
                continue
            except OSError as error:
                self._warn("chunk %s cannot be read and is left alone: %s", path, error)
                continue
            found.append((written_at, key, Stored(tokens, _space(size - _OVERHEAD))))
        for _, key, stored in sorted(found, key=lambda entry: entry[:2]):
            self._files[key] = stored
            self._used += stored.space
        self._make_room(0)

    def _write(self, key: bytes, data: bytes) -> bool:
        unfinished = self.folder / f"{key.hex()}.{os.urandom(4).hex()}.tmp"
        header = _HEADER.pack(_MAGIC, key, len(data) // self._token_bytes, len(data))
        try:
            with open(unfinished, "wb", opener=_create) as file:
                file.write(header + _digest(header, data))
                file.write(data)
            os.replace(unfinished, self._path(key))
        except OSError as error:
            self.failed_puts += 1
            self._warn("chunk %s is not stored: %s", self._path(key), error)
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            return False
        return True

    def _make_room(self, space: int) -> bool:
        """Let files leave until `space` more fits, if that can be."""
        if sum(self._writing.values()) + space > self._max_bytes:
            return False
        while self._used + space > self._max_bytes:
            key, stored = next(iter(self._files.items()))
            if not self._unlink(key):
                return False
            del self._files[key]
            self._used -= stored.space
        return True

    def _drop(self, key: bytes, stored: Stored) -> None:
        with self._lock:
            if self._files.get(key) is stored and self._unlink(key):
                del self._files[key]
                self._used -= stored.space
                self.damaged += 1

    def _unlink(self, key: bytes) -> bool:
        """Whether the file is gone; one that cannot be removed still takes its space."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            self._warn("chunk %s cannot be removed: %s", self._path(key), error)
            return False
        return True

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}.kv"

    def _warn(self, message: str, *values: object) -> None:
        """At most once a minute: a full disk fails every chunk."""
        now = time.monotonic()
        if now - self._warned_at >= _WARN_SECONDS:
            self._warned_at = now
            logger.warning(message, *values)


def check_usable(folder: Path) -> None:
    """Look whether chunks could be kept in the folder.

    Raises:
        DiskError: they could not.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DiskError(f"{folder}: cannot be used for chunks: {why}") from None
    if owner != os.geteuid():
        raise DiskError(f"{folder}: cannot be used for chunks: it belongs to another user (uid {owner})")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise DiskError(f"{folder}: cannot be used for chunks: it cannot be read and written")


def chunk_files(folder: Path) -> list[tuple[bytes, Path]]:
    """The chunk files in a folder and the keys in their names, by name.

    Raises:
        OSError: the folder cannot be read.
    """
    names = ((path, _FILE.fullmatch(path.name)) for path, _, _ in _entries(folder))
    return sorted((bytes.fromhex(name[1]), path) for path, name in names if name)


def read_chunk(path: Path, key: bytes, max_bytes: int) -> tuple[int, bytes]:
    """How many tokens a chunk file has, and their bytes, at most `max_bytes`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or too large.
    """
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
        digest = file.read(_DIGEST_BYTES)
        data = file.read(max_bytes + 1)
    if len(header) + len(digest) != _OVERHEAD or header[:8] != _MAGIC or header[8 : 8 + KEY_BYTES] != key:
        raise ValueError("it is no chunk of that key")
    if len(data) > max_bytes or _digest(header, data) != digest:
        raise ValueError("its checksum is wrong")
    return int(_HEADER.unpack(header)[2]), data


def _read_header(path: Path, key: bytes, size: int) -> int:
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) != _HEADER.size:
        raise ValueError("it is cut off")
    magic, its_key, tokens, length = _HEADER.unpack(header)
    if magic != _MAGIC or its_key != key or length != size - _OVERHEAD:
        raise ValueError("it is no whole chunk of that key")
    return int(tokens)


def _digest(header: bytes, data: bytes) -> bytes:
    digest = hashlib.blake2b(header, digest_size=_DIGEST_BYTES)
    digest.update(data)
    return digest.digest()


def _space(data_bytes: int) -> int:
    return -(-(data_bytes + _OVERHEAD) // _BLOCK) * _BLOCK


def _entries(folder: Path) -> Iterator[tuple[Path, float, int]]:
    """The plain files: path, when it was written, bytes."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    told = entry.stat(follow_symlinks=False)
                    yield Path(entry.path), told.st_mtime, told.st_size


def _create(path: str, _: int) -> int:
    """A new file for its owner alone, never one that somebody else has put there."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _own(folder: Path) -> int:
    """Make the folder and lock it; the kernel lets go of the lock when the process ends, however it ends."""
    check_usable(folder)
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be used for chunks: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, MAX_PID).decode(errors="replace").strip()
        os.close(lock)
        raise DiskError(f"{folder}: another engine (pid {owner or 'unknown'}) keeps its chunks there") from None
    except OSError as error:
        os.close(lock)
        raise DiskError(f"{folder}: cannot be locked: {error.strerror}") from None
    with contextlib.suppress(OSError):  # on a full disk it is just not told
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
    return lock
