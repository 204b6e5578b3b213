"""Where a server listens: a TCP host and port, or a Unix socket.

The one place that reads, prints and quotes addresses. A node of the frontend has a `host` and a `port`
whose value is a number, a number in a string, or a socket's path; `from_node` reads exactly that.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

import aiohttp

from lmcache_shared.errors import AddressError

MAX_SOCKET_PATH_BYTES = 107
"""Linux keeps a socket's path in 108 bytes with a closing NUL (`sun_path`, unix(7))."""

MAX_HOST_LENGTH = 253
"""Longest host name (RFC 1035, section 2.3.4)."""

_HOST_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?", re.ASCII)
_SCOPE = re.compile(r"[A-Za-z0-9_.-]{1,63}", re.ASCII)
"""An IPv6 scope such as `eth0`; without this check it could hold a second host (RFC 6874)."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
"""The kernel takes all but NUL; in a log they would be lines and colours of somebody else's choice."""

_DIGITS = re.compile(r"[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True)
class TcpAddress:
    """A host (a name, an IPv4 or an IPv6 address without brackets) and a port from 1 to 65535."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.url_host}:{self.port}"

    @property
    def url_host(self) -> str:
        """The host as it stands in a URL: an IPv6 address in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine by name or number; no name is resolved for it."""
        return is_loopback_host(self.host)

    def proxy_path(self) -> str:
        """The first segments of a proxied path: `/proxy/<host>/<port>`."""
        return f"/proxy/{quote(self.url_host, safe='[]:')}/{self.port}"

    def curl(self, path: str) -> str:
        """A curl line that reaches `path` here."""
        return f"curl http://{self}{path}"

    def connector(self, *, limit: int, keepalive_timeout: float) -> aiohttp.BaseConnector:
        """A client's pool of at most `limit` connections; an idle one is closed after the seconds given."""
        return aiohttp.TCPConnector(limit=limit, limit_per_host=limit, keepalive_timeout=keepalive_timeout)


@dataclass(frozen=True)
class UnixAddress:
    """The absolute path of a Unix socket, at most 107 bytes long."""

    path: str

    def __str__(self) -> str:
        return self.path

    def proxy_path(self) -> str:
        """`/proxy/localhost/<path>`, quoted twice: what survives servers that decode a path once."""
        return f"/proxy/localhost/{quote_socket(self.path, times=2)}"

    def curl(self, path: str) -> str:
        """A curl line that reaches `path` here."""
        return f"curl --unix-socket {self.path} http://localhost{path}"

    def connector(self, *, limit: int, keepalive_timeout: float) -> aiohttp.BaseConnector:
        """A client's pool of at most `limit` connections; an idle one is closed after the seconds given."""
        return aiohttp.UnixConnector(self.path, limit=limit, limit_per_host=limit, keepalive_timeout=keepalive_timeout)


Address = TcpAddress | UnixAddress


def parse(text: str) -> Address:
    """Read `host:port`, `[::1]:port`, `http://host:port`, `unix:/path` or `/path`.

    Raises:
        AddressError: `text` is none of these, the port is out of range, or the path is too long.
    """
    if text.startswith("unix:"):
        return unix_address(text.removeprefix("unix:").removeprefix("//"))
    if text.startswith("/"):
        return unix_address(text)
    host, colon, port = text.removeprefix("http://").rstrip("/").rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        raise AddressError(f"{text!r}: expected host:port, [ipv6]:port or the path of a Unix socket")
    return tcp_address(host, port)


def from_node(host: str, port: int | str) -> Address:
    """The address of a node: `port` is a number, a number in a string, or a Unix socket's path.

    For a socket `host` does not count: the frontend connects on its own machine.

    Raises:
        AddressError: as `parse`.
    """
    if isinstance(port, str) and "/" in port:
        return unix_address(port)
    return _tcp_address(host, port, "a port from 1 to 65535, or the absolute path of a Unix socket")


def from_proxy_segments(host: str, target: str) -> Address:
    """The two raw path segments behind `/proxy/`; a socket's path may be URL-encoded once or twice.

    Raises:
        AddressError: as `parse`.
    """
    decoded = unquote(target, errors="surrogateescape")
    if "/" not in decoded:
        decoded = unquote(decoded, errors="surrogateescape")
    return from_node(unquote(host), decoded)


def tcp_address(host: str, port: int | str) -> TcpAddress:
    """A checked TCP address.

    Raises:
        AddressError: the host is no host name or IP address, or the port is no number from 1 to 65535.
    """
    return _tcp_address(host, port, "a port from 1 to 65535")


def _tcp_address(host: str, port: int | str, expected: str) -> TcpAddress:
    bare = without_brackets(host)
    if not _is_host(bare):
        raise AddressError(f"{host[:300]!r}: expected a host name or an IP address")
    text = str(port)
    number = int(text) if _DIGITS.fullmatch(text) else 0
    if not 1 <= number <= 65535:
        raise AddressError(f"{text[:300]!r}: expected {expected}")
    return TcpAddress(bare, number)


def unix_address(path: str) -> UnixAddress:
    """A checked socket path.

    Raises:
        AddressError: not absolute, a control character in it, or longer than the kernel takes.
    """
    if not path.startswith("/"):
        raise AddressError(f"{path[:300]!r}: the path of a Unix socket starts with /")
    if _CONTROL.search(path):
        raise AddressError(f"{path[:300]!r}: the path of a Unix socket has no control characters")
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise AddressError(f"{path[:300]!r}: half a character is in no path") from None
    if size > MAX_SOCKET_PATH_BYTES:
        raise AddressError(
            f"{path[:300]!r}: {size} bytes, but the path of a Unix socket has at most {MAX_SOCKET_PATH_BYTES};"
            " choose a shorter folder"
        )
    return UnixAddress(path)


def quote_socket(path: str, *, times: int) -> str:
    """A socket's path as one URL segment, encoded once (`%2F`) or twice (`%252F`)."""
    for _ in range(times):
        path = quote(path, safe="", errors="surrogateescape")
    return path


@functools.lru_cache(maxsize=1024)  # asked for each request, and to read a number takes longer than to parse one
def is_loopback_host(host: str) -> bool:
    """Whether `host` is `localhost` or an address of the loopback network, an IPv4 one inside IPv6 included.

    In each of its spellings: `localhost.` ends at the root of all names, `[::1]` stands in a URL, `::1%lo` has a scope.
    """
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        number = ipaddress.ip_address(without_brackets(host).partition("%")[0])
    except ValueError:
        return False
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return (mapped or number).is_loopback


def without_brackets(host: str) -> str:
    """An IPv6 address as it stands outside a URL; any other host as it is."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _is_host(text: str) -> bool:
    if len(text) > MAX_HOST_LENGTH:
        return False
    if ":" in text:
        number, percent, scope = text.partition("%")
        try:
            ipaddress.IPv6Address(number)
        except ValueError:
            return False
        return not percent or _SCOPE.fullmatch(scope) is not None
    return _HOST_NAME.fullmatch(text) is not None
