"""LMCache's configuration object, read and set through its own definitions, converters and checks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lmcache_api.component import SettingDefinition, Unavailable
from lmcache_api.definitions import of_lmcache, of_ours
from lmcache_shared.settings import DEFINITIONS, EXTRA, Settings

CLOSED = frozenset(
    {
        "run_script_api_enabled",
        "script_allowed_imports",
        "storage_plugins",
        "remote_storage_plugins",
        "runtime_plugin_locations",
    }
)
"""What may not be set over HTTP: who starts the process decides which code runs in it."""

_NAMES_CODE = ("module_path", "class_name")
"""Ends of the keys of `extra_config` that name a plugin's code."""


class HostConfiguration:
    """The configuration that the manager holds."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def definitions(self) -> Mapping[str, SettingDefinition]:
        rows = self._definitions()
        return {
            name: of_lmcache(row, mutable=name not in CLOSED and bool(row.get("mutable", True)))
            for name, row in rows.items()
            if not name.startswith("_")
        }

    def read(self, names: Sequence[str] | None) -> Mapping[str, Any]:
        wanted = self._definitions() if names is None else names
        found = {name: getattr(self._config, name, _MISSING) for name in wanted if not name.startswith("_")}
        return {name: value for name, value in found.items() if value is not _MISSING and not callable(value)}

    def update(self, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        definitions = self._definitions()
        base = sys.modules.get("lmcache.v1.config_base")
        set_value = getattr(base, "validate_and_set_config_value", None)
        updated: dict[str, Any] = {}
        errors: dict[str, str] = {}
        for name, value in values.items():
            if name in CLOSED or not definitions.get(name, {}).get("mutable", True):
                errors[name] = "Config is not mutable at runtime"
            elif name not in definitions:
                errors[name] = "Unknown config"
            elif set_value is not None and set_value(self._config, name, self._with_ours(name, value)):
                updated[name] = getattr(self._config, name)
            else:
                errors[name] = "Failed to set config value"
        return updated, errors

    def _with_ours(self, name: str, value: Any) -> Any:
        """A new `extra_config` in which what is not mutable (settings of ours, names of code) is as it is now."""
        if name != EXTRA or not isinstance(value, Mapping | None):
            return value
        held = getattr(self._config, EXTRA, None) or {}
        ours = {key for key, row in DEFINITIONS.items() if row.section == EXTRA and not row.engine and not row.mutable}
        kept = {key: inner for key, inner in held.items() if key in ours or str(key).endswith(_NAMES_CODE)}
        rest = {
            key: inner for key, inner in (value or {}).items() if key not in ours and not str(key).endswith(_NAMES_CODE)
        }
        return {**rest, **kept} or value

    def _definitions(self) -> Mapping[str, Mapping[str, Any]]:
        module = sys.modules.get("lmcache.v1.config")
        definitions: Mapping[str, Mapping[str, Any]] | None = getattr(module, "_CONFIG_DEFINITIONS", None)
        if definitions is None:
            raise Unavailable("this process has not loaded LMCache's definitions of its settings")
        return definitions


class ControllerConfiguration:
    """LMCache's configuration of its controller, and what of ours it has. All of it is read at the start alone."""

    def __init__(self, config: Any, settings: Settings) -> None:
        module = sys.modules.get("lmcache.v1.cache_controller.config")
        theirs = getattr(module, "_CONTROLLER_CONFIG_DEFINITIONS", {})
        ours = {name: getattr(settings, name) for name in DEFINITIONS if name.startswith("controller_")}
        self._values = {**ours, **{name: getattr(config, name) for name in theirs if hasattr(config, name)}}
        self._told: dict[str, SettingDefinition] = {
            name: {**of_ours(DEFINITIONS[name]), "mutable": False} for name in ours
        }
        self._told.update(
            {name: of_lmcache(row, mutable=False) for name, row in theirs.items() if name in self._values}
        )

    def definitions(self) -> Mapping[str, SettingDefinition]:
        return self._told

    def read(self, names: Sequence[str] | None) -> Mapping[str, Any]:
        return {name: value for name, value in self._values.items() if names is None or name in names}

    def update(self, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        unknown = "Unknown config"
        fixed = "Config is not mutable at runtime"
        return {}, {name: fixed if name in self._values else unknown for name in values}


_MISSING = object()
