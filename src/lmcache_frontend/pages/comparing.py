"""Where nodes differ: for each name the groups of nodes with the same value, and what kind of difference it is.

A difference that nobody wants to see (each node has a port of its own) is told apart from one that somebody looks for
(one node of a hundred has another chunk size). Nothing here waits or asks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lmcache_frontend.pages.sweeping import Turns

Kind = Literal["drift", "role", "nature", "equal"]
"""drift   nodes that should be alike are not
role    schedulers differ from workers, and all of one role are alike
nature  each node has, or may have, its own: a port, a number, a name
equal   all have the same
"""

ODD_SHARE = 0.25
"""A group of at most this share of the nodes is odd, where another one has more than half."""

OWN_VALUES = 4
"""So many nodes have as many values, alike but for numbers: then each has its own."""

SHOWN_NAMES = 4
MAX_NAMES = 200
MAX_VALUES = 20
"""Of one name; the others are counted."""

_OWN_WORDS = frozenset(
    """port ports pid ppid rank hostname ip addr uid uuid guid instance socket sock worker invocation journal fds tty
    session windowid shlvl pod""".split()
)
_VAGUE_WORDS = frozenset("address device devices host id ids index name node path start started time".split())
"""They stand for something of its own where no two of several nodes have the same."""

_WORDS = re.compile(r"[A-Za-z]+")
_NUMBERS = re.compile(r"[0-9a-f]{8,}|[0-9]+")


@dataclass(frozen=True)
class Member:
    """A node of a comparison."""

    name: str
    path: str
    role: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Value:
    """A value and who has it; `text` is None where they have none."""

    text: str | None
    members: Sequence[Member]
    is_odd: bool = False
    is_most: bool = False

    @property
    def shown(self) -> Sequence[Member]:
        return self.members[:SHOWN_NAMES]

    @property
    def others(self) -> Sequence[Member]:
        return self.members[SHOWN_NAMES:MAX_NAMES]

    @property
    def uncounted(self) -> int:
        return max(0, len(self.members) - MAX_NAMES)

    @property
    def roles(self) -> str:
        return ", ".join(sorted({member.role or "no role" for member in self.members}))


@dataclass(frozen=True)
class Line:
    """A name, its values from the most common one on, and how many more there are."""

    name: str
    kind: Kind
    values: Sequence[Value]
    more: int = 0

    @property
    def count(self) -> int:
        return len(self.values) + self.more

    @property
    def odd(self) -> int:
        """How many nodes are odd ones out."""
        return sum(len(value.members) for value in self.values if value.is_odd)


async def compare(members: Sequence[Member], words: str = "") -> dict[Kind, list[Line]]:
    """The lines of each kind, those with the fewest odd nodes first; others get their turn meanwhile.

    Args:
        words: only names that have them in the name or in one of their values.
    """
    found: dict[Kind, list[Line]] = {"drift": [], "role": [], "nature": [], "equal": []}
    names = dict.fromkeys(name for member in members for name in member.values)
    turns = Turns()
    asked = words.lower().split()
    for name in sorted(names, key=str.lower):
        line = _line(name, members, asked)
        if line is not None:
            found[line.kind].append(line)
        await turns.next()
    found["drift"].sort(key=lambda line: (not line.odd, line.odd, line.name.lower()))
    return found


def _line(name: str, members: Sequence[Member], words: Sequence[str]) -> Line | None:
    groups: dict[str | None, list[Member]] = {}
    for member in members:
        groups.setdefault(member.values.get(name), []).append(member)
    if words:
        texts = [name.lower(), *(text.lower() for text in groups if text is not None)]
        if not all(any(word in text for text in texts) for word in words):
            return None
    kind = _kind(name, groups, len(members))
    most = max(len(group) for group in groups.values())
    has_most = kind != "nature" and len(groups) > 1 and most > len(members) / 2
    values = [
        Value(
            text,
            group,
            is_odd=has_most and kind == "drift" and len(group) <= max(1, ODD_SHARE * len(members)),
            is_most=has_most and len(group) == most,
        )
        for text, group in groups.items()
    ]
    values.sort(key=lambda value: (-len(value.members), value.text is None, value.text or ""))
    shown = values[:MAX_VALUES]
    if kind == "drift" and len(values) > MAX_VALUES:  # the rare ones are what somebody looks for
        shown = [*values[: MAX_VALUES // 2], *values[-MAX_VALUES // 2 :]]
    return Line(name, kind, shown, len(values) - len(shown))


def _kind(name: str, groups: Mapping[str | None, Sequence[Member]], total: int) -> Kind:
    if len(groups) == 1:
        return "equal"
    roles = [frozenset(member.role for member in group) for group in groups.values()]
    if sum(map(len, roles)) == len(frozenset().union(*roles)):
        return "role"
    return "nature" if _is_own(name, groups, total) else "drift"


def _is_own(name: str, groups: Mapping[str | None, Sequence[Member]], total: int) -> bool:
    """Whether it is in the nature of the name that nodes differ."""
    texts = [text for text in groups if text is not None]
    if len(texts) < 2 or max(len(group) for group in groups.values()) > total / 2:
        return False
    words = {word.lower() for word in _WORDS.findall(name)}
    if words & _OWN_WORDS:
        return True
    if any(len(group) > 1 for text, group in groups.items() if text is not None):
        return False
    is_alike = len({_NUMBERS.sub("#", text) for text in texts}) == 1
    return len(texts) >= OWN_VALUES and (is_alike or bool(words & _VAGUE_WORDS))
