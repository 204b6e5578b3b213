"""What the node's cache holds of a range of tokens, and what is done with it; the paged KV cache that chunks come from
and go to, and its checksums beside another node's. `?view=` is `tokens`, `layout` or `checksums`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from lmcache_frontend.app import HEALTH, REGISTRY
from lmcache_frontend.nodes.node import Node
from lmcache_frontend.pages import checksum_view, kv_layout
from lmcache_frontend.pages.asking import Outcome, Question, ask
from lmcache_frontend.pages.checksum_view import compare, read_sums, runs_of
from lmcache_frontend.pages.confirming import Change, Form, Plan, Result
from lmcache_frontend.pages.figures import Figures
from lmcache_frontend.pages.kv_layout import Layout, read_layout
from lmcache_frontend.pages.paths import node_path
from lmcache_frontend.pages.tabs import Action, Tab, View, told
from lmcache_frontend.pages.token_range import TokenRange
from lmcache_frontend.pages.wording import size

VIEWS = {"tokens": "Tokens", "layout": "Paged KV cache", "checksums": "Checksums"}

SECONDS = 60.0
"""Of an operation on many tokens, files or slots."""

MAX_NODES = 500
"""To choose from when two are compared; another one can stand in the address."""

MAX_SPANS = 200
MAX_BACKENDS = 100
MAX_SUMS = 64
"""Chunks and layers of one node's checksums that are listed."""

DEFAULT_SLOTS = 1024
DEFAULT_CHUNK = 256
MAX_TEXT = 4000

HOLDS = {"LocalCPUBackend": "cpu_bytes", "LocalDiskBackend": "disk_bytes", "RemoteBackend": "remote_bytes"}
"""Where the frontend's history has what a backend holds."""


@dataclass(frozen=True)
class Span:
    """Tokens that are known, and the backends that hold them."""

    start: int
    end: int
    chunks: int
    locations: Sequence[str]


async def show(view: View) -> Mapping[str, object]:
    chosen = view.query("view")
    chosen = chosen if chosen in VIEWS else "tokens"
    shown = await {"tokens": _tokens, "layout": _layout, "checksums": _checksums}[chosen](view)
    return {"views": VIEWS, "chosen": chosen, **shown}


async def _tokens(view: View) -> Mapping[str, object]:
    tokens = TokenRange.of(view.query)
    question = Question("GET", f"/cache/lookup?{tokens.query}", seconds=SECONDS)
    looked, backends = await asyncio.gather(view.ask(question), view.get("/backends"))
    answer = looked.object() if looked.ok else {}
    hit = answer.get("num_hit_tokens")
    return {
        "tokens": tokens,
        "looked": looked,
        "backends": backends,
        "locations": list(backends.object())[:MAX_BACKENDS] if backends.ok else [],
        "spans": spans_of(answer),
        "hit": hit if isinstance(hit, int) else 0,
        "workers": workers_of(answer),
    }


def spans_of(answer: Mapping[str, object]) -> list[Span]:
    """Those of an answer of `/cache/lookup`."""
    spans = []
    for it in _dicts(answer.get("spans"))[:MAX_SPANS]:
        numbers = [it.get(name) for name in ("start", "end", "chunks")]
        locations = it.get("locations")
        start, end, chunks = (number if isinstance(number, int) else 0 for number in numbers)
        spans.append(Span(start, end, chunks, [str(name) for name in locations] if isinstance(locations, list) else []))
    return spans


def workers_of(answer: Mapping[str, object]) -> list[tuple[str, int, str]]:
    """What a scheduler tells of each worker: its number, how many tokens it knows, and why it has not said."""
    workers = []
    for it in _dicts(answer.get("workers"))[:MAX_SPANS]:
        hit = it.get("num_hit_tokens")
        workers.append((str(it.get("worker_id", "")), hit if isinstance(hit, int) else 0, str(it.get("error") or "")))
    return workers


def _dicts(found: object) -> list[dict[str, object]]:
    return [it for it in found if isinstance(it, dict)] if isinstance(found, list) else []


async def _layout(view: View) -> Mapping[str, object]:
    outcome = await view.get("/cache/kvcache/info")
    layout = read_layout(outcome.object()) if outcome.ok else Layout((), ())
    return {"outcome": outcome, "layout": layout, "picture": kv_layout.picture(layout)}


async def _checksums(view: View) -> Mapping[str, object]:
    info = await view.get("/cache/kvcache/info")
    layout = read_layout(info.object()) if info.ok else Layout((), ())
    slots = view.query("slots")[:MAX_TEXT].strip()
    chunk_size = view.query("chunk_size") or str(DEFAULT_CHUNK)
    layerwise = "layers" in view.request.query or not slots
    other, chosen = _other(view)
    context: dict[str, object] = {
        "outcome": info,
        "layout": layout,
        "slots": slots or f"[0,{max(min(layout.slots, DEFAULT_SLOTS) - 1, 0)}]",
        "chunk_size": chunk_size,
        "layerwise": layerwise,
        "others": _others(view),
        "with_node": chosen,
        "asked": bool(slots),
    }
    if not slots or not info.ok:
        return context
    problem = "" if not chosen or other else "the node to compare with is no longer known; choose another one"
    if not (chunk_size.isascii() and chunk_size.isdigit() and 0 < len(chunk_size) < 10 and int(chunk_size)):
        problem = f"chunk size {chunk_size[:40]!r} is no number of slots; 256 is LMCache's own"
    if problem:
        return {**context, "problem": problem}
    query = {"slot_mapping": slots, "chunk_size": chunk_size, "layerwise": str(layerwise).lower()}
    question = Question("GET", f"/cache/kvcache/check?{urlencode(query)}", seconds=SECONDS)
    if other is None:
        here, there = await view.ask(question), None
    else:
        here, there = await asyncio.gather(view.ask(question), ask(view.request, *other, question))
    return {**context, "here": here, "there": there, **_seen(here, there, layout, int(chunk_size))}


def _seen(here: Outcome, there: Outcome | None, layout: Layout, chunk_size: int) -> Mapping[str, object]:
    if not here.ok:
        return {}
    runs = runs_of(here.object().get("slot_mapping_ranges"))
    sums = read_sums(here.object())
    context: dict[str, object] = {"sums": sums, "marked": kv_layout.picture(layout, runs)}
    context["most"] = MAX_SUMS
    context["chunk_slots"] = [checksum_view.slots_of(runs, i * chunk_size, chunk_size) for i in range(MAX_SUMS)]
    if there is not None and there.ok:
        comparison = compare(sums, read_sums(there.object()), runs, chunk_size)
        context["comparison"] = comparison
        context["picture"] = checksum_view.picture(comparison)
    return context


def _other(view: View) -> tuple[tuple[str, Node] | None, str]:
    """The node that `with` names by its page's path, and that path."""
    chosen = view.query("with")
    if not chosen:
        return None, ""
    registry = view.request.app[REGISTRY]
    for proxy in registry.proxies():
        for node in proxy.nodes:
            if node_path(proxy.name, node.name) == chosen:
                return (proxy.name, node), chosen
    return None, chosen


def _others(view: View) -> list[tuple[str, str]]:
    """Nodes to compare with, each with its page's path: workers, and those whose role is not known."""
    found = []
    for health in view.request.app[HEALTH].all():
        path = node_path(health.proxy, health.node.name)
        if path != view.path() and health.role in (None, "worker", view.health.role):
            name = health.node.name if health.proxy == view.proxy else f"{health.node.name} ({health.proxy})"
            found.append((path, name))
    return sorted(found, key=lambda it: kv_layout.natural(it[1]))[:MAX_NODES]


async def plan_store(view: View, form: Form) -> Plan:
    return await _plan_tokens(
        view,
        form,
        "Store",
        "The engine keeps the KV of these tokens, in full chunks. On a worker that serves it reads the first slots"
        " of the paged KV cache for it: what a request has there now is kept under these tokens.",
    )


async def plan_retrieve(view: View, form: Form) -> Plan:
    return await _plan_tokens(
        view,
        form,
        "Retrieve",
        "The engine brings the longest known prefix of these tokens back into the first slots of the paged KV cache. On"
        " a worker that serves it overwrites what a request has there now.",
        is_danger=True,
    )


async def _plan_tokens(view: View, form: Form, verb: str, effect: str, *, is_danger: bool = False) -> Plan:
    tokens = TokenRange.of(form.get)
    changes = []
    if not tokens.problem:
        looked = await view.ask(Question("GET", f"/cache/lookup?{tokens.query}", seconds=SECONDS))
        if looked.ok:
            then = f"{tokens.count:,}, in full chunks" if verb == "Store" else "the same"
            changes = [Change("Tokens known", _grouped(looked.object().get("num_hit_tokens")), then)]
    title = f"{verb} tokens {tokens.text}"
    return Plan(title, [view.name], effect, changes, is_danger, tokens.problem)


def _grouped(found: object) -> str:
    return f"{found:,}" if isinstance(found, int) else "not known"


async def store(view: View, form: Form) -> Result:
    outcome, tokens = await _operate(view, form, "store")
    if not outcome.ok:
        return told(outcome, "")
    looked = await view.ask(Question("GET", f"/cache/lookup?{tokens.query}", seconds=SECONDS))
    known = looked.object().get("num_hit_tokens")
    text = f"Asked again, the node knows {known:,} of {tokens.count:,} tokens." if isinstance(known, int) else "Stored."
    if known == 0:
        return Result(False, f"The node said that it did, but knows none of the {tokens.count:,} tokens: is it frozen?")
    return Result(True, text)


async def retrieve(view: View, form: Form) -> Result:
    outcome, tokens = await _operate(view, form, "retrieve")
    answer = outcome.object()
    return told(outcome, f"{answer.get('num_retrieved', 0)} of {tokens.count:,} tokens were brought back.")


async def _operate(view: View, form: Form, operation: str) -> tuple[Outcome, TokenRange]:
    tokens = TokenRange.of(form.get)
    return await view.ask(Question("POST", f"/cache/{operation}?{tokens.query}", seconds=SECONDS)), tokens


async def plan_clear(view: View, form: Form) -> Plan:
    locations = form.all("location")
    backends = await view.get("/backends")
    known = list(backends.object()) if backends.ok else []
    values, _ = Figures(view.request.app).of(view.proxy, view.node.name)
    of_them = locations or known
    there = set(known)
    unknown = [name for name in locations if backends.ok and name not in there]
    held = {name: values.get(HOLDS.get(name, "")) for name in of_them[:MAX_BACKENDS]}
    return Plan(
        "Clear " + (" and ".join(locations) if locations else "the whole cache"),
        [view.name],
        "The chunks are forgotten for good, and requests that would have found them compute them anew."
        " LMCache's LocalDiskBackend cannot be cleared and is left as it is.",
        [
            Change(name, size(amount) if amount is not None else "what it holds", "nothing")
            for name, amount in held.items()
        ],
        is_danger=True,
        problem=f"The node has no backend {unknown[0][:100]!r} now." if unknown else "",
    )


async def clear(view: View, form: Form) -> Result:
    query = "&".join(f"locations={quote(name, safe='')}" for name in form.all("location"))
    outcome = await view.ask(Question("DELETE", f"/cache/clear{'?' if query else ''}{query}", seconds=SECONDS))
    removed = outcome.object().get("num_removed")
    return told(outcome, f"{removed:,} tokens were forgotten." if isinstance(removed, int) else "It is cleared.")


async def plan_load(view: View, form: Form) -> Plan:
    path, problem = form.get("config_path").strip(), ""
    if not path:
        problem = "Write the path of a configuration file, as the node sees it."
    for name in ("max_chunks", "max_failed_keys"):
        text = form.get(name).strip()
        if text and not (text.isascii() and text.isdigit() and len(text) < 10):
            problem = f"{text[:40]!r} is no number."
    most = form.get("max_chunks").strip() or "all"
    return Plan(
        "Load chunk files",
        [view.name],
        f"The node reads {most} chunk files of the folder that the configuration {path[:300]} names into local CPU"
        " memory. It may evict what is there.",
        problem=problem,
    )


async def load(view: View, form: Form) -> Result:
    body: dict[str, object] = {"config_path": form.get("config_path").strip()}
    for name in ("max_chunks", "max_failed_keys"):
        if form.get(name).strip():
            body[name] = int(form.get(name))
    outcome = await view.ask(Question.of_json("POST", "/cache/load-fs-chunks", body, seconds=SECONDS))
    answer = outcome.object()
    failed = answer.get("failed_keys")
    text = f"{answer.get('loaded_chunks', 0)} of {answer.get('total_files', 0)} files are loaded."
    if isinstance(failed, list) and failed:
        return Result(False, f"{text} These could not be:", "\n".join(str(key) for key in failed))
    return told(outcome, text)


async def plan_record(view: View, form: Form) -> Plan:
    on = form.get("enabled") == "true"
    return Plan(
        "Record slots" if on else "Stop recording slots",
        [view.name],
        "Each store and retrieve writes its slots into the node's log: useful for a short while, and slow."
        if on
        else "Stores and retrieves no longer write their slots into the node's log.",
        [Change("Recorded slots", "off or on: the node tells it only when it is set", "on" if on else "off")],
    )


async def record(view: View, form: Form) -> Result:
    word = "true" if form.get("enabled") == "true" else "false"
    outcome = await view.ask(Question("POST", f"/cache/kvcache/record_slot?enabled={word}"))
    now = outcome.object().get("kvcache_check_log_enabled")
    if outcome.ok and now is not (word == "true"):
        return Result(False, f"The node says now that it is {'on' if now else 'off'}.")
    return told(outcome, f"The node says that it is {'on' if now else 'off'}.")


TAB = Tab(
    "cache",
    "Cache",
    80,
    show,
    serves=("/cache/store",),
    actions={
        "store": Action(plan_store, store),
        "retrieve": Action(plan_retrieve, retrieve),
        "clear": Action(plan_clear, clear),
        "load": Action(plan_load, load),
        "record": Action(plan_record, record),
    },
)
