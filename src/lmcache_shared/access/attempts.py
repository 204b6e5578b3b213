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
    nothing, and must not keep others of its address out. Nor must who guesses: a token that was right from an address
    need not wait there.
    """

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[float, set[int]]] = OrderedDict()
        self._right: OrderedDict[tuple[str, int], None] = OrderedDict()

    def wait_seconds(self, address: str, token: str) -> int:
        """How long the address has to wait before it may try this token; 0 when it may."""
        if not self._failures:
            return 0
        key = network_of(address)
        begun, wrong = self._failures.get(key, (0.0, set()))
        left = begun + WINDOW_SECONDS - time.monotonic()
        if len(wrong) < MAX_FAILURES or left <= 0 or (key, hash(token)) in self._right:
            return 0
        return max(1, int(left))

    def was_right(self, address: str, token: str) -> None:
        """Remember it, until `MAX_ADDRESSES` others were right later."""
        key = (network_of(address), hash(token))
        self._right[key] = None
        self._right.move_to_end(key)
        while len(self._right) > MAX_ADDRESSES:
            self._right.popitem(last=False)

    def failed(self, address: str, token: str) -> bool:
        """Count a wrong token; whether it is another one than those before."""
        key, now = network_of(address), time.monotonic()
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


def network_of(address: str) -> str:
    """An address as one caller's; of an IPv6 one its network."""
    try:
        number = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(number, ipaddress.IPv6Address) and number.ipv4_mapped is None:
        return str(ipaddress.ip_network((number, IPV6_NETWORK_BITS), strict=False))
    return str(number)
