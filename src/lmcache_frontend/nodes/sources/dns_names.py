"""What the options `dns` and `dns_server` say, read without asking anybody."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_shared.address import TcpAddress, tcp_address
from lmcache_shared.errors import AddressError, ConfigError

MAX_NAMES = 16
DNS_PORT = 53
_EXPECTED = "expected NAME:PORT, or an SRV name such as _http._tcp.lmcache"
_SERVICE = re.compile(r"_[A-Za-z0-9-]{1,62}\._(tcp|udp)(\.[A-Za-z0-9_-]{1,63})+\.?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class DnsName:
    """A name whose addresses are proxies; without a port its SRV records say where each serves."""

    name: str
    port: int | None


def read_names(texts: Sequence[str] | None) -> list[DnsName]:
    """The names of the option `dns`, each once.

    Raises:
        ConfigError: one is none, or they are too many.
    """
    names = list(dict.fromkeys(_read(text) for text in texts or ()))
    if len(names) > MAX_NAMES:
        raise ConfigError(f"{len(names)} names, but at most {MAX_NAMES} are resolved; put more behind one")
    return names


def _read(text: str) -> DnsName:
    name, colon, port = text.rpartition(":")
    if not colon:
        if not _SERVICE.fullmatch(text) or len(text) > 253:
            raise ConfigError(f"{text[:300]}: {_EXPECTED}")
        return DnsName(text.lower(), None)
    try:
        where = tcp_address(name, port)
    except AddressError as error:
        raise ConfigError(f"{text[:300]}: {_EXPECTED} ({error})") from None
    if _is_number(where.host):
        raise ConfigError(f"{text[:300]}: is an address and no name; put it in --nodes")
    return DnsName(where.host.lower(), where.port)


def read_server(text: str | None) -> TcpAddress | None:
    """The server of the option `dns_server`: `host`, `host:port`, `::1` or `[::1]:port`.

    Raises:
        ConfigError: it is none.
    """
    if text is None:
        return None
    host, _, port = text.rpartition(":")
    try:
        if _is_number(text) or text.endswith("]") or not host:
            return tcp_address(text, DNS_PORT)
        return tcp_address(host, port)
    except AddressError as error:
        raise ConfigError(f"{text[:300]}: expected the host or host:port of a DNS server ({error})") from None


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
