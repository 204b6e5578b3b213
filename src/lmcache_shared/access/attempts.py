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
    """Counts different wrong tokens by address, within a window that begins with the first.

    One that is shown again and again, by a browser or a scraper whose token was taken back, counts once: it guesses
    nothing, and must not keep others of its address out.
    """

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[float, set[int]]] = OrderedDict()

    def wait_seconds(self, address: str) -> int:
        """How long the address has to wait before it may try again; 0 when it may."""
        begun, wrong = self._failures.get(_network(address), (0.0, set()))
        left = begun + WINDOW_SECONDS - time.monotonic()
        return max(1, int(left)) if len(wrong) >= MAX_FAILURES and left > 0 else 0

    def failed(self, address: str, token: str) -> bool:
        """Count a wrong token; whether it is another one than those before."""
        key, now = _network(address), time.monotonic()
        begun, wrong = self._failures.pop(key, (now, set()))
        if now - begun > WINDOW_SECONDS:
            begun, wrong = now, set()
        is_new = hash(token) not in wrong
        if len(wrong) < MAX_FAILURES:
            wrong.add(hash(token))
        self._failures[key] = (begun, wrong)
        while len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)
        return is_new


def _network(address: str) -> str:
    try:
        number = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(number, ipaddress.IPv6Address) and number.ipv4_mapped is None:
        return str(ipaddress.ip_network((number, IPV6_NETWORK_BITS), strict=False))
    return str(number)
