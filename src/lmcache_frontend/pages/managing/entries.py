"""An entry of the registry as the page shows it: where it comes from, and what changing it here means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from aiohttp import web

from lmcache_frontend.app import BY_HAND, HEALTH, NEIGHBOURS, REGISTRY, SOURCES
from lmcache_frontend.nodes.node import LOCAL_PROXY, Node, Proxy, read_one
from lmcache_frontend.nodes.registry import BY_HAND as HAND
from lmcache_frontend.nodes.registry import NEIGHBOURS as TOLD
from lmcache_frontend.nodes.registry import Name
from lmcache_frontend.telemetry.health.states import NodeHealth
from lmcache_shared.errors import Refusal
from lmcache_shared.responses import json_text

SOURCES_SAY: Mapping[str, str] = {
    "nodes": "the option --nodes",
    "plugin": "LMCache's configuration, by the plugin that started this frontend",
    "file": "the file of --config",
    "lmcache-config": "the file of --lmcache-config",
    HAND: "an entry by hand",
    "supplier": "the discovery service",
    "heartbeats": "its own heartbeats",
    "dns": "the DNS",
    TOLD: "its proxy, which tells of it",
}
"""Where an entry comes from, for people."""


MAX_PORT_DIGITS = 10


@dataclass(frozen=True)
class Entry:
    """A proxy or a node.

    Attributes:
        proxy: the name of the proxy, of a node the one that it belongs to.
        node: None for a proxy itself.
        is_changed: one by hand stands in the place of a discovered one.
        problem: why a proxy does not tell of its nodes.
    """

    proxy: str
    item: Node | Proxy
    health: NodeHealth | None = None
    is_changed: bool = False
    problem: str | None = None
    place: str = ""

    @property
    def name(self) -> str:
        return self.item.name

    @property
    def is_proxy(self) -> bool:
        return isinstance(self.item, Proxy)

    @property
    def has_token(self) -> bool:
        return self.item.token is not None

    @property
    def nodes(self) -> int:
        return len(self.item.nodes) if isinstance(self.item, Proxy) else 0

    @property
    def is_by_hand(self) -> bool:
        return self.item.source == HAND

    @property
    def comes_from(self) -> str:
        told = SOURCES_SAY.get(self.item.source, self.item.source or "nobody knows")
        return f"{told}, {self.place}" if self.place else told

    @property
    def path(self) -> str:
        return entry_path(self.proxy, None if self.is_proxy else self.name)

    @property
    def effect_of_change(self) -> str:
        """What a change by hand is for an entry of another source."""
        if self.is_changed:
            return "A source tells of it too. What stands here was said by hand and wins; Restore takes it back."
        if self.is_by_hand:
            return "It was added by hand, and what you write here is all there is of it."
        return (
            f"It comes from {self.comes_from}. That is not changed: what you write here lies over it, and Restore"
            " takes it back. To change it for good, change it there."
        )

    @property
    def effect_of_removal(self) -> str:
        gone = " Its nodes go with it." if self.is_proxy else ""
        if self.is_by_hand and not self.is_changed:
            return f"It was added by hand and is gone for good.{gone}"
        return f"A source tells of it: it stays away until somebody restores it.{gone}"


def entry_path(proxy: str, node: str | None) -> str:
    """The page of an entry."""
    asked = {"proxy": proxy} if node is None else {"proxy": proxy, "name": node}
    return "/manage/entry?" + urlencode(asked)


def entry_of(app: web.Application, proxy: str, node: str | None) -> Entry:
    """The entry of these names.

    Raises:
        Refusal: 404.
    """
    registry = app[REGISTRY]
    changed = set(app[BY_HAND].changed())
    if node is None:
        found = None if proxy == LOCAL_PROXY else registry.proxy(proxy) or registry.head(proxy)
        if found is None:
            raise Refusal(404, f"there is no proxy {proxy[:100]!r}; it may have been removed")
        return Entry(proxy, found, None, proxy in changed, app[NEIGHBOURS].problem(proxy), _place(app, found))
    known = registry.node(proxy, node)
    if known is None:
        raise Refusal(404, f"{proxy[:100]!r} has no node {node[:100]!r}; it may have been removed")
    health = app[HEALTH].of(proxy, node)
    return Entry(proxy, known, health, (proxy, node) in changed, place=_place(app, known))


def proxies(app: web.Application) -> Iterator[Entry]:
    """The other frontends."""
    changed, registry = set(app[BY_HAND].changed()), app[REGISTRY]
    for head in list(registry.heads()):
        proxy = registry.proxy(head.name) or head
        yield Entry(head.name, proxy, None, head.name in changed, app[NEIGHBOURS].problem(head.name))


def label(name: Name) -> str:
    """A proxy or a node in a sentence."""
    if isinstance(name, str):
        return f"the proxy {name}"
    return name[1] if name[0] == LOCAL_PROXY else f"{name[1]} of {name[0]}"


def read(fields: Mapping[str, str], token: str | None, *, is_proxy: bool) -> Node | Proxy:
    """What a form describes, read as a request's body is.

    Raises:
        ConfigError: it is none.
    """
    form: dict[str, object] = {name: fields.get(name, "").strip() for name in ("name", "host", "port")}
    port = str(form["port"])
    if port.isascii() and port.isdigit() and len(port) < MAX_PORT_DIGITS:
        form["port"] = int(port)
    if token:
        form["token"] = token
    entry = read_one(json_text(form).encode(), "the form")
    if is_proxy and isinstance(entry, Node):
        return Proxy(entry.name, entry.host, entry.port, entry.address, token=entry.token)
    return entry


def _place(app: web.Application, item: Node | Proxy) -> str:
    return next((it.place for it in app[SOURCES] if it.name == item.source), "")
