"""A target to which no connection is to be had, again and again, is skipped for a moment."""

from __future__ import annotations

import time

from lmcache_frontend.proxy import limits
from lmcache_shared.address import Address
from lmcache_shared.errors import Refusal


class Breaker:
    """Counts failures in a row. After `FAILURES` of them one request in `SKIP_SECONDS` tries; the others are refused.

    Only connecting counts: a target that is slow, or fails at some of its paths, is there.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._failures = 0
        self._tries_at = 0.0
        self._problem = ""

    def check(self) -> None:
        """Before a connection is made.

        Raises:
            Refusal: 503; the text says what failed the last time.
        """
        if self._failures < limits.FAILURES:
            return
        now = time.monotonic()
        if now < self._tries_at:
            headers = {"Retry-After": str(limits.RETRY_SECONDS)}
            text = f"{self._address} is skipped for a moment after {self._failures} failures: {self._problem}"
            raise Refusal(503, text, headers)
        self._tries_at = now + limits.CONNECT_SECONDS + limits.SKIP_SECONDS  # this one tries, and says how it went

    def failed(self, refusal: Refusal) -> Refusal:
        self._failures += 1
        self._problem = str(refusal.detail) + (f": {refusal.reason}" if refusal.reason else "")
        self._tries_at = time.monotonic() + limits.SKIP_SECONDS
        return refusal

    def connected(self) -> None:
        self._failures = 0

    def gave_up(self) -> None:
        """Who tried has gone before it was known; the next one may."""
        self._tries_at = 0.0
