"""The seam: all that a handler may ask of a component, whatever engine stands behind it.

A component is one LMCache scheduler or worker. The embedded one (`lmcache_api.embedded`) needs nothing installed; a
running LMCache is one through `lmcache_api.bridge`. An ability that a component lacks is `None` here, and its
endpoints answer 503.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

from lmcache_shared.placement import Role
from lmcache_shared.settings import Settings

Category = Literal["common", "vllm"]
"""A folder of endpoints beside this file."""

Level = Literal["critical", "high", "medium", "low"]


@dataclass(frozen=True)
class Version:
    """What runs: `GET /lmc_version`, `/commit_id` and `/version`."""

    number: str
    commit: str
    whole: str
    """Both in one, as LMCache writes it: `0.5.6-g3e11e108`."""


class RunSummary(TypedDict):
    """What one run of a periodic thread did; times in Unix seconds and milliseconds."""

    timestamp: float
    duration_ms: float
    success: bool
    message: str
    extra_info: Mapping[str, str]


class PeriodicThreadStatus(TypedDict):
    """A periodic thread as LMCache tells it; times in seconds, `success_rate` in percent.

    It is active when it runs and its last run is less than three intervals ago.
    """

    name: str
    level: Level
    interval: float
    init_wait: float
    is_running: bool
    is_active: bool
    last_run_time: float
    last_run_ago: float | None
    total_runs: int
    failed_runs: int
    success_rate: float | None
    last_summary: RunSummary | None


class Metrics(Protocol):
    """A component's metrics. Both calls may take milliseconds and are made off the event loop."""

    def exposition(self) -> bytes:
        """Every family in the Prometheus text format."""

    def reset(self) -> None:
        """Set counters and histograms back to zero; gauges keep telling the present."""


class Component(Protocol):
    """One scheduler or worker."""

    @property
    def role(self) -> Role: ...

    @property
    def index(self) -> int:
        """0 for the scheduler, 1 + n for worker n: the offset of its port."""

    @property
    def settings(self) -> Settings: ...

    @property
    def version(self) -> Version: ...

    @property
    def metrics(self) -> Metrics: ...

    @property
    def script_adapter(self) -> object:
        """What a script of `/run_script` finds as `app.state.lmcache_adapter`."""

    def metadata(self) -> Mapping[str, Any] | None:
        """The engine's metadata (`worker_id`, `model_name`, `role`, …); `None` where there is no engine to tell of."""

    def periodic_threads(self) -> Sequence[PeriodicThreadStatus]:
        """The threads that do this component's recurring work, now."""
