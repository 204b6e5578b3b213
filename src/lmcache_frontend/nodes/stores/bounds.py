"""How much a store keeps and believes: what it writes it can read again, and what others wrote is not trusted."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from lmcache_frontend.nodes.stores import Change, StoreAway, Unkeepable

logger = logging.getLogger(__name__)

MAX_RECORDS = 20_000
"""Most records, and most reports, of one store; the registry's own limits lie below."""

MAX_KEY_BYTES = 4 << 10
MAX_VALUE_BYTES = 64 << 10
MAX_TOTAL_BYTES = 64 << 20
"""For all records together; a store that holds more is not read."""


def size(text: str) -> int | None:
    """Its length in UTF-8; `None` when it is no text that can be kept."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None


def refuse_unkeepable(description: str, texts: Iterable[tuple[str, str | None]]) -> None:
    """Refuse keys and values that could not be read again.

    Raises:
        Unkeepable: one is too long, empty, or no Unicode.
    """
    for key, value in texts:
        key_size, value_size = size(key), size(value or "")
        if not key_size or value_size is None:
            raise Unkeepable(f"{description}: a key or value is empty or no Unicode")
        if key_size > MAX_KEY_BYTES or value_size > MAX_VALUE_BYTES:
            raise Unkeepable(
                f"{description}: a record may have {MAX_KEY_BYTES} bytes of key and {MAX_VALUE_BYTES} of value;"
                " this one is larger"
            )


def refuse_unkeepable_changes(description: str, changes: Sequence[Change]) -> None:
    """As `refuse_unkeepable`, and no key may come twice: which of its changes is first would count.

    Raises:
        Unkeepable: the changes cannot be kept.
    """
    refuse_unkeepable(description, ((change.key, change.after) for change in changes))
    if len({change.key for change in changes}) < len(changes):
        raise Unkeepable(f"{description}: two changes of one record at once")


def growth(changes: Sequence[Change]) -> int:
    """How many records there are more afterwards."""
    return sum((change.after is not None) - (change.before is not None) for change in changes)


def too_many(description: str) -> StoreAway:
    return StoreAway(f"{description}: holds {MAX_RECORDS} records and takes no more; remove some first")


class Readable:
    """Turns what a store holds into texts, and skips what cannot be one. The log tells when the number changes."""

    def __init__(self, description: str, what: str) -> None:
        self._description = description
        self._what = what
        self._skipped = 0

    def texts(self, pairs: Iterable[tuple[object, object]], skipped: int = 0) -> dict[str, str]:
        """The pairs that are UTF-8 within bounds; `skipped` others were left out before."""
        found = {}
        for key, value in pairs:
            try:
                found[_text(key, MAX_KEY_BYTES)] = _text(value, MAX_VALUE_BYTES)
            except ValueError:
                skipped += 1
        if skipped != self._skipped:
            self._skipped = skipped
            logger.warning(
                "%s: %d %s are skipped: too large or no text, nobody here wrote them",
                self._description, skipped, self._what,
            )  # fmt: skip
        return found


def _text(value: object, limit: int) -> str:
    if not isinstance(value, bytes) or len(value) > limit:
        raise ValueError("no bytes, or too many")
    return value.decode()
