"""The registry in a few bytes for each node: what a process needs to serve proxied requests by it, and no more.

What only pages, health checks and other frontends are told (sources, staleness, ways through other frontends) stays in
the main process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from lmcache_frontend.nodes.node import Node, Proxy, Reach
from lmcache_shared.address import Address, TcpAddress, UnixAddress

_Address = bytes | tuple[str, int]
"""A socket's path as the kernel has it, or a host and a port."""


class _Way(msgspec.Struct, array_like=True):
    address: _Address
    prefix: str
    token: str | None


class _Node(msgspec.Struct, array_like=True):
    name: str
    address: _Address
    via: _Way | None
    token: str | None


class _Proxy(msgspec.Struct, array_like=True):
    name: str
    address: _Address
    found: bool
    token: str | None
    nodes: list[_Node]


def encoded(proxies: Iterable[Proxy]) -> bytes:
    """The proxies with their nodes."""
    return msgspec.msgpack.encode([
        _Proxy(
            proxy.name,
            _written(proxy.address),
            proxy.found,
            proxy.token,
            [_Node(node.name, _written(node.address), _way(node.via), node.token) for node in proxy.nodes],
        )
        for proxy in proxies
    ])  # fmt: skip


def decoded(data: bytes) -> tuple[Proxy, ...]:
    """The proxies of a snapshot.

    Raises:
        msgspec.DecodeError: it is none.
    """
    found = []
    for proxy in msgspec.msgpack.decode(data, type=list[_Proxy]):
        nodes = []
        for node in proxy.nodes:
            address = _read(node.address)
            via = None if node.via is None else Reach(_read(node.via.address), node.via.prefix, node.via.token)
            nodes.append(Node(node.name, *_as_written(address), address, via=via, token=node.token))
        address = _read(proxy.address)
        found.append(Proxy(proxy.name, *_as_written(address), address, tuple(nodes), proxy.found, token=proxy.token))
    return tuple(found)


def _written(address: Address) -> _Address:
    return os.fsencode(address.path) if isinstance(address, UnixAddress) else (address.host, address.port)


def _read(address: _Address) -> Address:
    return UnixAddress(os.fsdecode(address)) if isinstance(address, bytes) else TcpAddress(*address)


def _as_written(address: Address) -> tuple[str, int | str]:
    """The address as a node's host and port."""
    return ("localhost", address.path) if isinstance(address, UnixAddress) else (address.host, address.port)


def _way(reach: Reach | None) -> _Way | None:
    return None if reach is None else _Way(_written(reach.address), reach.prefix, reach.token)
