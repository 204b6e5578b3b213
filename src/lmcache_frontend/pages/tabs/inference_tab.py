"""The inference engine around the node: vLLM's version, and what it and LMCache tell of themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmcache_frontend.pages.reading import flat, text
from lmcache_frontend.pages.tabs import Tab, View

MAX_ROWS = 3000


@dataclass(frozen=True)
class Part:
    """A part of what is told: its rows by dotted name."""

    title: str
    rows: list[tuple[str, str, bool]]


def parts_of(told: Mapping[str, object]) -> list[Part]:
    """What is told by its first name, single values first."""
    single: list[tuple[str, str, bool]] = []
    parts: list[Part] = []
    for name, value in told.items():
        if isinstance(value, dict):
            parts.append(Part(str(name), [(inner, text(it), it is None) for inner, it in flat(value)]))
        else:
            single.append((str(name), text(value), value is None))
    return ([Part("", single)] if single else []) + parts


def first_of(parts: Sequence[Part], most: int) -> list[Part]:
    """The first parts, with so many rows in all; one without rows counts as well."""
    found = []
    for part in parts:
        if most <= 0:
            break
        found.append(Part(part.title, part.rows[:most]))
        most -= len(part.rows) or 1
    return found


async def show(view: View) -> Mapping[str, object]:
    outcome, version = await asyncio.gather(view.get("/inference_info"), view.get("/inference_version"))
    told = parts_of(outcome.object())
    parts = first_of(told, MAX_ROWS)
    total = sum(len(part.rows) for part in parts)
    words = view.words
    return {
        "outcome": outcome,
        "version": text(version.object().get("vllm_version")) if version.ok else "",
        "why": "" if version.ok else version.problem,
        "parts": parts,
        "words": words,
        "total": total,
        "more": sum(len(part.rows) for part in told) - total,
        "hits": sum(
            all(word in f"{part.title} {name} {value}".lower() for word in words)
            for part in parts
            for name, value, _ in part.rows
        ),
    }


TAB = Tab("inference", "Inference", 55, show, serves=("/inference_info",), answers="/inference_version")
