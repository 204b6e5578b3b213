"""Proxies that are found by their address alone: by a heartbeat, a discovery service, the DNS.

Such an address may be a frontend with nodes behind it, or one component's own server; that shows when it is asked.
"""

from __future__ import annotations

import ipaddress

from lmcache_frontend.nodes.node import Proxy
from lmcache_shared.address import MAX_HOST_LENGTH, TcpAddress, tcp_address
from lmcache_shared.errors import AddressError

MAX_FOUND = 1000
"""Most addresses of one source: each is asked for its nodes, and as many stand in a Kubernetes Endpoints object."""

SCHEME = "http://"
_MAX_LENGTH = len(SCHEME) + MAX_HOST_LENGTH + 10


def found_proxy(where: TcpAddress) -> Proxy:
    """The proxy at an address, under the name that LMCache's frontend gives it.

    Its port is a text, as there: that frontend's code takes this for granted of what ours tells it. An IPv6 address
    keeps its brackets (`proxy_[__1]_8000`): without them it could be another host's name.
    """
    return Proxy(f"proxy_{where}".replace(":", "_"), where.host, str(where.port), where, found=True)


def read_api_address(text: str) -> TcpAddress:
    """Read `http://host:port`, or `host:port` alone.

    Raises:
        AddressError: it is neither, or nobody can be reached there. A password in it is not repeated.
    """
    host, _, port = text.removeprefix(SCHEME).removesuffix("/").rpartition(":")
    if "@" in text:
        raise AddressError("an address with @ is not taken; expected http://host:port")
    if len(text) > _MAX_LENGTH or not host or (":" in host and not host.startswith("[")):
        raise AddressError(f"{text[:_MAX_LENGTH]!r}: expected http://host:port")
    return reachable(tcp_address(host, port))


def reachable(where: TcpAddress) -> TcpAddress:
    """The address, an IP address in its one spelling: no two proxies are the same one.

    Raises:
        AddressError: it means every machine, or none.
    """
    try:
        number = ipaddress.ip_address(where.host)
    except ValueError:
        return TcpAddress(where.host.lower(), where.port)
    if number.is_unspecified or number.is_multicast:
        raise AddressError(f"{where}: is no address of one machine; a frontend reports another with --report-host")
    return TcpAddress(str(number), where.port)
