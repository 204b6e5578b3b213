"""The one owner of what the frontend knows of the cluster: its proxies and their nodes, and which source told of each.

Each source publishes everything it knows at the moment; the registry lays the sources over one another. What is said by
hand wins, then the order of `SOURCES` counts. The result is worked out when somebody asks after a change, once.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lmcache_frontend.nodes.node import LOCAL_PROXY, MAX_NODES, Node, Proxy, Reach, named_path
from lmcache_shared.address import Address, TcpAddress, UnixAddress, tcp_address

BY_HAND = "hand"
NEIGHBOURS = "proxy"
"""The source of nodes that their proxy told of."""

SOURCES = ("nodes", "plugin", "file", "lmcache-config", BY_HAND, "supplier", "heartbeats", "dns")
"""The order in which proxies and nodes are listed. An entry by hand takes the place of the one it stands before."""

Name = str | tuple[str, str]
"""A proxy's name, or a proxy's and its node's."""


class Known(NamedTuple):
    """A node, and the name of the proxy that it is a child of."""

    proxy: str
    node: Node


@dataclass
class _Layer:
    """What one source says; what it no longer says is stale until the time in `leaves`."""

    heads: dict[str, Proxy] = field(default_factory=dict)
    nodes: dict[tuple[str, str], Node] = field(default_factory=dict)
    leaves: dict[Name, float] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """The layers as one: all that is asked of a registry to serve a proxied request."""

    proxies: tuple[Proxy, ...]
    nodes: dict[tuple[str, str], Node]
    by_name: dict[str, Reach | tuple[str, ...]]
    """A name's reach; where nodes of several proxies have it, those proxies."""
    by_address: dict[Address, Reach]
    direct: frozenset[Address]
    tokens: dict[Address, str]
    """What is shown to whom this frontend connects to."""


class Registry:
    """The proxies of the cluster, this frontend's own nodes first.

    Args:
        host, port: where this frontend serves, as `local_proxy` is told.
        identity: by what other frontends know this one; replicas that share a registry share it.
        stale_seconds: how long a discovered entry stays when its source no longer reports it.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        identity: str | None = None,
        stale_seconds: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = identity or secrets.token_hex(8)
        self.revision = 0
        """Counts changes, so that others see cheaply that there was one."""
        self._itself = Proxy(LOCAL_PROXY, host, port, tcp_address(host, port))
        self._stale_seconds = stale_seconds
        self._now = now
        self._layers: dict[str, _Layer] = {name: _Layer() for name in SOURCES}
        self._neighbours: dict[str, _Layer] = {}
        self._hidden: frozenset[Name] = frozenset()
        self._selves: frozenset[str] = frozenset()
        self._view: View | None = None

    def publish(self, source: str, entries: Iterable[Node | Proxy], *, lasting: bool = False) -> None:
        """Everything that a source knows now; plain nodes are children of `local_proxy`.

        Args:
            source: one of `SOURCES`.
            lasting: what it no longer reports stays for a while, as stale.
        """
        heads: dict[str, Proxy] = {}
        nodes: dict[tuple[str, str], Node] = {}
        for entry in entries:
            if isinstance(entry, Node):
                nodes[LOCAL_PROXY, entry.name] = replace(entry, source=source)
                continue
            if entry.name != LOCAL_PROXY:
                heads[entry.name] = replace(entry, nodes=(), source=source)
            nodes.update({(entry.name, node.name): replace(node, source=source) for node in entry.nodes})
        self._lay(self._layers[source], heads, nodes, lasting)

    def publish_by_hand(self, entries: Iterable[Proxy], hidden: Iterable[Name]) -> None:
        """What was added by hand, and the discovered proxies and nodes that were removed by hand."""
        now_hidden = frozenset(hidden)
        if now_hidden != self._hidden:
            self._hidden = now_hidden
            self._changed()
        self.publish(BY_HAND, entries)

    def publish_neighbours(self, proxy: str, nodes: Iterable[Node]) -> None:
        """The nodes that a proxy tells of."""
        layer = self._neighbours.setdefault(proxy, _Layer())
        found = {(proxy, node.name): replace(node, source=NEIGHBOURS) for node in nodes}
        self._lay(layer, {}, found, lasting=True)

    def forget_neighbours(self, proxy: str) -> None:
        """A proxy has another address: what it told of at the former one is nothing."""
        if self._neighbours.pop(proxy, None) is not None:
            self._changed()

    def publish_selves(self, proxies: Iterable[str]) -> None:
        """The proxies that turned out to be this frontend; they are not shown."""
        selves = frozenset(proxies)
        if selves != self._selves:
            self._selves = selves
            self._changed()

    def mirror(self, view: View) -> None:
        """Be as another process's registry is, which alone has sources."""
        self._changed()
        self._view = view

    def tick(self) -> None:
        """Let what has been stale for long enough leave; called once a second."""
        now = self._now()
        for layer in [*self._layers.values(), *self._neighbours.values()]:
            for name in [name for name, leaves in layer.leaves.items() if leaves <= now]:
                del layer.leaves[name]
                gone = layer.heads.pop(name, None) if isinstance(name, str) else layer.nodes.pop(name, None)
                assert gone is not None
                self._changed()
        known = {proxy.name for proxy in self.proxies()} | self._selves
        for proxy in [proxy for proxy in self._neighbours if proxy not in known]:
            del self._neighbours[proxy]

    def proxies(self) -> Iterator[Proxy]:
        """The proxies with their nodes, `local_proxy` first if it has any."""
        return iter(self._current.proxies)

    def nodes(self) -> Iterator[Node]:
        """The leaves, proxy by proxy."""
        for proxy in self._current.proxies:
            yield from proxy.nodes

    def head(self, name: str) -> Proxy | None:
        """The proxy with this name, without its nodes; also one that turned out to be this frontend."""
        return next((head for head in self.heads() if head.name == name), None)

    def heads(self) -> Iterator[Proxy]:
        """Every other frontend without its nodes, those by hand first; also those that turned out to be this one."""
        seen: set[str] = set()
        for layer in self._by_rank():
            for head in layer.heads.values():
                if head.name not in seen and head.name not in self._hidden:
                    seen.add(head.name)
                    yield self._by_hand_head(head) if layer is self._layers[BY_HAND] else head

    def proxy(self, name: str) -> Proxy | None:
        """The proxy with this name; `local_proxy` also while it has no nodes."""
        found = next((proxy for proxy in self._current.proxies if proxy.name == name), None)
        return found or (self._itself if name == LOCAL_PROXY else None)

    def node(self, proxy: str, name: str) -> Node | None:
        """The node of a proxy."""
        return self._current.nodes.get((proxy, name))

    def nodes_named(self, name: str) -> list[Known]:
        """The nodes that a plain name may mean: this frontend's own one alone if it has one, else every proxy's."""
        found = [
            Known(proxy.name, node) for proxy in self._current.proxies for node in proxy.nodes if node.name == name
        ]
        return found[:1] if found and found[0].proxy == LOCAL_PROXY else found

    def is_discovered(self, name: Name) -> bool:
        """Whether a source other than the hand knows a proxy, or a proxy's node, of this name."""
        layers = [layer for source, layer in self._layers.items() if source != BY_HAND]
        if isinstance(name, str):
            return any(name in layer.heads for layer in layers)
        layers += [told] if (told := self._neighbours.get(name[0])) is not None else []
        leaf_of_itself = name[0] == name[1] and any(
            head.found for layer in layers if (head := layer.heads.get(name[0])) is not None
        )
        return leaf_of_itself or any(name in layer.nodes for layer in layers)

    def find(self, name: str) -> Reach | tuple[str, ...] | None:
        """How the proxy or node with this name is reached; proxies come first, as with LMCache's frontend.

        Returns:
            The names of the proxies, when nodes of several have the name and none is this frontend's own.
        """
        return self._current.by_name.get(name)

    def at(self, address: Address) -> Reach | None:
        """How the proxy or node that is registered with this address is reached."""
        return self._current.by_address.get(address)

    def has(self, address: Address) -> bool:
        """Whether this frontend connects to this address for a registered node or proxy."""
        return address in self._current.direct

    def token_of(self, address: Address) -> str | None:
        """What the entry of the proxy or node at this address gives it as its token."""
        return self._current.tokens.get(address)

    def path_of(self, proxy: str, node: Node) -> str:
        """The path by which this frontend serves a node, whatever other names there are."""
        if proxy == LOCAL_PROXY and self._current.by_name.get(node.name) == node.reach:
            return named_path(node.name)
        return named_path(proxy) + named_path(node.name)

    def _lay(self, layer: _Layer, heads: dict[str, Proxy], nodes: dict[tuple[str, str], Node], lasting: bool) -> None:
        leaves: dict[Name, float] = {}
        if lasting and self._stale_seconds > 0:
            until = self._now() + self._stale_seconds
            gone_heads = [name for name in layer.heads if name not in heads][: MAX_NODES - len(heads)]
            gone_nodes = [key for key in layer.nodes if key not in nodes][: MAX_NODES - len(nodes)]
            gone: list[Name] = [*gone_heads, *gone_nodes]
            leaves = {name: layer.leaves.get(name, until) for name in gone}
            # In the order that there was, so that nothing jumps about in a list.
            heads = {name: head for name, head in layer.heads.items() if name in leaves or name in heads} | heads
            nodes = {key: node for key, node in layer.nodes.items() if key in leaves or key in nodes} | nodes
            heads.update({name: replace(heads[name], stale=True) for name in gone_heads})
            nodes.update({key: replace(nodes[key], stale=True) for key in gone_nodes})
        same = heads == layer.heads and nodes == layer.nodes
        layer.heads, layer.nodes, layer.leaves = heads, nodes, leaves
        if not same:
            self._changed()

    def _changed(self) -> None:
        self._view = None
        self.revision += 1

    @property
    def _current(self) -> View:
        if self._view is None:
            self._view = self._work_out()
        return self._view

    def _by_rank(self) -> list[_Layer]:
        """By hand first."""
        return [self._layers[BY_HAND], *(layer for name, layer in self._layers.items() if name != BY_HAND)]

    def _work_out(self) -> View:
        heads = self._merged_heads()
        children = self._merged_nodes(heads)
        proxies = tuple(
            replace(head, nodes=tuple(children[name].values()))
            for name, head in heads.items()
            if name != LOCAL_PROXY or children[name]
        )
        return view_of(proxies)

    def _merged_heads(self) -> dict[str, Proxy]:
        heads = {LOCAL_PROXY: self._itself}
        own = {
            node.address
            for layer in self._layers.values()
            for key, node in layer.nodes.items()
            if key[0] == LOCAL_PROXY
        }
        for layer in self._layers.values():
            for name, head in layer.heads.items():
                if name in self._hidden or name in self._selves:
                    continue
                if head.found and head.address in own and not self._tells(name):
                    continue  # this frontend's own node, found a second time
                heads.setdefault(name, head)
        heads.update(
            {name: self._by_hand_head(head) for name, head in self._layers[BY_HAND].heads.items() if name in heads}
        )
        return heads

    def _by_hand_head(self, head: Proxy) -> Proxy:
        """What was found by its address stays so when something was said of it by hand."""
        others = (layer.heads.get(head.name) for source, layer in self._layers.items() if source != BY_HAND)
        found = any(other is not None and other.found and other.address == head.address for other in others)
        return replace(head, found=found)

    def _tells(self, proxy: str) -> bool:
        """Whether a proxy has told of nodes."""
        told = self._neighbours.get(proxy)
        return told is not None and bool(told.nodes)

    def _merged_nodes(self, heads: dict[str, Proxy]) -> dict[str, dict[str, Node]]:
        found: dict[str, dict[str, Node]] = {name: {} for name in heads}
        by_hand = self._layers[BY_HAND].nodes
        neighbours = [self._neighbours[name] for name in heads if name in self._neighbours]
        nearest = self._nearest(neighbours)
        written = {(key[0], node.address) for layer in self._layers.values() for key, node in layer.nodes.items()}
        for layer in [*self._layers.values(), *neighbours]:
            for key, node in layer.nodes.items():
                proxy, name = key
                if proxy not in heads or key in self._hidden or name in found[proxy]:
                    continue
                if node.origin is not None and nearest[node.origin] != key:
                    continue
                if node.path is not None and (proxy, node.address) in written:
                    continue  # under another name
                chosen = by_hand.get(key, node)
                stale = chosen.stale or (heads[proxy].stale and key not in by_hand)
                found[proxy][name] = replace(chosen, via=_way(heads[proxy], chosen), stale=stale)
        for proxy, head in heads.items():
            if head.found and not self._tells(proxy) and (proxy, proxy) not in self._hidden:
                itself = Node(head.name, head.host, head.port, head.address, source=head.source, stale=head.stale)
                found[proxy].setdefault(head.name, itself)
        return found

    def _nearest(self, neighbours: Sequence[_Layer]) -> dict[tuple[str, str], tuple[str, str]]:
        """For each node that several proxies tell of, the shortest way to it: one node is counted once.

        Of ways that are as long, that through a proxy which somebody wrote down comes before one that was found, so
        that one who only claims to be a frontend takes no node away from it.
        """
        trusted = {head.name: rank for rank, head in enumerate(self.heads())}
        nearest: dict[tuple[str, str], tuple[bool, int, int, tuple[str, str]]] = {}
        for layer in neighbours:
            for key, node in layer.nodes.items():
                if node.origin is not None and key not in self._hidden:
                    way = (node.stale, len(node.through), trusted.get(key[0], len(trusted)), key)
                    nearest[node.origin] = min(nearest.get(node.origin, way), way)
        return {origin: way[3] for origin, way in nearest.items()}


def view_of(proxies: tuple[Proxy, ...]) -> View:
    """The proxies and their nodes by name and address.

    Who was found by its address alone is believed about addresses of its own host: what is asked of another one by its
    address does not go to whoever says that it knows the way.
    """
    named: dict[str, list[Known]] = {}
    by_address: dict[Address, Reach] = {}
    for proxy in proxies:
        for node in proxy.nodes:
            named.setdefault(node.name, []).append(Known(proxy.name, node))
            if node.via is None:
                by_address[node.address] = node.reach
    for proxy in proxies:
        for node in proxy.nodes:
            if (
                isinstance(node.address, TcpAddress)
                and not node.address.is_loopback
                and _is_believed(proxy, node.address)
            ):
                by_address.setdefault(node.address, node.reach)
    by_name = {name: _meant(known) for name, known in named.items()}
    for proxy in proxies:
        if proxy.name != LOCAL_PROXY:
            by_name[proxy.name] = by_address[proxy.address] = Reach(proxy.address, token=proxy.token)
    nodes = {(proxy.name, node.name): node for proxy in proxies for node in proxy.nodes}
    direct = {proxy.address for proxy in proxies if proxy.name != LOCAL_PROXY}
    direct |= {node.reach.address for node in nodes.values()}
    tokens = {node.address: node.token for node in nodes.values() if node.token is not None and node.via is None}
    tokens.update({proxy.address: proxy.token for proxy in proxies if proxy.token is not None})
    return View(proxies, nodes, by_name, by_address, frozenset(direct), tokens)


def _is_believed(proxy: Proxy, address: TcpAddress) -> bool:
    return not proxy.found or (isinstance(proxy.address, TcpAddress) and proxy.address.host == address.host)


def _way(proxy: Proxy, node: Node) -> Reach | None:
    """How a proxy's node is reached when not at its own address.

    A node of which the proxy told is reached through it, by its name there. Of one that was written down beside the
    proxy, a socket or a loopback port lies on the proxy's machine.
    """
    if proxy.name == LOCAL_PROXY:
        return None
    if node.path is not None:
        return Reach(proxy.address, node.path, proxy.token)
    far = isinstance(proxy.address, UnixAddress) or not proxy.address.is_loopback
    if isinstance(node.address, UnixAddress) or (far and node.address.is_loopback):
        return Reach(proxy.address, node.address.proxy_path(), proxy.token)
    return None


def _meant(known: list[Known]) -> Reach | tuple[str, ...]:
    """What a name means: this frontend's own node comes first and stays what its name means."""
    if len(known) == 1 or known[0].proxy == LOCAL_PROXY:
        return known[0].node.reach
    return tuple(proxy for proxy, _ in known)
