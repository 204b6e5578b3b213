"""Settings as a form shows and takes them: what is known of each, and the value that a text stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmcache_frontend.pages.reading import is_deep, listed, number, record, text
from lmcache_shared.secrets import MASK

NOT_SET = "not set"


@dataclass(frozen=True)
class Setting:
    """A setting of a node.

    Attributes:
        told: what the node says of it beside its value (`/conf/definitions`); empty when it says nothing.
    """

    name: str
    value: Any
    told: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """Its type; told, or else that of its value."""
        if self.told.get("type"):
            return str(self.told["type"])
        kinds = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "mapping"}
        return kinds.get(type(self.value), "")

    @property
    def is_optional(self) -> bool:
        return bool(self.told.get("optional", not self.told and self.value is None))

    @property
    def is_secret(self) -> bool:
        return bool(self.value == MASK)

    @property
    def is_mutable(self) -> bool:
        """Of one that the node says nothing of it is tried."""
        return bool(self.told.get("mutable", True)) and not self.is_secret

    @property
    def knows_default(self) -> bool:
        return "default" in self.told

    @property
    def is_changed(self) -> bool:
        if not self.knows_default:
            return False
        return self.told.get("source") != "default" if self.is_secret else self.value != self.told["default"]

    @property
    def help(self) -> str:
        return text(self.told.get("help")).replace("`", "")

    @property
    def choices(self) -> list[str]:
        """What a menu offers, when there is one: for lists of choices there is none."""
        if self.kind == "bool":
            return ["true", "false"]
        return [text(it) for it in listed(self.told.get("choices"))] if self.kind == "str" else []

    @property
    def limits(self) -> str:
        least, most = number(self.told.get("minimum")), number(self.told.get("maximum"))
        if least is not None and most is not None:
            return f"{least:,g} to {most:,.15g}"
        if least is not None:
            return f"{least:,g} or more"
        return f"at most {most:,.15g}" if most is not None else ""

    @property
    def what(self) -> str:
        """What it takes, in a line."""
        kinds = {"bool": "yes or no", "int": "whole number", "float": "number", "str": "text"}
        said = kinds.get(self.kind, {"list": "list, as JSON", "mapping": "object, as JSON"}.get(self.kind, ""))
        return ", ".join(part for part in (said, self.limits, "empty: not set" if self.is_optional else "") if part)

    @property
    def field(self) -> str:
        """Its value as a form has it."""
        return written(self.value)

    @property
    def shown(self) -> str:
        return shown(self.value)

    @property
    def default(self) -> str:
        return shown(self.told.get("default"))

    def taken(self, given: str) -> tuple[Any, str]:
        """The value that a text stands for, and why it is none."""
        given = given.strip() if self.kind != "str" else given
        if given == "" and (self.is_optional or self.value is None):
            return None, ""
        if self.kind == "bool":
            return (
                (given == "true", "") if given in ("true", "false") else (None, f"{given!r} is neither true nor false")
            )
        if self.kind in ("int", "float"):
            return self._number(given)
        if self.kind in ("list", "mapping"):
            return self._structure(given)
        if self.choices and given not in self.choices:
            return None, f"{given[:100]!r} is none of {', '.join(self.choices)}"
        return given, ""

    def _number(self, given: str) -> tuple[Any, str]:
        try:
            value = int(given) if self.kind == "int" else float(given)
        except ValueError:
            return None, f"{given[:100]!r} is no {'whole number' if self.kind == 'int' else 'number'}"
        least, most = number(self.told.get("minimum")), number(self.told.get("maximum"))
        if (least is not None and value < least) or (most is not None and value > most):
            return None, f"{given[:100]} is out of range ({self.limits})"
        return value, "" if number(value) is not None else f"{given[:100]!r} is no number"

    def _structure(self, given: str) -> tuple[Any, str]:
        wanted: type = list if self.kind == "list" else dict
        try:
            value = json.loads(given)
        except (ValueError, RecursionError):
            value = [it.strip() for it in given.split(",")] if wanted is list and not given.startswith("[") else None
        if not isinstance(value, wanted) or is_deep(value):
            example = '["a", "b"]' if wanted is list else '{"name": "value"}'
            return None, f"{given[:100]!r} is no {self.kind}; write it as {example}"
        return value, ""


def settings_of(values: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[Setting]:
    """The settings in the node's order."""
    return [Setting(name, value, record(definitions.get(name))) for name, value in values.items()]


def written(value: object) -> str:
    """A value as a field of a form has it."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shown(value: object) -> str:
    """A value as people read it."""
    return NOT_SET if value is None else '""' if value == "" else text(value)
