"""The node file: what an import would change, line by line, and the list that `--config` reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from lmcache_frontend.nodes.node import LOCAL_PROXY, Node, Proxy, read_usable
from lmcache_frontend.nodes.registry import BY_HAND, NEIGHBOURS, Registry
from lmcache_shared.errors import ConfigError
from lmcache_shared.responses import json_text

Status = Literal["new", "changed", "same", "wrong"]


@dataclass(frozen=True)
class Line:
    """An entry of a file: where it stands there, and what an import makes of it."""

    number: int
    name: str
    status: Status
    kind: str = "node"
    old: str = ""
    new: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Import:
    """What a file would change; `entries` are those that are new or changed."""

    lines: Sequence[Line]
    entries: Sequence[Node | Proxy]
    problem: str = ""

    def count(self, status: Status) -> int:
        return sum(line.status == status for line in self.lines)

    @property
    def is_good(self) -> bool:
        return not self.problem and not self.count("wrong")


def read_import(text: str, registry: Registry) -> Import:
    """Compare a file's entries with what there is. A token that the file does not tell stays as it is."""
    try:
        read, problems = read_usable(text.encode("utf-8", "replace"), "entry")
        numbers = list(_numbers(text))
    except ConfigError as error:
        return Import((), (), str(error))
    wrong = [_wrong(problem, numbers) for problem in problems]
    bad = {index for problem in problems if (index := _index(problem)) is not None}
    rows = iter([number for index, number in enumerate(numbers) if index not in bad])  # others stand in their order
    lines, entries = [], []
    for entry in read:
        number = next(rows, 0)
        taken = _with_tokens(entry, registry)
        found = list(_lines(taken, number, registry))
        lines += found
        if any(line.status != "same" for line in found):
            changed = {line.name for line in found if line.status != "same"}
            nodes = tuple(node for node in taken.nodes if node.name in changed) if isinstance(taken, Proxy) else ()
            entries.append(replace(taken, nodes=nodes) if isinstance(taken, Proxy) else taken)
    return Import(sorted([*wrong, *lines], key=lambda line: line.number), entries)


def node_file(registry: Registry, *, by_hand: bool = False) -> str:
    """The list that `--config` reads, without tokens; nodes of which a proxy tells by itself are not in it."""
    forms: list[dict[str, object]] = []
    for head in registry.heads():
        nodes = [_form(node) for node in _written(registry.proxy(head.name) or head, by_hand)]
        if nodes or not by_hand or head.source == BY_HAND:
            forms.append({**_form(head), "nodes": nodes})
    own = registry.proxy(LOCAL_PROXY)
    forms[:0] = [_form(node) for node in (_written(own, by_hand) if own is not None else ())]
    return "[\n" + ",\n".join("  " + json_text(form) for form in forms) + "\n]\n" if forms else "[]\n"


def _written(proxy: Proxy, by_hand: bool) -> Iterator[Node]:
    for node in proxy.nodes:
        is_itself = proxy.found and node.name == proxy.name
        if node.source != NEIGHBOURS and not is_itself and (not by_hand or node.source == BY_HAND):
            yield node


def _form(item: Node | Proxy) -> dict[str, object]:
    return {"name": item.name, "host": item.host, "port": item.port}


def _numbers(text: str) -> Iterator[int]:
    """The line in which each entry of the list begins, from 1."""
    at = line = 0
    for raw in msgspec.json.decode(text.encode("utf-8", "replace"), type=list[msgspec.Raw]):
        form = bytes(raw).decode("utf-8", "replace")
        found = text.find(form, at)
        if found >= 0:
            line += text.count("\n", at, found)
            yield line + 1
            line += form.count("\n")
            at = found + len(form)
        else:
            yield line + 1


_PLACE = re.compile(r"entry: \[([0-9]+)\](\S*): ")


def _index(problem: str) -> int | None:
    """Which entry is none at all; None where only a part of it is."""
    found = _PLACE.match(problem)
    return int(found[1]) if found is not None and not found[2] else None


def _wrong(problem: str, numbers: Sequence[int]) -> Line:
    """`entry: [3]: …` as a line."""
    found = _PLACE.match(problem)
    if found is None or int(found[1]) >= len(numbers):
        return Line(0, "", "wrong", problem=problem)
    part = f"{found[2].lstrip('.')}: " if found[2] else ""
    return Line(numbers[int(found[1])], "", "wrong", problem=part + problem[found.end() :])


def _lines(entry: Node | Proxy, number: int, registry: Registry) -> Iterator[Line]:
    if isinstance(entry, Node):
        yield _line(number, "node", entry, registry.node(LOCAL_PROXY, entry.name))
        return
    yield _line(number, "proxy", entry, registry.proxy(entry.name) or registry.head(entry.name))
    for node in entry.nodes:
        yield _line(number, f"node of {entry.name}", node, registry.node(entry.name, node.name))


def _line(number: int, kind: str, entry: Node | Proxy, known: Node | Proxy | None) -> Line:
    if known is None:
        return Line(number, entry.name, "new", kind, "", str(entry.address))
    is_same = known.address == entry.address and known.token == entry.token
    old, new = str(known.address), str(entry.address)
    if old == new and not is_same:
        new += ", another token"
    return Line(number, entry.name, "same" if is_same else "changed", kind, old, new)


def _with_tokens(entry: Node | Proxy, registry: Registry) -> Node | Proxy:
    if isinstance(entry, Node):
        return _with_token(entry, registry.node(LOCAL_PROXY, entry.name))
    nodes = tuple(_with_token(node, registry.node(entry.name, node.name)) for node in entry.nodes)
    known = registry.proxy(entry.name) or registry.head(entry.name)
    token = known.token if known is not None and entry.token is None and known.address == entry.address else entry.token
    return replace(entry, nodes=nodes, token=token)


def _with_token(node: Node, known: Node | None) -> Node:
    """With the token that the registry has for the same place, where the file tells of none."""
    is_known = known is not None and node.token is None and known.address == node.address
    return replace(node, token=known.token) if is_known and known is not None else node
