"""The scheduler's lookup client over its workers, and what an operator may do with it.

A worker of the same process is asked directly, another one over its internal API.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lmcache_api.embedded.calls import ask
from lmcache_api.embedded.keys import ChunkKeys
from lmcache_api.embedded.statistics import EmbeddedChunkStatistics
from lmcache_shared.address import Address
from lmcache_shared.blocking import together
from lmcache_shared.settings import Settings

logger = logging.getLogger(__name__)

MAX_ASKED_AT_ONCE = 64
MARGIN_SECONDS = 0.25
"""For threads that begin late, so that a worker that is silent is told as such."""

NO_CLIENT = "None"


class Worker(Protocol):
    """A worker as the scheduler sees it."""

    def hit_tokens(self, tokens: Sequence[int]) -> int:
        """The tokens of the longest prefix that it knows.

        Raises:
            OSError: it does not answer.
        """


class RemoteWorker:
    """A worker of another process, asked over its internal API."""

    def __init__(self, address: Address, settings: Callable[[], Settings]) -> None:
        self.address = address
        self._settings = settings

    @property
    def seconds(self) -> float:
        """How long it may take to answer."""
        return self._settings().lookup_timeout_ms / 1000

    def hit_tokens(self, tokens: Sequence[int]) -> int:
        answer = ask(self.address, "POST", "/cache/lookup", {"tokens": list(tokens)}, seconds=self.seconds)
        hit = answer.get("num_hit_tokens")
        if type(hit) is not int or not 0 <= hit <= len(tokens):
            raise OSError(f"{self.address}: no answer that can be used: num_hit_tokens is not from 0 to {len(tokens)}")
        return hit


class EmbeddedLookupClient:
    """Asks every worker; a request's hit is what all of them have.

    Args:
        workers: by their ids.
        keys: cuts tokens into the chunks that the statistics count.
        statistics: where lookups are counted, if they are.
    """

    def __init__(
        self, workers: Mapping[int, Worker], keys: ChunkKeys, statistics: EmbeddedChunkStatistics | None
    ) -> None:
        self._workers = workers
        self._keys = keys
        self.statistics = statistics

    def hits(self, tokens: Sequence[int]) -> Mapping[int, int | OSError]:
        return self._ask(tokens)

    def lookup(self, tokens: Sequence[int]) -> int:
        """The hit of a request, which is counted. A worker that does not answer has nothing, as in LMCache."""
        began = time.perf_counter()
        found = self._ask(tokens)
        if self.statistics is not None:
            self.statistics.record((chunk.key for chunk in self._keys.of(tokens)), time.perf_counter() - began)
        return min((hit if isinstance(hit, int) else 0 for hit in found.values()), default=0)

    @property
    def name(self) -> str:
        """As LMCache tells a client within a client."""
        return _class_name(counts=self.statistics is not None)

    def _ask(self, tokens: Sequence[int]) -> dict[int, int | OSError]:
        remote = [worker for worker in self._workers.values() if isinstance(worker, RemoteWorker)]
        if not remote:
            return {number: worker.hit_tokens(tokens) for number, worker in self._workers.items()}
        seconds = max(worker.seconds for worker in remote) + MARGIN_SECONDS
        calls = [functools.partial(worker.hit_tokens, tokens) for worker in self._workers.values()]
        answers = together(calls, at_once=MAX_ASKED_AT_ONCE, seconds=seconds)
        return {number: _hit(answer) for number, answer in zip(self._workers, answers, strict=True)}


def _hit(answer: int | BaseException | None) -> int | OSError:
    if answer is None:
        return TimeoutError("timed out")
    if isinstance(answer, int | OSError):
        return answer
    raise answer


class SchedulerLookup:
    """The scheduler's lookup client, closed and made again by the settings of now."""

    def __init__(self, settings: Callable[[], Settings], workers: Mapping[int, Worker], keys: ChunkKeys) -> None:
        self._settings = settings
        self._workers = workers
        self._keys = keys
        self._lock = threading.Lock()
        self.client: EmbeddedLookupClient | None = self._make()

    def info(self) -> Mapping[str, str]:
        return {"client": _name(self.client), "server": NO_CLIENT}

    def close(self) -> dict[str, Any]:
        with self._lock:
            old, self.client = self.client, None
        return {"old": _name(old)}

    def create(self, *, dryrun: bool) -> dict[str, Any]:
        if dryrun:
            return {"new": _class_name(counts=self._settings().enable_chunk_statistics), "dryrun": True}
        with self._lock:
            self.client = self._make()
            return {"new": _name(self.client)}

    def recreate(self) -> dict[str, Any]:
        with self._lock:
            if self.client is None:
                return {"error": "lookup client not available"}
            old, self.client = self.client, self._make()
            return {"old": _name(old), "new": _name(self.client)}

    def _make(self) -> EmbeddedLookupClient:
        settings = self._settings()
        statistics = EmbeddedChunkStatistics(settings) if settings.enable_chunk_statistics else None
        return EmbeddedLookupClient(self._workers, self._keys, statistics)


class WorkerLookup:
    """A worker answers lookups by its internal API, and has no server for them beside it."""

    def info(self) -> Mapping[str, str]:
        return {"client": NO_CLIENT, "server": NO_CLIENT}

    def close(self) -> dict[str, Any]:
        return {"old": NO_CLIENT}

    def create(self, *, dryrun: bool) -> dict[str, Any]:
        return {
            "error": "an embedded worker answers lookups by its internal API (/cache/lookup) and has no lookup server"
        }

    def recreate(self) -> dict[str, Any]:
        return {"error": "lookup server not available"}


def _class_name(*, counts: bool) -> str:
    own = EmbeddedLookupClient.__name__
    return f"ChunkStatisticsLookupClient({own})" if counts else own


def _name(client: EmbeddedLookupClient | None) -> str:
    return NO_CLIENT if client is None else client.name
