"""What LMCache tells a plugin in its environment: the configuration, the number of workers, the options.

In a deployment with a scheduler and workers the nodes are their internal API servers, placed as those place themselves.
In the multiprocess mode there is one HTTP server, no role and another configuration; heartbeats alone are sent for it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec

from lmcache_frontend.nodes.node import Node, Proxy, read_list
from lmcache_frontend.options import DEFINITIONS, Given, Options, make_options, of_environment
from lmcache_shared import config
from lmcache_shared.errors import ConfigError
from lmcache_shared.placement import MAX_WORKERS, SCHEDULER_INDEX, place, serves

PREFIXES = ("LMCACHE_RUNTIME_PLUGIN_", "LMCACHE_PLUGIN_")
"""How the variables of a plugin begin; the second is the older one."""

OPTION = "plugin.frontend."
"""How the keys of `extra_config` begin that are options of the frontend."""

MP_SECTION = "runtime_plugin_extra_config"
MP_SERVER = ("http_config", "http_frontend_config")
"""Where the multiprocess mode says how its HTTP server is reached; the second name is the older one."""

MP_NODE = "lmcache_server"
MP_PORT = 8080
ANY_HOST = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared, not bound


class _HttpServer(msgspec.Struct):
    """LMCache's HTTP server in the multiprocess mode."""

    http_host: str | None = None
    http_port: int | None = None
    http_socket_path: str | None = None


@dataclass(frozen=True)
class Deployment:
    """The frontend that a plugin runs: its options, the deployment's nodes, and what the operator should hear."""

    options: Options
    nodes: list[Node | Proxy]
    hints: tuple[str, ...] = ()


def read_deployment(environ: Mapping[str, str]) -> Deployment:
    """The deployment that the environment tells of.

    Raises:
        ConfigError: LMCache has not set it, or something in it cannot be used.
    """
    variable, text = _variable(environ, "CONFIG")
    if not text:
        raise ConfigError(f"{variable} is not set: LMCache sets it when it starts this plugin (docs/plugins.md)")
    try:
        configuration = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{variable}: no JSON: {str(error)[:200]}") from None
    if not isinstance(configuration, dict):
        raise ConfigError(f"{variable}: expected a JSON object, found {type(configuration).__name__}")
    if any(name in configuration for name in ("mp_config", MP_SECTION, *MP_SERVER)):
        return _multiprocess(configuration, environ, variable)
    return _scheduler_and_workers(configuration, environ, variable)


def _scheduler_and_workers(configuration: dict[str, Any], environ: Mapping[str, str], variable: str) -> Deployment:
    settings = config.from_object(SimpleNamespace(**configuration), variable)
    options = make_options({**of_environment(environ), **_options(settings.extra_config, f"{variable}: extra_config")})
    indexes = range(SCHEDULER_INDEX, SCHEDULER_INDEX + 1 + _worker_count(environ))
    nodes = [place(settings, index).node for index in indexes if serves(settings, index)]
    hints = [] if settings.internal_api_server_enabled else ["internal_api_server_enabled is false: no node answers"]
    return Deployment(options, _read(nodes, variable), tuple(hints))


def _multiprocess(configuration: dict[str, Any], environ: Mapping[str, str], variable: str) -> Deployment:
    section = next((name for name in MP_SERVER if configuration.get(name) is not None), MP_SERVER[0])
    try:
        server = msgspec.convert(configuration.get(section) or {}, _HttpServer, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{variable}: {section}: {error}") from None
    found = {**of_environment(environ), **_options(configuration.get(MP_SECTION), f"{variable}: {MP_SECTION}")}
    if "heartbeat_url" not in found:
        raise ConfigError(
            f"{variable}: {MP_SECTION} has no {OPTION}heartbeat_url; in LMCache's multiprocess mode this plugin sends"
            " heartbeats and does nothing else"
        )
    if server.http_port is not None or "port" not in found:
        found["port"] = Given(server.http_port or MP_PORT, f"{variable}: {section}.http_port")
    found["no_http"] = Given(True, f"{variable}: multiprocess mode")
    options = make_options(found)
    host = "localhost" if server.http_host is None or server.http_host in ANY_HOST else server.http_host
    node = {"name": MP_NODE, "host": host, "port": server.http_socket_path or options.port}
    return Deployment(options, _read([node], f"{variable}: {section}"))


def _options(section: object, place: str) -> dict[str, Given]:
    """The options among the keys of a section, by name; a key that is none is refused."""
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{place}: expected keys with values, found {type(section).__name__}")
    found: dict[str, Given] = {}
    for key, value in section.items():
        if not key.startswith(OPTION):
            continue
        name = key.removeprefix(OPTION).replace("-", "_")
        if name not in DEFINITIONS:
            close = difflib.get_close_matches(name, DEFINITIONS, n=1)
            hint = f" (did you mean {OPTION}{close[0]}?)" if close else ""
            shown = key[:100] if key.isprintable() else ascii(key[:100])
            raise ConfigError(f"{place}: {shown}: the frontend has no such option{hint}")
        if name in found:
            raise ConfigError(f"{place}: {key} is there twice, with - and with _")
        if value is not None:
            text = json.dumps(value) if name == "nodes" and not isinstance(value, str) else value
            found[name] = Given(text, f"{place}: {key}")
    return found


def _worker_count(environ: Mapping[str, str]) -> int:
    variable, text = _variable(environ, "WORKER_COUNT")
    digits = text.strip() or "0"
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10 and int(digits) <= MAX_WORKERS):
        raise ConfigError(f"{variable}: expected a number of workers from 0 to {MAX_WORKERS}, found {text[:80]!r}")
    return int(digits)


def _variable(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    """A variable of the plugin, by its name or its older one, and what it holds."""
    variable = next((prefix + name for prefix in PREFIXES if environ.get(prefix + name)), PREFIXES[0] + name)
    return variable, environ.get(variable, "")


def _read(nodes: list[dict[str, str | int]], place: str) -> list[Node | Proxy]:
    return read_list(json.dumps(nodes).encode(), f"{place}: nodes")
