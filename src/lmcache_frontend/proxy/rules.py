"""What `--allow-target` and `--socket-prefix` allow, and targets that are looked at again when they are connected to.

A text says what is asked for, not where it leads: a name leads to what the DNS says at the moment, a path to where
symbolic links point. Such a target is allowed as a `GuardedName` or `GuardedSocket`; `connect.py` makes a connection to
what has been checked and to nothing else.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lmcache_shared.address import TcpAddress, UnixAddress, without_brackets
from lmcache_shared.errors import ConfigError, Refusal

Number = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_RULES = 256
"""Of an option."""

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))

ANYWHERE = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
"""All addresses but the special ones."""

SPECIAL = (
    *LOOPBACK,
    *map(
        ipaddress.ip_network,
        ("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32", "::/128", "fe80::/10", "ff00::/8"),
    ),
    ipaddress.ip_network("fd00:ec2::254/128"),
)
"""This machine, its links and what clouds keep credentials at (169.254.169.254): no larger network means them."""

_NETWORK = re.compile(r"\[?([0-9A-Fa-f:.]+)\]?/([0-9]{1,3})(?::(.*))?", re.ASCII)
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9_*-]{1,63}", re.ASCII)
_NUMERAL = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII | re.IGNORECASE)


class NotAllowed(Refusal):
    """A target that is not allowed: LMCache's words as `detail`, and the way out as `reason`."""

    def __init__(self, detail: str, reason: str) -> None:
        super().__init__(403, detail, reason=reason)


@dataclass(frozen=True)
class GuardedName(TcpAddress):
    """A name that is allowed for those of its addresses that lie in these networks."""

    networks: tuple[Network, ...] = ()

    def check(self, found: str) -> bool:
        """Whether an address that it resolves to may be connected to."""
        number = number_of(found)
        return number is not None and lies_in(number, self.networks)

    def refusal(self) -> Refusal:
        """What is said when none may."""
        return NotAllowed(
            f"Target {self} is not a registered node",
            "its name resolves to no address that --allow-target allows; allow its network, or exactly this name",
        )


@dataclass(frozen=True)
class SocketRule:
    """Sockets in a folder, or below it, by what their path has behind it."""

    folder: str
    rest: re.Pattern[str]

    def matches(self, path: str) -> bool:
        """Whether it is one by its text."""
        return self._is_in(self.folder, path)

    def holds(self, real: str) -> bool:
        """Whether a path without symbolic links is one; the folder may be called by one."""
        return self._is_in(os.path.realpath(self.folder), real)

    def _is_in(self, folder: str, path: str) -> bool:
        start = folder.rstrip("/") + "/"
        return path.startswith(start) and self.rest.fullmatch(path, len(start)) is not None


@dataclass(frozen=True)
class GuardedSocket(UnixAddress):
    """A path that is allowed where it leads to a socket that is allowed."""

    rules: tuple[SocketRule, ...] = ()

    @contextlib.contextmanager
    def opened(self) -> Iterator[str]:
        """A path to the very socket that was checked, whoever puts another file in its place meanwhile.

        The file is held open and asked for its path: in this mount namespace, so a link through `/proc/<pid>/root` to
        another container's file of the same path is found out too.

        Raises:
            OSError: nothing is there.
            Refusal: 403; it leads out, or to what is no socket.
        """
        handle = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
        try:
            here = f"/proc/self/fd/{handle}"
            real, info = os.readlink(here), os.fstat(handle)
            if not any(rule.holds(real) for rule in self.rules) or not os.path.samestat(os.lstat(real), info):
                raise NotAllowed(
                    f"Socket {self} is not a registered node",
                    "a symbolic link leads it out of what --socket-prefix and --allow-target allow",
                )
            if not stat.S_ISSOCK(info.st_mode):
                raise NotAllowed(f"{self} is no socket", "--socket-prefix and --allow-target allow sockets alone")
            yield here
        finally:
            os.close(handle)


@dataclass(frozen=True)
class HostRule:
    """Names by a pattern, in small letters and without a dot at the end."""

    name: re.Pattern[str]
    ports: range
    is_exact: bool


@dataclass(frozen=True)
class NetworkRule:
    network: Network
    ports: range


@dataclass(frozen=True)
class Rules:
    """All that the options allow, read."""

    hosts: tuple[HostRule, ...] = ()
    networks: tuple[NetworkRule, ...] = ()
    sockets: tuple[SocketRule, ...] = ()

    def tcp(self, address: TcpAddress) -> TcpAddress | None:
        """The address as it is allowed, if it is."""
        number = number_of(address.host)
        networks = tuple(rule.network for rule in self.networks if address.port in rule.ports)
        if number is not None:
            return address if lies_in(number, networks) else None
        if is_numeral(address.host):
            return None
        hosts = self._hosts(address)
        if any(rule.is_exact for rule in hosts):
            return address
        networks += ANYWHERE if hosts else ()
        return GuardedName(address.host, address.port, networks) if networks else None

    def names(self, address: TcpAddress) -> bool:
        """Whether a number lies in an allowed network, or a name is an allowed one, whatever it resolves to."""
        if number_of(address.host) is not None:
            return self.tcp(address) is not None
        return not is_numeral(address.host) and bool(self._hosts(address))

    def _hosts(self, address: TcpAddress) -> list[HostRule]:
        name = address.host.lower().rstrip(".")
        return [rule for rule in self.hosts if address.port in rule.ports and rule.name.fullmatch(name)]

    def unix(self, address: UnixAddress) -> UnixAddress | None:
        """The path as it is allowed, if it is by its text: nobody makes this look around in a folder of his choice."""
        path = "/" + os.path.normpath(address.path).lstrip("/")
        rules = tuple(rule for rule in self.sockets if rule.matches(path))
        return GuardedSocket(address.path, rules) if rules else None


def number_of(host: str) -> Number | None:
    """The address that a host is, an IPv4 one inside IPv6 taken out and without its scope; `None` for a name."""
    try:
        number = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return mapped or number


def is_numeral(name: str) -> bool:
    """Whether a resolver may read a number into it: 2130706433, 0x7f000001, 127.1, 0177.0.0.1 (inet_aton(3))."""
    return _NUMERAL.fullmatch(name.rstrip(".").rpartition(".")[2]) is not None


def lies_in(number: Number, networks: Iterable[Network]) -> bool:
    """Whether one of the networks means this address; special ones are meant by special networks alone."""
    within = [network for network in networks if number in network]
    if any(number in special for special in SPECIAL):
        return any(_is_special(network) for network in within)
    return bool(within)


def _is_special(network: Network) -> bool:
    return any(network.network_address in each and network.prefixlen >= each.prefixlen for each in SPECIAL)


def read_rules(socket_prefixes: Sequence[str] | None, allowed: Sequence[str] | None) -> Rules:
    """The rules of `--socket-prefix` and `--allow-target`.

    Raises:
        ConfigError: one of them cannot be read.
    """
    hosts, networks, sockets = [], [], [_prefix(prefix) for prefix in socket_prefixes or ()]
    for text in allowed or ():
        rule = read_rule(text)
        if isinstance(rule, HostRule):
            hosts.append(rule)
        elif isinstance(rule, NetworkRule):
            networks.append(rule)
        else:
            sockets.append(rule)
    if max(len(hosts) + len(networks), len(sockets)) > MAX_RULES:
        raise ConfigError(f"more than {MAX_RULES} targets are allowed one by one; allow a network or a pattern")
    return Rules(tuple(hosts), tuple(networks), tuple(sockets))


def _prefix(text: str) -> SocketRule:
    if not text.startswith("/"):
        raise ConfigError(f"{text}: the path of a Unix socket starts with /")
    folder, name = os.path.split(text)
    return SocketRule(_plain(folder, text), re.compile(re.escape(name) + ".*", re.DOTALL))


def read_rule(text: str) -> HostRule | NetworkRule | SocketRule:
    """One value of `--allow-target`.

    Raises:
        ConfigError: it is no host:port, network or path of a socket.
    """
    if text.startswith("/"):
        return _socket(text)
    if "/" in text:
        return _network(text)
    host, colon, ports = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        raise ConfigError(
            f"{text}: expected host:port, *.host:*, [ipv6]:port, a network such as 10.0.0.0/8:7000-7010, or the path of"
            " a socket such as /run/lmcache/*.sock"
        )
    host = without_brackets(host)
    number = number_of(host)
    if number is not None:
        return NetworkRule(ipaddress.ip_network(number), _ports(ports, text))
    labels = host.lower().rstrip(".").split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise ConfigError(f"{text}: {host!r} is no host name; * stands for any text within a label")
    if all(label == "*" or _NUMERAL.fullmatch(label) for label in labels) and labels != ["*"]:
        raise ConfigError(f"{text}: of numbers, write a network such as 10.0.0.0/24:7000")
    pattern = r"\.".join("[a-z0-9_*-]+" if it == "*" else re.escape(it).replace(r"\*", "[a-z0-9_-]*") for it in labels)
    is_exact = "*" not in host
    if not is_exact:
        pattern = rf"(?!(?:.*\.)?localhost\Z){pattern}"  # this machine is meant by its name alone
    return HostRule(re.compile(pattern), _ports(ports, text), is_exact)


def _network(text: str) -> NetworkRule:
    found = _NETWORK.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text}: expected a network such as 10.0.0.0/8, 10.0.0.0/8:7000-7010 or fd00::/8:7000")
    try:
        network = ipaddress.ip_network(f"{found[1]}/{found[2]}")
    except ValueError as error:
        raise ConfigError(f"{text}: {error}") from None
    return NetworkRule(network, _ports(found[3] if found[3] is not None else "*", text))


def _ports(text: str, whole: str) -> range:
    if text == "*":
        return range(1, 65536)
    found = _PORTS.fullmatch(text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last <= 65535:
        raise ConfigError(f"{whole}: {text!r}: expected a port, a range such as 7000-7010, or *")
    return range(first, last + 1)


def _socket(text: str) -> SocketRule:
    literal = text.partition("*")[0]
    folder = _plain(os.path.dirname(literal), text)
    rest = re.escape(text[len(os.path.dirname(literal)) :].lstrip("/")).replace(r"\*", "[^/]*")
    if not rest:
        raise ConfigError(f"{text}: is a folder; expected the path of a socket such as {text}*.sock")
    return SocketRule(folder, re.compile(rest))


def _plain(folder: str, text: str) -> str:
    if ".." in text.split("/"):
        raise ConfigError(f"{text}: write the path without ..")
    return "/" + os.path.normpath(folder).strip("/")
