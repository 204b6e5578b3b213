"""The one owner of what the frontend knows of the cluster: its proxies and their nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lmcache_frontend.nodes.node import LOCAL_PROXY, Node, Proxy, Reach, repeated_name
from lmcache_shared.address import Address, tcp_address
from lmcache_shared.errors import ConfigError


class Registry:
    """The proxies of the cluster, this frontend's own nodes first.

    Args:
        entries: proxies, and nodes that become children of `local_proxy`.
        host, port: where this frontend serves, as `local_proxy` is told.

    Where two proxies have nodes of one name, the first one's is meant by it.

    Raises:
        ConfigError: two proxies, or two nodes of one proxy, have one name.
    """

    def __init__(self, entries: Iterable[Node | Proxy], *, host: str, port: int) -> None:
        own: list[Node] = []
        proxies: dict[str, Proxy] = {}
        for entry in entries:
            if isinstance(entry, Node):
                own.append(entry)
            elif entry.name in proxies or entry.name == LOCAL_PROXY:
                raise ConfigError(f"nodes: two proxies are named {entry.name!r}; give each a name of its own")
            else:
                proxies[entry.name] = entry
        local = {LOCAL_PROXY: Proxy(LOCAL_PROXY, host, port, tcp_address(host, port), tuple(own))} if own else {}
        self._proxies: dict[str, Proxy] = {**local, **proxies}
        for proxy in self._proxies.values():
            if name := repeated_name(iter(proxy.nodes)):
                raise ConfigError(f"nodes: two nodes of {proxy.name} are named {name!r}; give each a name of its own")
        self._by_name = {name: Reach(proxy.address) for name, proxy in proxies.items()}
        for node in self.nodes():
            self._by_name.setdefault(node.name, node.reach)
        self._addresses = frozenset(
            {proxy.address for proxy in proxies.values()} | {node.reach.address for node in self.nodes()}
        )

    def proxies(self) -> Iterator[Proxy]:
        return iter(self._proxies.values())

    def nodes(self) -> Iterator[Node]:
        """The leaves, proxy by proxy."""
        for proxy in self._proxies.values():
            yield from proxy.nodes

    def find(self, name: str) -> Reach | None:
        """How the proxy or node with this name is reached; proxies come first, as with LMCache's frontend."""
        return self._by_name.get(name)

    def has(self, address: Address) -> bool:
        """Whether this frontend connects to this address for a registered node or proxy."""
        return address in self._addresses
