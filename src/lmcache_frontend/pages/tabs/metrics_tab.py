"""What the node tells Prometheus: families with their help and values; `?raw=yes` as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from lmcache_frontend.pages.asking import Question
from lmcache_frontend.pages.confirming import Form, Plan, Result
from lmcache_frontend.pages.tabs import Action, Tab, View, told

MOST_BYTES = 2 << 20
MAX_LINE = 16 << 10
"""Characters; the library takes the square of a line's labels."""

MAX_PROBLEM = 300
MAX_SAMPLES = 300
"""Of one family; the raw text has all."""


_LAST = ("python_", "process_")


@dataclass
class Family:
    """A metric as a row: `value` where it has only one sample."""

    name: str
    kind: str
    help: str
    samples: list[tuple[str, str, str]] = field(default_factory=list)
    more: int = 0

    @property
    def written(self) -> str:
        """Its name as it stands in the text: a counter's ends in `_total` there."""
        return self.name + "_total" if self.kind == "counter" else self.name

    @property
    def value(self) -> str:
        return self.samples[0][2] if len(self.samples) == 1 else ""


def families(text: str) -> list[Family]:
    """The families of an exposition in its order, those of the process last, without the times of counters' beginnings.

    Raises:
        ValueError: it is none.
    """
    try:
        return _families(text)
    except (IndexError, KeyError) as error:  # so the parser ends at some texts
        raise ValueError(f"no exposition: {error}") from None


def _families(text: str) -> list[Family]:
    if any(len(line) > MAX_LINE for line in text.split("\n")):
        raise ValueError(f"a line has more than {MAX_LINE} characters")
    found = []
    for parsed in text_string_to_metric_families(text):
        if parsed.name.endswith("_created"):
            continue
        family = Family(parsed.name, parsed.type, parsed.documentation)
        for sample in parsed.samples:
            if sample.name.endswith("_created"):
                continue
            if len(family.samples) >= MAX_SAMPLES:
                family.more += 1
                continue
            labels = ", ".join(f"{name}={value}" for name, value in sample.labels.items())
            family.samples.append((sample.name.removeprefix(family.written), labels, _shown(sample.value)))
        found.append(family)
    return sorted(found, key=lambda family: family.name.startswith(_LAST))


def _shown(value: float) -> str:
    return f"{int(value):,}" if abs(value) < 1e15 and value == int(value) else f"{value:.6g}"


async def show(view: View) -> Mapping[str, object]:
    outcome = await view.ask(Question("GET", "/metrics", most=MOST_BYTES))
    if not outcome.ok or view.query("raw"):
        return {"outcome": outcome, "families": [], "raw": bool(view.query("raw"))}
    try:  # the largest text takes half a second, in which nothing else would go on
        return {"outcome": outcome, "families": await asyncio.to_thread(families, outcome.text), "raw": False}
    except ValueError as error:
        return {"outcome": outcome, "families": [], "raw": True, "problem": str(error)[:MAX_PROBLEM]}


async def plan_reset(view: View, form: Form) -> Plan:
    return Plan(
        "Reset the metrics",
        [view.name],
        "Counters and histograms begin again at zero. Prometheus takes it as a restart; a rate over it has no spike.",
    )


async def reset(view: View, form: Form) -> Result:
    return told(await view.ask(Question("POST", "/metrics/reset")), "Its counters and histograms are at zero.")


TAB = Tab("metrics", "Metrics", 10, show, serves=("/metrics",), actions={"reset": Action(plan_reset, reset)})
