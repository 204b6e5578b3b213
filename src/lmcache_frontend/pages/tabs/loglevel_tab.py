"""The levels of the node's loggers as a tree by dots: what each has, what it inherits, what was changed from here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from lmcache_frontend.pages.asking import Question
from lmcache_frontend.pages.changed_levels import CHANGED_LEVELS, ChangedLevels
from lmcache_frontend.pages.confirming import Change, Form, Plan, Result
from lmcache_frontend.pages.tabs import Action, Tab, View

ROOT, INHERITS = "root", "NOTSET"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
MAX_SHOWN = 2000
"""Loggers on one page; a search looks through all."""

MAX_AT_ONCE = 100
MAX_NAME = 255
MAX_READ = 10_000
MAX_PARTS = 20
"""Loggers of a node, and parts of a name, that are read: each name stands for all those above it."""


@dataclass(frozen=True)
class Logger:
    """A logger, or a name with dots that has some below it.

    Attributes:
        own: the level that it has itself; empty when it inherits one.
        effective: what counts.
        source: from whom it has that.
        was: its level before it was changed from here.
    """

    name: str
    depth: int
    own: str
    effective: str
    source: str
    was: str | None

    @property
    def stem(self) -> str:
        """What it has in common with its parent."""
        return self.name[: len(self.name) - len(self.leaf)]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2] or self.name

    @property
    def changed_from(self) -> str:
        return "" if self.was is None else _named(self.was)


@dataclass(frozen=True)
class Branch:
    """The loggers of one package."""

    name: str
    loggers: list[Logger]


def levels_of(text: str) -> dict[str, str]:
    """The loggers of an answer of `/loglevel`, by name."""
    lines = (line.rpartition(": ") for line in text.splitlines()[:MAX_READ] if not line.startswith("==="))
    return {
        name: level.strip()[:MAX_NAME]
        for name, colon, level in lines
        if colon and 0 < len(name) <= MAX_NAME and name.count(".") < MAX_PARTS
    }


def tree(levels: Mapping[str, str], was: Mapping[str, str]) -> list[Logger]:
    """All loggers, each after its parent; a parent that the node does not name is there, too."""
    names = {
        ".".join(parts[:end]) for name in levels for parts in [name.split(".")] for end in range(1, len(parts) + 1)
    }
    names = (names | was.keys()) - {ROOT, ""}
    top = levels.get(ROOT, "")
    found = [Logger(ROOT, 0, top, top or "WARNING", ROOT, was.get(ROOT))]
    effective: dict[str, tuple[str, str]] = {"": (found[0].effective, ROOT)}
    for name in sorted(names, key=lambda name: name.lower().split(".")):
        own = levels.get(name, INHERITS)
        own = "" if own == INHERITS else own
        inherited = effective.get(name.rpartition(".")[0], effective[""])
        effective[name] = (own, name) if own else inherited
        found.append(Logger(name, name.count("."), own, *effective[name], was.get(name)))
    return found


def branches(loggers: list[Logger]) -> list[Branch]:
    """By package; root, and what is alone, come first, then LMCache and vLLM."""
    found: dict[str, list[Logger]] = {}
    for logger in loggers:
        found.setdefault(logger.name.partition(".")[0], []).append(logger)
    first = ("lmcache", "vllm")
    order = sorted(found, key=lambda name: (name != ROOT, not name.startswith(first), name.lower()))
    return [Branch(name, found[name]) for name in order]


async def show(view: View) -> Mapping[str, object]:
    outcome, root = await asyncio.gather(view.get("/loglevel"), view.get(f"/loglevel?logger_name={ROOT}"))
    if not outcome.ok:
        return {"outcome": outcome}
    levels = {**levels_of(outcome.text), **(levels_of(root.text) if root.ok else {})}
    loggers = tree(levels, _changed(view).of(_key(view), levels))
    kept = [logger for logger in loggers if _is_wanted(view, logger)]
    words = view.words
    hits = [logger for logger in kept if all(word in logger.name.lower() for word in words)]
    is_whole = len(kept) <= MAX_SHOWN
    shown = kept if is_whole else hits[:MAX_SHOWN]
    return {
        "outcome": outcome,
        "branches": branches(shown),
        "words": words,
        "hits": len(hits),
        "kept": len(kept),
        "total": len(loggers),
        "left_out": 0 if is_whole else len(hits) - len(shown),
        "is_whole": is_whole,
        "changed": [logger for logger in loggers if logger.was is not None],
        "levels": [*LEVELS, INHERITS],
        "lacks": view.lacks("GET", "/loglevel?logger_name=a&level=INFO"),
        "max_at_once": MAX_AT_ONCE,
    }


def _is_wanted(view: View, logger: Logger) -> bool:
    wanted = view.query("show")
    if wanted == "own":
        return bool(logger.own)
    if wanted == "changed":
        return logger.was is not None
    if wanted == "debug":
        return logger.effective not in LEVELS[1:]
    return True


async def plan_set(view: View, form: Form) -> Plan:
    level = form.get("level").upper()
    names = _chosen(form)
    title = f"Set {_many(len(names))} to {_named(level)}"
    if level not in (*LEVELS, INHERITS):
        return Plan(
            "Set the level", [view.name], problem=f"{level[:40]!r} is none of {', '.join((*LEVELS, INHERITS))}."
        )
    return await _plan(view, title, dict.fromkeys(names, level), _effect(level))


async def plan_reset(view: View, form: Form) -> Plan:
    was = await _to_reset(view, form)
    if was is None:
        return Plan("Reset the levels", [view.name], problem="The node does not tell its levels now.")
    if not was:
        return Plan("Reset the levels", [view.name], problem="No level was changed from here.")
    return await _plan(view, f"Reset {_many(len(was))}", was, "Each gets the level that it had before it was changed.")


async def _plan(view: View, title: str, levels: Mapping[str, str], effect: str) -> Plan:
    if not levels:
        return Plan("Set the level", [view.name], problem="No logger is chosen. Mark some, or name one.")
    if len(levels) > MAX_AT_ONCE:
        problem = (
            f"{len(levels)} loggers are chosen; at most {MAX_AT_ONCE} can be set at once. Set their parent instead."
        )
        return Plan("Set the level", [view.name], problem=problem)
    too_long = next((name for name in levels if len(name) > MAX_NAME), None)
    if too_long:
        return Plan(title, [view.name], problem=f"{too_long[:40]}… is longer than {MAX_NAME} characters.")
    now = await _now(view)
    if isinstance(now, str):
        return Plan(title, [view.name], problem=now)
    changes = [Change(name, _named(now.get(name, INHERITS)), _named(level)) for name, level in levels.items()]
    return Plan(title, [view.name], effect, changes)


async def set_levels(view: View, form: Form) -> Result:
    level = form.get("level").upper()
    return await _set(view, dict.fromkeys(_chosen(form)[:MAX_AT_ONCE], level))


async def reset_levels(view: View, form: Form) -> Result:
    return await _set(view, await _to_reset(view, form) or {})


async def _set(view: View, levels: Mapping[str, str]) -> Result:
    """One after the other; one that fails does not keep the others from being set."""
    now = await _now(view)
    if isinstance(now, str):
        return Result(False, now)
    said, failed, last = [], 0, None
    for name, level in levels.items():
        asked = urlencode({"logger_name": name, "level": level})
        outcome = last = await view.ask(Question("GET", f"/loglevel?{asked}"))
        if outcome.ok:
            _changed(view).note(_key(view), name, now.get(name, INHERITS))
        failed += not outcome.ok
        said.append(f"{name}: {_named(level) if outcome.ok else outcome.problem}")
    if last is not None and failed == len(levels):
        return Result(False, last.problem, extra={"outcome": last})
    if failed:
        return Result(False, f"{failed} of {_many(len(levels))} could not be set.", "\n".join(said))
    return Result(True, f"{_many(len(levels)).capitalize()} set.", "\n".join(said) if len(said) > 1 else "")


async def _now(view: View) -> dict[str, str] | str:
    """The levels that the node has, or why they are not known."""
    outcome, root = await asyncio.gather(view.get("/loglevel"), view.get(f"/loglevel?logger_name={ROOT}"))
    if not outcome.ok:
        return f"The node does not tell its levels: {outcome.problem}"
    return {**levels_of(outcome.text), **(levels_of(root.text) if root.ok else {})}


async def _to_reset(view: View, form: Form) -> dict[str, str] | None:
    now = await _now(view)
    if isinstance(now, str):
        return None
    was = _changed(view).of(_key(view), now)
    names = form.all("logger")
    return {name: level for name, level in was.items() if not names or name in names}


def _chosen(form: Form) -> list[str]:
    names = [name.strip() for name in (*form.all("logger"), form.get("other"))]
    return list(dict.fromkeys(name for name in names if name))


def _effect(level: str) -> str:
    handlers = "The handlers of a logger get the same level, so what comes to them from loggers below is cut as well."
    if level == INHERITS:
        return "What counts is then the level of the next logger above that has one."
    if level == "DEBUG":
        return f"Much may be written, which costs the engine time. {handlers}"
    return handlers


def _named(level: str) -> str:
    return "inherited" if level == INHERITS else level


def _many(count: int) -> str:
    return "one logger" if count == 1 else f"{count} loggers"


def _key(view: View) -> tuple[str, str]:
    return view.proxy, view.node.name


def _changed(view: View) -> ChangedLevels:
    return view.request.app[CHANGED_LEVELS]


TAB = Tab(
    "loglevel",
    "Log levels",
    30,
    show,
    serves=("/loglevel",),
    actions={"set": Action(plan_set, set_levels), "reset": Action(plan_reset, reset_levels)},
)
