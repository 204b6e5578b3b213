"""Which target a path means: `/proxy/{host}/{port or socket}/{path}`, or `/proxy2/{name}/{path}`.

Read from the raw request target, not from a decoded path: what follows the target goes on byte for byte.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote

from lmcache_frontend.nodes.node import LOCAL_PROXY, Reach, named_path
from lmcache_frontend.nodes.registry import Registry
from lmcache_shared import address
from lmcache_shared.address import Address
from lmcache_shared.errors import AddressError, Refusal

MAX_WAYS = 5
"""Of the ways to nodes of one name, so many are told."""


class ProxiedPath(NamedTuple):
    """A target, and what to ask it for: a path with its query, as the caller wrote it.

    `prefix` is what the caller's path has before the target's own, and `skipped` what the way through other frontends
    adds there: the caller's `prefix + x` is asked for as `skipped + x`.
    """

    address: Address
    path: str
    prefix: str
    skipped: str


def by_address(raw_path: str, registry: Registry) -> ProxiedPath:
    """Read `/proxy/{host}/{port or socket}/{path}`; a socket's path may be encoded once or twice.

    A registered address is reached as its node is, through another frontend where that is the way.

    Raises:
        Refusal: 400, when host, port or socket cannot be one.
    """
    (host, target), path, prefix = _split(raw_path, 2)
    try:
        asked = address.from_proxy_segments(host, target)
    except AddressError as error:
        raise Refusal(400, f"/proxy/{{host}}/{{port or socket}}/…: {error}") from None
    reach = registry.at(asked) or Reach(asked)
    return ProxiedPath(reach.address, reach.prefix + path, prefix, reach.prefix)


def by_name(raw_path: str, registry: Registry) -> ProxiedPath:
    """Read `/proxy2/{node name}/{path}`, or `/proxy2/{proxy}/proxy2/{node name}/{path}` for the node of that proxy.

    A name may be encoded once or twice, as a socket's path may. A proxy's node that is not known here is left to the
    proxy.

    Raises:
        Refusal: 404, when no node or proxy has the name; 409, when nodes of several proxies have it.
    """
    (quoted,), path, prefix = _split(raw_path, 1)
    name = unquote(quoted)
    if registry.find(name) is None and registry.proxy(name) is None:
        name = unquote(name)
    if path.startswith("/proxy2/") and registry.proxy(name) is not None:
        (inner,), inner_path, inner_prefix = _split(path, 1)
        node = registry.node(name, unquote(inner)) or registry.node(name, unquote(unquote(inner)))
        if node is not None:
            reach = node.reach
            return ProxiedPath(reach.address, reach.prefix + inner_path, prefix + inner_prefix, reach.prefix)
        if name == LOCAL_PROXY:
            raise Refusal(404, f"Node with name '{unquote(inner)}' not found")
    found = registry.find(name)
    if found is None:
        raise Refusal(404, f"Node with name '{name}' not found")
    if not isinstance(found, Reach):
        ways = ", ".join(named_path(proxy) + named_path(name) for proxy in found[:MAX_WAYS])
        raise Refusal(409, f"{len(found)} nodes are named '{name}'; ask for {ways}{', …' * (len(found) > MAX_WAYS)}")
    return ProxiedPath(found.address, found.prefix + path, prefix, found.prefix)


def _split(raw_path: str, count: int) -> tuple[list[str], str, str]:
    """The `count` segments behind the first one, the rest with its `/` and query, and all before the rest."""
    if not raw_path.startswith("/"):  # the absolute form, `GET http://host/path` (RFC 9112, section 3.2.2)
        raw_path = "/" + raw_path.partition("://")[2].partition("/")[2]
    if not raw_path.isascii():
        raise Refusal(400, "the request's path has bytes that are no ASCII; percent-encode them (RFC 3986)")
    path, question, query = raw_path.partition("?")
    parts = path.split("/", 2 + count)
    rest = parts[2 + count] if len(parts) > 2 + count else ""
    return parts[2 : 2 + count], f"/{rest}{question}{query}", "/".join(parts[: 2 + count])
