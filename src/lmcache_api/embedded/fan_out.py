"""One question to many workers at once over their internal APIs, in the controller's event loop.

What a worker answers is checked before anybody reads it, and bounded, as is how many are asked at the same time: all
of them, and each. A worker that hangs holds its own few places and nobody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import aiohttp
import msgspec

from lmcache_shared.address import Address, TcpAddress

logger = logging.getLogger(__name__)

ASKED_AT_ONCE = 512
"""Connections of one controller; further workers wait for theirs."""

ASKED_OF_ONE = 8
"""Questions that wait for one worker; a further one fails at once."""

MAX_ANSWER_BYTES = 1 << 20
MAX_HERE_BYTES = 1 << 14
"""A longer answer is read in a thread, so that the loop goes on."""

OUT_OF_FILES = "the controller has no file descriptor left to ask a worker; raise its limit (ulimit -n) or try later"
"""What is told of a worker that was not asked: it is no fault of the worker."""

MAX_WHY = 256
PIECE_BYTES = 1 << 18

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
"""Tokens; more than any cache holds is no answer."""


class _Span(msgspec.Struct):
    locations: list[str]


class Cleared(msgspec.Struct):
    """What is read of `DELETE /cache/clear`."""

    num_removed: _Count

    def told(self) -> dict[str, Any]:
        return {"num_tokens": self.num_removed}


class Found(msgspec.Struct):
    """What is read of `POST /cache/lookup`: how many tokens, and where they begin."""

    num_hit_tokens: _Count
    spans: list[_Span]

    def told(self) -> dict[str, Any]:
        where = [location for span in self.spans[:1] for location in span.locations]
        return {"num_hit_tokens": self.num_hit_tokens, "location": where[0][:MAX_WHY] if where else ""}


class Healthy(msgspec.Struct):
    """What is read of `GET /periodic-threads-health`."""

    healthy: bool

    def told(self) -> dict[str, Any]:
        return {"healthy": self.healthy}


Answer = Cleared | Found | Healthy


@dataclass(frozen=True)
class Question:
    """What every worker is asked; `answer` is what is read of what it says."""

    method: str
    path: str
    answer: type[Answer]
    query: Mapping[str, str] | None = None
    body: bytes | None = None


class FanOut:
    """Asks workers, so many at once. Used in one event loop."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(ASKED_AT_ONCE)
        self._asked: dict[Address, int] = {}

    async def ask(
        self, address: Address, question: Question, seconds: float, token: str | None = None
    ) -> dict[str, Any]:
        """What a worker answers, or why it has not: `status` is `success` or `error`; never later than `seconds`.

        `token` is shown to workers on other machines, which ask for one before they change something.
        """
        if self._asked.get(address, 0) >= ASKED_OF_ONE:
            return _error(f"it has not answered {ASKED_OF_ONE} earlier questions")
        with self._counted(address):
            try:
                return await asyncio.wait_for(self._asked_in_turn(address, question, token), seconds)
            except asyncio.TimeoutError:
                return _error(f"no answer within {seconds:g} seconds")
            except (aiohttp.ClientError, OSError, ValueError) as error:
                return _error(OUT_OF_FILES if _is_out_of_files(error) else str(error) or type(error).__name__)
            except Exception as error:  # one worker's answer is no reason to leave the others out
                logger.exception("asking %s failed", address)
                return _error(type(error).__name__)

    @contextlib.contextmanager
    def _counted(self, address: Address) -> Iterator[None]:
        self._asked[address] = self._asked.get(address, 0) + 1
        try:
            yield
        finally:
            self._asked[address] -= 1
            if not self._asked[address]:
                del self._asked[address]

    async def _asked_in_turn(self, address: Address, question: Question, token: str | None) -> dict[str, Any]:
        async with self._places:
            status, content = await _exchange(address, question, token)
        read = functools.partial(_read, status, content, question.answer)
        if len(content) <= MAX_HERE_BYTES:
            return read()
        return await asyncio.get_running_loop().run_in_executor(None, read)


async def _exchange(address: Address, question: Question, token: str | None) -> tuple[int, bytes]:
    """The status and the body that the worker answers.

    Raises:
        aiohttp.ClientError: it answers something that is no HTTP, or breaks off.
        OSError: it cannot be reached.
        ValueError: the answer is too large.
    """
    base = f"http://{address}" if isinstance(address, TcpAddress) else "http://localhost"
    headers = {"Accept-Encoding": "identity"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    if question.body is not None:
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(question.body))}
    connector = _connector(address)
    async with (
        _cut_off_when_it_fails(connector),
        aiohttp.ClientSession(
            base,
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),  # the caller has one deadline for everything
        ) as client,
        client.request(
            question.method,
            question.path,
            params=question.query,
            data=_pieces(question.body) if question.body is not None else None,
            headers=headers,
            allow_redirects=False,
        ) as response,
    ):
        content = bytearray()
        async for piece in response.content.iter_any():
            content += piece
            if len(content) > MAX_ANSWER_BYTES:
                raise ValueError(f"its answer is larger than {MAX_ANSWER_BYTES} bytes")
        return response.status, bytes(content)


class _Remembering(aiohttp.BaseConnector):
    """A connector that knows its connections, also while a request is being sent."""

    transports: tuple[asyncio.Transport, ...] = ()

    async def connect(self, *arguments: Any, **named: Any) -> aiohttp.connector.Connection:
        connection = await super().connect(*arguments, **named)
        if connection.transport is not None:
            self.transports += (connection.transport,)
        return connection


class _TcpConnector(_Remembering, aiohttp.TCPConnector):
    pass


class _UnixConnector(_Remembering, aiohttp.UnixConnector):
    pass


def _connector(address: Address) -> _Remembering:
    if isinstance(address, TcpAddress):
        return _TcpConnector(limit=1, keepalive_timeout=1)
    return _UnixConnector(address.path, limit=1, keepalive_timeout=1)


@contextlib.asynccontextmanager
async def _cut_off_when_it_fails(connector: _Remembering) -> AsyncIterator[None]:
    """A connection that is closed stays open until what was written is read, which a worker that hangs never does."""
    try:
        yield
    except BaseException:
        for transport in connector.transports:
            transport.abort()
        raise


def _is_out_of_files(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


async def _pieces(body: bytes) -> AsyncIterator[memoryview]:
    """The body bit by bit: it is in memory once, however many workers it goes to."""
    view = memoryview(body)
    for start in range(0, len(body), PIECE_BYTES):
        yield view[start : start + PIECE_BYTES]


def _read(status: int, content: bytes, model: type[Answer]) -> dict[str, Any]:
    if status != 200:
        why = _why(content)
        return _error(f"it answers {status}: {why}" if why else f"it answers {status}")
    try:
        return {"status": "success", **msgspec.json.decode(content, type=model).told()}
    except (ValueError, RecursionError) as error:
        return _error(f"no answer that can be used: {error}")


def _why(content: bytes) -> str:
    """What a refusal of our own servers says: `detail`, or `error` and `message`."""
    try:
        answer = msgspec.json.decode(content[: 2 * MAX_HERE_BYTES], type=dict)
    except (ValueError, RecursionError):
        return ""
    said = (answer.get(key) for key in ("detail", "error", "message"))
    return ": ".join(text for text in said if isinstance(text, str))


def _error(text: str) -> dict[str, Any]:
    return {"status": "error", "error": text[:MAX_WHY]}
