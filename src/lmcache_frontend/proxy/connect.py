"""One new connection to a target, within a time; never one that is made and forgotten, and to no unchecked address."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import aiohappyeyeballs
from aiohappyeyeballs import AddrInfoType as AddressInfo

from lmcache_frontend.proxy.rules import GuardedName, GuardedSocket
from lmcache_shared.address import Address, UnixAddress

P = TypeVar("P", bound=asyncio.Protocol)

SECOND_ADDRESS_SECONDS = 0.25
"""After these the next address of a name is tried beside the first (RFC 8305)."""


async def connect(address: Address, make: Callable[[], P], seconds: float) -> P:
    """The protocol of a new connection.

    Not `wait_for`, which up to Python 3.11 can forget that its caller was cancelled.

    A name is looked up once, and what was looked up is connected to; of a guarded target, what was checked.

    Raises:
        OSError: there is none to be had.
        asyncio.TimeoutError: not within `seconds`.
        Refusal: 403; a guarded target leads to where it is not allowed.
    """
    connecting = asyncio.ensure_future(_connected(address, make))
    try:
        await asyncio.wait({connecting}, timeout=seconds)
        if not connecting.done():
            raise asyncio.TimeoutError
        return connecting.result()[1]
    except BaseException:
        connecting.cancel()
        connecting.add_done_callback(_drop)
        raise


def _drop(connecting: asyncio.Future[tuple[asyncio.BaseTransport, P]]) -> None:
    """A connection that nobody waits for any more."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result()[0].close()


async def _connected(address: Address, make: Callable[[], P]) -> tuple[asyncio.BaseTransport, P]:
    loop = asyncio.get_running_loop()
    if isinstance(address, GuardedSocket):
        with address.opened() as path:
            return await loop.create_unix_connection(make, path)
    if isinstance(address, UnixAddress):
        return await loop.create_unix_connection(make, address.path)
    if _is_number(address.host):
        return await loop.create_connection(make, address.host, address.port)
    found = await look_up(address.host, address.port)
    if isinstance(address, GuardedName):
        found = [info for info in found if address.check(str(info[4][0]))]
        if not found:
            raise address.refusal()
    sock = await aiohappyeyeballs.start_connection(found, happy_eyeballs_delay=SECOND_ADDRESS_SECONDS, interleave=1)
    return await loop.create_connection(make, sock=sock)


async def look_up(host: str, port: int) -> Sequence[AddressInfo]:
    """What a name resolves to, as `getaddrinfo` gives it."""
    return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
