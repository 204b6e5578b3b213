"""What passes between the proxy's handler and a transport: a request, its body, an answer, a refusal."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lmcache_frontend.proxy import limits
from lmcache_shared.access.asking import Asking
from lmcache_shared.address import Address, TcpAddress
from lmcache_shared.errors import Refusal

Fields = Sequence[tuple[bytes, bytes]]
"""Header fields as they came, in their order, repeated ones repeated."""


Interim = Callable[[int, bytes, Fields], None]
"""Takes an interim answer (1xx, RFC 9110, section 15.2): its status, reason and fields."""


class Proxying(Asking, Protocol):
    """A caller's request that is passed on; what may be written to its connection is written to `transport`."""

    @property
    def raw_headers(self) -> Fields: ...
    @property
    def keep_alive(self) -> bool: ...
    @property
    def body_exists(self) -> bool: ...
    @property
    def writer(self) -> Any:
        """Its `drain` waits until the caller has taken enough of what was written."""

    @property
    def protocol(self) -> Any:
        """Its `writing_paused` tells whether to wait."""


class BrokenOff(ConnectionError):
    """An answer ended before its end; the text says why."""


class Body(Protocol):
    """A request's body."""

    @property
    def is_chunked(self) -> bool:
        """Whether it is sent in chunks; else a `Content-Length` among the fields says how long it is."""

    def whole(self) -> bytes | None:
        """All of it, when all of it has come; asked once, before `read`."""

    async def read(self) -> bytes:
        """The next piece, nothing at the end.

        Raises:
            Refusal: the caller breaks it off or is too slow.
        """


@dataclass
class Outgoing:
    """A request as the target is to get it; `fields` without those that a transport adds (`Host` and the framing)."""

    method: str
    path: str
    fields: list[tuple[bytes, bytes]]
    body: Body | None = None
    upgrade: bool = False
    """Whether the connection may become a tunnel, to which `fields` ask it."""
    head: bytes = b""
    """As a transport has written it; one without a body may be sent again."""
    interim: Interim | None = None
    """Is told of the answers before the answer; nobody, where the caller could not read them."""
    is_held_back: bool = False
    """Whether the caller waits with the body until `interim` has told it 100 (`Expect: 100-continue`)."""


class Opening(NamedTuple):
    """How an answer to the caller begins, and how its body is framed.

    Attributes:
        has_own_date: its target told `Date`, so that it may be used for as long as the target tells the same.
    """

    head: bytes
    is_chunked: bool
    keep_alive: bool
    has_own_date: bool


class Answer(Protocol):
    """A target's answer, its body still coming. Whoever has it calls `release` in the end, however it goes."""

    status: int
    reason: bytes
    fields: Fields
    openings: dict[Any, Opening]
    """What was worked out from its head, kept for the next answer that has the same one."""

    def take(self) -> tuple[bytes, bool]:
        """What has come of the body since the last time, and whether that was the end.

        Raises:
            BrokenOff: it ends here, and is not whole.
        """

    async def wait(self) -> None:
        """Until `take` has something to give or to raise."""

    def release(self) -> None:
        """The connection goes back to its pool when the answer was read to its end, and is closed otherwise."""


class Tunnel(Answer, Protocol):
    """The target's end of a connection after `101 Switching Protocols`; its bytes are taken as an answer's body.

    Every answer of a transport is one; that it is used as one needs the status 101.
    """

    def push(self, data: bytes) -> bool:
        """Pass bytes on; whether the target is now to be waited for."""

    async def drained(self) -> None:
        """Until the target has taken what was pushed.

        Raises:
            ConnectionError: it is gone.
        """

    def touch(self) -> None:
        """The tunnel is alive: its idle time begins anew."""


class Transport(Protocol):
    """The way to one target."""

    @property
    def in_use(self) -> bool:
        """Whether a request or an answer is on its way."""

    async def request(self, outgoing: Outgoing) -> Tunnel:
        """Send a request, and wait for the head of its answer.

        Raises:
            Refusal: 502 when the target cannot be reached or speaks no HTTP, 503 when too many ask, 504 when it is too
                slow.
        """

    async def close(self) -> None:
        """Close every connection."""


def not_reached(address: Address, error: OSError | None = None) -> Refusal:
    """LMCache's words as `detail`, and what the system says as `reason`."""
    kind = "target service" if isinstance(address, TcpAddress) else "socket:"
    return Refusal(502, f"Failed to connect to {kind} {address}", reason=None if error is None else _why(error))


def _why(error: OSError) -> str:
    number = error.errno or 0
    text = os.strerror(number) if number > 0 else error.strerror or str(error) or type(error).__name__
    return " ".join(text.split())[: limits.MAX_REASON_LENGTH]


def timed_out(address: Address) -> Refusal:
    kind = "target service" if isinstance(address, TcpAddress) else "socket"
    return Refusal(504, f"Connection to {kind} {address} timed out")


def no_answer(problem: str) -> Refusal:
    return Refusal(502, f"Error communicating with target service: {problem[: limits.MAX_REASON_LENGTH]}")


def overloaded(address: Address) -> Refusal:
    headers = {"Retry-After": str(limits.RETRY_SECONDS)}
    return Refusal(503, f"Too many requests to {address} are on their way", headers)
