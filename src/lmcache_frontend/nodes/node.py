"""A node: one component's internal API server. A proxy: a frontend, with the nodes behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import quote

import msgspec

from lmcache_shared import address
from lmcache_shared.address import Address
from lmcache_shared.errors import AddressError, ConfigError

LOCAL_PROXY = "local_proxy"
"""The proxy that is this frontend itself; nodes without a proxy of their own are its children."""

MAX_NODES = 10_000
"""Most nodes of one list."""

_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]*\Z"
"""No control characters, and none that turn the direction of the text around: names are shown in logs and pages."""

_Token = Annotated[str, msgspec.Meta(min_length=1, max_length=512, pattern=r"^[!-~]+\Z")]

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=_PRINTABLE)]


class NodeForm(msgspec.Struct):
    """A node, or a proxy with `nodes`, as a file or a request writes it; other keys are ignored."""

    name: _Name
    host: str
    port: int | str
    nodes: list[msgspec.Raw] | None = None
    token: _Token | None = None


@dataclass(frozen=True)
class Reach:
    """How this frontend gets somewhere: where it connects, what it puts before the path that it asks for, and the token
    that it shows there when it asks for itself.
    """

    address: Address
    prefix: str = ""
    token: str | None = field(default=None, repr=False)

    @property
    def proxy_path(self) -> str:
        """The path at this frontend under which it is reached."""
        return self.address.proxy_path() + self.prefix


@dataclass(frozen=True)
class Node:
    """`port` as it was written: a number, a number in a string, or a socket's path; `address` is what it means.

    Attributes:
        path: where the proxy that told of it serves it (`/proxy2/worker0`); None where nobody told.
        through: the frontends between that proxy and the node, the proxy first, by their ids.
        origin: the frontend that has the node for its own, and its name there, by which it is known on every way.
        source: which source of the registry knows it.
        stale: its source no longer reports it.
        via: how it is reached when not at its address; the registry works it out.
        token: shown to it where the caller may ask for what is asked; to nobody else, and in no answer and no log.
    """

    name: str
    host: str
    port: int | str
    address: Address
    path: str | None = None
    through: tuple[str, ...] = ()
    origin: tuple[str, str] | None = None
    source: str = ""
    stale: bool = False
    via: Reach | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def reach(self) -> Reach:
        return self.via or Reach(self.address, token=self.token)


@dataclass(frozen=True)
class Proxy:
    """A frontend, and the nodes on its side; `port` as it was written, `address` what it means.

    Attributes:
        found: it was found by its address alone and may be no frontend; then it is itself its one node.
        source, stale, token: as a node's.
    """

    name: str
    host: str
    port: int | str
    address: Address
    nodes: tuple[Node, ...] = field(default=())
    found: bool = False
    source: str = ""
    stale: bool = False
    token: str | None = field(default=None, repr=False)


def named_path(name: str) -> str:
    """The path of a proxy or node by its name: `/proxy2/<name>`."""
    return f"/proxy2/{quote(name, safe='')}"


def read_list(text: bytes, place: str) -> list[Node | Proxy]:
    """The nodes and proxies of a JSON list; `place` says in errors where it stands.

    Raises:
        ConfigError: no such list, too long, or an entry that cannot be used.
    """
    entries, problems = read_usable(text, place)
    if problems:
        raise ConfigError(problems[0])
    return entries


def read_usable(text: bytes, place: str) -> tuple[list[Node | Proxy], list[str]]:
    """The entries of a JSON list that can be used, and one line for each that cannot.

    Raises:
        ConfigError: it is no list at all, or too long.
    """
    try:
        forms = msgspec.json.decode(text, type=list[msgspec.Raw])
        if len(forms) > MAX_NODES:
            raise ConfigError(f"{place}: {len(forms)} entries, but at most {MAX_NODES} are kept")
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: expected a JSON list of nodes {{name, host, port}}: {error}") from None
    reader = _Reader()
    entries = reader.entries(forms, place)
    if reader.count > MAX_NODES:
        raise ConfigError(f"{place}: {reader.count} nodes, but at most {MAX_NODES} are kept")
    return entries, reader.problems


def read_one(text: bytes, place: str) -> Node | Proxy:
    """One node or proxy, as a request's body holds it.

    Raises:
        ConfigError: it is none, or cannot be used; the text is one line.
    """
    reader = _Reader()
    entry = reader.entry(text, place)
    if entry is None or reader.problems:
        raise ConfigError(reader.problems[0])
    if reader.count > MAX_NODES:
        raise ConfigError(f"{place}: {reader.count} nodes, but at most {MAX_NODES} are kept")
    return entry


class _Reader:
    """Reads entries; what cannot be used is a line in `problems`."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.count = 0

    def entries(self, forms: Iterable[msgspec.Raw], place: str) -> list[Node | Proxy]:
        found: list[Node | Proxy] = []
        taken: set[tuple[type, str]] = set()
        for i, form in enumerate(forms):
            entry = self.entry(bytes(form), f"{place}: [{i}]")
            if entry is None:
                continue
            kind = "proxies" if isinstance(entry, Proxy) else f"nodes of {LOCAL_PROXY}"
            if (type(entry), entry.name) in taken or (isinstance(entry, Proxy) and entry.name == LOCAL_PROXY):
                self._refuse(f"{place}: [{i}]", f"two {kind} are named {entry.name!r}; give each a name of its own")
                continue
            taken.add((type(entry), entry.name))
            found.append(entry)
        return found

    def entry(self, text: bytes, place: str) -> Node | Proxy | None:
        form = self._form(text, place)
        itself = None if form is None else self._node(form, place)
        if form is None or itself is None:
            return None
        if form.nodes is None:
            return itself
        children: dict[str, Node] = {}
        for i, child_text in enumerate(form.nodes):
            where = f"{place}.nodes[{i}]"
            child_form = self._form(bytes(child_text), where)
            child = None if child_form is None else self._node(child_form, where)
            if child_form is None or child is None:
                continue
            if child_form.nodes is not None:
                self._refuse(where, f"{child.name!r} has nodes of its own; a proxy's nodes are leaves")
            elif child.name in children:
                self._refuse(where, f"two nodes of {form.name} are named {child.name!r}; give each a name of its own")
            else:
                children[child.name] = child
        return Proxy(form.name, form.host, form.port, itself.address, tuple(children.values()), token=form.token)

    def _form(self, text: bytes, place: str) -> NodeForm | None:
        try:
            return msgspec.json.decode(text, type=NodeForm)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            self._refuse(place, f"expected a node {{name, host, port}}: {error}")
            return None

    def _node(self, form: NodeForm, place: str) -> Node | None:
        self.count += 1
        try:
            return Node(form.name, form.host, form.port, address.from_node(form.host, form.port), token=form.token)
        except AddressError as error:
            self._refuse(place, f"{form.name!r}: {error}")
            return None

    def _refuse(self, place: str, problem: str) -> None:
        self.problems.append(f"{place}: {problem}")
