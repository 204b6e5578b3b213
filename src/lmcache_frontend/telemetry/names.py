"""Host names to addresses, off the event loop, a few at a time, each kept for a while."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections import OrderedDict
from dataclasses import dataclass

from lmcache_shared.address import TcpAddress

LOOKUP_SECONDS = 2.0
"""How long one check waits for a name; the lookup goes on, and the next check finds what it found."""

LOOKUPS_AT_ONCE = 16
"""The loop has 64 threads for them, and what is proxied needs some too."""

KEPT_SECONDS = 30.0
MAX_NAMES = 10_000
MAX_ADDRESSES = 8
"""Of one name."""

AddressInfo = tuple[int, int, int, str, "tuple[str, int] | tuple[str, int, int, int]"]
"""As `getaddrinfo` gives it."""


class NotAsked(Exception):
    """A node could not be asked, for a reason that lies on this side; the text says which."""


@dataclass
class _Name:
    lookup: asyncio.Task[list[AddressInfo]]
    until: float = float("inf")
    """When it is looked up anew; a lookup that goes on is waited for by everybody."""


class Names:
    """What names resolve to; used in one event loop."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, _Name] = OrderedDict()
        self._gate = asyncio.Semaphore(LOOKUPS_AT_ONCE)

    async def addresses(self, address: TcpAddress) -> list[AddressInfo]:
        """Where to connect for a name; nothing when the host is a number already.

        Raises:
            OSError: there is no such name.
            NotAsked: the answer takes too long.
        """
        if _is_number(address.host):
            return []
        name = self._names.get(address.host)
        if name is None or time.monotonic() > name.until:
            name = self._look_up(address.host)
        await asyncio.wait({name.lookup}, timeout=LOOKUP_SECONDS)
        if not name.lookup.done():
            raise NotAsked(f"could not be asked: its name was not resolved within {LOOKUP_SECONDS:g} seconds")
        if name.lookup.cancelled():
            raise NotAsked("could not be asked: too many names are looked up")
        return [
            (family, kind, protocol, canonical, (where[0], address.port, *where[2:]))
            for family, kind, protocol, canonical, where in name.lookup.result()
        ]

    def forget(self, host: str) -> None:
        """Look this name up anew next time: nobody was found where it points to."""
        name = self._names.get(host)
        if name is not None and name.lookup.done():
            del self._names[host]

    async def close(self) -> None:
        tasks = [name.lookup for name in self._names.values()]
        self._names.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _look_up(self, host: str) -> _Name:
        name = self._names[host] = _Name(asyncio.create_task(self._resolve(host), name="look up a name"))
        self._names.move_to_end(host)
        name.lookup.add_done_callback(lambda task: _keep(name, task))
        while len(self._names) > MAX_NAMES:
            self._names.popitem(last=False)[1].lookup.cancel()
        return name

    async def _resolve(self, host: str) -> list[AddressInfo]:
        async with self._gate:
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        usable = [info for info in found if info[0] in (socket.AF_INET, socket.AF_INET6)]
        if not usable:
            raise OSError("its name has no address")
        return usable[:MAX_ADDRESSES]  # type: ignore[return-value]


def _keep(name: _Name, task: asyncio.Task[list[AddressInfo]]) -> None:
    # a name that does not exist may do so at the next check
    failed = task.cancelled() or task.exception() is not None
    name.until = 0.0 if failed else time.monotonic() + KEPT_SECONDS


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
