"""What the overview names first: what is down, what stands out among its like, what is slow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from lmcache_frontend.nodes.node import Node
from lmcache_frontend.pages.attention import MINUTE_SLOTS, Attention, attention
from lmcache_frontend.pages.figures import Figures
from lmcache_frontend.pages.listing import Row
from lmcache_frontend.telemetry.health.states import NodeHealth, State
from lmcache_shared.address import TcpAddress

Key = tuple[str, str]
Values = Sequence[float | None]


class Past:
    """Figures of which the last minute is known."""

    def __init__(self, **series: Mapping[str, Values]) -> None:
        self._series = series

    def sparklines(self, series: str, keys: Iterable[Key], points: int) -> Mapping[Key, Values]:
        assert points == MINUTE_SLOTS
        told = self._series.get(series, {})
        return {key: told[key[1]] for key in keys if key[1] in told}


def row(name: str, state: State = "up", role: str = "worker", problem: str | None = None) -> Row:
    node = Node(name, "h", 1, TcpAddress("h", 1))
    return Row(NodeHealth(node, "p", state, role=role, problem=problem), False, {})


def found(rows: Sequence[Row], **series: Mapping[str, Values]) -> Sequence[Attention]:
    return attention(now(rows, **series), cast(Figures, Past(**series))).named


def now(rows: Sequence[Row], **series: Mapping[str, Values]) -> list[Row]:
    """With the newest of their values."""
    return [replace(row, figures={key: it.get(row.name, [None])[-1] for key, it in series.items()}) for row in rows]


WORKERS = [row(f"w{i}") for i in range(6)]


def of_workers(*values: float | None) -> Mapping[str, Values]:
    return {f"w{i}": [value] * MINUTE_SLOTS for i, value in enumerate(values)}


def test_a_worker_that_retrieves_slower_than_the_others_is_named_with_the_reason() -> None:
    (it,) = found(WORKERS, retrieve_p95=of_workers(0.01, 0.01, 0.012, 0.01, 0.24, 0.01))
    assert (it.row.name, it.chart) == ("w4", "chart-retrieve_p50")
    assert it.why == "Retrieve p95 240 ms: 24 times the median of 6 workers"
    (it,) = found(WORKERS, lookup_hit_rate=of_workers(0.8, 0.8, 0.1, 0.8, 0.8, 0.8))
    assert (it.row.name, it.why) == ("w2", "Hit rate 10.0 %: the median of 6 workers is 80.0 %")


def test_what_is_no_alarm() -> None:
    assert not found(WORKERS, retrieve_p95=of_workers(0.001, 0.001, 0.001, 0.001, 0.001, 0.015)), "fast for everybody"
    assert not found(WORKERS, retrieve_p95=of_workers(0.1, 0.1, 0.1, 0.1, 0.1, 0.25)), "not that far off"
    assert not found(WORKERS[:3], retrieve_p95=of_workers(0.01, 0.01, 1.0)), "too few to stand out among"
    once = {**of_workers(*[0.01] * 6), "w1": [0.01] * 7 + [5.0] * 5}
    assert not found(WORKERS, retrieve_p95=once), "a few odd intervals"
    hardly = {**of_workers(*[0.01] * 6), "w1": [None] * 10 + [5.0] * 2}
    assert not found(WORKERS, retrieve_p95=hardly), "it has hardly told anything"
    assert not found(WORKERS, lookup_hit_rate=of_workers(0.05, 0.05, 0.0, 0.05, 0.05, 0.05)), "nobody finds much"
    mixed = [*WORKERS[:5], row("w5", role="scheduler")]
    assert not found(mixed, retrieve_p95=of_workers(0.01, 0.01, 0.01, 0.01, 0.01, 1.0)), "another role is no like"


def test_each_kind_is_named_and_the_rest_is_counted() -> None:
    down = [row(f"d{i}", "down", problem="Connection refused") for i in range(10)]
    slow = [row("s0", "slow", problem="answered after 1.4 seconds"), row("s1")]
    slow[1] = replace(slow[1], health=replace(slow[1].health, failures=1, problem="reset"))
    series = of_workers(0.01, 0.01, 0.01, 0.01, 0.01, 1.0)
    told = attention(now([*WORKERS, *slow, *down], retrieve_p95=series), cast(Figures, Past(retrieve_p95=series)))
    assert [it.row.name for it in told.named] == ["d0", "d1", "d2", "w5", "s0", "s1"]
    assert told.more == 7
    assert not attention(WORKERS, cast(Figures, Past())).named


def test_a_node_stands_once_with_what_is_farthest_off() -> None:
    rows = [*WORKERS[:5], row("w5", "slow", problem="answered late")]
    (it,) = found(
        rows,
        retrieve_p95=of_workers(0.01, 0.01, 0.01, 0.01, 0.01, 0.1),
        store_p95=of_workers(0.01, 0.01, 0.01, 0.01, 0.01, 1.0),
    )
    assert it.why.startswith("Store p95 1 s: 100 times")
