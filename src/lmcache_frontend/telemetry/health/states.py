"""What is known of a node's health, and what one more check makes of it. Nothing here waits or asks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from lmcache_frontend.nodes.node import Node

State = Literal["up", "slow", "down", "unknown"]

STATES: tuple[State, ...] = ("down", "unknown", "slow", "up")
"""In the order in which somebody wants to see them."""

FALL = 2
"""So many checks in a row fail before a node that was up is down."""

RISE = 1
"""So many succeed before a node that was down is up."""

SLOW_MILLISECONDS = 1000.0
"""An answer that takes longer makes a node slow."""


@dataclass(frozen=True)
class Checked:
    """What one check found: an answer when `problem` is `None`; with `asked` false the node could not be asked.

    `note` is what is wrong with an answer that shows nevertheless that the node serves.
    """

    problem: str | None = None
    note: str | None = None
    milliseconds: float | None = None
    version: str | None = None
    asked: bool = True


@dataclass(frozen=True)
class NodeHealth:
    """A node's health.

    `since` is when its state began, `checked` when it was asked last, `successes` and `failures` count those in a row
    until now. `problem` is why it is not up, why the last check of a node that still counts as up failed, or what is
    wrong with its answer. `version`, `role`, `model` and `instance` are the last known ones, also of one that is down.
    """

    node: Node
    proxy: str
    state: State = "unknown"
    since: datetime | None = None
    successes: int = 0
    failures: int = 0
    problem: str | None = None
    checked: datetime | None = None
    milliseconds: float | None = None
    version: str | None = None
    role: str | None = None
    model: str | None = None
    instance: str | None = None

    @property
    def answers(self) -> bool:
        """Whether it is up, be it slow."""
        return self.state in ("up", "slow")

    def as_json(self) -> dict[str, object]:
        return {
            "proxy": self.proxy,
            "node": self.node.name,
            "address": str(self.node.address),
            "state": self.state,
            "since": self.since and self.since.isoformat(timespec="milliseconds"),
            "successes": self.successes,
            "failures": self.failures,
            "problem": self.problem,
            "checked": self.checked and self.checked.isoformat(timespec="milliseconds"),
            "milliseconds": None if self.milliseconds is None else round(self.milliseconds, 2),
            "version": self.version,
            "role": self.role,
            "model": self.model,
            "instance": self.instance,
        }


def after(health: NodeHealth, found: Checked, now: datetime, *, rise: int = RISE, fall: int = FALL) -> NodeHealth:
    """The node's health after one more check.

    While it is unknown one check decides. A node that could not be asked is unknown, and its counts begin anew.
    """
    if not found.asked:
        return _in_state(replace(health, successes=0, failures=0, milliseconds=None), "unknown", found.problem, now)
    if found.problem is not None:
        failures = health.failures + 1
        counted = replace(health, successes=0, failures=failures, milliseconds=None, checked=now)
        falls = not health.answers or failures >= fall
        return _in_state(counted, "down" if falls else health.state, found.problem, now)
    successes = health.successes + 1
    counted = replace(
        health,
        successes=successes,
        failures=0,
        milliseconds=found.milliseconds,
        checked=now,
        version=found.version or health.version,
    )
    if health.state == "down" and successes < rise:
        return _in_state(counted, "down", f"answers again, {successes} of {rise} times", now)
    milliseconds = found.milliseconds or 0.0
    if milliseconds > SLOW_MILLISECONDS:
        late = f"answered after {milliseconds / 1000:.1f} seconds; from {SLOW_MILLISECONDS / 1000:g} on it is slow"
        return _in_state(counted, "slow", late, now)
    return _in_state(counted, "up", found.note, now)


def _in_state(health: NodeHealth, state: State, problem: str | None, now: datetime) -> NodeHealth:
    since = now if health.since is None or state != health.state else health.since
    return replace(health, state=state, problem=problem, since=since)
