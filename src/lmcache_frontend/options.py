"""Every option of the frontend, once: name, type, default, limits and help.

The command line (`--socket-prefix`), the environment (`LMCACHE_FRONTEND_SOCKET_PREFIX`), LMCache's configuration
(`plugin.frontend.socket_prefix`) and `docs/frontend.md` come from here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from yarl import URL

from lmcache_frontend import plugins
from lmcache_frontend.nodes.sources.dns_names import read_names, read_server
from lmcache_frontend.nodes.stores.spec import check_spec
from lmcache_shared.address import tcp_address
from lmcache_shared.config import convert
from lmcache_shared.errors import AddressError, ConfigError
from lmcache_shared.placement import MAX_WORKERS
from lmcache_shared.program import LOG_LEVELS
from lmcache_shared.settings import Definition, definitions_of, setting
from lmcache_shared.version import VERSION

PROGRAM = "lmcache-frontend"
ENV_PREFIX = "LMCACHE_FRONTEND_"

_METAVARS = {
    "nodes": "JSON",
    "config": "FILE",
    "lmcache_config": "FILE",
    "token_file": "FILE",
    "audit_log": "FILE",
    "route_folder": "DIR",
    "socket_prefix": "PATH",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The frontend's options, checked."""

    port: int = setting(8000, "The port to listen on.", minimum=1, maximum=65535)
    host: str = setting("0.0.0.0", "The host to listen on.")  # noqa: S104 - as LMCache's frontend
    config: str | None = setting(None, "A JSON file with a list of nodes, or of proxies with nodes of their own.")
    nodes: str | None = setting(None, "A list of nodes as JSON, beside those of the file.")
    lmcache_config: str | None = setting(None, "An lmcache.yaml: the scheduler and workers that it implies are nodes.")
    lmcache_workers: int = setting(1, "How many workers that deployment has.", minimum=0, maximum=MAX_WORKERS)
    node_supplier_url: str | None = setting(
        None, "Ask the discovery service at this URL (such as http://host:port/lmcache_infos) for nodes."
    )
    dns: list[str] | None = setting(
        None, "NAME:PORT, or an SRV name such as _http._tcp.lmcache: every address it resolves to is a node."
    )
    dns_server: str | None = setting(None, "Ask this DNS server (host or host:port), not those of the system.")
    refresh_interval: float = setting(
        30.0,
        "How many seconds lie between two questions to the supplier and to other frontends.",
        minimum=1,
        maximum=3600,
    )
    stale_seconds: float = setting(
        60.0,
        "How long a discovered node that is no longer reported is still shown, as stale.",
        minimum=0,
        maximum=86400,
    )
    registry: str = setting(
        "sqlite",
        "Where nodes that are added by hand are kept: memory, sqlite (in the user's state folder), sqlite:/a/file, or"
        " redis://host:port/0, shared by every frontend that names it.",
    )
    health_interval: float = setting(
        10.0, "How many seconds lie between two checks of a node.", minimum=1, maximum=3600
    )
    scrape_seconds: float = setting(
        8.0, "How long /metrics waits for the nodes; below Prometheus' own scrape_timeout.", minimum=0.5, maximum=300
    )
    no_history: bool = setting(
        False, "Keep no history: nodes are not asked for their metrics every five seconds, and charts stay empty."
    )
    socket_prefix: str | None = setting(
        "/tmp/lmcache_internal_api_server/",  # noqa: S108 - where LMCache's documents put them
        "The proxy also reaches Unix sockets whose path begins like this; empty: registered nodes alone.",
    )
    route_folder: list[str] | None = setting(None, "Folders whose *_api.py and *_page.py files are served too.")
    log_level: str = setting("warning", "How much to log: critical, error, warning (or warn), info, debug, trace.")
    heartbeat_url: str | None = setting(None, "Report this frontend to the discovery service at this URL.")
    heartbeat_initial_delay: float = setting(
        0.0, "How many seconds to wait before the first heartbeat.", minimum=0, maximum=86400
    )
    heartbeat_interval: float = setting(30.0, "How many seconds lie between two.", minimum=1, maximum=86400)
    report_host: str | None = setting(
        None, "The host to report; without one this machine's address on the way to the service."
    )
    token: str | None = setting(
        None, "An admin's token, of 16 characters or more; in the environment other users of the machine do not see it."
    )
    token_file: str | None = setting(None, "A file of tokens: name, role and sha256 of each; docs/security.md.")
    viewers: str = setting("open", "Who may look: everybody, or who has a token.", choices=("open", "token"))
    no_trust_local: bool = setting(False, "Ask callers on this machine for a token too; without it they are admins.")
    no_auth: bool = setting(False, "Ask nobody for a token: whoever reaches the port may do everything.")
    audit_log: str | None = setting(None, "Write a line in JSON for every change that passes into this file.")
    no_http: bool = setting(False, "Send heartbeats and serve nothing.")

    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where the options stand that a source has set, for refusals of what is read later."""

    def place_of(self, name: str) -> str:
        return self.places.get(name, flag_of(name))


DEFINITIONS = definitions_of(Options)


class Given(NamedTuple):
    """What a source says of an option, not yet checked, and where it stands there."""

    value: object
    place: str


def flag_of(name: str) -> str:
    """The option of the command line."""
    return "--" + name.replace("_", "-")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="The dashboard of an LMCache cluster, and an HTTP proxy to its components."
    )
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("--print-plugin-path", action=_PrintPluginPath, help="print the paths of LMCache's plugins")
    for definition in DEFINITIONS.values():
        default = "" if definition.default is None else f" (default: {_spelled(definition.default)})"
        parser.add_argument(
            flag_of(definition.name),
            metavar=_metavar(definition.name),
            help=f"{definition.help} Environment: {ENV_PREFIX}{definition.name.upper()}{default}",
            **_action(definition),
        )
    return parser


class _PrintPluginPath(argparse.Action):
    """As `--version`, but a path stays in one line."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(*plugins.FILES, sep="\n")
        parser.exit()


def _action(definition: Definition) -> dict[str, Any]:
    if definition.kind is bool:
        return {"nargs": "?", "const": "true"}  # `--no-http`, and `--no-http false` where a variable says otherwise
    return {"action": "append" if "list" in str(definition.kind) else "store"}


def _spelled(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _metavar(name: str) -> str:
    return _METAVARS.get(name, name.upper())


def read_options(arguments: Sequence[str] | None, environ: Mapping[str, str]) -> Options:
    """The options of the command line, over those of the environment.

    Raises:
        ConfigError: a value is not what its option takes.
    """
    given = vars(parser().parse_args(arguments))
    line = {name: Given(given[name], flag_of(name)) for name in DEFINITIONS if given[name] is not None}
    return make_options({**of_environment(environ), **line})


def of_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    """What the environment says."""
    found = {}
    for name in DEFINITIONS:
        variable = ENV_PREFIX + name.upper()
        # Kubernetes sets a value such as tcp://10.0.0.1:80 for every Service of this name
        if variable in environ and not environ[variable].startswith("tcp://"):
            found[name] = Given(environ[variable], f"environment: {variable}")
    return found


def make_options(found: Mapping[str, Given]) -> Options:
    """Options from what the sources say, checked.

    Raises:
        ConfigError: a value is not what its option takes; the text names its place.
    """
    options = Options(**{name: convert(*_checkable(name, given)) for name, given in found.items()})
    places = {name: given.place for name, given in found.items()}
    options = replace(options, log_level=options.log_level.lower(), places=places)

    def refuse(name: str, problem: str) -> ConfigError:
        place = options.place_of(name)
        return ConfigError(f"{place}{'' if place == flag_of(name) else ':'} {problem}")

    if options.log_level not in LOG_LEVELS:
        raise refuse("log_level", f"{options.log_level}: expected one of {', '.join(LOG_LEVELS)}")
    if options.socket_prefix is not None and not options.socket_prefix.startswith("/"):
        raise refuse("socket_prefix", f"{options.socket_prefix}: the path of a Unix socket starts with /")
    for name, problem in _discovery_problems(options):
        raise refuse(name, problem)
    try:
        check_spec(options.registry)
    except ConfigError as error:
        raise refuse("registry", str(error)) from None
    if options.report_host is not None:
        try:
            tcp_address(options.report_host, options.port)
        except AddressError as error:
            raise refuse("report_host", str(error)) from None
    if options.no_http and options.heartbeat_url is None:
        raise refuse("no_http", "without a heartbeat URL there is nothing to do; give --heartbeat-url too")
    return options


def _discovery_problems(options: Options) -> Iterator[tuple[str, str]]:
    """The options that say where to look for nodes, or to report to, and cannot; and why not."""
    for name, url in (("heartbeat_url", options.heartbeat_url), ("node_supplier_url", options.node_supplier_url)):
        if url is not None and (problem := url_problem(url)):
            yield name, problem
    try:
        read_names(options.dns)
    except ConfigError as error:
        yield "dns", str(error)
    try:
        read_server(options.dns_server)
    except ConfigError as error:
        yield "dns_server", str(error)


def _checkable(name: str, given: Given) -> tuple[object, Definition, str]:
    return given.value, DEFINITIONS[name], given.place


def url_problem(text: str) -> str | None:
    """Why nothing can be asked at this URL. It may hold a password, so it is not repeated."""
    try:
        url = URL(text)
        host, port = url.host, url.port  # a name that is none (IDNA) is only found here
    except ValueError:
        return "expected a URL such as http://host:port/path"
    if url.scheme not in ("http", "https") or not host or not port:
        return "expected a URL that begins with http:// or https:// and a host"
    return None
