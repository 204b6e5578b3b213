"""The seam: all that a handler may ask of a component, whatever engine stands behind it.

A component is one LMCache scheduler or worker. The embedded one (`lmcache_api.embedded`) needs nothing installed; a
running LMCache is one through `lmcache_api.bridge`. An ability that a component lacks is `None` here, and its
endpoints answer 503.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

from lmcache_shared.errors import OpsError
from lmcache_shared.placement import Role
from lmcache_shared.settings import Settings

Category = Literal["common", "vllm", "controller"]
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


@dataclass(frozen=True)
class Span:
    """Consecutive chunks that lie in the same backends: tokens `start` to `end`, without the last."""

    start: int
    end: int
    chunks: int
    locations: tuple[str, ...]


@dataclass(frozen=True)
class LayerInfo:
    """One layer of the paged KV cache, as LMCache tells it: `[2, 2, 256, 4, 16]`, `torch.float16`, `cpu`."""

    shape: tuple[int, ...]
    dtype: str
    device: str


@dataclass(frozen=True)
class LoadedChunks:
    """What came of loading chunk files: how many there are, how many were loaded, the keys of the first that failed."""

    loaded: int
    total: int
    failed_keys: Sequence[str]


class Unavailable(OpsError):
    """The component has the ability, but not this part of it, or not now; the text says what is missing."""


class LoadError(OpsError):
    """A configuration of chunk files cannot be used; the text says why."""


class Backends(Protocol):
    """The storage backends of an engine, by name (`LocalCPUBackend`)."""

    def classes(self) -> Mapping[str, str]:
        """The class of each, in the order in which chunks are looked up."""

    def create(self) -> Mapping[str, str]:
        """Make those that the settings ask for and that are not there; what was made."""

    def close(self, name: str) -> bool:
        """Close one and forget it; whether it was there."""

    def recreate(self, name: str) -> Mapping[str, str] | None:
        """Close one and make it again by the settings of now; what was made, or `None` when it was not there."""

    def bypassed(self) -> Sequence[str]:
        """Those that are neither stored to nor looked up in."""

    def set_bypass(self, name: str, bypass: bool) -> bool:
        """Bypass one, or no longer; whether it was bypassed before."""


class Engine(Protocol):
    """A cache engine. Calls may take time and are made off the event loop; what they raise is a failure of its own."""

    @property
    def backends(self) -> Backends | None: ...

    def store(self, tokens: Sequence[int]) -> None:
        """Keep the KV of these tokens."""

    def retrieve(self, tokens: Sequence[int]) -> int:
        """Bring the KV of the longest known prefix back into the paged KV cache; its tokens."""

    def lookup(self, tokens: Sequence[int]) -> Sequence[Span]:
        """Where the longest known prefix lies; nothing changes by asking."""

    def clear(self, locations: Sequence[str] | None) -> int:
        """Forget every chunk, or those in these backends; the tokens that were forgotten, of each backend."""

    def freeze(self, frozen: bool) -> None:
        """Frozen: stores are skipped, only local CPU serves, nothing is admitted or evicted."""

    def is_frozen(self) -> bool: ...

    def set_hot_cache(self, enabled: bool) -> None:
        """Disabling clears what it held."""

    def is_hot_cache_enabled(self) -> bool: ...

    def records_slots(self) -> bool:
        """Whether store and retrieve log their slot mapping."""

    def record_slots(self, enabled: bool) -> None: ...

    def load_chunks(self, config_path: str, max_chunks: int | None, max_failed_keys: int) -> LoadedChunks:
        """Bring the chunk files that a configuration names into local CPU.

        Raises:
            LoadError: the configuration cannot be used.
        """


class KVCaches(Protocol):
    """The paged KV cache of a worker: a tensor a layer."""

    def layers(self) -> Mapping[str, LayerInfo]:
        """Each layer by name, in the model's order; none, before the engine has registered them."""

    def slot_bytes(self, layer: str, slots: Sequence[int]) -> bytes:
        """The bytes of a layer at these slots, C-contiguous; bfloat16 widened to float32."""


class Lookup(Protocol):
    """A scheduler's lookup client or a worker's lookup server. The answers are LMCache's, `error` among it."""

    def info(self) -> Mapping[str, str]: ...

    def close(self) -> dict[str, Any]: ...

    def create(self, *, dryrun: bool) -> dict[str, Any]: ...

    def recreate(self) -> dict[str, Any]: ...


class ChunkStatistics(Protocol):
    """What a lookup client counts: how many chunks requests have, and how many of them are new."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def reset(self) -> None: ...

    def status(self) -> dict[str, Any]: ...


class LookupClient(Protocol):
    """A scheduler's lookup client."""

    def hits(self, tokens: Sequence[int]) -> Mapping[int, int | OSError]:
        """The tokens of the longest known prefix on each worker, or why it does not answer; nothing changes by asking.

        Raises:
            Unavailable: this client cannot be asked so.
        """

    @property
    def statistics(self) -> ChunkStatistics | None: ...


class SettingDefinition(TypedDict, total=False):
    """What is known of a setting beside its value; what is not known is left out.

    `type` is `bool`, `int`, `float`, `str`, `list` or `mapping`. `source` says where the value of now comes from:
    `default`, `configured` (file, environment, command line) or `running` (set by `POST /conf`).
    """

    type: str
    optional: bool
    default: Any
    mutable: bool
    help: str
    minimum: float | None
    maximum: float | None
    choices: Sequence[str]
    source: str


class Configuration(Protocol):
    """The settings that an operator may read and, as far as they are mutable, change (`/conf`)."""

    def definitions(self) -> Mapping[str, SettingDefinition]:
        """Of each setting what it takes, and whether it can be changed while the component runs."""

    def read(self, names: Sequence[str] | None) -> Mapping[str, Any]:
        """Those that exist of `names`, all when `None`."""

    def update(self, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        """Set what can be set: what each is now, and of the others why not."""


class Inference(Protocol):
    """The inference engine around the component."""

    def info(self) -> Mapping[str, Any]: ...

    def version(self) -> str:
        """vLLM's.

        Raises:
            Unavailable: there is none.
        """


class Controller(Protocol):
    """A cluster's controller: which workers there are, and operations on an instance's workers.

    Awaited in the server's loop, which no call blocks. The answers' fields are LMCache's.

    Raises:
        ControllerError: an instance or worker is not registered, or the operation is not possible.
    """

    async def key_stats(self) -> Mapping[str, Any]: ...

    async def workers(self, instance_id: str | None, worker_id: int | None) -> Mapping[str, Any]: ...

    async def report(self, report: WorkerReport, caller: str | None) -> Mapping[str, Any]:
        """A worker tells that it is there; `caller` is the address it calls from, `None` on a Unix socket."""

    async def leave(self, instance_id: str, worker_id: int, caller: str | None) -> None:
        """A worker tells that it goes; `caller` as in `report`."""

    async def operate(self, operation: Operation) -> Mapping[str, Any]: ...

    async def close(self) -> None:
        """End what goes on; the server stops."""


@dataclass(frozen=True)
class WorkerReport:
    """What a worker tells of itself; without a host it is where it calls from."""

    instance_id: str
    worker_id: int
    port: str
    key_count: int
    host: str | None = None


@dataclass(frozen=True)
class Operation:
    """An orchestration post: its name (`lookup`, `clear`, …) and its checked fields."""

    name: str
    fields: Mapping[str, Any]


class ControllerError(OpsError):
    """Why the controller does not do it, and the status that says so: 404 unknown, 501 not possible, 500 failed, …"""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


PART_OF_A_CALL = 0.9
"""A controller answers before the deadline of the call (`internal_api_server_call_seconds`)."""


def nobody_at(ip: str) -> str:
    """Why `query_instance` is a 404."""
    return f"no instance is registered at {ip[:256]}; GET /controller/workers lists the workers and their addresses"


class Component(Protocol):
    """One scheduler, worker or controller. An ability that it lacks is `None`."""

    @property
    def role(self) -> Role: ...

    @property
    def index(self) -> int:
        """0 for the scheduler, 1 + n for worker n: the offset of its port; -1 for a controller."""

    @property
    def settings(self) -> Settings: ...

    @property
    def version(self) -> Version: ...

    @property
    def metrics(self) -> Metrics: ...

    @property
    def script_adapter(self) -> object:
        """What a script of `/run_script` finds as `app.state.lmcache_adapter`."""

    @property
    def engine(self) -> Engine | None: ...

    @property
    def kv_caches(self) -> KVCaches | None: ...

    @property
    def lookup(self) -> Lookup | None: ...

    @property
    def lookup_client(self) -> LookupClient | None: ...

    @property
    def configuration(self) -> Configuration: ...

    @property
    def controller(self) -> Controller | None: ...

    @property
    def inference(self) -> Inference | None: ...

    def metadata(self) -> Mapping[str, Any] | None:
        """The engine's metadata (`worker_id`, `model_name`, `role`, …); `None` where there is no engine to tell of."""

    def periodic_threads(self) -> Sequence[PeriodicThreadStatus]:
        """The threads that do this component's recurring work, now."""
