"""The scheduler's lookup client, or the worker's lookup server: what it is, and made, closed or made again."""

from __future__ import annotations

from collections.abc import Mapping

from lmcache_frontend.pages.asking import Question
from lmcache_frontend.pages.confirming import Change, Form, Plan, Result
from lmcache_frontend.pages.reading import text
from lmcache_frontend.pages.tabs import Action, Tab, View

NONE = "None"
"""LMCache's text for what is not there."""


async def show(view: View) -> Mapping[str, object]:
    outcome = await view.get("/lookup/info")
    said = outcome.object()
    parts = [
        ("Lookup client", _class(said.get("client")), "asks the workers how much of a request they know"),
        ("Lookup server", _class(said.get("server")), "tells the scheduler how much this worker knows"),
    ]
    return {"outcome": outcome, "parts": parts, "lacks": view.lacks("POST", "/lookup/create")}


def _class(value: object) -> str:
    return "" if value in (None, NONE) else text(value)


async def _now(view: View) -> tuple[str, str]:
    """What is there now, and why it is not known."""
    outcome = await view.get("/lookup/info")
    if not outcome.ok:
        return "", outcome.problem
    said = outcome.object()
    return _class(said.get("client")) or _class(said.get("server")) or "none", ""


async def _would_be(view: View) -> tuple[str, str]:
    """What would be made by the settings of now, and why nothing would."""
    outcome = await view.ask(Question("POST", "/lookup/create?dryrun=true"))
    return (text(outcome.object().get("new")) or "none", "") if outcome.ok else ("", outcome.problem)


async def plan_create(view: View, form: Form) -> Plan:
    return await _plan_new(view, "Create the lookup", "It is made by the settings of now.")


async def plan_recreate(view: View, form: Form) -> Plan:
    effect = (
        "It is closed and made by the settings of now. Lookups in between find nothing: those requests are computed."
    )
    return await _plan_new(view, "Recreate the lookup", effect)


async def _plan_new(view: View, title: str, effect: str) -> Plan:
    now, problem = await _now(view)
    if problem:
        return Plan(title, [view.name], problem=problem)
    then, problem = await _would_be(view)
    if problem:
        return Plan(title, [view.name], problem=problem)
    return Plan(title, [view.name], effect, [Change("Lookup", now, then)])


async def plan_close(view: View, form: Form) -> Plan:
    title = "Close the lookup"
    now, problem = await _now(view)
    if not problem and now == "none":
        problem = "There is nothing to close."
    effect = "Until it is made again no request finds what is cached: all of them are computed."
    return Plan(
        title, [view.name], "" if problem else effect, [Change("Lookup", now, "none")] if now else [], True, problem
    )


def _run(verb: str, done: str) -> Action:
    async def run(view: View, form: Form) -> Result:
        outcome = await view.ask(Question("POST", f"/lookup/{verb}"))
        if not outcome.ok:
            return Result(False, outcome.problem, extra={"outcome": outcome})
        said = outcome.object()
        return Result(True, done.format(old=text(said.get("old")), new=text(said.get("new"))))

    return Action({"create": plan_create, "recreate": plan_recreate, "close": plan_close}[verb], run)


TAB = Tab(
    "lookup",
    "Lookup",
    90,
    show,
    serves=("/lookup/info",),
    answers="/lookup/info",
    actions={
        "create": _run("create", "{new} is there."),
        "recreate": _run("recreate", "{old} is closed, {new} is there."),
        "close": _run("close", "{old} is closed."),
    },
)
