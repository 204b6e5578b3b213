"""What only LMCache's multiprocess server has: the state of its parts, quotas, and its configuration.

`?view=` is `status`, `quotas` or `config`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from lmcache_frontend.pages.asking import Outcome, Question
from lmcache_frontend.pages.confirming import Change, Form, Plan, Result
from lmcache_frontend.pages.reading import number, record
from lmcache_frontend.pages.tabs import Action, Tab, View, told
from lmcache_frontend.pages.wording import size

VIEWS = {"status": "Status", "quotas": "Quotas", "config": "Configuration"}
GIB = 1 << 30
NOBODYS = "_default"
"""How the server writes the salt of requests that have none."""

MAX_ROWS = 1000
MAX_DEPTH = 8
MAX_TEXT = 300


@dataclass(frozen=True)
class Memory:
    """An L1 cache."""

    name: str
    used: float
    total: float
    objects: int | None
    locked: int
    is_healthy: bool


@dataclass(frozen=True)
class Part:
    """A part of the server that says how it is."""

    name: str
    is_healthy: bool
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Quota:
    """What one salt may hold; a soft limit in bytes."""

    salt: str
    limit: float
    used: float


async def show(view: View) -> Mapping[str, object]:
    chosen = view.query("view")
    chosen = chosen if chosen in VIEWS else "status"
    path = {"status": "/status", "quotas": "/quota", "config": "/config"}[chosen]
    outcome = await view.get(path)
    answer = outcome.object() if outcome.ok else {}
    context: dict[str, object] = {"views": VIEWS, "chosen": chosen, "outcome": outcome, "nobodys": NOBODYS}
    if chosen == "status":
        return {
            **context,
            "status": answer,
            "memories": read_memories(answer),
            "parts": read_parts(answer),
            "facts": _facts(answer),
            "rest": [row for row in flat(answer) if not row[0].startswith("storage_manager.")][:MAX_ROWS],
        }
    if chosen == "quotas":
        return {**context, "quotas": read_quotas(outcome)}
    return {**context, "rows": list(flat(answer))[:MAX_ROWS]}


def read_memories(status: Mapping[str, object]) -> list[Memory]:
    """The L1 caches of `/status`."""
    found = record(record(status.get("storage_manager")).get("l1_managers"))
    memories = []
    for name, it in found.items():
        told = record(it)
        total = _number(told.get("memory_total_bytes"))
        objects = told.get("total_object_count")
        locked = sum(int(_number(told.get(f"{kind}_locked_count"))) for kind in ("write", "read"))
        memories.append(
            Memory(
                name,
                _number(told.get("memory_used_bytes")),
                total,
                objects if isinstance(objects, int) else None,
                locked,
                told.get("is_healthy") is not False,
            )
        )
    return memories[:MAX_ROWS]


def read_parts(status: Mapping[str, object]) -> list[Part]:
    """The parts of the storage manager, what is wrong first; those of each name (`l1_managers`) by it."""
    parts = []
    for name, it in record(status.get("storage_manager")).items():
        told = record(it)
        if "is_healthy" in told:
            parts.append(_part(name, told))
    single = {name for name, it in record(status.get("storage_manager")).items() if isinstance(it, dict)}
    for name, it in record(status.get("storage_manager")).items():
        for key, below in record(it).items():
            if name.removesuffix("s") in single and key == NOBODYS:
                continue  # the same once more
            if isinstance(below, dict) and "is_healthy" in below:
                parts.append(_part(f"{name}.{key}", below))
    return sorted(parts, key=lambda part: part.is_healthy)[:MAX_ROWS]


def _part(name: str, told: Mapping[str, object]) -> Part:
    facts = [(key.replace("_", " "), _text(value)) for key, value in told.items() if not isinstance(value, dict | list)]
    return Part(name.replace("_", " "), told.get("is_healthy") is not False, facts)


def _facts(status: Mapping[str, object]) -> list[tuple[str, str]]:
    """What is told in a line under the head."""
    names = {
        "engine_type": "Engine",
        "chunk_size": "Chunk size",
        "hash_algorithm": "Hash",
        "active_sessions": "Sessions",
    }
    names |= {"active_prefetch_jobs": "Prefetches", "p2p_state": "Peer to peer"}
    facts = [(title, _text(status[name])) for name, title in names.items() if name in status]
    if isinstance(workers := record(status.get("worker_liveness")).get("tracked_instances"), int):
        facts.append(("Engines attached", f"{workers:,}"))
    return facts


def read_quotas(outcome: Outcome) -> list[Quota]:
    """Those of `/quota`, the fullest first."""
    found = record(outcome.object().get("users")) if outcome.ok else {}
    quotas = [
        Quota(salt, _number(record(it).get("limit_gb")) * GIB, _number(record(it).get("current_usage_gb")) * GIB)
        for salt, it in list(found.items())[:MAX_ROWS]
    ]
    return sorted(quotas, key=lambda quota: (-quota.used / quota.limit if quota.limit else 0.0, quota.salt))


def flat(value: object, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """A nested answer as rows, each with its way in (`mp.port`)."""
    if isinstance(value, dict) and value and depth < MAX_DEPTH:
        for key, below in value.items():
            yield from flat(below, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list) and any(isinstance(below, dict) for below in value) and depth < MAX_DEPTH:
        for i, below in enumerate(value):
            yield from flat(below, f"{name}.{i}", depth + 1)
    elif name:
        yield name, _text(value)


def _text(value: object) -> str:
    words = {True: "yes", False: "no"} if isinstance(value, bool) else {}
    if isinstance(value, bool):
        return words[value]
    text = "none" if value is None else "empty" if value in ("", [], {}) else str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"


def _number(found: object) -> float:
    return number(found) or 0.0


async def _quota_of(view: View, salt: str) -> tuple[Outcome, str]:
    """What it is now, as text."""
    outcome = await view.get(f"/quota/{_segment(salt)}")
    answer = outcome.object()
    if not outcome.ok or answer.get("exists") is False:
        return outcome, "none: evicted" if outcome.ok else "not known"
    return outcome, size(_number(answer.get("limit_gb")) * GIB)


def _segment(salt: str) -> str:
    """In a path; one that a way would take for a step in it goes as it cannot."""
    return quote(salt, safe="")


def _limit(form: Form) -> float | None:
    try:
        limit = float(form.get("limit_gb"))
    except ValueError:
        return None
    return limit if math.isfinite(limit) and 0 <= limit < 1e9 else None


def _salt_problem(salt: str) -> str:
    if not salt:
        return f"Write a salt; {NOBODYS} stands for requests without one."
    if salt in (".", "..") or "/" in salt or len(salt) > 200:
        return "The server cannot be asked for this salt: it is no segment of a path."
    return ""


async def plan_set(view: View, form: Form) -> Plan:
    salt, limit = form.get("salt").strip(), _limit(form)
    problem = _salt_problem(salt)
    if not problem and limit is None:
        problem = f"{form.get('limit_gb')[:40]!r} is no number of GiB."
    now = "" if problem else (await _quota_of(view, salt))[1]
    return Plan(
        f"Set the quota of {salt[:100]}",
        [view.name],
        "A soft limit: nothing is refused, and what is above it is evicted within about a second.",
        [Change(salt, now, size((limit or 0) * GIB))] if not problem else (),
        problem=problem,
    )


async def set_quota(view: View, form: Form) -> Result:
    salt = form.get("salt").strip()
    question = Question.of_json("PUT", f"/quota/{_segment(salt)}", {"limit_gb": _limit(form)})
    outcome = await view.ask(question)
    if not outcome.ok:
        return told(outcome, "")
    return Result(True, f"Asked again, the server says: {(await _quota_of(view, salt))[1]}.")


async def plan_remove(view: View, form: Form) -> Plan:
    salt = form.get("salt").strip()
    problem = _salt_problem(salt)
    now = "" if problem else (await _quota_of(view, salt))[1]
    return Plan(
        f"Remove the quota of {salt[:100]}",
        [view.name],
        "A salt without a quota may hold nothing where quotas are kept: what it holds is evicted within a second.",
        [Change(salt, now, "none: evicted")] if not problem else (),
        is_danger=True,
        problem=problem,
    )


async def remove_quota(view: View, form: Form) -> Result:
    outcome = await view.ask(Question("DELETE", f"/quota/{_segment(form.get('salt').strip())}"))
    if outcome.ok and outcome.object().get("status") == "not_found":
        return Result(True, "There was none any longer.")
    return told(outcome, "It is removed.")


async def plan_clear(view: View, form: Form) -> Plan:
    force = form.get("force") == "yes"
    outcome = await view.get("/status")
    memories = read_memories(outcome.object()) if outcome.ok else []
    return Plan(
        "Clear L1",
        [view.name],
        "Every object in L1 is forgotten"
        + (
            ", also those that are being read or written now: what a request has under way may be corrupted."
            if force
            else " that nobody reads or writes now; L2 is left as it is."
        ),
        [
            Change(memory.name, f"{memory.objects or 0:,} objects, {size(memory.used)}", "nothing")
            for memory in memories
        ],
        is_danger=True,
    )


async def clear(view: View, form: Form) -> Result:
    body = {"tier": "l1", "force": form.get("force") == "yes"}
    outcome = await view.ask(Question.of_json("POST", "/cache/clear", body, seconds=60.0))
    if not outcome.ok:
        return told(outcome, "")
    memories = read_memories((await view.get("/status")).object())
    left = ", ".join(f"{memory.name}: {memory.objects or 0:,} objects, {size(memory.used)}" for memory in memories)
    return Result(True, f"Asked again, L1 holds: {left or 'nothing'}.")


TAB = Tab(
    "multiprocess",
    "Multiprocess server",
    5,
    show,
    serves=("/quota",),
    answers="/status",
    actions={
        "set-quota": Action(plan_set, set_quota),
        "remove-quota": Action(plan_remove, remove_quota),
        "clear": Action(plan_clear, clear),
    },
)
