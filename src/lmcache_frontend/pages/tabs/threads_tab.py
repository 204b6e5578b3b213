"""What the node's threads and tasks do now: those with the same stack stand together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lmcache_frontend.pages.asking import Question
from lmcache_frontend.pages.tabs import Tab, View

MAX_THREADS = 2000
_HEAD = re.compile(r"^(?P<kind>Thread|Task): (?P<name>.*)$", re.MULTILINE)
_NAMED = re.compile(r"<\w+\((?P<name>.*), (?:initial|started|stopped)[^,]*\)>")
_FRAME = re.compile(r'  File "(?P<file>[^"\n]*)", line (?P<line>\d+), in (?P<function>.*)')


@dataclass
class Stack:
    """One stack, and the threads that have it; the innermost frame first among `frames`."""

    text: str
    threads: list[str] = field(default_factory=list)

    @property
    def top(self) -> str:
        """Where they are."""
        frames = _FRAME.findall(self.text)
        if not frames:
            return "no Python frame"
        file, line, function = frames[-1]
        return f"{function} ({file.rpartition('/')[2]}:{line})"


def stacks(text: str) -> list[Stack]:
    """The stacks of an answer of `/threads`, those of most threads first."""
    heads = list(_HEAD.finditer(text))[:MAX_THREADS]
    found: dict[str, Stack] = {}
    ends = [*(head.start() for head in heads[1:]), len(text)]
    for head, end in zip(heads, ends, strict=False):  # without heads there is one end more
        body = text[head.end() : end]
        stack = "\n".join(line for line in body.splitlines() if line.startswith("  "))
        found.setdefault(stack, Stack(stack)).threads.append(_name(head["name"]))
    return sorted(found.values(), key=lambda stack: -len(stack.threads))


def _name(head: str) -> str:
    """`worker-1` of `<Thread(worker-1, started daemon 140493918471872)>`."""
    named = _NAMED.fullmatch(head)
    return named["name"] if named else head


async def show(view: View) -> Mapping[str, object]:
    outcome = await view.ask(Question("GET", "/threads"))
    return {"outcome": outcome, "stacks": stacks(outcome.text) if outcome.ok else []}


TAB = Tab("threads", "Threads", 20, show, serves=("/threads",))
