"""How often an address may be wrong about a token."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict

MAX_FAILURES = 10
WINDOW_SECONDS = 60.0
MAX_ADDRESSES = 4096
"""Addresses that are remembered; the one that was heard of first goes first."""

IPV6_NETWORK_BITS = 64
"""Whoever has one IPv6 address has as many as fit into its network."""


class Attempts:
    """Counts failures by address, within a window that begins with the first."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def wait_seconds(self, address: str) -> int:
        """How long the address has to wait before it may try again; 0 when it may."""
        begun, count = self._failures.get(_network(address), (0.0, 0))
        left = begun + WINDOW_SECONDS - time.monotonic()
        return max(1, int(left)) if count >= MAX_FAILURES and left > 0 else 0

    def failed(self, address: str) -> None:
        key, now = _network(address), time.monotonic()
        begun, count = self._failures.pop(key, (now, 0))
        if now - begun > WINDOW_SECONDS:
            begun, count = now, 0
        self._failures[key] = (begun, count + 1)
        while len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)


def _network(address: str) -> str:
    try:
        number = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(number, ipaddress.IPv6Address) and number.ipv4_mapped is None:
        return str(ipaddress.ip_network((number, IPV6_NETWORK_BITS), strict=False))
    return str(number)
