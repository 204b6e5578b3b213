"""How the node does: its main series over the chosen time."""

from __future__ import annotations

from collections.abc import Mapping

from lmcache_frontend.pages.tabs import Tab, View


async def show(view: View) -> Mapping[str, object]:
    return {}


TAB = Tab("overview", "Overview", 0, show, refresh=5)
