"""The node's settings: what differs from its default, and those that can be changed while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from lmcache_frontend.pages.asking import Question
from lmcache_frontend.pages.confirming import Change, Form, Plan, Result
from lmcache_frontend.pages.reading import record
from lmcache_frontend.pages.settings_form import Setting, settings_of, shown
from lmcache_frontend.pages.tabs import Action, Tab, View

MAX_SETTINGS = 450
"""Each has two fields in the form, which may have a thousand."""

EFFECT = (
    "It counts at once, and until the process ends: the file is not changed. What a backend or the lookup client reads"
    " when it is made counts when that is made again."
)


async def show(view: View) -> Mapping[str, object]:
    outcome, told = await asyncio.gather(view.get("/conf"), view.get("/conf/definitions"))
    if not outcome.ok:
        return {"outcome": outcome}
    everything = settings_of(outcome.object(), told.object() if told.ok else {})
    kept = [setting for setting in everything if _is_wanted(view, setting)]
    words = view.words
    return {
        "outcome": outcome,
        "settings": kept[:MAX_SETTINGS],
        "words": words,
        "hits": sum(all(word in searched(setting) for word in words) for setting in kept),
        "total": len(everything),
        "changed": sum(setting.is_changed for setting in everything),
        "mutable": sum(setting.is_mutable for setting in everything),
        "running": sum(setting.told.get("source") == "running" for setting in everything),
        "knows": told.ok,
        "why": "" if told.ok else told.problem,
        "lacks": view.lacks("POST", "/conf"),
        "searched": searched,
    }


def searched(setting: Setting) -> str:
    """What a search looks through."""
    return f"{setting.name} {setting.shown} {setting.help}".lower()


def _is_wanted(view: View, setting: Setting) -> bool:
    wanted = view.query("show")
    if wanted == "changed":
        return setting.is_changed
    if wanted == "mutable":
        return setting.is_mutable
    if wanted == "running":
        return setting.told.get("source") == "running"
    return True


async def plan_set(view: View, form: Form) -> Plan:
    texts = _texts(form)
    if not texts:
        return Plan("Change the settings", [view.name], problem="No field was changed.")
    title = f"Change {_many(len(texts))}"
    now = await _now(view, texts)
    if isinstance(now, str):
        return Plan(title, [view.name], problem=now)
    changes, problems, notes = [], [], []
    for name, text in texts.items():
        setting = now.get(name)
        if setting is None or not setting.is_mutable:
            problems.append(f"{name[:100]} cannot be changed while this node runs.")
            continue
        value, problem = setting.taken(text)
        if problem:
            problems.append(f"{name}: {problem}.")
        changes.append(Change(name, setting.shown, text if problem else shown(value)))
        was = form.get(f"was.{name}")
        if was != setting.field:
            notes.append(f"{name} was {was or shown(None)} when you opened the page: somebody has changed it since.")
    effect = "" if problems else " ".join([*notes, EFFECT])
    return Plan(title, [view.name], effect, changes, bool(notes), " ".join(problems))


async def set_settings(view: View, form: Form) -> Result:
    texts = _texts(form)
    now = await _now(view, texts)
    if isinstance(now, str):
        return Result(False, now)
    values = {name: now[name].taken(text)[0] for name, text in texts.items() if name in now}
    outcome = await view.ask(Question.of_json("POST", "/conf", values))
    said = outcome.object()
    errors: dict[str, Any] = record(said.get("errors"))
    updated: dict[str, Any] = record(said.get("updated"))
    lines = [f"{name}: {shown(value)}" for name, value in updated.items()]
    lines += [f"{name}: not changed. {problem}" for name, problem in errors.items()]
    if errors:
        return Result(False, f"{len(errors)} of {_many(len(values))} refused by the node.", "\n".join(lines))
    if not outcome.ok:
        return Result(False, outcome.problem, extra={"outcome": outcome})
    return Result(True, f"{_many(len(updated)).capitalize()} changed.", "\n".join(lines))


async def _now(view: View, names: Mapping[str, str]) -> dict[str, Setting] | str:
    """The settings as they are on the node, or why they are not known."""
    asked = ",".join(names)
    outcome, told = await asyncio.gather(
        view.get(f"/conf?names={quote(asked, safe=',')}"), view.get("/conf/definitions")
    )
    if not outcome.ok:
        return f"The node does not tell its settings: {outcome.problem}"
    return {it.name: it for it in settings_of(outcome.object(), told.object() if told.ok else {})}


def _texts(form: Form) -> dict[str, str]:
    """What was typed that is another text than the page had."""
    return {
        name.removeprefix("new."): value
        for name, value in form.pairs
        if name.startswith("new.") and value != form.get(f"was.{name.removeprefix('new.')}")
    }


def _many(count: int) -> str:
    return "one setting" if count == 1 else f"{count} settings"


TAB = Tab("conf", "Configuration", 40, show, serves=("/conf",), actions={"set": Action(plan_set, set_settings)})
