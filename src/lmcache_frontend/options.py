"""Every option of the frontend, once: name, type, default, limits and help.

The command line (`--socket-prefix`), the environment (`LMCACHE_FRONTEND_SOCKET_PREFIX`) and `docs/frontend.md` come
from here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmcache_shared.config import convert
from lmcache_shared.errors import ConfigError
from lmcache_shared.program import LOG_LEVELS
from lmcache_shared.settings import definitions_of, setting
from lmcache_shared.version import VERSION

ENV_PREFIX = "LMCACHE_FRONTEND_"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The frontend's options, checked."""

    port: int = setting(8000, "The port to listen on.", minimum=1, maximum=65535)
    host: str = setting("0.0.0.0", "The host to listen on.")  # noqa: S104 - as LMCache's frontend
    config: str | None = setting(None, "A JSON file with a list of nodes, or of proxies with nodes of their own.")
    nodes: str | None = setting(None, "A list of nodes as JSON, beside those of the file.")
    socket_prefix: str | None = setting(
        "/tmp/lmcache_internal_api_server/",  # noqa: S108 - where LMCache's documents put them
        "The proxy also reaches Unix sockets whose path begins like this; empty: registered nodes alone.",
    )
    route_folder: list[str] | None = setting(None, "Folders whose *_api.py and *_page.py files are served too.")
    log_level: str = setting("warning", "How much to log: critical, error, warning, info, debug, trace.")


DEFINITIONS = definitions_of(Options)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmcache-frontend", description="The dashboard of an LMCache cluster, and an HTTP proxy to its components."
    )
    parser.add_argument("--version", action="version", version=VERSION)
    for definition in DEFINITIONS.values():
        flag = "--" + definition.name.replace("_", "-")
        many = "list" in str(definition.kind)
        default = "" if definition.default is None else f" (default: {definition.default})"
        parser.add_argument(
            flag,
            action="append" if many else "store",
            metavar=_metavar(definition.name),
            help=f"{definition.help} Environment: {ENV_PREFIX}{definition.name.upper()}{default}",
        )
    return parser


def _metavar(name: str) -> str:
    return {"nodes": "JSON", "config": "FILE", "route_folder": "DIR", "socket_prefix": "PATH"}.get(name, name.upper())


def read_options(arguments: Sequence[str] | None, environ: Mapping[str, str]) -> Options:
    """The options of the command line, over those of the environment.

    Raises:
        ConfigError: a value is not what its option takes.
    """
    given = vars(parser().parse_args(arguments))
    values: dict[str, Any] = {}
    for name, definition in DEFINITIONS.items():
        variable = ENV_PREFIX + name.upper()
        if given[name] is not None:
            values[name] = convert(given[name], definition, "--" + name.replace("_", "-"))
        elif variable in environ and not environ[variable].startswith("tcp://"):
            # Kubernetes sets such a value for every Service of this name
            values[name] = convert(environ[variable], definition, f"environment: {variable}")
    options = Options(**values)
    options = replace(options, log_level=options.log_level.lower())
    if options.log_level not in LOG_LEVELS:
        raise ConfigError(f"--log-level {options.log_level}: expected one of {', '.join(LOG_LEVELS)}")
    if options.socket_prefix is not None and not options.socket_prefix.startswith("/"):
        raise ConfigError(f"--socket-prefix {options.socket_prefix}: the path of a Unix socket starts with /")
    return options
