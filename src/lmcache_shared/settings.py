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

FileMode = Annotated[int, "a file mode"]
"""Permission bits; written as an octal text such as `"0660"`."""


def setting(
    default: Any, help: str, *, section: str | None = None, minimum: float | None = None, maximum: float | None = None
) -> Any:
    """A field of a settings class: its default, what it is for, where it stands, and its limits."""
    metadata = {"help": help, "section": section, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=metadata)


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
        maximum=3600,
    )  # fmt: skip
    internal_api_server_route_folders: list[str] | None = setting(
        None, "Folders whose `*_api.py` files are served too.", section=EXTRA
    )
    internal_api_server_env_mask: list[str] | None = setting(
        None, "Names of environment variables to mask in `/env` beside the built-in rule; `*` stands for any text.",
        section=EXTRA,
    )  # fmt: skip
    run_script_max_bytes: int = setting(
        1048576, "The largest script that is taken, in bytes.", section=EXTRA, minimum=1, maximum=67108864
    )
    run_script_seconds: float = setting(
        30.0, "How long a script may run before it is stopped.", section=EXTRA, minimum=0.01, maximum=3600
    )

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
            field.metadata["minimum"],
            field.metadata["maximum"],
        )
        for field in dataclasses.fields(model)
        if "help" in field.metadata
    }


DEFINITIONS: Mapping[str, Definition] = definitions_of(Settings)
