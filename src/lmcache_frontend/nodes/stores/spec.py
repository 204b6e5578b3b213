"""What the option `registry` says, read without opening anything: which store, and where."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from lmcache_shared.errors import ConfigError

EXPECTED = "expected memory, sqlite, sqlite:/a/file, redis://host:port/0 (rediss:// for TLS) or unix:///path/redis.sock"

DEFAULT_REDIS_PORT = 6379

_DATABASE = re.compile(r"[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True)
class MemoryPlace:
    """Nowhere: what is kept ends with the frontend."""


@dataclass(frozen=True)
class FilePlace:
    """A SQLite file; without a path, the frontend's own in the user's state folder."""

    path: Path | None = None

    def file(self, port: int) -> Path | None:
        """The file; `None` when it lies in the state folder and this user has none."""
        if self.path is not None:
            return self.path
        folder = state_folder()
        return None if folder is None else folder / "lmcache-ops" / f"frontend-{port}.db"


@dataclass(frozen=True)
class RedisPlace:
    """A Redis; either `host` and `port`, or `socket`."""

    host: str = ""
    port: int = DEFAULT_REDIS_PORT
    socket: str | None = None
    database: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_file: str | None = None

    @property
    def description(self) -> str:
        if self.socket is not None:
            return f"unix://{self.socket}" + (f"?db={self.database}" if self.database else "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' if self.tls else ''}://{host}:{self.port}/{self.database}"


Place = MemoryPlace | FilePlace | RedisPlace


def check_spec(spec: str) -> None:
    """Whether the option names a store.

    Raises:
        ConfigError: it does not. The text does not repeat a URL, which may hold a password.
    """
    read_spec(spec)


def read_spec(spec: str) -> Place:
    """Which store is meant, and where it is.

    Raises:
        ConfigError: none.
    """
    kind, _, rest = spec.partition(":")
    if spec == "memory":
        return MemoryPlace()
    if kind == "sqlite":
        return _file_place(spec, rest)
    if kind in ("redis", "rediss", "unix"):
        try:
            return _redis_place(urlsplit(spec))
        except ConfigError:
            raise
        except ValueError:  # its text may hold the password
            raise ConfigError(f"this is no {kind}:// URL; write special characters of a password as %XX") from None
    shown = "" if "@" in spec or "//" in spec else f"{spec}: "
    raise ConfigError(shown + EXPECTED)


def _file_place(spec: str, path: str) -> FilePlace:
    if spec == "sqlite":
        return FilePlace()
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ConfigError(f"{spec}: expected sqlite, or sqlite: and the absolute path of a file")
    return FilePlace(Path(path))


def _redis_place(url: SplitResult) -> RedisPlace:
    if url.fragment:
        raise ConfigError(f"expected no # in a {url.scheme}:// URL; in a password it is %23")
    options = dict(parse_qsl(url.query, keep_blank_values=True, strict_parsing=True)) if url.query else {}
    user = unquote(url.username) if url.username else None
    password = unquote(url.password) if url.password else None
    if user is not None and password is None:
        raise ConfigError(f"the {url.scheme}:// URL has a user and no password; with a password alone write :password@")
    if url.scheme == "unix":
        if url.hostname or not url.path.startswith("/") or len(url.path) < 2:
            raise ConfigError("expected unix:///path/redis.sock, with three slashes")
        database = options.pop("db", "0")
    else:
        if not url.hostname:
            raise ConfigError(f"the {url.scheme}:// URL has no host; expected {url.scheme}://host:port/0")
        database = url.path.strip("/") or "0"
    ca_file = options.pop("ssl_ca_certs", None) if url.scheme == "rediss" else None
    if options:
        raise ConfigError(f"the {url.scheme}:// URL has parameters that are not known: {', '.join(sorted(options))}")
    if not _DATABASE.fullmatch(database):
        raise ConfigError(f"the {url.scheme}:// URL ends with the number of a database, such as /0")
    if url.scheme == "unix":
        return RedisPlace(socket=unquote(url.path), database=int(database), user=user, password=password)
    return RedisPlace(
        host=url.hostname or "",
        port=url.port if url.port is not None else DEFAULT_REDIS_PORT,
        database=int(database),
        user=user,
        password=password,
        tls=url.scheme == "rediss",
        ca_file=ca_file,
    )


def state_folder() -> Path | None:
    """`$XDG_STATE_HOME`, or `~/.local/state`; relative paths do not count, as that specification says."""
    for variable, below in (("XDG_STATE_HOME", ""), ("HOME", ".local/state")):
        folder = os.environ.get(variable, "")
        if folder.startswith("/"):
            return Path(folder, below)
    return None
