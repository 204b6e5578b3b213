"""What is told of a setting beside its value (`/conf/definitions`): from our table, or from LMCache's."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from lmcache_api.component import SettingDefinition
from lmcache_shared.settings import Definition, FileMode

MAX_HELP = 1000
"""Characters of a help text that is not ours."""


def of_ours(row: Definition) -> SettingDefinition:
    """A row of our table."""
    kind, optional = _type_of(str if row.kind == FileMode else row.kind)
    told: SettingDefinition = {
        "type": kind,
        "optional": optional,
        "default": row.default,
        "mutable": row.mutable,
        "help": row.help,
    }
    if row.minimum is not None and row.kind != FileMode:
        told["minimum"] = row.minimum
    if row.maximum is not None and row.kind != FileMode:
        told["maximum"] = row.maximum
    if row.choices:
        told["choices"] = row.choices
    return told


def of_lmcache(row: Mapping[str, Any], *, mutable: bool) -> SettingDefinition:
    """A row of LMCache's, which says of few settings what they are for."""
    kind, optional = _type_of(row.get("type"))
    default = row.get("default")
    told: SettingDefinition = {"optional": optional or default is None, "default": default, "mutable": mutable}
    if kind:
        told["type"] = kind
    if row.get("description"):
        told["help"] = str(row["description"])[:MAX_HELP]
    return told


def _type_of(kind: Any) -> tuple[str, bool]:
    """The name of a type, empty when it is none of those that are told, and whether it may be None."""
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
    if optional:
        inner = [it for it in typing.get_args(kind) if it is not type(None)]
        kind, optional = (inner[0] if len(inner) == 1 else None), len(inner) < len(typing.get_args(kind))
    origin = typing.get_origin(kind) or kind
    for name, classes in (("list", (list, tuple)), ("mapping", (dict, Mapping))):
        if origin in classes:
            return name, optional
    return {bool: "bool", int: "int", float: "float", str: "str"}.get(origin, ""), optional
