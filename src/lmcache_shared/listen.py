"""Binding an address: the site a server listens on, taken over safely and left without a trace.

A Unix socket has three states when a server wants it. Nobody there: bind. A file that nobody answers on (its
server was killed): remove it and bind. A live server: leave it alone and say who it is. LMCache's own server, and
`asyncio` by itself, delete the file in every case and so cut a living server off.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.http_exceptions import HttpProcessingError

from lmcache_shared import secrets
from lmcache_shared.address import Address, TcpAddress, UnixAddress
from lmcache_shared.errors import AddressError, AddressInUse

DEFAULT_SOCKET_MODE = 0o660
"""Owner and group may connect; connecting needs write permission (unix(7))."""

BACKLOG = 128
"""Connections that wait to be accepted; more are refused by the kernel."""

KEEPALIVE_SECONDS = 75.0
"""How long an idle connection is kept."""

MIN_SHUTDOWN_SECONDS = 0.05

MAX_LOGGED_QUERY = 2000
"""Characters; a longer query is not looked through, and not told."""

_http_logger = logging.getLogger("lmcache_shared.http")


def _bad_request_in_one_line(record: logging.LogRecord) -> bool:
    """aiohttp logs what is no HTTP as an error with a traceback; it is the caller's mistake, and told if asked for."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg = f"{record.getMessage()}: {' '.join(error.message.split())[:200]!r}"
        record.args = record.exc_info = None
        return _http_logger.isEnabledFor(logging.INFO)
    return True


_http_logger.addFilter(_bad_request_in_one_line)

_FOLDER_LOCK_SECONDS = 5.0
_PROBE_SECONDS = 1.0
_MAX_COMMAND_LENGTH = 200


def make_runner(
    app: web.Application,
    *,
    drain_seconds: float,
    access_log: logging.Logger | None,
    kind: type[web.AppRunner] = web.AppRunner,
) -> web.AppRunner:
    """The runner of one server: its end gives requests `drain_seconds`; a caller that leaves ends its request."""
    return kind(
        app,
        auto_decompress=False,  # a proxied body goes on as it came, and nobody sends a small one that grows here
        keepalive_timeout=KEEPALIVE_SECONDS,
        access_log=access_log,
        access_log_class=AccessLogger,
        # aiohttp (3.14) waits this long twice, for handlers and for connections, and without an end when it is 0
        shutdown_timeout=max(drain_seconds / 2, MIN_SHUTDOWN_SECONDS),
        handler_cancellation=True,
        logger=_http_logger,
    )


class AccessLogger(AbstractAccessLogger):
    """One line for a request: from where, what, how it ended, bytes, seconds. What looks secret in a query is `***`."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        self.logger.info(
            '%s "%s %s HTTP/%s.%s" %s %s bytes %.6f s',
            request.remote or "-",
            request.method,
            without_secrets(request.path_qs),
            *request.version,
            response.status,
            response.body_length,
            time,
        )

    @property
    def enabled(self) -> bool:
        return self.logger.isEnabledFor(logging.INFO)


def without_secrets(target: str) -> str:
    """A path and query for the log, such as `/sign-in?token=***`."""
    path, question, query = target.partition("?")
    if not question:
        return path
    if len(query) > MAX_LOGGED_QUERY:
        return f"{path}?..."
    pairs = [(pair, *pair.partition("=")) for pair in query.split("&")]
    shown = [
        f"{name}={secrets.MASK}" if is_set and secrets.is_secret(unquote(name), unquote(value)) else pair
        for pair, name, is_set, value in pairs
    ]
    return f"{path}?{'&'.join(shown)}"


def make_site(runner: web.BaseRunner, address: Address, *, socket_mode: int = DEFAULT_SOCKET_MODE) -> web.BaseSite:
    """The site that listens on `address`; a Unix socket is created with `socket_mode`."""
    if isinstance(address, UnixAddress):
        return UnixSocketSite(runner, address, socket_mode)
    return TcpPortSite(runner, address)


class TcpPortSite(web.TCPSite):
    """A `TCPSite` that says in one line why it cannot listen."""

    __slots__ = ("_address",)

    def __init__(self, runner: web.BaseRunner, address: TcpAddress) -> None:
        super().__init__(runner, address.host, address.port, backlog=BACKLOG)
        self._address = address

    async def start(self) -> None:
        """Listen.

        Raises:
            AddressInUse: the port is taken.
            AddressError: the host is not one of this machine, or the port needs more rights.
        """
        try:
            await super().start()
        except UnicodeError as error:
            raise AddressError(f"{self._address}: no host name: {error}") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(
                    f"{self._address}: the port is in use; stop what listens there or choose another port"
                ) from None
            # A failed bind of several addresses loses its errno inside asyncio; its text still says why.
            raise AddressError(f"{self._address}: cannot listen there: {error.strerror or error}") from None

    @property
    def listening(self) -> Sequence[socket.socket]:
        """The sockets, one for each address of the host; nobody but the site closes them."""
        found: Sequence[socket.socket] = getattr(self._server, "sockets", ())
        return found


class UnixSocketSite(web.UnixSite):
    """A `UnixSite` that replaces a stale socket, refuses a live one, and removes only its own file."""

    __slots__ = ("_address", "_identity", "_mode")

    def __init__(self, runner: web.BaseRunner, address: UnixAddress, mode: int) -> None:
        super().__init__(runner, address.path, backlog=BACKLOG)
        self._address = address
        self._mode = mode
        self._identity: tuple[int, int] | None = None

    async def start(self) -> None:
        """Listen; the folder is made when it is missing.

        Raises:
            AddressInUse: somebody answers on the socket.
            AddressError: the path is no socket, or the folder cannot be made or written.
        """
        loop = asyncio.get_running_loop()
        sock = await loop.run_in_executor(None, bind_unix_socket, self._address, self._mode)
        info = os.stat(self._address.path)
        self._identity = (info.st_dev, info.st_ino)
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None, "a site is made from a runner that is set up"
        self._server = await loop.create_unix_server(server, sock=sock, backlog=BACKLOG)

    async def stop(self) -> None:
        """Stop listening and remove the socket, unless another server has taken the path since."""
        if self._identity is not None:
            with contextlib.suppress(OSError):
                info = os.stat(self._address.path)
                if (info.st_dev, info.st_ino) == self._identity:
                    os.unlink(self._address.path)
            self._identity = None
        await super().stop()


def bind_unix_socket(address: UnixAddress, mode: int) -> socket.socket:
    """A socket that is bound to `address` with exactly `mode`, and listens.

    The folder is locked meanwhile, so that of two servers that start together one wins and the other sees it alive.
    Between `bind` and `chmod` nobody can connect: the socket does not listen yet.

    Raises:
        AddressInUse: somebody answers on the socket.
        AddressError: the path is no socket, or the folder cannot be made or written.
    """
    path = address.path
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise AddressError(f"{path}: cannot make its folder {folder}: {error.strerror}") from None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked_folder(folder, path):
            _clear_stale_socket(address)
            sock.bind(path)
            os.chmod(path, mode)
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise AddressError(f"{path}: cannot create the socket: {error.strerror}") from None
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def check_address_free(address: Address) -> None:
    """See, without changing anything, whether a server could listen on `address` now.

    Raises:
        AddressInUse: somebody answers there.
        AddressError: it cannot be listened on.
    """
    if isinstance(address, UnixAddress):
        _probe_unix_socket(address)
        _check_folder(address)
        return
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, where in found:
            with socket.socket(family, kind, protocol) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(where)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"{address}: the port is in use; stop what listens there or choose another port"
            ) from None
        raise AddressError(f"{address}: cannot listen there: {error.strerror}") from None


def _check_folder(address: UnixAddress) -> None:
    """The nearest folder that exists must be one in which this user can make files."""
    folder = Path(address.path).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise AddressError(f"{address}: cannot make its folder: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise AddressError(f"{address}: cannot create the socket: {folder} is not writable")


@contextlib.contextmanager
def _locked_folder(folder: str, path: str) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _FOLDER_LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise AddressError(
                        f"{path}: cannot create the socket: another process has kept {folder} locked"
                        f" for {_FOLDER_LOCK_SECONDS:g} seconds"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def _clear_stale_socket(address: UnixAddress) -> None:
    if _probe_unix_socket(address):
        os.unlink(address.path)


def _probe_unix_socket(address: UnixAddress) -> bool:
    """Whether a stale socket lies at the path; a live one and a path that is no socket are refused."""
    path = address.path
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise AddressError(f"{path}: cannot look at the socket: {error.strerror}") from None
    if not stat.S_ISSOCK(info.st_mode):
        raise AddressError(f"{path}: exists and is no socket; remove it or choose another socket prefix")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return False
        except ConnectionRefusedError:
            return True
        except (BlockingIOError, TimeoutError):  # its queue of waiting connections is full: it lives
            raise AddressInUse(f"{path}: a server that is too busy to answer listens on this socket") from None
        except OSError as error:
            raise AddressError(f"{path}: cannot see who listens there: {error.strerror}") from None
        raise AddressInUse(f"{path}: {_peer(probe)} listens on this socket; stop it or choose another socket prefix")


def _peer(sock: socket.socket) -> str:
    """Who listens at the other end (SO_PEERCRED, unix(7)), for people."""
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if pid <= 0:
        return "a process of another container"
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        command = ""
    return f"process {pid} ({command[:_MAX_COMMAND_LENGTH]})" if command else f"process {pid}"
