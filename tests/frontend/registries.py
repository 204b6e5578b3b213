"""A registry that a test fills by itself."""

from __future__ import annotations

import json
from collections.abc import Iterable

from lmcache_frontend.nodes.node import Node, Proxy, read_list
from lmcache_frontend.nodes.registry import Registry


def entries(*items: object) -> list[Node | Proxy]:
    return read_list(json.dumps(items).encode(), "--nodes")


def registry_of(found: Iterable[Node | Proxy] = (), *, host: str = "h", port: int = 1) -> Registry:
    registry = Registry(host=host, port=port)
    registry.publish("nodes", found)
    return registry
