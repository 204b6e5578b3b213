"""How many chunks the scheduler's requests have and how many of them are new: figures and a switch."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lmcache_frontend.pages.asking import Question
from lmcache_frontend.pages.confirming import Change, Form, Plan, Result
from lmcache_frontend.pages.reading import flat, number, record, text
from lmcache_frontend.pages.tabs import Action, Tab, View, told

BASE = "/chunk_statistics"
MAX_ROWS = 1000
_TOLD_ELSEWHERE = frozenset(
    {
        "enabled", "total_requests", "total_chunks", "unique_chunks", "duplicate_chunks", "reuse_rate", "timestamp",
        "auto_exit_enabled", "auto_exit_timeout_hours", "auto_exit_target_unique_chunks", "bloom_filter", "timing",
    }
)  # fmt: skip


async def show(view: View) -> Mapping[str, object]:
    outcome = await view.get(f"{BASE}/status")
    said = outcome.object()
    timing, bloom = record(said.get("timing")), record(said.get("bloom_filter"))
    return {
        "outcome": outcome,
        "is_off": outcome.status == 400 and outcome.by_node,
        "counts": said.get("enabled") is True,
        "figures": {name: number(said.get(name)) for name in _TOLD_ELSEWHERE},
        "overhead": number(timing.get("overhead_percentage")),
        "timing": [(_title(name), number(value)) for name, value in timing.items() if name.endswith("_seconds")],
        "bloom": {str(name): number(value) for name, value in bloom.items()},
        "more": [(name, text(value)) for name, value in flat(said) if name.partition(".")[0] not in _TOLD_ELSEWHERE][
            :MAX_ROWS
        ],
        "lacks": view.lacks("POST", f"{BASE}/start"),
    }


def _title(name: str) -> str:
    return name.removesuffix("_seconds").removesuffix("_time").replace("_", " ").capitalize()


def _action(verb: str, title: str, effect: str, done: str, *, is_danger: bool = False) -> Action:
    async def plan(view: View, form: Form) -> Plan:
        outcome = await view.get(f"{BASE}/status")
        if not outcome.ok:
            return Plan(title, [view.name], problem=outcome.problem)
        return Plan(title, [view.name], effect, _changes(verb, outcome.object()), is_danger)

    async def run(view: View, form: Form) -> Result:
        return told(await view.ask(Question("POST", f"{BASE}/{verb}")), done)

    return Action(plan, run)


def _changes(verb: str, now: Mapping[str, object]) -> list[Change]:
    if verb == "reset":
        names = ("total_requests", "total_chunks", "unique_chunks")
        return [Change(_title(name), json.dumps(now.get(name)), "0") for name in names if name in now]
    counting = "counting" if now.get("enabled") else "not counting"
    return [Change("Statistics", counting, "counting" if verb == "start" else "not counting")]


ACTIONS = {
    "start": _action("start", "Start counting", "Each lookup then costs a little more time.", "It counts from now on."),
    "stop": _action("stop", "Stop counting", "What was counted stays.", "It counts no longer."),
    "reset": _action("reset", "Reset the statistics", "What was counted is lost.", "All is at zero.", is_danger=True),
}

TAB = Tab(
    "chunks",
    "Chunk statistics",
    85,
    show,
    serves=(f"{BASE}/status",),
    answers=f"{BASE}/status",
    refresh=5,
    actions=ACTIONS,
)
