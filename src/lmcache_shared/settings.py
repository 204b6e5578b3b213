"""Every setting of an LMCache component that these programs use: name, type, default, limits and help, once.

The names without a section are LMCache's own (`lmcache.yaml`). Those of the section `extra_config` are ours: LMCache
drops top-level keys that it does not know, but hands `extra_config` on, so one file serves both programs, also inside
vLLM. The command line, the checks, `docs/configuration.md` and the environment names all come from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

EXTRA = "extra_config"
"""The free-form section of `lmcache.yaml` in which our own settings stand."""

ENV_PREFIX = "LMCACHE_"

OLDER_NAMES: Mapping[str, str] = {"plugin_locations": "runtime_plugin_locations"}
"""Names that LMCache used before, and what they are called now."""

BACKENDS = ("LocalCPUBackend", "LocalDiskBackend")
"""The storage backends of the embedded engine."""

FileMode = Annotated[int, "a file mode"]
"""Permission bits; written as an octal text such as `"0660"`."""


def setting(
    default: Any,
    help: str,
    *,
    section: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    engine: bool = False,
    mutable: bool = False,
    only: str | None = None,
) -> Any:
    """A field of a settings class.

    Args:
        default: what it is when no source sets it.
        help: what it is for, in a sentence.
        section: where it stands in the file, the top level when `None`.
        minimum: the smallest number that is taken.
        maximum: the largest.
        choices: the only texts that are taken.
        engine: the engine's, not the server's. A running LMCache has read and checked it by itself.
        mutable: the embedded engine takes a new value while it runs (`POST /conf`).
        only: the one role that uses it, `scheduler` or `worker`; `None` for all.
    """
    metadata = {
        "help": help,
        "section": section,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "engine": engine,
        "mutable": mutable,
        "only": only,
    }
    return dataclasses.field(default=default, metadata=metadata)


def engine_setting(default: Any, help: str, **more: Any) -> Any:
    """A `setting` of the engine."""
    return setting(default, help, engine=True, **more)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one LMCache deployment, checked. `given` tells which of them the operator set."""

    internal_api_server_enabled: bool = setting(False, "Serve the internal API.")
    internal_api_server_host: str = setting("127.0.0.1", "The host to listen on, when no socket prefix is set.")
    internal_api_server_port_start: int = setting(
        6999, "The scheduler's port; worker n has this plus 1 + n.", minimum=1, maximum=65535
    )
    internal_api_server_include_index_list: list[int] | None = setting(
        None, "Which components serve: 0 is the scheduler, 1 + n is worker n. Unset or empty: all.", minimum=0
    )
    internal_api_server_socket_path_prefix: str | None = setting(
        None, "Listen on the Unix socket `<prefix>_<port>` and on no port."
    )
    lmcache_instance_id: str | None = setting(
        None, "The name of this deployment; the names of its nodes begin with it."
    )
    runtime_plugin_locations: list[str] | None = setting(
        None, "Files or folders that LMCache starts as plugin processes; `plugin_locations` is its older name."
    )
    run_script_api_enabled: bool = setting(False, "Serve `POST /run_script`, which runs the caller's Python code.")
    script_allowed_imports: list[str] | None = setting(None, "The modules that such a script may import.")
    extra_config: Mapping[str, Any] | None = setting(None, "Free-form settings; those of this table stand in it too.")

    internal_api_server_access_log: bool = setting(False, "Log one line for each request.", section=EXTRA)
    internal_api_server_socket_mode: FileMode = setting(
        0o660, "The permissions of a Unix socket; who may write to it may connect.", section=EXTRA, maximum=0o777
    )
    internal_api_server_drain_seconds: float = setting(
        5.0, "How long requests in flight may take when the server stops.", section=EXTRA, minimum=0, maximum=300
    )
    internal_api_server_call_seconds: float = setting(
        30.0, "How long one request may wait for the component before it is a 504.", section=EXTRA, minimum=0.01,
        maximum=3600, mutable=True,
    )  # fmt: skip
    internal_api_server_max_tokens: int = setting(
        1 << 20, "The most tokens or slots that one request may name.", section=EXTRA, minimum=1, maximum=1 << 26,
        mutable=True,
    )  # fmt: skip
    internal_api_server_route_folders: list[str] | None = setting(
        None, "Folders whose `*_api.py` files are served too.", section=EXTRA
    )
    internal_api_server_env_mask: list[str] | None = setting(
        None, "Names to mask in `/env` and `/conf` beside the built-in rule; `*` stands for any text.",
        section=EXTRA,
    )  # fmt: skip
    internal_api_server_allow_host: list[str] | None = setting(
        None, "Names by which browsers ask for this server, such as `*.example.com`, beside addresses and names of no"
        " public DNS; where it is set it holds for programs too.", section=EXTRA,
    )  # fmt: skip
    internal_api_server_token: str | None = setting(
        None, "An admin's token, of 16 characters or more, for callers on other machines.", section=EXTRA
    )
    internal_api_server_token_file: str | None = setting(
        None, "A file of tokens: name, role and sha256 of each (docs/security.md).", section=EXTRA
    )
    internal_api_server_trust_local: bool = setting(
        True, "Callers on this machine are admins; if not, they need a token too.", section=EXTRA
    )
    internal_api_server_viewers: str = setting(
        "open", "Who on other machines may look: everybody, or who has a token.", section=EXTRA,
        choices=("open", "token"),
    )  # fmt: skip
    internal_api_server_auth: bool = setting(
        True, "Ask callers on other machines for a token before they change something; if not, whoever reaches the"
        " server may do everything.", section=EXTRA,
    )  # fmt: skip
    run_script_max_bytes: int = setting(
        1048576, "The largest script that is taken, in bytes.", section=EXTRA, minimum=1, maximum=67108864
    )
    run_script_seconds: float = setting(
        30.0, "How long a script may run before it is stopped.", section=EXTRA, minimum=0.01, maximum=3600
    )

    chunk_size: int = engine_setting(256, "Tokens in a chunk.", minimum=16, maximum=65536)
    local_cpu: bool = engine_setting(
        True,
        "Keep chunks in memory, the hot cache; a new value counts when LocalCPUBackend is made again.",
        mutable=True,
        only="worker",
    )
    max_local_cpu_size: float = engine_setting(
        5.0, "The memory for chunks, in GiB; a new value counts when LocalCPUBackend is made again.",
        minimum=0, maximum=65536, mutable=True, only="worker",
    )  # fmt: skip
    local_disk: str | None = engine_setting(
        None, "The folder for chunks on disk, as a path or `file://` URL; several by comma are shared out among the"
        " workers. A new value counts when LocalDiskBackend is made again.", mutable=True, only="worker",
    )  # fmt: skip
    max_local_disk_size: float = engine_setting(
        0.0, "The disk space for chunks, in GiB; a new value counts when LocalDiskBackend is made again.",
        minimum=0, maximum=1 << 24, mutable=True, only="worker",
    )  # fmt: skip
    save_unfull_chunk: bool = engine_setting(False, "Store the last tokens of a request that fill no whole chunk too.")
    save_decode_cache: bool = engine_setting(False, "Store what the model generates too.", mutable=True, only="worker")
    store_location: str | None = engine_setting(
        None, "Store into this backend alone.", choices=BACKENDS, mutable=True, only="worker"
    )
    retrieve_locations: list[str] | None = engine_setting(
        None, "Look chunks up in these backends alone.", choices=BACKENDS, mutable=True, only="worker"
    )
    min_retrieve_tokens: int = engine_setting(
        0,
        "Compute anew instead of retrieving when fewer tokens than this are found.",
        minimum=0,
        mutable=True,
        only="worker",
    )
    pre_caching_hash_algorithm: str = engine_setting(
        "builtin", "The hash of a chunk's key: `sha256`, or for every other value blake2b."
    )
    lookup_timeout_ms: int = engine_setting(
        3000, "How long the scheduler waits for a worker's answer to a lookup.", minimum=1, maximum=600000,
        mutable=True, only="scheduler",
    )  # fmt: skip
    pin_timeout_sec: int = engine_setting(
        300,
        "How long a lookup may hold chunks in memory before they are let go.",
        minimum=1,
        mutable=True,
        only="worker",
    )
    pin_check_interval_sec: int = engine_setting(30, "How often that is looked at.", minimum=1, maximum=86400)
    enable_chunk_statistics: bool = engine_setting(
        False,
        "Give the lookup client chunk statistics; a new value counts when it is made again.",
        mutable=True,
        only="scheduler",
    )
    chunk_statistics_auto_start_statistics: bool = engine_setting(
        False, "Start them with the lookup client.", mutable=True, only="scheduler"
    )
    chunk_statistics_auto_exit_timeout_hours: float = engine_setting(
        0.0, "Stop them after so many hours; 0: never.", minimum=0, mutable=True, only="scheduler"
    )
    chunk_statistics_auto_exit_target_unique_chunks: int = engine_setting(
        0, "Stop them after so many different chunks; 0: never.", minimum=0, mutable=True, only="scheduler"
    )
    chunk_statistics_mem_bf_expected_chunks: int = engine_setting(
        1 << 20, "How many different chunks the statistics are sized for.", section=EXTRA, minimum=1, maximum=1 << 25,
        mutable=True, only="scheduler",
    )  # fmt: skip
    chunk_statistics_mem_bf_false_positive_rate: float = engine_setting(
        0.01, "How often they may take a new chunk for a known one.", section=EXTRA, minimum=0.0001, maximum=0.5,
        mutable=True, only="scheduler",
    )  # fmt: skip

    engine_model_name: str = engine_setting("standalone_model", "The name of the model.", section=EXTRA)
    engine_layers: int = engine_setting(2, "Layers of its KV cache.", section=EXTRA, minimum=1, maximum=1024)
    engine_heads: int = engine_setting(4, "KV heads of a layer; 1 with MLA.", section=EXTRA, minimum=1, maximum=1024)
    engine_head_size: int = engine_setting(16, "Numbers in a head.", section=EXTRA, minimum=1, maximum=65536)
    engine_dtype: str = engine_setting(
        "float16", "The type of a number.", section=EXTRA, choices=("float16", "bfloat16", "float32", "uint8")
    )
    engine_use_mla: bool = engine_setting(
        False, "One latent vector a token (MLA) instead of keys and values (MHA).", section=EXTRA
    )
    engine_blocks: int = engine_setting(2, "Blocks of the paged KV cache.", section=EXTRA, minimum=1, maximum=1 << 20)
    engine_block_size: int = engine_setting(256, "Slots of a block.", section=EXTRA, minimum=1, maximum=65536)
    engine_hash_salt: str = engine_setting(
        "", "Goes into every chunk's key: caches of different salts share nothing.", section=EXTRA
    )
    engine_load: float = engine_setting(
        0.0, "Requests a second of made-up conversations that keep the embedded engine busy; 0: none.",
        section=EXTRA, minimum=0, maximum=100, mutable=True, only="scheduler",
    )  # fmt: skip

    enable_controller: bool = engine_setting(False, "Register the workers with the controller.")
    controller_port: int = setting(
        9000, "The controller's port; with a socket prefix it listens on the Unix socket `<prefix>_<port>`.",
        section=EXTRA, minimum=1, maximum=65535,
    )  # fmt: skip
    controller_address: str | None = setting(
        None, "Where embedded workers find the controller: `host:port` or the path of a Unix socket; unset: where these"
        " settings put it.", section=EXTRA,
    )  # fmt: skip
    controller_worker_seconds: float = setting(
        10.0, "The controller forgets a worker that has not reported for so long; they report three times as often.",
        section=EXTRA, minimum=0.1, maximum=3600,
    )  # fmt: skip
    controller_answer_seconds: float = setting(
        5.0, "How long an operation of the controller waits for the workers before it answers with those that are"
        " done.", section=EXTRA, minimum=0.01, maximum=3600,
    )  # fmt: skip
    controller_operation_seconds: float = setting(
        60.0, "How long it goes on waiting for the others, as an event that `/check_finish` follows.", section=EXTRA,
        minimum=0.01, maximum=3600,
    )  # fmt: skip

    unknown: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the sources hold beyond this table, as it was found: LMCache's other settings."""

    given: frozenset[str] = frozenset()
    """The names of this table that a source set."""


@dataclass(frozen=True)
class Definition:
    """One row of the table: what a source may call it, what it takes, and what it is for."""

    name: str
    kind: Any
    default: Any
    help: str
    section: str | None
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    engine: bool
    mutable: bool
    only: str | None

    @property
    def env_name(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def key_path(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name


def definitions_of(model: type) -> dict[str, Definition]:
    """The rows of a settings class by name, in its order."""
    hints = get_type_hints(model, include_extras=True)
    return {
        field.name: Definition(
            field.name,
            hints[field.name],
            field.default,
            field.metadata["help"],
            field.metadata["section"],
            *(field.metadata[key] for key in ("minimum", "maximum", "choices", "engine", "mutable", "only")),
        )
        for field in dataclasses.fields(model)
        if "help" in field.metadata
    }


DEFINITIONS: Mapping[str, Definition] = definitions_of(Settings)
