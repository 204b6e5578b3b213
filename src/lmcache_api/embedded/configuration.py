"""The embedded component's settings while it runs: read, and changed where they are mutable."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lmcache_api.component import SettingDefinition
from lmcache_api.definitions import of_ours
from lmcache_shared.config import convert
from lmcache_shared.errors import ConfigError
from lmcache_shared.placement import Role
from lmcache_shared.settings import DEFINITIONS, EXTRA, FileMode, Settings


class EmbeddedConfiguration:
    """Holds the settings of now; a change replaces them as a whole, so that no reader sees half of it."""

    def __init__(self, settings: Settings, role: Role = "worker") -> None:
        self._settings = settings
        self._role = role
        self._changed: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    @property
    def settings(self) -> Settings:
        return self._settings

    def definitions(self) -> Mapping[str, SettingDefinition]:
        settings, changed = self._settings, self._changed
        found: dict[str, SettingDefinition] = {}
        for name, row in DEFINITIONS.items():
            if row.engine and self._role == "controller":
                continue
            value = getattr(settings, name)
            is_given = name in settings.given or value != row.default
            source = "running" if name in changed else "configured" if is_given else "default"
            mutable = row.mutable and row.only in (None, self._role)
            found[name] = {**of_ours(row), "default": _told(row.default, name), "mutable": mutable, "source": source}
        return found

    def read(self, names: Sequence[str] | None) -> Mapping[str, Any]:
        settings = self._settings
        values = {
            name: _told(getattr(settings, name), name)
            for name, row in DEFINITIONS.items()
            if not row.engine or self._role != "controller"  # which has no engine
        }
        extra = values[EXTRA]
        if extra:
            values[EXTRA] = {name: values.get(name, value) for name, value in extra.items()}
        values = {**settings.unknown, **values}
        return values if names is None else {name: values[name] for name in names if name in values}

    def update(self, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        changes: dict[str, Any] = {}
        errors: dict[str, str] = {}
        for name, value in values.items():
            row = DEFINITIONS.get(name)
            if row is None:
                unused = name in self._settings.unknown
                errors[name] = "Config is not used by the embedded engine" if unused else "Unknown config"
            elif not row.mutable:
                errors[name] = "Config is not mutable at runtime"
            else:
                try:
                    converted = convert(value, row, name)
                except ConfigError as error:
                    errors[name] = f"Failed to set config value: {error}"
                    continue
                if row.only in (None, self._role):
                    changes[name] = converted
                else:
                    errors[name] = f"Config is not used by a {self._role}; set it on the {row.only}"
        with self._lock:
            self._settings = replace(self._settings, **changes)
            self._changed |= changes.keys()
        return changes, errors


def _told(value: Any, name: str) -> Any:
    return f"{value:04o}" if DEFINITIONS[name].kind == FileMode else value
