"""What levels loggers had before this frontend changed them: no node tells, and whoever looks wants them back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from aiohttp import web

MAX_NODES = 1000
MAX_LOGGERS = 500
"""Of one node; what is changed past this is not remembered."""


class ChangedLevels:
    """Remembers the first level of each logger that was changed here, until it has it again."""

    def __init__(self) -> None:
        self._was: OrderedDict[tuple[str, str], dict[str, str]] = OrderedDict()

    def note(self, node: tuple[str, str], logger: str, was: str) -> None:
        """A logger that had this level gets another one."""
        known = self._was.setdefault(node, {})
        self._was.move_to_end(node)
        if len(known) < MAX_LOGGERS:
            known.setdefault(logger, was)
        while len(self._was) > MAX_NODES:
            self._was.popitem(last=False)

    def of(self, node: tuple[str, str], levels: Mapping[str, str]) -> dict[str, str]:
        """What was of a node's loggers, now that they have these levels; what is as it was is forgotten."""
        known = self._was.get(node, {})
        for name in [name for name, was in known.items() if levels.get(name, "NOTSET") == was]:
            del known[name]
        return dict(known)


CHANGED_LEVELS: web.AppKey[ChangedLevels] = web.AppKey("changed levels", ChangedLevels)
