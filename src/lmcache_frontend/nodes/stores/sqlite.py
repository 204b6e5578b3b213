"""A store in one SQLite file, which several frontends of a host may share.

The journal is SQLite's rollback journal, not WAL: writes are rare and small, so WAL would win nothing, and it needs
memory shared by all who open the file, which home folders on a network do not have. `synchronous=EXTRA` has every
change on the disk, its folder's entry too, before it is acknowledged: neither `kill -9` nor a power cut takes it back.

Heartbeats are not written: they are news for seconds, and a disk is no place for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from lmcache_frontend.nodes.stores import Change, StoreAway, StoreUncertain
from lmcache_frontend.nodes.stores.bounds import (
    MAX_KEY_BYTES,
    MAX_RECORDS,
    MAX_TOTAL_BYTES,
    MAX_VALUE_BYTES,
    Readable,
    growth,
    refuse_unkeepable,
    refuse_unkeepable_changes,
    too_many,
)
from lmcache_frontend.nodes.stores.memory import News, Reports
from lmcache_shared.blocking import BlockingPool
from lmcache_shared.errors import Refusal

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 0.25
"""Between two looks whether another process has written."""

LOCK_SECONDS = 2.0
"""How long another process's lock is waited for."""

CALL_SECONDS = 5.0
"""How long a call may take, its turn in the line included; beyond that the disk counts as stuck."""

CLOSE_SECONDS = 1.0
"""For a stuck disk to come back when the frontend ends; what is on it does not need this."""

APPLICATION_ID = 0x4C4D4F50
"""In the file's header: "LMOP". A file with another one belongs to another program."""

SCHEMA_VERSION = 1

_SCHEMA = "CREATE TABLE records (key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL) WITHOUT ROWID"

_SIZE = "length(CAST(key AS BLOB)) <= ? AND length(CAST(value AS BLOB)) <= ?"

_WAYS_OUT = (
    ("is locked", "another process holds its lock; end that one, or wait"),
    ("readonly", "it cannot be written; make it and its folder writable for this user"),
    ("disk I/O error", "its disk does not take or give it, or is full; make room, and see the system's log"),
    ("is full", "the disk is full; make room"),
    ("unable to open", "it cannot be opened; make it and its folder readable and writable for this user"),
    ("not a database", "it is no SQLite database; move it away, or name another file"),
    ("malformed", "it is damaged; move it away, what it held can be had with `sqlite3 FILE .recover`"),
)
"""What SQLite says, and what is to be done. Its codes reach Python only from 3.11 on."""


NO_FILE = -1
"""In the place of the number of changes that SQLite keeps for a file."""


class SqliteStore:
    """Keeps records in `path`; `None`: in a state folder that this user does not have."""

    is_shared = False

    def __init__(self, path: Path | None) -> None:
        self.description = "sqlite" if path is None else f"sqlite:{path}"
        self._file = None if path is None else _File(path)
        self._pool = BlockingPool("lmcache-store", threads=1)
        self._readable = Readable(self.description, "records")
        self._reports = Reports()
        self._news = News()
        self._closed = False

    async def open(self) -> None:
        await self._call(_File.changed)

    async def read(self) -> dict[str, str]:
        return self._readable.texts(*await self._call(_File.read))

    async def apply(self, changes: Sequence[Change]) -> bool:
        refuse_unkeepable_changes(self.description, changes)
        if not changes:
            return True
        consent = _Consent()
        try:
            done = await self._call(lambda file: file.apply(changes, consent))
        except _Late as late:
            if consent.withdraw():
                raise StoreAway(str(late)) from None
            raise StoreUncertain(f"{late}; whether the change is kept is not known") from None
        if done:
            self._news.tell()
        return done

    async def changed(self, seconds: float) -> bool:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while True:
            # The file first: news of our own would otherwise hide, until later, that it cannot be asked.
            elsewhere = await self._call(_File.changed)
            here = await self._news.wait(0.0 if elsewhere else min(POLL_SECONDS, until - loop.time()))
            if elsewhere or here:
                return True
            if loop.time() >= until:
                return False

    async def report(self, key: str, value: str, *, keep_seconds: float, limit: int) -> bool:
        refuse_unkeepable(self.description, [(key, value)])
        return self._reports.keep(key, value, keep_seconds=keep_seconds, limit=limit)

    async def reports_mark(self) -> str:
        return str(self._reports.revision)

    async def reports(self) -> dict[str, str]:
        return self._reports.all()

    async def close(self) -> None:
        if not self._closed:
            with contextlib.suppress(StoreAway):
                await self._call(_File.close, seconds=CLOSE_SECONDS)
            self._closed = True
            self._pool.close()

    async def _call(self, call: Callable[[_File], T], *, seconds: float | None = None) -> T:
        """The result of `call(file)`, made in the store's thread.

        Raises:
            StoreAway: the file cannot be used. Its kind `_Late`: the thread is stuck, and the call may still be made.
        """
        file = self._file
        if file is None:
            raise StoreAway(
                "sqlite: there is no state folder, neither XDG_STATE_HOME nor HOME is an absolute path;"
                " name a file with --registry sqlite:/a/file"
            )
        if self._closed:
            raise StoreAway(f"{self.description}: this frontend has closed it")
        seconds = CALL_SECONDS if seconds is None else seconds
        try:
            return await self._pool.run(lambda: call(file), seconds=seconds, what=self.description)
        except Refusal as refusal:
            if refusal.status != 504:
                raise StoreAway(f"{self.description}: too many calls wait for the disk; try again later") from None
            raise _Late(f"{self.description}: the disk does not answer within {seconds:g} seconds") from None


class _Late(StoreAway):
    """No answer in time."""


class _Consent:
    """Either the caller gives up, or the thread commits: whoever is first. So no change is made that was refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False

    def withdraw(self) -> bool:
        return self._take()

    def use(self) -> bool:
        return self._take()

    def _take(self) -> bool:
        with self._lock:
            taken, self._taken = self._taken, True
        return not taken


class _File:
    """The file, for the one thread that uses it. Opened when it is needed, and anew after whatever went wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._told: int | None = None

    def read(self) -> tuple[list[tuple[object, object]], int]:
        """Keys and values as bytes, and how many were left out because of their size. Without a file there are none."""
        if self._is_missing():
            return [], 0
        with self._opened() as connection, _transaction(connection, "DEFERRED"):
            count, length, left_out = connection.execute(
                f"SELECT count(*), total(CASE WHEN {_SIZE} THEN length(CAST(value AS BLOB)) END),"  # noqa: S608 - ours
                f" total(NOT ({_SIZE})) FROM records",
                (MAX_KEY_BYTES, MAX_VALUE_BYTES) * 2,
            ).fetchone()
            if count > MAX_RECORDS or length > MAX_TOTAL_BYTES:
                raise StoreAway(
                    f"sqlite:{self._path}: holds {count} records of {length:.0f} bytes; at most {MAX_RECORDS} and"
                    f" {MAX_TOTAL_BYTES} are read; name another file"
                )
            found = connection.execute(
                f"SELECT key, value FROM records WHERE {_SIZE}",  # noqa: S608 - ours
                (MAX_KEY_BYTES, MAX_VALUE_BYTES),
            ).fetchall()
        return found, int(left_out)

    def apply(self, changes: Sequence[Change], consent: _Consent) -> bool:
        with self._opened() as connection, _transaction(connection, "IMMEDIATE"):
            for change in changes:
                row = connection.execute("SELECT value FROM records WHERE key = ?", (change.key,)).fetchone()
                if (None if row is None else row[0]) != (None if change.before is None else change.before.encode()):
                    return False
            if (more := growth(changes)) > 0:
                (count,) = connection.execute("SELECT count(*) FROM records").fetchone()
                if count + more > MAX_RECORDS:
                    raise too_many(f"sqlite:{self._path}")
            for change in changes:
                if change.after is None:
                    connection.execute("DELETE FROM records WHERE key = ?", (change.key,))
                else:
                    connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", (change.key, change.after))
            if not consent.use():
                raise StoreAway(f"sqlite:{self._path}: too late")  # nobody waits for this any more
            connection.execute("COMMIT")
        return True

    def changed(self) -> bool:
        """Whether another process has written since this was asked last, or the file is another."""
        version = NO_FILE
        if not self._is_missing():
            with self._opened() as connection:
                (version,) = connection.execute("PRAGMA data_version").fetchone()
        told, self._told = self._told, version
        return bool(version != told)

    def _is_missing(self) -> bool:
        """Whether there is no file; the first change makes one."""
        with self._explained():
            if _identity(self._path) is not None:
                return False
            if self._connection is not None:
                self._drop()
            return True

    def close(self) -> None:
        connection, self._connection, self._told = self._connection, None, None
        if connection is not None:
            connection.close()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The connection, to a file that is made when there is none."""
        with self._explained():
            yield self._current()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever SQLite or the system refuses becomes a `StoreAway`, and all but a lock closes the connection."""
        try:
            yield
        except sqlite3.Error as error:
            if "is locked" not in str(error):
                self._drop()
            raise StoreAway(f"sqlite:{self._path}: {_reason(error)}") from error
        except OSError as error:
            self._drop()
            raise StoreAway(
                f"sqlite:{self._path}: {error.strerror} ({error.filename or self._path});"
                " name a file in a folder that this user can write, with --registry sqlite:/a/file"
            ) from error

    def _drop(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self.close()

    def _current(self) -> sqlite3.Connection:
        """Opened anew when the path no longer leads to the file that is open: what is written there would be lost."""
        if self._connection is not None and self._identity == _identity(self._path):
            return self._connection
        self._drop()
        self._create()
        identity = _identity(self._path)
        connection = sqlite3.connect(
            f"file:{quote(str(self._path))}?mode=rw", uri=True, timeout=LOCK_SECONDS, isolation_level=None
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._identity = connection, identity
        return connection

    def _create(self) -> None:
        """The folder for this user alone, and the file.

        A file that is there is not opened here: closing it would take this process's locks on it away.
        """
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Settings, and the schema in a file that is new."""
        connection.text_factory = bytes  # others may have written what is no UTF-8
        connection.execute("PRAGMA synchronous = EXTRA")
        connection.execute("PRAGMA trusted_schema = OFF")
        if self._is_ready(connection):
            return
        with _transaction(connection, "IMMEDIATE"):
            if self._is_ready(connection):
                return  # another process was quicker
            connection.execute(_SCHEMA)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")

    def _is_ready(self, connection: sqlite3.Connection) -> bool:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not (application or version or tables):
            return False
        if application != APPLICATION_ID:
            raise StoreAway(f"sqlite:{self._path}: this database belongs to another program; name another file")
        if version > SCHEMA_VERSION:
            raise StoreAway(
                f"sqlite:{self._path}: a newer frontend has written it (version {version}, this one knows"
                f" {SCHEMA_VERSION}); upgrade this frontend, or name another file"
            )
        return True


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, kind: str) -> Iterator[None]:
    """A transaction that is rolled back unless the block commits it."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file the path leads to; `None`: none.

    Raises:
        OSError: it cannot be looked at, or is no file: a pipe would hold the thread up.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "not a regular file", str(path))
    return found.st_dev, found.st_ino


def _reason(error: sqlite3.Error) -> str:
    text = " ".join(str(error).split())[:200]
    for words, way_out in _WAYS_OUT:
        if words in text:
            return f"{way_out} ({text})"
    return text
