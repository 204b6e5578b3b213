"""How the node does: its main series over the chosen time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lmcache_frontend.pages.figures import DEFAULT_RANGE, Figures
from lmcache_frontend.pages.tabs import Tab, View
from lmcache_frontend.telemetry.history.ranges import RANGES
from lmcache_frontend.telemetry.history.series import SERIES, Series


@dataclass(frozen=True)
class Panel:
    """Series that belong in one picture; they have one unit."""

    title: str
    keys: tuple[str, ...]
    note: str = ""

    @property
    def unit(self) -> str:
        return SERIES[self.keys[0]].unit

    @property
    def series(self) -> tuple[Series, ...]:
        return tuple(SERIES[key] for key in self.keys)

    def word(self, series: Series) -> str:
        """What a series is called beside the others of its picture."""
        return _WORDS.get(series.key, series.title.rpartition(", ")[2]) if len(self.keys) > 1 else "Now"


_WORDS = {"lookup_hit_rate": "Of looked up", "hit_rate": "Of requested"}

PANELS = (
    Panel("Tokens", ("requested_tokens", "hit_tokens", "stored_tokens")),
    Panel("Hit rate", ("lookup_hit_rate", "hit_rate"), "of tokens"),
    Panel("Time to retrieve", ("retrieve_p50", "retrieve_p95", "retrieve_p99")),
    Panel("Time to store", ("store_p50", "store_p95", "store_p99")),
    Panel("Cache use", ("cpu_bytes", "disk_bytes", "remote_bytes")),
    Panel("Requests", ("retrieves", "stores", "lookups")),
    Panel("Load", ("load",), "seconds of retrieving and storing per second"),
    Panel("Evictions", ("evictions",)),
    Panel("Failures", ("failures",)),
    Panel("Unfinished requests", ("unfinished",)),
    Panel("Keys at the controller", ("controller_keys",)),
    Panel("Workers at the controller", ("controller_workers",)),
)


async def show(view: View) -> Mapping[str, object]:
    figures = Figures(view.request.app, view.query("range", DEFAULT_RANGE))
    key = (view.proxy, view.node.name)
    values, age = figures.of(*key)
    frame = figures.frame([name for name, series in SERIES.items() if not series.is_of_cluster], key)
    trends = {} if frame is None else frame.values
    panels = [panel for panel in PANELS if any(_is_known(trends.get(name)) for name in panel.keys)]
    return {
        "figures": figures,
        "panels": panels,
        "trends": trends,
        "values": values,
        "age": age,
        "ranges": tuple(RANGES),
    }


def _is_known(values: list[float | None] | None) -> bool:
    return values is not None and any(value is not None for value in values)


TAB = Tab("overview", "Overview", 0, show, refresh=5, topics="node,health")
