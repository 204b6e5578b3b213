"""A node: one component's internal API server. A proxy: a frontend, with the nodes behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec

from lmcache_shared import address
from lmcache_shared.address import Address, UnixAddress
from lmcache_shared.errors import AddressError, ConfigError

LOCAL_PROXY = "local_proxy"
"""The proxy that is this frontend itself; nodes without a proxy of their own are its children."""

MAX_NODES = 10_000
"""Most nodes of one list."""

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]*\Z")]


class NodeForm(msgspec.Struct):
    """A node, or a proxy with `nodes`, as a file or a request writes it; other keys are ignored."""

    name: _Name
    host: str
    port: int | str
    nodes: list[NodeForm] | None = None


@dataclass(frozen=True)
class Reach:
    """How this frontend gets somewhere: where it connects, and what it puts before the path that it asks for."""

    address: Address
    prefix: str = ""

    @property
    def proxy_path(self) -> str:
        """The path at this frontend under which it is reached."""
        return self.address.proxy_path() + self.prefix


@dataclass(frozen=True)
class Node:
    """`port` as it was written: a number, a number in a string, or a socket's path; `address` is what it means.

    `via` is the proxy that the node is a child of. A socket lies on that proxy's machine, so it is reached through it.
    """

    name: str
    host: str
    port: int | str
    address: Address
    via: Address | None = None

    @property
    def reach(self) -> Reach:
        if self.via is not None and isinstance(self.address, UnixAddress):
            return Reach(self.via, self.address.proxy_path())
        return Reach(self.address)


@dataclass(frozen=True)
class Proxy:
    """A frontend, and the nodes on its side; `port` as it was written, `address` what it means."""

    name: str
    host: str
    port: int | str
    address: Address
    nodes: tuple[Node, ...]


def read_list(text: bytes, place: str) -> list[Node | Proxy]:
    """The nodes and proxies of a JSON list; `place` says in errors where it stands.

    Raises:
        ConfigError: no such list, too long, or an entry that cannot be used.
    """
    try:
        forms = msgspec.json.decode(text, type=list[NodeForm])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: expected a JSON list of nodes {{name, host, port}}: {error}") from None
    entries = [_entry(form, f"{place}: [{i}]") for i, form in enumerate(forms)]
    count = sum(len(entry.nodes) if isinstance(entry, Proxy) else 1 for entry in entries)
    if count > MAX_NODES:
        raise ConfigError(f"{place}: {count} nodes, but at most {MAX_NODES} are kept")
    return entries


def _entry(form: NodeForm, place: str) -> Node | Proxy:
    if form.nodes is None:
        return _node(form, place)
    itself = _node(form, place)
    children = []
    for i, child in enumerate(form.nodes):
        if child.nodes is not None:
            raise ConfigError(f"{place}.nodes[{i}]: {child.name!r} has nodes of its own; a proxy's nodes are leaves")
        children.append(_node(child, f"{place}.nodes[{i}]", itself.address))
    return Proxy(form.name, form.host, form.port, itself.address, tuple(children))


def _node(form: NodeForm, place: str, via: Address | None = None) -> Node:
    try:
        return Node(form.name, form.host, form.port, address.from_node(form.host, form.port), via)
    except AddressError as error:
        raise ConfigError(f"{place}: {form.name!r}: {error}") from None


def repeated_name(nodes: Iterator[Node]) -> str | None:
    """The first name that two nodes have."""
    seen: set[str] = set()
    for node in nodes:
        if node.name in seen:
            return node.name
        seen.add(node.name)
    return None
