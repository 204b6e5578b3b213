"""What can be switched while the engine runs: freeze, hot cache, and its backends.

Each says what it does and shows what has come of it. After a change the node is asked again: what it says then counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from lmcache_frontend.pages.asking import Outcome, Question
from lmcache_frontend.pages.confirming import Change, Form, Plan, Result
from lmcache_frontend.pages.figures import Figures
from lmcache_frontend.pages.tabs import Action, Tab, View, told

MAX_BACKENDS = 200
SECONDS = 60.0
"""A backend that is closed or made again may have much to write."""


@dataclass(frozen=True)
class Switch:
    """Something that is on or off.

    Attributes:
        path: what `/status`, `/enable` and `/disable` are below.
        key: its value in the answers.
        series: where its effect is seen.
    """

    name: str
    title: str
    path: str
    key: str
    verbs: tuple[str, str]
    what: str
    effects: tuple[str, str]
    series: tuple[str, ...]


FREEZE = Switch(
    "freeze",
    "Freeze",
    "/freeze",
    "freeze",
    ("Freeze the cache", "Unfreeze the cache"),
    "While it is frozen nothing is stored, admitted or evicted, and only local CPU memory serves.",
    (
        "From now on stores are skipped, and what is only on disk or remote is not found: the hit rate may fall.",
        "Stores, admission and eviction go on, and all backends serve again.",
    ),
    ("stored_tokens", "evictions"),
)
HOT_CACHE = Switch(
    "hot_cache",
    "Hot cache",
    "/hot_cache",
    "hot_cache",
    ("Enable the hot cache", "Disable the hot cache"),
    "Keeps chunks in local CPU memory (LocalCPUBackend), from where they come back fastest.",
    (
        "Chunks are kept in local CPU memory again; it is empty at first and fills with use.",
        "What local CPU memory holds is cleared at once; it does not come back by enabling it again.",
    ),
    ("cpu_bytes", "hit_rate"),
)
SWITCHES = {switch.name: switch for switch in (FREEZE, HOT_CACHE)}


@dataclass(frozen=True)
class Backend:
    """A row: `kind` is empty where it is bypassed and there is none (a bypass outlives its backend)."""

    name: str
    kind: str
    bypassed: bool | None

    @property
    def is_there(self) -> bool:
        return bool(self.kind)


async def show(view: View) -> Mapping[str, object]:
    paths = ("/freeze/status", "/hot_cache/status", "/backends", "/bypass/list")
    freeze, hot_cache, backends, bypass = await asyncio.gather(*(view.get(path) for path in paths))
    figures = Figures(view.request.app)
    key = (view.proxy, view.node.name)
    values, age = figures.of(*key)
    series = [name for switch in SWITCHES.values() for name in switch.series]
    frame = figures.frame(series, key)
    outcomes = (freeze, hot_cache, backends, bypass)
    alike = {(outcome.kind, outcome.problem) for outcome in outcomes}
    return {
        "outcome": freeze if len(alike) == 1 and not freeze.ok else None,  # one way to say what all four say
        "switches": [
            (FREEZE, freeze, state_of(FREEZE, freeze)),
            (HOT_CACHE, hot_cache, state_of(HOT_CACHE, hot_cache)),
        ],
        "backends": backends,
        "bypass": bypass,
        "rows": rows_of(backends, bypass),
        "values": values,
        "age": age,
        "trends": {} if frame is None else frame.values,
        "recording": figures.recording,
    }


def state_of(switch: Switch, outcome: Outcome) -> bool | None:
    """Whether it is on; None where the node does not say."""
    found = outcome.object().get(switch.key) if outcome.ok else None
    return found if isinstance(found, bool) else None


def rows_of(backends: Outcome, bypass: Outcome) -> list[Backend]:
    """All backends that there are or that are bypassed."""
    classes = {name: str(kind) for name, kind in backends.object().items()} if backends.ok else {}
    answer = bypass.object() if bypass.ok else {}
    bypassed = _names(answer.get("bypassed_backends"))
    names = dict.fromkeys([*classes, *_names(answer.get("all_backends")), *bypassed])
    there = {*classes, *_names(answer.get("all_backends"))}
    return [
        Backend(name, classes.get(name, name if name in there else ""), name in bypassed if bypass.ok else None)
        for name in list(names)[:MAX_BACKENDS]
    ]


def _names(found: object) -> Sequence[str]:
    return [str(name) for name in found] if isinstance(found, list) else []


def word(state: bool | None) -> str:
    return "not known" if state is None else "on" if state else "off"


def _switching(switch: Switch) -> Action:
    async def plan(view: View, form: Form) -> Plan:
        on = form.get("on") == "yes"
        outcome = await view.get(f"{switch.path}/status")
        now = state_of(switch, outcome)
        problem = "" if outcome.ok else f"Its state is not known: {outcome.problem}"
        if now is on:
            problem = f"It is {word(on)} already; somebody may have changed it since you looked."
        return Plan(
            switch.verbs[not on],
            [view.name],
            switch.effects[not on],
            [Change(switch.title, word(now), word(on))],
            is_danger=on == (switch is FREEZE),  # freezing, and clearing the hot cache
            problem=problem,
        )

    async def run(view: View, form: Form) -> Result:
        on = form.get("on") == "yes"
        outcome = await view.ask(Question("PUT", f"{switch.path}/{'enable' if on else 'disable'}"))
        if not outcome.ok:
            return told(outcome, "")
        now = state_of(switch, await view.get(f"{switch.path}/status"))
        if now is not on:
            return Result(False, f"The node said that it did, but tells now that it is {word(now)}.")
        return Result(True, f"Asked again, the node says that it is {word(on)}.")

    return Action(plan, run)


async def plan_bypass(view: View, form: Form) -> Plan:
    name, on = form.get("backend"), form.get("on") == "yes"
    outcome = await view.get("/bypass/list")
    row = _bypass_row(outcome, name)
    problem = "" if outcome.ok else f"It is not known which are bypassed: {outcome.problem}"
    if outcome.ok and row is None:
        problem = f"The node has no backend {name[:100]!r} now."
    elif row is not None and row.bypassed is on:
        problem = f"It is {'bypassed' if on else 'used'} already; somebody may have changed it since you looked."
    return Plan(
        f"Bypass {name}" if on else f"Use {name} again",
        [view.name],
        "Nothing is stored to it or looked up in it until it is used again; what it holds stays."
        if on
        else "It is stored to and looked up in again; what it held before is still there.",
        [Change(name, _use(row.bypassed if row else None), _use(on))],
        problem=problem,
    )


def _bypass_row(outcome: Outcome, name: str) -> Backend | None:
    answer = outcome.object() if outcome.ok else {}
    bypassed = _names(answer.get("bypassed_backends"))
    if name not in bypassed and name not in _names(answer.get("all_backends")):
        return None
    return Backend(name, name, name in bypassed)


def _use(bypassed: bool | None) -> str:
    return "not known" if bypassed is None else "bypassed" if bypassed else "in use"


async def bypass(view: View, form: Form) -> Result:
    name, on = form.get("backend"), form.get("on") == "yes"
    path = f"/bypass/{'add' if on else 'remove'}?backend_name={quote(name, safe='')}"
    outcome = await view.ask(Question("PUT", path))
    if not outcome.ok:
        return told(outcome, "")
    row = _bypass_row(await view.get("/bypass/list"), name)
    now = row.bypassed if row else False if not on else None
    if now is not on:
        return Result(False, f"The node said that it did, but tells now that {name} is {_use(now)}.")
    return Result(True, f"Asked again, the node says that {name} is {_use(on)}.")


async def plan_close(view: View, form: Form) -> Plan:
    return await _plan_backend(
        view,
        form.get("backend"),
        "Close",
        "none",
        "The engine no longer stores to it or finds anything in it. What it held in memory is lost; what lies on a disk"
        " or remote may be found again once it is made again.",
    )


async def plan_recreate(view: View, form: Form) -> Plan:
    return await _plan_backend(
        view,
        form.get("backend"),
        "Recreate",
        "a new one, by the settings of now",
        "It is closed and made again in one step, by the settings as they are now. What it held in memory is lost.",
    )


async def _plan_backend(view: View, name: str, verb: str, then: str, effect: str) -> Plan:
    outcome = await view.get("/backends")
    kind = outcome.object().get(name) if outcome.ok else None
    problem = "" if outcome.ok else f"It is not known which there are: {outcome.problem}"
    if outcome.ok and kind is None:
        problem = f"The node has no backend {name[:100]!r} now."
    return Plan(f"{verb} {name}", [view.name], effect, [Change(name, str(kind or "none"), then)], True, problem)


async def close(view: View, form: Form) -> Result:
    return await _change_backends(view, "DELETE", f"/backends/{quote(form.get('backend'), safe='')}")


async def recreate(view: View, form: Form) -> Result:
    return await _change_backends(view, "POST", f"/backends/{quote(form.get('backend'), safe='')}/recreate")


async def plan_create(view: View, form: Form) -> Plan:
    outcome = await view.get("/backends")
    there = ", ".join(outcome.object()) or "none"
    return Plan(
        "Make missing backends",
        [view.name],
        "The node makes those that its settings ask for and that are not there; the others are left as they are.",
        [Change("Backends", there, "these, and what the settings ask for")] if outcome.ok else (),
        problem="" if outcome.ok else f"It is not known which there are: {outcome.problem}",
    )


async def create(view: View, form: Form) -> Result:
    return await _change_backends(view, "POST", "/backends")


async def _change_backends(view: View, method: str, path: str) -> Result:
    outcome = await view.ask(Question(method, path, seconds=SECONDS))
    if not outcome.ok:
        return told(outcome, "")
    answer = outcome.object()
    made = answer.get("recreated", answer.get("created"))
    there = answer.get("backends")
    what = (
        "Nothing was missing." if made == {} else f"Made: {', '.join(made)}." if isinstance(made, dict) else "Closed."
    )
    return Result(True, f"{what} There are now: {', '.join(there) or 'none'}." if isinstance(there, dict) else what)


TAB = Tab(
    "switches",
    "Switches",
    70,
    show,
    answers="/freeze/status",
    actions={
        **{name: _switching(switch) for name, switch in SWITCHES.items()},
        "bypass": Action(plan_bypass, bypass),
        "close": Action(plan_close, close),
        "recreate": Action(plan_recreate, recreate),
        "create": Action(plan_create, create),
    },
)
