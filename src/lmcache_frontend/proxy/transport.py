"""How a request gets to its target and the answer back: streamed both ways, through one transport per target."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import cast

from aiohttp import HttpVersion11, web

from lmcache_frontend.proxy import limits
from lmcache_frontend.proxy.answering import (
    Traffic,
    Written,
    break_off,
    opening_of,
    send_back,
    send_interim,
    taken,
    without_length,
)
from lmcache_frontend.proxy.exchange import Answer, Fields, Opening, Outgoing, Proxying, Transport, no_answer
from lmcache_frontend.proxy.headers import Introduction, answer_fields, kept_by_nobody, request_fields
from lmcache_frontend.proxy.leaving import Leaving
from lmcache_frontend.proxy.native import NativeTransport, Room
from lmcache_frontend.proxy.target import ProxiedPath
from lmcache_frontend.proxy.tunnel import FIELDS, asks_for_upgrade, is_switched, pass_on
from lmcache_shared.address import Address
from lmcache_shared.errors import Refusal

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
"""So often somebody looks whether the framing of a request's body broke."""

MAX_UNREGISTERED_TARGETS = 64
"""Transports kept for targets that are no registered nodes; the one unused for longest goes first."""

MAX_OPENINGS = 64
"""Of what was worked out for one head of answers; so many ways to a target there are."""

_TURNS = 10
"""Of the event loop, so many are enough for a cancelled reader to be gone."""


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
    if request.version >= HttpVersion11:
        outgoing.interim = functools.partial(_interim, request, wanted, body)
        outgoing.is_held_back = body is not None and "Expect" in request.headers
    return outgoing


async def forward(
    request: Proxying,
    target: Transport,
    wanted: ProxiedPath,
    outgoing: Outgoing,
    traffic: Traffic,
    *,
    reveals: bool = False,
) -> web.StreamResponse:
    """Send the request on to `target` as `outgoing`, and its answer back; `traffic` is counted.

    Nobody keeps a copy of an answer that may reveal something.

    No body is held whole. An answer that breaks off breaks the caller's connection off too, so that half an answer
    never looks whole.

    Raises:
        Refusal: 502 when the target cannot be reached or speaks no HTTP, 503 when too many ask, 504 when it is too
            slow.
    """
    try:
        return await _exchanged(request, target, wanted, outgoing, traffic, reveals=reveals)
    finally:
        if isinstance(outgoing.body, CallersBody):
            await outgoing.body.left_alone()


async def _exchanged(
    request: Proxying,
    target: Transport,
    wanted: ProxiedPath,
    outgoing: Outgoing,
    traffic: Traffic,
    *,
    reveals: bool,
) -> web.StreamResponse:
    answer = await target.request(outgoing)
    if answer.status == 101 and not is_switched(answer.fields):
        answer.release()
        raise no_answer("it switches to a protocol that nobody asked for")
    status = answer.status
    try:
        try:
            if status == 101:
                fields = answer_fields(answer.fields, wanted)
                return await pass_on(cast(web.Request, request), answer, fields, traffic)
            opening = _opening(request, wanted, outgoing, answer, reveals=reveals)
            written = await send_back(request, answer, opening, traffic)
        finally:
            answer.release()
        if request.protocol.writing_paused:
            await taken(request)  # its end, for which the target's connection is needed no more
        return written
    except (ConnectionError, Refusal) as error:  # also of the request's body: the answer has begun
        traffic.broke_off = True
        logger.info("%s %s broke off: %s", request.method, request.path, error or type(error).__name__)
        break_off(request)
        return Written(status, keep_alive=False, length=traffic.received)


def _opening(request: Proxying, wanted: ProxiedPath, outgoing: Outgoing, answer: Answer, *, reveals: bool) -> Opening:
    """How the answer begins; worked out once for answers with the same head."""
    is_last = outgoing.is_held_back and isinstance(outgoing.body, CallersBody) and not outgoing.body.is_wanted
    key = (wanted.prefix, wanted.skipped, request.version, request.keep_alive, reveals, is_last)
    opening = answer.openings.get(key)
    if opening is None:
        fields = answer_fields(answer.fields, wanted)
        if reveals:
            kept_by_nobody(fields)
        opening = opening_of(request, answer, fields, is_last=is_last)
        if opening.has_own_date and len(answer.openings) < MAX_OPENINGS:
            answer.openings[key] = opening
    return opening


async def expected(request: web.Request) -> None:
    """aiohttp's server asks this before a handler: nothing is said to `Expect: 100-continue` until the target does."""
    if request.headers["Expect"].lower() != "100-continue":
        raise web.HTTPExpectationFailed(text="Expect: there is no expectation but 100-continue")


def _interim(
    request: Proxying, wanted: ProxiedPath, body: CallersBody | None, status: int, reason: bytes, fields: Fields
) -> None:
    if status == 100 and body is not None:
        body.is_wanted = True
    send_interim(request, status, reason, without_length(answer_fields(fields, wanted)))


class CallersBody:
    """A request's body as it comes; a caller that stops sending does not hold a connection to the target.

    Attributes:
        is_wanted: whether a caller that holds it back has been told to go on, or has not waited for that.
    """

    def __init__(self, request: web.Request, traffic: Traffic) -> None:
        self.is_wanted = False
        self._is_read = False
        self._leaving: Leaving | None = None
        self._request = request
        self.is_chunked = "Content-Length" not in request.headers
        self._content = request.content
        self._traffic = traffic

    def whole(self) -> bytes | None:
        if not self._content.is_eof() or self._content.exception() is not None:
            return None
        self.is_wanted = True
        data = self._content.read_nowait(-1)
        self._traffic.sent += len(data)
        return data

    async def left_alone(self) -> None:
        """Until nobody reads it, for the server may want to; who read it has been cancelled."""
        if self._leaving is not None:
            self._leaving.close()
        for _ in range(_TURNS):
            if not self._is_read:
                return
            await asyncio.sleep(0)

    async def read(self) -> bytes:
        if self._leaving is None and self._request.transport is not None:
            self._leaving = Leaving(self._request.transport)
        waited = 0.0
        self._is_read = True
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(self._content.readany(), min(_LOOK_SECONDS, limits.IDLE_SECONDS))
                    break
                except asyncio.TimeoutError:
                    waited += _LOOK_SECONDS
                    if self._is_broken():
                        raise Refusal(400, "the request's body is broken: its framing") from None
                    if waited >= limits.IDLE_SECONDS:
                        raise Refusal(408, "the request's body stopped coming") from None
        except (web.RequestPayloadError, ValueError) as error:
            raise Refusal(400, f"the request's body is broken: {error}"[: limits.MAX_REASON_LENGTH]) from None
        finally:
            self._is_read = False
        self._traffic.sent += len(piece)
        return piece

    def _is_broken(self) -> bool:
        """aiohttp (3.14) tells nobody that a chunk was none: it puts an error in line behind the request."""
        return bool(getattr(self._request.protocol, "_messages", None)) and not self._content.is_eof()
