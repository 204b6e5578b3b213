"""Proxies and nodes that are added, changed and removed by hand, over HTTP: kept in a store, laid over the discovered.

A record is a proxy or a node, or says that a discovered one was removed. Every change is compare-and-set on its
records: of two frontends that share a store and add one name at once, one wins and the other sees that it exists.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from lmcache_frontend.nodes.node import LOCAL_PROXY, MAX_NODES, Node, Proxy, read_one
from lmcache_frontend.nodes.registry import NEIGHBOURS, Known, Name, Registry
from lmcache_frontend.nodes.stores import Change, Store, StoreAway, StoreUncertain, Unkeepable
from lmcache_shared.errors import ConfigError, Refusal

logger = logging.getLogger(__name__)

TRIES = 8
"""How often a change is worked out anew when others change the same records at the same time."""

WATCH_SECONDS = 1.0
READ_AGAIN_SECONDS = 30.0
"""The store is read again after so long, whether it tells of a change or not."""

IDENTITY = "identity"
"""The record of the name by which other frontends know all that share the store."""

_REMOVED = '{"removed":true}'


class ByHand:
    """Changes the registry by hand.

    Args:
        registry: what the records are laid over.
        store: where they are kept.
    """

    def __init__(self, registry: Registry, store: Store) -> None:
        self.problem: str | None = "it has not been read yet"
        self.loaded = False
        """Whether the store has been read at least once."""
        self._registry = registry
        self._store = store
        self._records: dict[str, str] = {}
        self._parsed: dict[str, tuple[str, Node | Proxy]] = {}
        """What each record's text says; of thousands one is another at a time."""
        self._lock = asyncio.Lock()
        self._failed_at = 0.0
        self._kept_before = 0

    @property
    def place(self) -> str:
        """The store, for people."""
        return self._store.description

    async def run(self) -> None:
        """Follow the store until cancelled; while it is away the last known records count."""
        while True:
            try:
                await self.read()
                unread = 0.0
                while unread < READ_AGAIN_SECONDS and not await self._store.changed(WATCH_SECONDS):
                    unread += WATCH_SECONDS
            except StoreAway as away:
                self.note(away)
                await asyncio.sleep(WATCH_SECONDS / 2)

    async def read(self) -> None:
        """Take what the store has.

        Raises:
            StoreAway: it cannot be read.
        """
        async with self._lock:
            await self._read()

    async def add_proxy(self, entry: Proxy) -> None:
        """Add a proxy, with the nodes that it is given.

        Raises:
            Refusal: 409, when there is one of this name; 503, when it cannot be kept.
        """

        def changes() -> list[Change]:
            if self._has_proxy(entry.name):
                raise Refusal(409, "Proxy name already exists")
            return [self._put(entry.name, entry), *(self._put((entry.name, node.name), node) for node in entry.nodes)]

        await self._apply(changes)

    async def add_node(self, proxy_name: str, entry: Node) -> None:
        """Add a node to a proxy.

        Raises:
            Refusal: 404 without such a proxy, 409 when it has a node of this name, 503 when it cannot be kept.
        """

        def changes() -> list[Change]:
            proxy = self._registry.proxy(proxy_name)
            if proxy is None:
                raise Refusal(404, "Proxy not found")
            if self._registry.node(proxy_name, entry.name) is not None:
                raise Refusal(409, "Node name already exists")
            return [*self._adopt(proxy), self._put((proxy_name, entry.name), entry)]

        await self._apply(changes)

    async def put_all(self, entries: Sequence[Node | Proxy]) -> None:
        """Put each in the place of what has its name, or beside the others: all of them or none.

        Raises:
            Refusal: 409, when these are too many; 503, when they cannot be kept.
        """

        def changes() -> list[Change]:
            found: dict[Name, Change] = {}
            for entry in entries:
                if isinstance(entry, Node):
                    found[LOCAL_PROXY, entry.name] = self._put((LOCAL_PROXY, entry.name), entry)
                    continue
                found[entry.name] = self._put(entry.name, entry)
                found.update(
                    {(entry.name, node.name): self._put((entry.name, node.name), node) for node in entry.nodes}
                )
            return list(found.values())

        await self._apply(changes)

    async def change(self, name: str, entry: Node | Proxy, *, proxy: str | None = None) -> bool:
        """Put `entry` in the place of a proxy or node; whether it was a proxy.

        Args:
            name: the proxy's or node's, proxies first.
            proxy: only the node of this proxy.

        Raises:
            Refusal: 404 without one, 409 when the name is not clear or the new one is taken, 503 when it is not kept.
        """
        was_proxy = False

        def changes() -> list[Change]:
            nonlocal was_proxy
            found = self._named(name, proxy)
            was_proxy = isinstance(found, Proxy)
            return self._changed_proxy(found, entry) if isinstance(found, Proxy) else self._changed_node(found, entry)

        await self._apply(changes)
        return was_proxy

    async def remove(self, name: str, *, proxy: str | None = None) -> bool:
        """Remove a proxy with its nodes, or a node; whether it was a proxy. A discovered one stays away.

        Raises:
            Refusal: as `change`.
        """
        was_proxy = False

        def changes() -> list[Change]:
            nonlocal was_proxy
            found = self._named(name, proxy)
            was_proxy = isinstance(found, Proxy)
            if not isinstance(found, Proxy):
                return [self._take_away((found.proxy, found.node.name))]
            children = [key for key in map(_name_of, self._records) if isinstance(key, tuple) and key[0] == name]
            return [self._take_away(name), *(self._put(key, None) for key in children)]

        await self._apply(changes)
        return was_proxy

    async def restore(self, name: str, *, proxy: str | None = None) -> None:
        """Let a discovered proxy or node that was changed or removed be seen again as its source tells of it.

        Raises:
            Refusal: 404, when there is none; 503, when it cannot be kept.
        """

        def changes() -> list[Change]:
            names = [known for known in [*self.hidden(), *self.changed()] if _matches(known, name, proxy)]
            if not names:
                raise Refusal(404, f"no discovered proxy or node named {name!r} was changed or removed by hand")
            hidden = set(self.hidden())
            if any(known not in hidden and not self._registry.is_discovered(known) for known in names):
                raise Refusal(409, f"no source tells of {name!r} now: without what was said by hand there is nothing")
            return [self._put(known, None) for known in names]

        await self._apply(changes)

    def hidden(self) -> list[Name]:
        """The discovered proxies and nodes that were removed."""
        return [name for key, text in self._records.items() if text == _REMOVED and (name := _name_of(key)) is not None]

    def changed(self) -> list[Name]:
        """The discovered proxies and nodes in whose place stands one by hand."""
        return [
            name
            for key, text in self._records.items()
            if '"over":true' in text and _read_record(text).over and (name := _name_of(key)) is not None
        ]

    def _named(self, name: str, proxy: str | None) -> Proxy | Known:
        if proxy is not None:
            node = self._registry.node(proxy, name)
            if node is None:
                raise Refusal(404, "Node not found")
            return Known(proxy, node)
        if name == LOCAL_PROXY:
            raise Refusal(409, f"{LOCAL_PROXY} is this frontend itself; its nodes can be changed, it cannot")
        found = self._registry.proxy(name) or self._registry.head(name)
        if found is not None:
            return found
        nodes = self._registry.nodes_named(name)
        if not nodes:
            raise Refusal(404, "Node not found")
        if len(nodes) > 1:
            proxies = ", ".join(known.proxy for known in nodes[:5])
            raise Refusal(409, f"{len(nodes)} nodes are named {name!r}; say which one with ?proxy= (of {proxies})")
        return nodes[0]

    def _has_proxy(self, name: str) -> bool:
        return self._registry.proxy(name) is not None or self._registry.head(name) is not None

    def _changed_proxy(self, proxy: Proxy, entry: Node | Proxy) -> list[Change]:
        if entry.name != proxy.name and self._has_proxy(entry.name):
            raise Refusal(409, "Proxy name already exists")
        written = self._written(proxy)
        wanted = {node.name: node for node in entry.nodes} if isinstance(entry, Proxy) else written
        changes = {}
        if entry.name != proxy.name:
            changes[proxy.name, ""] = self._take_away(proxy.name)
            for node_name in written:
                changes[proxy.name, node_name] = self._put((proxy.name, node_name), None)
            for _, node_name in [key for key in self.hidden() if isinstance(key, tuple) and key[0] == proxy.name]:
                changes[proxy.name, node_name] = self._put((proxy.name, node_name), None)
        elif wanted is not written:
            for node_name in written.keys() - wanted.keys():
                changes[proxy.name, node_name] = self._take_away((proxy.name, node_name))
        changes[entry.name, ""] = self._put(entry.name, entry)
        if entry.name != proxy.name or wanted is not written:
            for node in wanted.values():
                changes[entry.name, node.name] = self._put((entry.name, node.name), node)
        return list(changes.values())

    def _written(self, proxy: Proxy) -> dict[str, Node]:
        """The nodes that were written down beside a proxy, of which it did not tell: also while it is not shown."""
        kept = {
            entry.name: entry
            for key, (_, entry) in self._parsed.items()
            if isinstance(entry, Node) and isinstance(name := _name_of(key), tuple) and name[0] == proxy.name
        }
        shown = {
            node.name: node
            for node in proxy.nodes
            if node.source != NEIGHBOURS and not (proxy.found and node.name == proxy.name)
        }
        return {**shown, **kept}

    def _changed_node(self, known: Known, entry: Node | Proxy) -> list[Change]:
        if isinstance(entry, Proxy):
            raise Refusal(400, f"{known.node.name!r} is a node and has no nodes of its own; leave out `nodes`")
        proxy = self._registry.proxy(known.proxy)
        assert proxy is not None
        changes = self._adopt(proxy)
        if entry.name != known.node.name:
            if self._registry.node(known.proxy, entry.name) is not None:
                raise Refusal(409, "Node name already exists")
            changes.append(self._take_away((known.proxy, known.node.name)))
        return [*changes, self._put((known.proxy, entry.name), entry)]

    def _adopt(self, proxy: Proxy) -> list[Change]:
        """A proxy that has a node by hand stays, though its source may stop telling of it.

        Its record is another one after every such change, so that of somebody who removes it at the same time and
        somebody who gives it a node one comes second, and knows.
        """
        if proxy.name == LOCAL_PROXY:
            return []
        key = _key(proxy.name)
        before = self._records.get(key)
        after = _Record(
            proxy.name,
            proxy.host,
            proxy.port,
            proxy.token,
            over=self._lies_over(proxy.name),
            change=_number(before) + 1,
        )
        return [Change(key, before, after.text())]

    def _take_away(self, name: Name) -> Change:
        key = _key(name)
        return Change(key, self._records.get(key), _REMOVED if self._lies_over(name) else None)

    def _put(self, name: Name, entry: Node | Proxy | None) -> Change:
        key = _key(name)
        before = self._records.get(key)
        if entry is None:
            return Change(key, before, None)
        over, change = self._lies_over(name), _number(before) + 1
        after = _Record(entry.name, entry.host, entry.port, entry.token, over=over, change=change)
        return Change(key, before, after.text())

    def _lies_over(self, name: Name) -> bool:
        """Whether a source knows this name, now, or did when the record was written."""
        text = self._records.get(_key(name))
        return self._registry.is_discovered(name) or text == _REMOVED or _read_record(text).over

    async def _apply(self, work_out: Callable[[], Sequence[Change]]) -> None:
        began = time.monotonic()
        try:
            async with self._lock:
                if self._failed_at > began and self.problem is not None:
                    # One who waits in line behind a store that does not answer hears what the one before heard.
                    raise Refusal(503, f"nothing was changed: {self.problem}", {"Retry-After": "1"})
                if not self.loaded:
                    await self._read()
                for _ in range(TRIES):
                    changes = [change for change in work_out() if change.before != change.after]
                    if changes and IDENTITY not in self._records:
                        changes.append(Change(IDENTITY, None, self._registry.identity))
                    after = {**self._records, **{change.key: change.after for change in changes}}
                    count = sum(text is not None for key, text in after.items() if key != IDENTITY)
                    if count > MAX_NODES:
                        raise Refusal(409, f"{count} proxies and nodes would be kept by hand, at most {MAX_NODES} are")
                    if not changes or await self._store.apply(changes):
                        self._take({key: text for key, text in after.items() if text is not None})
                        return
                    await self._read()
        except Unkeepable as refused:
            raise Refusal(400, str(refused)) from None
        except StoreAway as away:
            self.note(away)
            self._failed_at = time.monotonic()
            known = "" if isinstance(away, StoreUncertain) else "nothing was changed: "
            raise Refusal(503, f"{known}{away}", {"Retry-After": "1"}) from None
        raise Refusal(409, "others change the same nodes at the same time; try again")

    async def _read(self) -> None:
        records = await self._store.read()
        if IDENTITY not in records and self._store.is_shared:
            if await self._store.apply([Change(IDENTITY, None, self._registry.identity)]):
                records[IDENTITY] = self._registry.identity
            else:
                records = await self._store.read()
        if records != self._records or not self.loaded:
            self._take(records)
        self.note(None)

    def _take(self, records: dict[str, str]) -> None:
        self._records = records
        self.loaded = True
        self._registry.identity = records.get(IDENTITY, self._registry.identity)[:64]
        found = self._entries(records)
        self._registry.publish_by_hand(found.proxies.values(), found.hidden)

    def _entries(self, records: dict[str, str]) -> _Found:
        """What the records say; one that cannot be read, as another version may have written it, is passed over."""
        heads: dict[str, Node | Proxy] = {}
        nodes: dict[str, list[Node]] = {}
        hidden: list[Name] = []
        before, self._parsed = self._parsed, {}
        for key, text in records.items():
            name = _name_of(key)
            if name is None:
                continue
            if text == _REMOVED:
                hidden.append(name)
                continue
            known = before.get(key)
            entry = known[1] if known is not None and known[0] == text else _entry_of(name, key, text)
            if entry is None:
                continue
            self._parsed[key] = (text, entry)
            if isinstance(name, str):
                heads[name] = entry
            elif isinstance(entry, Node):
                nodes.setdefault(name[0], []).append(entry)
        proxies: dict[str, Proxy] = {}
        for proxy_name in dict.fromkeys([*heads, *nodes]):
            children = tuple(nodes.get(proxy_name, ()))
            head = heads.get(proxy_name)
            if head is not None:
                proxies[proxy_name] = Proxy(proxy_name, head.host, head.port, head.address, children, token=head.token)
            elif proxy_name == LOCAL_PROXY:
                proxies[proxy_name] = Proxy(proxy_name, "", 0, children[0].address, children)
        return _Found(proxies, hidden)

    def note(self, away: StoreAway | None) -> None:
        """Whether the store is away; the log tells of a change."""
        problem = None if away is None else str(away)
        if problem != self.problem:
            if problem is not None:
                logger.warning("nodes by hand: %s", problem)
            elif self.loaded and self._kept_before > len(self._records):
                lost = "nodes by hand: %s can be used again, with %d records where %d were"
                logger.warning(lost, self._store.description, len(self._records), self._kept_before)
            elif self.loaded:
                logger.info("nodes by hand: %s can be used", self._store.description)
            self._kept_before = len(self._records)
        self.problem = problem


@dataclass
class _Found:
    proxies: dict[str, Proxy]
    hidden: list[Name]


def _entry_of(name: Name, key: str, text: str) -> Node | Proxy | None:
    try:
        entry = read_one(text.encode(), key)
    except (ConfigError, UnicodeEncodeError) as error:
        logger.debug("nodes by hand: a record was passed over: %s", error)
        return None
    return entry if entry.name == (name if isinstance(name, str) else name[1]) else None


class _Record(msgspec.Struct, omit_defaults=True):
    """A proxy or node as it is kept.

    Attributes:
        over: it lies over a discovered one, which would be seen again without it.
        change: counts the changes of this record.
    """

    name: str = ""
    host: str = ""
    port: int | str = ""
    token: str | None = None
    over: bool = False
    change: int = 0

    def text(self) -> str:
        return msgspec.json.encode(self).decode()


def _read_record(text: str | None) -> _Record:
    """What a record says; of one that nobody here wrote nothing."""
    try:
        return msgspec.json.decode(text or "{}", type=_Record)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return _Record()


def _number(text: str | None) -> int:
    return min(max(_read_record(text).change, 0), 1 << 31)


def _key(name: Name) -> str:
    parts = [name] if isinstance(name, str) else list(name)
    return json.dumps(parts, separators=(",", ":"), ensure_ascii=False)


def _name_of(key: str) -> Name | None:
    """Whose record it is; None when it is something else's."""
    try:
        parts = json.loads(key) if key.startswith("[") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts) or len(parts) not in (1, 2):
        return None
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _matches(known: Name, name: str, proxy: str | None) -> bool:
    if isinstance(known, str):
        return proxy is None and known == name
    return known[1] == name and proxy in (None, known[0])
