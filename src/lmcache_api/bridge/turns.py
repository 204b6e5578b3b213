"""One caller at a time, where LMCache's own server has one event loop that each call holds.

Its managers take no locks of their own: two recreations at once would leak a lookup client. Data (store, retrieve) and
control (everything that changes what there is) have a turn each, so that a store that hangs holds no switch up.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from lmcache_api.component import Unavailable

WAIT_SECONDS = 5.0
"""How long a call waits for its turn; meanwhile it keeps one of few threads."""


class Turns:
    """The turns of one manager."""

    def __init__(self) -> None:
        self._data = threading.Lock()
        self._control = threading.Lock()

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Raises:
        Unavailable: another call has kept it for too long.
        """
        with _turn(self._data, "another store or retrieve of the API"):
            yield

    @contextlib.contextmanager
    def control(self) -> Iterator[None]:
        """Raises:
        Unavailable: another call has kept it for too long.
        """
        with _turn(self._control, "another change by the API"):
            yield


@contextlib.contextmanager
def _turn(lock: threading.Lock, other: str) -> Iterator[None]:
    if not lock.acquire(timeout=WAIT_SECONDS):
        raise Unavailable(f"{other} has not ended for {WAIT_SECONDS:g} seconds; try again later")
    try:
        yield
    finally:
        lock.release()
