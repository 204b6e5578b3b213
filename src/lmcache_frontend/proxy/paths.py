"""What the paths of proxied requests mean and need, remembered for as long as the registry stays the same.

To read a path, and to look its role up in every reading that a server might give it, costs as much as to parse the
request; who polls asks for the same paths again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.proxy.target import ProxiedPath
from lmcache_shared.access.table import Proxied, of_proxied

MAX_PATHS = 4096
"""When so many are remembered, all are forgotten."""

MAX_LENGTH = 512
"""Of a path with its query that is remembered."""


class Meant(NamedTuple):
    """Where a request is to go, and what it needs."""

    wanted: ProxiedPath
    asked: Proxied


class Paths:
    """The paths that were asked for.

    Args:
        registry: says what they mean.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._revision = -1
        self._known: dict[tuple[str, str], Meant] = {}

    def meant(self, read: Callable[[str, Registry], ProxiedPath], method: str, raw_path: str) -> Meant:
        """What is asked for by a request whose path is to be read by `read`.

        Raises:
            Refusal: as `read`.
        """
        if self._revision != self._registry.revision:
            self._known.clear()
            self._revision = self._registry.revision
        key = (method, raw_path)
        found = self._known.get(key)
        if found is None:
            wanted = read(raw_path, self._registry)
            found = Meant(wanted, of_proxied(method, wanted.path))
            if len(raw_path) <= MAX_LENGTH:
                if len(self._known) >= MAX_PATHS:
                    self._known.clear()
                self._known[key] = found
        return found
