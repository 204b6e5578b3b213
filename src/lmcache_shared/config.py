"""Where settings come from: `lmcache.yaml` < the environment < the command line, into a `Settings`.

Spellings are LMCache's: booleans as true/false/1/0, lists as `[0, 1]`, `0,1` or one value, texts with or without
quotes, `extra_config` as a mapping or as JSON. Where LMCache drops a value that it cannot read and goes on with the
default, this stops with an error that names the file, the key path, what was expected and what was found.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import re
import stat
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lmcache_shared.errors import ConfigError
from lmcache_shared.settings import DEFINITIONS, ENV_PREFIX, EXTRA, OLDER_NAMES, Definition, FileMode, Settings

logger = logging.getLogger(__name__)

CONFIG_FILE_VARIABLE = "LMCACHE_CONFIG_FILE"
"""Names the configuration file when the command line does not."""

MAX_FILE_BYTES = 1 << 20
"""Largest configuration file that is read."""

LMCACHES_OWN = frozenset({"internal_api_server_log_level"})
"""Settings of LMCache that begin so too and mean nothing here."""

SLIP = 0.88
"""How alike a key is to one of the table when it is taken for a slip; no two of LMCache's own are so."""

MAX_NODES = 50_000
"""Values of a YAML document."""

MAX_TEXT = 8192
"""Characters of a text that is read as a list or a value: from the environment, the command line or a request."""

MAX_DIGITS = 20
MAX_SHOWN = 80
"""Characters of a value that an error shows."""

OUR_PREFIXES = ("internal_api_server_", "run_script_", "engine_")
"""Settings that begin like this are all in the table."""

_SERVER_ROWS: Mapping[str, Definition] = {name: row for name, row in DEFINITIONS.items() if not row.engine}

_SECTION_ROWS: Mapping[str, Definition] = {
    name: row for name, row in DEFINITIONS.items() if name in _SERVER_ROWS or row.section == EXTRA
}

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


def load(
    path: str | Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    overrides: Sequence[str] = (),
) -> Settings:
    """The settings of a file, changed by the environment, changed by `overrides` (each `key=value`).

    Args:
        path: the file; without one the file that `LMCACHE_CONFIG_FILE` names, without that none.
        environ: `LMCACHE_<KEY IN CAPITALS>` sets a key. An empty value unsets a text or a list.
        overrides: a key of the table, any other key (kept as it is), or `extra_config.<key>`.

    Raises:
        ConfigError: a source cannot be read, or a value is not what its key takes.
    """
    if path is None:
        path = environ.get(CONFIG_FILE_VARIABLE) or None
    found = _Found()
    if path is not None:
        found.add_mapping(read_yaml(path), str(path))
    found.add_environment(environ)
    for override in sorted(overrides, key=lambda override: not override.startswith(f"{EXTRA}=")):
        found.add_override(override)  # the whole section first, so that it does not undo what one of its keys sets
    return found.settings()


def from_object(config: object, place: str = "configuration", *, own_engine: bool = False) -> Settings:
    """The settings of a configuration object such as LMCache's: attributes that it has, defaults for the others.

    Those of the engine are not for us to judge: the object's owner has read them, and knows values that we do not.
    With `own_engine`, those in the section `extra_config` are read, for an engine that we start.

    Raises:
        ConfigError: a value is not what its key takes.
    """
    found = _Found(_SECTION_ROWS if own_engine else _SERVER_ROWS)
    found.add_mapping(attributes_of(config), place)
    return found.settings()


def attributes_of(config: object) -> dict[str, Any]:
    """The attributes of a configuration object that are settings of the server, as they are."""
    named = (row.name for row in _SERVER_ROWS.values() if row.section is None)
    return {name: getattr(config, name) for name in named if hasattr(config, name)}


def read_yaml(path: str | Path, *, of_a_caller: bool = False) -> dict[str, Any]:
    """The mapping at the top of a YAML file; an empty file is an empty mapping.

    A file that a caller names must be a plain one: a pipe or a device would be waited for without end.

    Raises:
        ConfigError: the file cannot be read, is too large, is no YAML, or holds something else.
    """
    data = _read(path, of_a_caller=of_a_caller)
    try:
        content = _safe_yaml(data)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}: {where}no YAML: {problem}") from None
    except Exception as error:  # PyYAML raises what its constructors happen to: ValueError, IndexError, KeyError, ...
        text = " ".join(str(error).split())[:MAX_SHOWN] or type(error).__name__
        raise ConfigError(f"{path}: no YAML that can be used: {text}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys with values at the top, found {_shown(content)}")
    for key in content:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: expected a text as key, found {_shown(key)}")
    return content


def _read(path: str | Path, *, of_a_caller: bool) -> bytes:
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if of_a_caller else 0)
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            if of_a_caller and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path}: is no plain file")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except ValueError:
        raise ConfigError(f"{str(path)!r}: is no path") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; this is no configuration")
    return data


class _Found:
    """What the sources said so far; later ones replace earlier ones.

    Args:
        rows: the settings that are looked for; what else a source holds is kept as it is.
    """

    def __init__(self, rows: Mapping[str, Definition] = DEFINITIONS) -> None:
        self._rows = rows
        self.values: dict[str, Any] = {}
        self.unknown: dict[str, Any] = {}
        self.extra: dict[str, Any] | None = None

    def add_mapping(self, mapping: Mapping[str, Any], place: str) -> None:
        if EXTRA in mapping:
            self._set_extra(mapping[EXTRA], f"{place}: {EXTRA}")  # first: the top level wins over the section
        for name, value in _with_current_names(mapping, place).items():
            if name == EXTRA:
                continue
            if name in self._rows:
                self.values[name] = convert(value, self._rows[name], f"{place}: {name}")
            else:
                _warn_of_a_slip(name, f"{place}: {name}")
                self.unknown[name] = value

    def add_environment(self, environ: Mapping[str, str]) -> None:
        names = [EXTRA, *OLDER_NAMES, *self._rows, *self.unknown]
        variables = {name: ENV_PREFIX + name.upper() for name in dict.fromkeys(names)}
        mapping = {name: _unquoted(environ[variable]) for name, variable in variables.items() if variable in environ}
        for name, value in _with_current_names(mapping, "environment").items():
            self._set(name, value, f"environment: {variables[name] if name in mapping else name}")
        for variable in environ.keys() - variables.values():
            if variable.startswith(ENV_PREFIX):
                _warn_of_a_slip(variable.removeprefix(ENV_PREFIX).lower(), f"environment: {variable}")

    def add_override(self, override: str) -> None:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {override}: expected key=value")
        ((name, text),) = _with_current_names({key: _unquoted(value)}, "--set").items()
        inner = name.removeprefix(f"{EXTRA}.")
        if inner not in DEFINITIONS and inner not in LMCACHES_OWN and inner.startswith(OUR_PREFIXES):
            raise ConfigError(f"--set {key}: there is no such setting{_did_you_mean(inner)}")
        if name not in self._rows and "." not in name:
            _warn_of_a_slip(name, f"--set {key}")
        self._set(name, text, f"--set {key}")

    def _set(self, name: str, text: str, place: str) -> None:
        """Take a text, from the environment or the command line."""
        section, dot, inner = name.partition(".")
        if name == EXTRA:
            self._set_extra(text, place)
        elif dot and section == EXTRA:
            known = inner in self._rows and self._rows[inner].section == EXTRA
            if known:
                self.values[inner] = convert(text, self._rows[inner], place)
            self.extra = {**(self.extra or {}), inner: text if known else _yaml_value(text, place)}
        elif name in self._rows:
            self.values[name] = convert(text, self._rows[name], place)
        else:
            self.unknown[name] = _yaml_value(text, place)

    def _set_extra(self, value: Any, place: str) -> None:
        mapping = convert(value, self._rows[EXTRA], place)
        for name in mapping or ():
            if name not in DEFINITIONS:
                _warn_of_a_slip(name, f"{place}.{name}")
        for name in [n for n, row in self._rows.items() if row.section == EXTRA]:
            self.values.pop(name, None)  # a later source replaces the section as a whole, as LMCache does
            if mapping and name in mapping:
                self.values[name] = convert(mapping[name], self._rows[name], f"{place}.{name}")
        self.extra = mapping

    def settings(self) -> Settings:
        given = frozenset(self.values) | ({EXTRA} if self.extra is not None else frozenset())
        return Settings(**self.values, extra_config=self.extra, unknown=self.unknown, given=given)


def _warn_of_a_slip(name: str, place: str) -> None:
    """A key that begins like ours and is none is a slip, and so is one that is almost one of the table.

    LMCache's many others are not ours to judge.
    """
    if name in LMCACHES_OWN:
        return
    if name.startswith(OUR_PREFIXES):
        logger.warning("%s: there is no such setting; it is ignored%s", place, _did_you_mean(name))
    elif difflib.get_close_matches(name, DEFINITIONS, n=1, cutoff=SLIP):
        logger.warning("%s: not used here%s", place, _did_you_mean(name))


def _did_you_mean(name: str) -> str:
    close = difflib.get_close_matches(name, DEFINITIONS, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _with_current_names(mapping: Mapping[str, Any], place: str) -> dict[str, Any]:
    current = {name: value for name, value in mapping.items() if name not in OLDER_NAMES}
    for older, name in OLDER_NAMES.items():
        if older in mapping:
            logger.warning("%s: %s is the older name of %s", place, older, name)
            current.setdefault(name, mapping[older])
    return current


def convert(value: Any, definition: Definition, place: str) -> Any:
    """`value`, as found at `place`, as what the setting takes.

    Raises:
        ConfigError: it is of another type or out of range.
    """
    kind = definition.kind
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
    if optional:
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
    if value is None or (optional and value == ""):
        if optional:
            return None
        raise ConfigError(f"{place}: expected {_kind_name(kind)}, found nothing")
    if typing.get_origin(kind) is list:
        (item_kind,) = typing.get_args(kind)
        items = _items(value, place)
        return [_scalar(item, item_kind, definition, f"{place}[{i}]") for i, item in enumerate(items)]
    if kind == Mapping[str, Any]:
        return _mapping(value, place)
    return _scalar(value, kind, definition, place)


def _scalar(value: Any, kind: Any, definition: Definition, place: str) -> Any:
    converted: Any
    if kind == FileMode:
        converted = _file_mode(value)
    elif kind is bool:
        converted = _boolean(value)
    elif kind is int:
        converted = _integer(value)
    elif kind is float:
        converted = _number(value)
    else:
        converted = _text(value)
    if converted is None:
        raise ConfigError(f"{place}: expected {_kind_name(kind)}, found {_shown(value)}")
    if definition.choices and converted not in definition.choices:
        raise ConfigError(f"{place}: expected one of {', '.join(definition.choices)}, found {_shown(value)}")
    low, high = definition.minimum, definition.maximum
    if (low is not None and converted < low) or (high is not None and converted > high):
        limits = f"at least {low:g}" if high is None else f"from {low or 0:.10g} to {high:.10g}"
        raise ConfigError(f"{place}: expected {_kind_name(kind)} {limits}, found {_shown(value)}")
    return converted


def _boolean(value: Any) -> bool | None:
    if isinstance(value, int):
        return bool(value) if value in (0, 1) else None
    word = value.strip().lower() if isinstance(value, str) else ""
    return True if word in _TRUE else False if word in _FALSE else None


def _integer(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str | float):
        return None
    try:
        if isinstance(value, float):
            return int(value) if value.is_integer() else None
        text = str(value)
        return int(text) if len(text) <= MAX_DIGITS and text.isascii() else None
    except ValueError:  # also an int of so many digits that Python does not write it
        return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | str | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        text = str(value)
        text.encode()
    except ValueError:  # an int of too many digits, or half a character
        return None
    return text


def _file_mode(value: Any) -> int | None:
    """Octal digits in a text. A number is refused: YAML reads 0660 as 432, and 660 as 660."""
    digits = value.strip().removeprefix("0o") if isinstance(value, str) else ""
    return int(digits, 8) if re.fullmatch("[0-7]{1,4}", digits) else None


def _items(value: Any, place: str) -> list[Any]:
    if isinstance(value, str):
        text = _unquoted(value)
        if text.startswith("["):
            value = _yaml_value(text, place)
        elif len(text) > MAX_TEXT:
            raise ConfigError(f"{place}: {len(text)} characters, but at most {MAX_TEXT} are read as a list")
        else:
            return [item.strip() for item in text.split(",") if item.strip()]
    return value if isinstance(value, list) else [value]


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ConfigError(f"{place}: expected a JSON object, found {_shown(value)}") from None
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place}: expected keys with values, found {_shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{place}: expected a text as key, found {_shown(key)}")
    return dict(value)


def _unquoted(text: str) -> str:
    stripped = text.strip()
    if len(stripped) >= 2 and stripped[0] == stripped[-1] and stripped[0] in "'\"":
        return stripped[1:-1]
    return stripped


def _yaml_value(text: str, place: str) -> Any:
    if len(text) > MAX_TEXT:
        raise ConfigError(f"{place}: {len(text)} characters, but at most {MAX_TEXT} are read as a value")
    try:
        return _safe_yaml(text)
    except Exception:
        raise ConfigError(f"{place}: cannot be read as a value: {_shown(text)}") from None


def _safe_yaml(data: bytes | str) -> Any:
    """A YAML document; one that is huge, or whose aliases unfold into something huge, is refused."""
    loader = _yaml_loader(data)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        size = _unfolded(node, {})
        if size > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} values, aliases (*name) followed")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _yaml_loader(data: bytes | str) -> Any:
    """libyaml's, which takes a twentieth of the time, where PyYAML was built with it."""
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)(data)


def _unfolded(node: Any, known: dict[int, int]) -> int:
    """How many values a node has when every alias is followed; one that leads back to itself has no end."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # until it is known: an alias to what it stands in
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = min(MAX_NODES + 1, 1 + sum(_unfolded(part, known) for part in parts))
    return known[id(node)]


def _kind_name(kind: Any) -> str:
    if kind == FileMode:
        return 'permissions as an octal text such as "0660"'
    return {bool: "true or false", int: "int", float: "number", str: "text"}[kind]


def _shown(value: Any) -> str:
    if not _is_small(value):
        return f"a large {type(value).__name__}"
    try:
        text = json.dumps(value, default=repr)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _is_small(value: Any, depth: int = 4) -> bool:
    """Whether it can be written down to be cut: what aliases unfold into cannot."""
    if isinstance(value, Mapping | list | tuple | set):
        parts = [*value, *value.values()] if isinstance(value, Mapping) else value
        return depth > 0 and len(value) <= MAX_SHOWN and all(_is_small(part, depth - 1) for part in parts)
    return True
