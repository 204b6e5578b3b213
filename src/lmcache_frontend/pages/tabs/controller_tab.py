"""What a controller knows: instances, their workers and keys; and what it does on all workers of an instance at once.

`?instance=` shows the workers of one and asks them how they are; `?start=&end=` looks tokens up; `?event=` follows an
operation. All of these only read.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmcache_frontend.app import REGISTRY
from lmcache_frontend.pages.asking import Outcome, Question
from lmcache_frontend.pages.confirming import Change, Form, Plan, Result
from lmcache_frontend.pages.paths import node_path
from lmcache_frontend.pages.tabs import Action, Tab, View, told
from lmcache_frontend.pages.token_range import TokenRange
from lmcache_shared.address import TcpAddress

SECONDS = 60.0
"""A controller waits for all workers of an instance."""

MAX_TOKENS = 100_000
"""A controller takes tokens in a body, each written out."""

PAGE = 200
MAX_INSTANCES = 500
MAX_ANSWERS = 500
SILENT_SECONDS = 60.0
"""A worker that was not heard of for so long is marked."""

DEFAULT_LOCATION = "LocalCPUBackend"
EMBEDDED = "embedded"
"""In the version of a controller that comes with this project; its workers can be cleared, and no more."""

CODES = {0: "well", 1: "says that it is not well", 2: "says nothing"}


@dataclass(frozen=True)
class Worker:
    """A worker that is registered; `page` is that of its node, where this frontend knows it."""

    instance: str
    number: int
    address: str
    registered: float | None
    heard: float | None
    keys: int | None
    page: str = ""


@dataclass(frozen=True)
class Instance:
    """An instance: all workers of one deployment."""

    name: str
    workers: int | None
    keys: int | None


async def show(view: View) -> Mapping[str, object]:
    workers, stats = await asyncio.gather(view.get("/controller/workers"), view.get("/controller/key-stats"))
    instance, words = view.query("instance"), view.words
    found = read_workers(view, workers)
    matching = [
        worker
        for worker in found
        if instance in ("", worker.instance)
        and all(word in f"{worker.instance} {worker.number} {worker.address}".lower() for word in words)
    ]
    instances = read_instances(stats, found)
    page = _page(view.query("page"), -(-len(matching) // PAGE))
    return {
        "outcome": workers,
        "stats": stats,
        "instance_count": _whole(stats.object().get("total_instance_count")) if stats.ok else len(instances),
        "key_count": _whole(stats.object().get("total_key_count")) if stats.ok else None,
        "instances": instances[:MAX_INSTANCES],
        "more_instances": max(0, len(instances) - MAX_INSTANCES),
        "instance": instance,
        "workers": matching[(page - 1) * PAGE : page * PAGE],
        "matching": len(matching),
        "all_workers": len(found),
        "page": page,
        "pages": -(-len(matching) // PAGE),
        "silent": SILENT_SECONDS,
        "is_embedded": EMBEDDED in (view.health.version or ""),
        "locations": DEFAULT_LOCATION,
        "codes": CODES,
        **await _asked(view, instance if workers.ok else ""),
    }


async def _asked(view: View, instance: str) -> Mapping[str, object]:
    """What the address asks for beside what is always shown."""
    tokens = TokenRange.of(view.query, most=MAX_TOKENS)
    wants_lookup = bool(view.query("start") or view.query("end"))
    event = view.query("event")[:200].strip()
    looked = health = followed = None
    if wants_lookup and not tokens.problem:
        looked = await _post(view, "/lookup", {"tokens": list(range(tokens.start, tokens.end))})
    if instance:
        health = await _post(view, "/health", {"instance_id": instance})
    if event:
        followed = await _post(view, "/check_finish", {"event_id": event})
    codes = health.object().get("error_codes") if health is not None and health.ok else None
    layout = looked.object().get("layout_info") if looked is not None and looked.ok else None
    return {
        "tokens": tokens,
        "wants_lookup": wants_lookup,
        "looked": looked,
        "known": read_known(layout, tokens.count),
        "health": health,
        "error_codes": [(worker, code) for worker, code in sorted(codes.items()) if isinstance(code, int)][:MAX_ANSWERS]
        if isinstance(codes, dict)
        else [],
        "event": event,
        "followed": followed,
    }


async def _post(view: View, path: str, body: Mapping[str, object]) -> Outcome:
    return await view.ask(Question.of_json("POST", path, body, seconds=SECONDS))


def _page(text: str, pages: int) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 7 else 1
    return max(1, min(number, pages))


def read_workers(view: View, outcome: Outcome) -> list[Worker]:
    """Those of an answer of `/controller/workers`, by instance and number."""
    found = outcome.object().get("workers") if outcome.ok else None
    registry = view.request.app[REGISTRY]
    pages = {
        str(node.address): node_path(proxy.name, node.name) for proxy in registry.proxies() for node in proxy.nodes
    }
    workers = []
    for it in found if isinstance(found, list) else ():
        if not isinstance(it, dict):
            continue
        address = str(it.get("address") or _address(it))
        number = it.get("worker_id")
        workers.append(
            Worker(
                str(it.get("instance_id", "")),
                number if isinstance(number, int) else -1,
                address,
                _moment(it.get("registration_time")),
                _moment(it.get("last_heartbeat_time")),
                _whole(it.get("key_count")),
                pages.get(address, ""),
            )
        )
    return sorted(workers, key=lambda worker: (worker.instance, worker.number))


def _address(worker: Mapping[str, object]) -> str:
    ip, port = worker.get("ip"), worker.get("port")
    if isinstance(ip, str) and isinstance(port, int) and not isinstance(port, bool) and 0 < port < 65536:
        return str(TcpAddress(ip, port))
    return str(ip or "")


def _moment(value: object) -> float | None:
    """A time that a clock can show."""
    return float(value) if isinstance(value, int | float) and 0 < value < 1e11 else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def read_instances(stats: Outcome, workers: Sequence[Worker]) -> list[Instance]:
    """Each instance with its workers and keys; where the controller does not count them, of its workers."""
    found = stats.object().get("instances") if stats.ok else None
    if isinstance(found, list):
        told = [it for it in found if isinstance(it, dict)]
        instances = [
            Instance(str(it.get("instance_id", "")), _whole(it.get("worker_count")), _whole(it.get("key_count")))
            for it in told
        ]
    else:
        counts = Counter(worker.instance for worker in workers)
        instances = [Instance(name, number, None) for name, number in counts.items()]
    return sorted(instances, key=lambda instance: instance.name)


def read_known(found: object, most: int) -> list[dict[str, object]]:
    """Of an answer of `/lookup`: each instance that knows something, where, and how many tokens; the most first."""
    rows = []
    for name, it in list(found.items())[:MAX_ANSWERS] if isinstance(found, dict) else ():
        if isinstance(it, list) and len(it) == 2 and isinstance(it[1], int):
            rows.append({"instance": str(name), "location": str(it[0]), "tokens": min(max(it[1], 0), most)})
    return sorted(rows, key=lambda row: -int(str(row["tokens"])))


async def plan_clear(view: View, form: Form) -> Plan:
    instance, location = form.get("instance").strip(), form.get("location").strip()
    stats = await view.get("/controller/key-stats")
    row = next((row for row in read_instances(stats, ()) if row.name == instance), None)
    problem = ""
    if not instance or not location:
        problem = "Name an instance and a backend."
    elif stats.ok and row is None:
        problem = f"The controller knows no instance {instance[:100]!r} now."
    return Plan(
        f"Clear {instance[:100]}",
        [view.name],
        f"Every worker of the instance forgets the chunks in its {location[:100]}; requests that would have found them"
        " compute them anew. A backend that no worker has clears nothing.",
        [Change(f"{location[:100]} of {instance[:100]}", f"{row.keys} keys in all backends", "nothing")] if row else (),
        is_danger=True,
        problem=problem,
    )


async def clear(view: View, form: Form) -> Result:
    body = {"instance_id": form.get("instance").strip(), "location": form.get("location").strip()}
    return _operated(await _post(view, "/clear", body), "cleared: the most that one worker had")


async def plan_pin(view: View, form: Form) -> Plan:
    tokens = TokenRange.of(form.get, most=MAX_TOKENS)
    instance, location = form.get("instance").strip(), form.get("location").strip()
    return Plan(
        f"Pin tokens {tokens.text}",
        [view.name],
        f"What {instance[:100]} holds of them in {location[:100]} is kept from leaving it.",
        problem=tokens.problem or ("" if instance and location else "Name an instance and a backend."),
    )


async def pin(view: View, form: Form) -> Result:
    tokens = TokenRange.of(form.get, most=MAX_TOKENS)
    body = {"instance_id": form.get("instance").strip(), "location": form.get("location").strip()}
    return _operated(await _post(view, "/pin", {**body, "tokens": list(range(tokens.start, tokens.end))}), "pinned")


async def plan_move(view: View, form: Form) -> Plan:
    tokens = TokenRange.of(form.get, most=MAX_TOKENS)
    old, new = _position(form, "old"), _position(form, "new")
    copy = form.get("copy") == "yes"
    problem = tokens.problem or ("" if all([*old, *new]) else "Name an instance and a backend on both sides.")
    if not problem and old == new:
        problem = "Both sides are the same."
    return Plan(
        f"{'Copy' if copy else 'Move'} tokens {tokens.text}",
        [view.name],
        "The workers of one instance send the chunks to those of the other."
        + ("" if copy else " Where they were they are forgotten."),
        [Change("Where they are", " in ".join(reversed(old)), " in ".join(reversed(new)))],
        problem=problem,
    )


async def move(view: View, form: Form) -> Result:
    tokens = TokenRange.of(form.get, most=MAX_TOKENS)
    body = {
        "old_position": _position(form, "old"),
        "new_position": _position(form, "new"),
        "tokens": list(range(tokens.start, tokens.end)),
        "should_copy": form.get("copy") == "yes",
    }
    return _operated(await _post(view, "/move", body), "moved")


def _position(form: Form, side: str) -> list[str]:
    return [form.get(f"{side}_{part}").strip()[:300] for part in ("instance", "location")]


def _compression(verb: str) -> Action:
    path = f"/{verb.lower()}"

    async def plan(view: View, form: Form) -> Plan:
        tokens = TokenRange.of(form.get, most=MAX_TOKENS)
        instance, location, method = (form.get(name).strip()[:100] for name in ("instance", "location", "method"))
        problem = tokens.problem or (
            "" if instance and location and method else "Name an instance, a backend and a method."
        )
        effect = f"The workers of {instance} {verb.lower()} what they hold of them in {location}, by {method}."
        return Plan(f"{verb} tokens {tokens.text}", [view.name], effect, problem=problem)

    async def run(view: View, form: Form) -> Result:
        tokens = TokenRange.of(form.get, most=MAX_TOKENS)
        names = {"instance_id": "instance", "location": "location", "method": "method"}
        body = {key: form.get(name).strip() for key, name in names.items()}
        outcome = await _post(view, path, {**body, "tokens": list(range(tokens.start, tokens.end))})
        return _operated(outcome, f"{verb.lower()}ed")

    return Action(plan, run)


def _operated(outcome: Outcome, done: str) -> Result:
    """The result of an operation: its answer tells how many tokens, and of each worker where it tells of them."""
    answer = outcome.object()
    number = answer.get("num_tokens")
    text = f"{number:,} tokens {done}." if isinstance(number, int) else "The controller has it done."
    workers = answer.get("workers")
    statuses = [it.get("status") for it in workers if isinstance(it, dict)] if isinstance(workers, list) else []
    if outcome.ok and "error" in statuses:
        return Result(False, f"{statuses.count('error')} of {len(statuses)} workers failed.", outcome.text)
    if outcome.ok and "pending" in statuses:
        text = f"{statuses.count('pending')} of {len(statuses)} workers are still at it; its event tells how far."
    return told(outcome, text)


TAB = Tab(
    "controller",
    "Controller",
    5,
    show,
    answers="/controller/workers",
    actions={
        "clear": Action(plan_clear, clear),
        "pin": Action(plan_pin, pin),
        "move": Action(plan_move, move),
        "compress": _compression("Compress"),
        "decompress": _compression("Decompress"),
    },
)
