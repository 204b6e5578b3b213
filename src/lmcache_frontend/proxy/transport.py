"""How a request gets to its target and the answer back: streamed both ways, through one transport per target."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import cast

from aiohttp import web

from lmcache_frontend.proxy import limits
from lmcache_frontend.proxy.answering import Known, Traffic, Written, opening_of, send_back
from lmcache_frontend.proxy.exchange import Outgoing, Proxying, Transport
from lmcache_frontend.proxy.headers import Introduction, answer_fields, request_fields
from lmcache_frontend.proxy.native import NativeTransport, Room
from lmcache_frontend.proxy.target import ProxiedPath
from lmcache_frontend.proxy.tunnel import FIELDS, asks_for_upgrade, pass_on
from lmcache_shared.address import Address
from lmcache_shared.errors import Refusal

logger = logging.getLogger(__name__)

MAX_UNREGISTERED_TARGETS = 64
"""Transports kept for targets that are no registered nodes; the one unused for longest goes first."""


class Targets:
    """The transports of all targets. A registered node's lives as long as it is registered.

    Args:
        is_registered: whether a node is registered at an address.
        make: makes the transport to an address, in place of the native one.
    """

    def __init__(
        self, is_registered: Callable[[Address], bool], make: Callable[[Address], Transport] | None = None
    ) -> None:
        room = Room()
        self._is_registered = is_registered
        self._make: Callable[[Address], Transport] = make or (lambda address: NativeTransport(address, room))
        self._targets: OrderedDict[Address, Transport] = OrderedDict()

    async def get(self, address: Address) -> Transport:
        """The transport to `address`, made at its first use."""
        target = self._targets.get(address)
        if target is not None:
            self._targets.move_to_end(address)
            return target
        target = self._targets[address] = self._make(address)
        for unused in self._take_unused(address):
            await unused.close()
        return target

    def _take_unused(self, new: Address) -> list[Transport]:
        """The targets to give up, taken out at once: while they are closed, others may come and go."""
        others = [address for address in self._targets if not self._is_registered(address)]
        surplus = others[: max(0, len(others) - MAX_UNREGISTERED_TARGETS)]
        return [
            self._targets.pop(address) for address in surplus if address != new and not self._targets[address].in_use
        ]

    async def close(self) -> None:
        while self._targets:
            _, target = self._targets.popitem()
            await target.close()


def as_outgoing(request: Proxying, wanted: ProxiedPath, caller: Introduction, traffic: Traffic) -> Outgoing:
    """The request as the target that is `wanted` is to get it; `caller` is how that is told who asks."""
    body = CallersBody(cast(web.Request, request), traffic) if request.body_exists else None
    outgoing = Outgoing(request.method, wanted.path, request_fields(request, wanted.prefix, caller), body)
    if "Upgrade" in request.headers and asks_for_upgrade(cast(web.Request, request)):
        outgoing.upgrade = True
        outgoing.fields.extend(FIELDS)
    return outgoing


async def forward(
    request: Proxying,
    target: Transport,
    wanted: ProxiedPath,
    outgoing: Outgoing,
    traffic: Traffic,
    known: Known,
) -> web.StreamResponse:
    """Send the request on to `target` as `outgoing`, and its answer back; `traffic` is counted.

    What is `known` of the answers to its path is used and renewed.

    No body is held whole. An answer that breaks off breaks the caller's connection off too, so that half an answer
    never looks whole.

    Raises:
        Refusal: 502 when the target cannot be reached or speaks no HTTP, 503 when too many ask, 504 when it is too
            slow.
    """
    answer = await target.request(outgoing)
    try:
        opening = known.opening(request, answer)
        if opening is None:
            fields = answer_fields(answer.fields, wanted)
            if answer.status == 101:
                return await pass_on(cast(web.Request, request), answer, fields, traffic)
            opening = opening_of(request, answer, fields)
            known.remember(request, answer, opening)
        return await send_back(request, answer, opening, traffic)
    except (ConnectionError, Refusal) as error:  # also of the request's body: the answer has begun
        traffic.broke_off = True
        logger.info("%s %s broke off: %s", request.method, request.path, error or type(error).__name__)
        if request.transport is not None:
            request.transport.abort()
        return Written(answer.status, keep_alive=False, length=traffic.received)
    finally:
        answer.release()


class CallersBody:
    """A request's body as it comes; a caller that stops sending does not hold a connection to the target."""

    def __init__(self, request: web.Request, traffic: Traffic) -> None:
        self.is_chunked = "Content-Length" not in request.headers
        self._content = request.content
        self._traffic = traffic

    def whole(self) -> bytes | None:
        if not self._content.is_eof() or self._content.exception() is not None:
            return None
        data = self._content.read_nowait(-1)
        self._traffic.sent += len(data)
        return data

    async def read(self) -> bytes:
        try:
            piece = await asyncio.wait_for(self._content.readany(), limits.IDLE_SECONDS)
        except asyncio.TimeoutError:
            raise Refusal(408, "the request's body stopped coming") from None
        except (web.RequestPayloadError, ValueError) as error:
            raise Refusal(400, f"the request's body is broken: {error}"[: limits.MAX_REASON_LENGTH]) from None
        self._traffic.sent += len(piece)
        return piece
