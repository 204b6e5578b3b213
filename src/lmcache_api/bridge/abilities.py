"""What a manager or its engine may lack: another version of LMCache, or another role."""

from __future__ import annotations

from typing import Any

from lmcache_api.component import Unavailable


def ability(owner: Any, name: str) -> Any:
    """The attribute `name` of `owner`.

    Raises:
        Unavailable: it has none, or it is `None`.
    """
    found = getattr(owner, name, None)
    if found is None:
        raise Unavailable(f"{type(owner).__name__} has no {name}")
    return found
