"""Where nodes that are added by hand, and heartbeats received, are kept.

A store knows neither nodes nor heartbeats: it keeps small texts by key, changes them by compare-and-set, and tells when
somebody else has. When it cannot be reached it says so (`StoreAway`) and is asked again later: no store ever keeps the
frontend from starting or ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmcache_shared.errors import OpsError


class StoreAway(OpsError):
    """The store cannot be asked, or cannot keep a change.

    The text is one line: what is away, why, and the way out; it holds no password.
    """


class StoreUncertain(StoreAway):
    """Whether a change is kept is not known."""


class Unkeepable(StoreAway):
    """No store could keep this: a text is too long, empty, or no Unicode."""


@dataclass(frozen=True)
class Change:
    """What becomes of one record; a change counts only when `before` holds."""

    key: str
    before: str | None
    """What must be there now; `None`: nothing may be."""
    after: str | None
    """What is there afterwards; `None`: it is removed."""


class Store(Protocol):
    """Records and reports by key. It lives in the event loop that opens it, and has one task at a time in `changed`."""

    @property
    def description(self) -> str:
        """The store, for people: `memory`, `sqlite:/path`, `redis://host:6379/0`; a password is left out."""

    @property
    def is_shared(self) -> bool:
        """Whether it is meant for several frontends, which are one to others."""

    async def open(self) -> None:
        """Reach the store. After a failure it is tried again by every other method.

        Raises:
            StoreAway: it cannot be reached.
        """

    async def read(self) -> dict[str, str]:
        """Every record by key. Those that nobody here can have written are skipped, and the log says so.

        Raises:
            StoreAway: it cannot be asked.
        """

    async def apply(self, changes: Sequence[Change]) -> bool:
        """Make all the changes or none; false when some `before` does not hold: somebody else was quicker.

        Raises:
            StoreAway: the changes cannot be kept; none was made.
            StoreUncertain: whether they were made is not known.
        """

    async def changed(self, seconds: float) -> bool:
        """Wait, at most so long, until records may have changed; whether they may have.

        Counted from the last time that this said so, or else from `open`: what is changed between two calls is not
        missed. Changes through this object count too.

        Raises:
            StoreAway: it cannot be asked. This may come at once, so whoever asks in a loop pauses.
        """

    async def report(self, key: str, value: str, *, keep_seconds: float, limit: int) -> bool:
        """Keep a heartbeat in the place of the key's former; false when `limit` other keys are kept already.

        Raises:
            StoreAway: it cannot be kept.
        """

    async def reports_mark(self) -> str:
        """Another one whenever reports have changed; that one is forgotten because of its age does not count.

        Raises:
            StoreAway: it cannot be asked.
        """

    async def reports(self) -> dict[str, str]:
        """The reports that are not older than their `keep_seconds`.

        Raises:
            StoreAway: it cannot be asked.
        """

    async def close(self) -> None:
        """Leave the store; what it keeps stays there. Never fails; nothing can be asked afterwards."""


def open_store(spec: str, port: int) -> Store:
    """The store that the option `registry` names, for the frontend that serves on `port`; not yet opened.

    Raises:
        ConfigError: it names none.
    """
    from lmcache_frontend.nodes.stores.spec import FilePlace, RedisPlace, read_spec

    place = read_spec(spec)
    if isinstance(place, RedisPlace):
        from lmcache_frontend.nodes.stores.redis import RedisStore

        return RedisStore(place)
    if isinstance(place, FilePlace):
        from lmcache_frontend.nodes.stores.sqlite import SqliteStore

        return SqliteStore(place.file(port))
    from lmcache_frontend.nodes.stores.memory import MemoryStore

    return MemoryStore()
