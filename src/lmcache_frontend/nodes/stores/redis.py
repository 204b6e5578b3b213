"""A store in one Redis (5 or newer, or Valkey), shared by every frontend that names it.

What is promised. A change is made whole or not at all, by a script that Redis runs alone. When an answer is lost, the
change is asked for again under the same id, which Redis remembers, until its fate is known; only when Redis stays away
does `apply` say that it is not known. A script that reaches Redis after its frontend has given up changes nothing: it
carries the latest time, on Redis' own clock, at which it may run. How long a change outlives Redis itself is a matter
of Redis' persistence.

How others' changes are noticed. Every change sets a mark that no other has, and publishes it. A frontend listens, and
beside that asks for the mark every second, so that a lost message or a connection that is half open costs a second.
A Redis that came back empty, or with older data, has another mark.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.connection import (
    BlockingConnectionPool,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from lmcache_frontend.nodes.stores import Change, StoreAway, StoreUncertain
from lmcache_frontend.nodes.stores.bounds import (
    MAX_KEY_BYTES,
    MAX_RECORDS,
    MAX_TOTAL_BYTES,
    MAX_VALUE_BYTES,
    Readable,
    refuse_unkeepable,
    refuse_unkeepable_changes,
    too_many,
)
from lmcache_frontend.nodes.stores.scripts import APPLY, READ, REPORT, REPORTS, Script
from lmcache_frontend.nodes.stores.spec import RedisPlace

logger = logging.getLogger(__name__)

T = TypeVar("T")

PREFIX = "lmcache-ops:{nodes}:"
"""Of every key and channel; what stands in braces keeps the keys together in a Redis cluster."""

CONNECT_SECONDS = 1.0
OPERATION_SECONDS = 2.0
"""For one command on an open connection."""

CALL_SECONDS = CONNECT_SECONDS + OPERATION_SECONDS
"""For one call, all included: its turn, connecting, authentication, the answer."""

APPLY_SECONDS = 4.0
"""For a change, finding out how it went included; no script of it runs later."""

AGAIN_SECONDS = 0.1
"""Before a change whose answer was lost is asked for again."""

POLL_SECONDS = 1.0
"""Between two looks at the mark while messages come as well."""

DEAF_POLL_SECONDS = 0.3
"""The same while none can come, for instance because the user may not subscribe."""

DEAF_SECONDS = 60.0
"""Before subscribing is tried again when it was refused."""

BREATH_SECONDS = 0.05
"""After a message, so that a flood of them asks for the mark only so often."""

MAX_CONNECTIONS = 8

_REASONS: tuple[tuple[str, str], ...] = (
    ("NOAUTH", "it wants a password; give one with --registry redis://user:password@host"),
    ("WRONGPASS", "it refuses this user and password"),
    ("Authentication required", "it wants a password; give one with --registry redis://user:password@host"),
    ("invalid username-password", "it refuses this user and password"),
    ("invalid password", "it refuses this password"),
    ("NOPERM", "this user may not use the keys and channels lmcache-ops:*"),
    ("executing the script can't", "this user may not use the keys and channels lmcache-ops:*"),
    ("ACL failure", "this user may not use the keys and channels lmcache-ops:*"),
    ("READONLY", "it is a replica and takes no changes; name the primary"),
    ("OOM", "it has no memory left (maxmemory)"),
    ("MISCONF", "it cannot write to its disk and takes no changes"),
    ("NOREPLICAS", "it has too few replicas and takes no changes"),
    ("LOADING", "it is still loading its data"),
    ("WRONGTYPE", "a key lmcache-ops:* is of another type; somebody else uses it: remove it, or name another database"),
    ("MOVED", "this node of a Redis cluster does not hold lmcache-ops:*; name the one that does, or a single Redis"),
    ("CROSSSLOT", "this node of a Redis cluster does not hold lmcache-ops:*; name a single Redis"),
    ("CLUSTERDOWN", "its cluster is down"),
    ("BUSY", "it is busy with somebody's script"),
)  # fmt: skip
"""What stands in Redis' refusal, and what it means."""

_CODE_OF_CLASS = {
    "NoPermissionError": "NOPERM", "ReadOnlyError": "READONLY", "OutOfMemoryError": "OOM",
    "BusyLoadingError": "LOADING", "MovedError": "MOVED", "ClusterDownError": "CLUSTERDOWN",
    "ClusterCrossSlotError": "CROSSSLOT",
}  # fmt: skip
"""The library takes the code out of some refusals and makes a class of it."""


class RedisStore:
    """Keeps records and reports in the Redis at `place`."""

    is_shared = True

    def __init__(self, place: RedisPlace) -> None:
        self.description = place.description
        self._client = Redis(connection_pool=_pool(place))
        self._records = PREFIX + "records"
        self._mark = PREFIX + "mark"
        self._reports = PREFIX + "reports"
        self._report_ends = PREFIX + "report-ends"
        self._reports_mark = PREFIX + "reports-mark"
        self._channel = f"{PREFIX}changed:{place.database}"  # channels are those of all databases
        self._readable_records = Readable(self.description, "records")
        self._readable_reports = Readable(self.description, "reports")
        self._told: bytes | _Unknown | None = _Unknown()
        self._listener: PubSub | None = None
        self._deaf_until = 0.0
        self._closed = False

    async def open(self) -> None:
        self._told = await self._current_mark(self._mark)

    async def read(self) -> dict[str, str]:
        bounds = (MAX_RECORDS, MAX_KEY_BYTES, MAX_VALUE_BYTES, MAX_TOTAL_BYTES)
        return self._texts(await self._run(READ, [self._records], *bounds), self._readable_records)

    async def reports(self) -> dict[str, str]:
        bounds = (MAX_RECORDS, MAX_KEY_BYTES, MAX_VALUE_BYTES, MAX_TOTAL_BYTES)
        answer = await self._run(REPORTS, [self._reports, self._report_ends], *bounds)
        return self._texts(answer, self._readable_reports)

    async def report(self, key: str, value: str, *, keep_seconds: float, limit: int) -> bool:
        refuse_unkeepable(self.description, [(key, value)])
        keys = [self._reports, self._report_ends, self._reports_mark]
        milliseconds = max(1, int(keep_seconds * 1000))
        most = min(limit, MAX_RECORDS)
        answer = await self._run(REPORT, keys, key, value, milliseconds, most, uuid.uuid4().hex)
        if answer not in (0, 1):
            raise self._strange()
        return bool(answer)

    async def reports_mark(self) -> str:
        return (await self._current_mark(self._reports_mark) or b"").decode("ascii", "replace")

    async def apply(self, changes: Sequence[Change]) -> bool:
        refuse_unkeepable_changes(self.description, changes)
        if not changes:
            return True
        loop = asyncio.get_running_loop()
        until = loop.time() + APPLY_SECONDS
        identity = uuid.uuid4().hex
        lost = False
        while True:
            try:
                now = await self._clock(within=_at_most(until - loop.time()))
            except StoreAway as away:
                if not lost:
                    raise StoreAway(str(away)) from None
                problem = away
            else:
                # Redis told its time before we know it, so on our clock this is `until` or earlier
                latest = now + int((until - loop.time()) * 1000)
                try:
                    return self._went_well(
                        await self._try(changes, identity, latest, within=_at_most(until - loop.time()))
                    )
                except _Lost as away:
                    lost, problem = True, away
                except _Refused as away:
                    if not lost:
                        raise StoreAway(str(away)) from None
                    problem = away
            if loop.time() + AGAIN_SECONDS >= until:
                await asyncio.sleep(max(0.0, until - loop.time()))  # later no script of this change runs any more
                raise StoreUncertain(f"{problem}; whether the change is kept could not be found out")
            await asyncio.sleep(AGAIN_SECONDS)

    async def changed(self, seconds: float) -> bool:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while True:
            listener = await self._listening()  # before the mark is asked for: nothing falls in between
            mark = await self._current_mark(self._mark)
            if mark != self._told:
                self._told = mark
                return True
            left = until - loop.time()
            if left <= 0:
                return False
            if listener is None:
                await asyncio.sleep(min(DEAF_POLL_SECONDS, left))
            else:
                await self._hear(listener, min(POLL_SECONDS, left))

    async def close(self) -> None:
        self._closed = True
        await self._stop_listening()
        with contextlib.suppress(Exception):  # what cannot be closed is gone already
            await _within(CONNECT_SECONDS, self._client.aclose())
            await _within(CONNECT_SECONDS, self._client.connection_pool.disconnect())

    # a change

    async def _clock(self, *, within: float) -> int:
        """Redis' time in milliseconds."""
        answer = await self._ask(self._command("TIME"), within=within)
        try:
            seconds, microseconds = answer
            return int(seconds) * 1000 + int(microseconds) // 1000
        except (TypeError, ValueError):
            raise _Refused(f"{self.description}: this is no Redis, it does not tell the time") from None

    async def _try(self, changes: Sequence[Change], identity: str, latest: int, *, within: float) -> object:
        arguments: list[str] = []
        for change in changes:
            arguments += [change.key, _optional(change.before), _optional(change.after)]
        keys = [self._records, self._mark, f"{PREFIX}change:{identity}"]
        return await self._run(
            APPLY, keys, latest, identity, self._channel, MAX_RECORDS, *arguments, within=within
        )  # fmt: skip

    def _went_well(self, answer: object) -> bool:
        if answer == b"kept":
            return True
        if answer == b"quicker":
            return False
        if answer == b"full":
            raise too_many(self.description)
        if answer == b"late":
            raise _Lost(f"{self.description}: answered too late")
        raise self._strange()

    # what others change

    async def _current_mark(self, key: str) -> bytes | None:
        answer = await self._ask(self._command("GETRANGE", key, 0, 63))
        return answer if isinstance(answer, bytes) and answer else None

    async def _listening(self) -> PubSub | None:
        """The subscription; `None` when there is none, and the mark alone has to do."""
        loop = asyncio.get_running_loop()
        if self._listener is None and loop.time() >= self._deaf_until:
            self._listener = self._client.pubsub()
            try:
                await self._ask(self._subscribe(self._listener))
            except StoreAway as away:
                await self._stop_listening()
                if isinstance(away, _Lost):
                    raise
                level = logging.DEBUG if self._deaf_until else logging.WARNING  # told once
                logger.log(level, "%s; others' changes are looked for every %g seconds", away, DEAF_POLL_SECONDS)
                self._deaf_until = loop.time() + DEAF_SECONDS
            except BaseException:
                await self._stop_listening()
                raise
        return self._listener

    async def _subscribe(self, listener: PubSub) -> None:
        await listener.subscribe(self._channel)
        await listener.get_message(timeout=OPERATION_SECONDS)  # the acknowledgement, or the refusal

    async def _hear(self, listener: PubSub, seconds: float) -> None:
        """Wait for a message; a connection that does not even answer a ping meanwhile is given up."""
        try:
            await self._ask(_ping(listener))
            message = await self._ask(_message(listener, seconds), within=seconds + OPERATION_SECONDS)
        except StoreAway:
            await self._stop_listening()  # the mark's own connection tells whether Redis is away
            return
        if message == b"nothing" and seconds >= POLL_SECONDS:
            await self._stop_listening()
        elif message == b"message":
            await asyncio.sleep(BREATH_SECONDS)

    async def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(Exception):
                await _within(CONNECT_SECONDS, listener.aclose())  # type: ignore[no-untyped-call]

    # asking

    def _strange(self) -> StoreAway:
        return _Refused(f"{self.description}: answered what no script of ours does; is it a Redis?")

    def _texts(self, answer: object, readable: Readable) -> dict[str, str]:
        if not isinstance(answer, list) or not answer or not isinstance(answer[0], int):
            raise self._strange()
        if answer[0] < 0:
            what, most = ("records", MAX_RECORDS) if answer[0] == -1 else ("bytes", MAX_TOTAL_BYTES)
            raise StoreAway(
                f"{self.description}: {answer[1]} {what} under lmcache-ops:*, and at most {most} are read;"
                " remove some, or name another database"
            )
        return readable.texts(zip(answer[1::2], answer[2::2], strict=True), answer[0])

    async def _run(self, script: Script, keys: list[str], *arguments: str | int, within: float = CALL_SECONDS) -> Any:
        parts = (len(keys), *keys, *arguments)

        async def run() -> Any:
            try:
                return await self._command("EVALSHA", script.sha, *parts)
            except NoScriptError:  # a Redis that has not seen it yet, or has started anew
                return await self._command("EVAL", script.text, *parts)

        return await self._ask(run(), within=within)

    async def _command(self, *parts: str | int) -> Any:
        return await self._client.execute_command(*parts)  # type: ignore[no-untyped-call]

    async def _ask(self, question: Coroutine[Any, Any, T], *, within: float = CALL_SECONDS) -> T:
        """The answer.

        Raises:
            _Refused: Redis answered that it does not do this.
            _Lost: no answer came; whether it was done is not known.
        """
        if self._closed:
            question.close()
            raise _Refused(f"{self.description}: this frontend has closed it")
        try:
            return await _within(within, question)
        except (AuthenticationError, BusyLoadingError, ResponseError) as error:
            if isinstance(error, ReadOnlyError):
                await self._forget_connections()  # its name may mean another one by now
            raise _Refused(f"{self.description}: {_reason(error)}") from None
        except (RedisTimeoutError, asyncio.TimeoutError):
            raise _Lost(f"{self.description}: no answer within {within:.3g} seconds") from None
        except (RedisConnectionError, OSError) as error:
            raise _Lost(f"{self.description}: {_one_line(error)}") from None
        except Exception as error:  # whatever answers there: it may be no Redis at all
            logger.debug("%s: an answer that is none", self.description, exc_info=True)
            kind = "" if isinstance(error, RedisError) else f"{type(error).__name__}: "
            raise _Lost(f"{self.description}: {kind}{_one_line(error)}") from None

    async def _forget_connections(self) -> None:
        with contextlib.suppress(Exception):
            await _within(CONNECT_SECONDS, self._client.connection_pool.disconnect(inuse_connections=False))


class _Refused(StoreAway):
    """Redis answered: no."""


class _Lost(StoreAway):
    """Nobody answered."""


class _Unknown:
    """In the place of a mark that was never asked for; equal to none."""


def _pool(place: RedisPlace) -> BlockingConnectionPool:
    settings: dict[str, Any] = {
        "db": place.database,
        "username": place.user,
        "password": place.password,
        "protocol": 2,  # that of every version; the third adds nothing here
        "socket_timeout": OPERATION_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        "retry": Retry(NoBackoff(), 0),  # what may be asked again is known here alone
    }
    kind: type[Connection | SSLConnection | UnixDomainSocketConnection]
    if place.socket is not None:
        kind = UnixDomainSocketConnection
        settings["path"] = place.socket
    else:
        kind = SSLConnection if place.tls else Connection
        settings.update(host=place.host, port=place.port, socket_keepalive=True)
    if place.tls:
        settings.update(ssl_cert_reqs="required", ssl_check_hostname=True, ssl_ca_certs=place.ca_file)
    return BlockingConnectionPool(
        connection_class=kind, max_connections=MAX_CONNECTIONS, timeout=OPERATION_SECONDS, **settings
    )  # fmt: skip


async def _ping(listener: PubSub) -> None:
    await listener.ping()


async def _message(listener: PubSub, seconds: float) -> bytes:
    """`message` as soon as there is one; else `alive` or `nothing`, whether or not anything came meanwhile."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    heard = b"nothing"
    while (left := until - loop.time()) > 0:
        message = await listener.get_message(timeout=left)
        if message is not None:
            if message["type"] == "message":
                return b"message"
            heard = b"alive"
    return heard


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; not `asyncio.wait_for`, which up to Python 3.11 may forget that it was cancelled.

    Raises:
        TimeoutError: that of asyncio; the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=CONNECT_SECONDS)
        if task.done() and not task.cancelled():
            task.exception()  # looked at, should nobody be here for it any more
    if not task.done() or task.cancelled():
        raise asyncio.TimeoutError
    return task.result()


def _at_most(seconds: float) -> float:
    return max(0.0, min(seconds, CALL_SECONDS))


def _optional(text: str | None) -> str:
    return "" if text is None else "=" + text


def _reason(error: Exception) -> str:
    text = f"{_CODE_OF_CLASS.get(type(error).__name__, '')} {_one_line(error)}".strip()
    for word, meaning in _REASONS:
        if word in text:
            return f"{meaning} ({text})"
    return text


def _one_line(error: BaseException) -> str:
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(text.split())[:200] or type(error).__name__
