"""The manager's lookup client (scheduler) or server (worker), and the chunk statistics of a client."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lmcache_api.bridge.abilities import ability
from lmcache_api.bridge.turns import Turns
from lmcache_api.component import ChunkStatistics, Unavailable
from lmcache_shared.placement import Role

logger = logging.getLogger(__name__)


class ManagerLookup:
    """Calls the manager's methods for its role; what they raise is told as their `error`."""

    def __init__(self, manager: Any, role: Role, turns: Turns) -> None:
        self._manager = manager
        self._turns = turns
        self._what = "lookup_client" if role == "scheduler" else "lookup_server"

    def info(self) -> Mapping[str, str]:
        return dict(ability(self._manager, "get_lookup_info")())

    def close(self) -> dict[str, Any]:
        return self._call("close")

    def create(self, *, dryrun: bool) -> dict[str, Any]:
        return self._call("create", dryrun=dryrun)

    def recreate(self) -> dict[str, Any]:
        return self._call("recreate")

    def _call(self, verb: str, **arguments: bool) -> dict[str, Any]:
        method = ability(self._manager, f"{verb}_{self._what}")
        with self._turns.control():
            try:
                return dict(method(**arguments))
            except Exception as error:  # LMCache asserts that there is an engine id, say
                logger.warning("%s_%s of %s raised", verb, self._what, type(self._manager).__name__, exc_info=True)
                return {"error": str(error) or type(error).__name__}


class ManagerLookupClient:
    """The scheduler's lookup client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def hits(self, tokens: Sequence[int]) -> Mapping[int, int | OSError]:
        raise Unavailable("a lookup through the scheduler holds what it finds; ask the workers")

    @property
    def statistics(self) -> ChunkStatistics | None:
        """LMCache's `ChunkStatisticsLookupClient` has them, others have not."""
        return ManagerChunkStatistics(self._client) if hasattr(self._client, "get_statistics") else None


class ManagerChunkStatistics:
    """What such a client counts."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def start(self) -> None:
        ability(self._client, "start_statistics")()

    def stop(self) -> None:
        ability(self._client, "stop_statistics")()

    def reset(self) -> None:
        ability(self._client, "reset_statistics")()

    def status(self) -> dict[str, Any]:
        return dict(ability(self._client, "get_statistics")())
