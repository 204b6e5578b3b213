"""What can be done on many nodes: for each kind what it reads before, what it asks, and how old and new are told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

from lmcache_frontend.pages.asking import Outcome, Question
from lmcache_frontend.pages.reading import MAX_LEVELS, is_deep
from lmcache_shared import secrets
from lmcache_shared.errors import Refusal

MAX_VALUE = 4000
"""Characters of one field of the form."""

READ_SECONDS = 5.0
DO_SECONDS = 10.0
LONG_SECONDS = 60.0
"""For what clears or makes something."""

MAX_BYTES = 256 << 10

NOT_READ = ""
"""Of a value that cannot be read before it is changed."""

Values = Mapping[str, str]
"""What the form says."""


class Lacks(str):
    """What a node has not; it cannot do this."""

    __slots__ = ()


@dataclass(frozen=True)
class Input:
    """A field of a kind's form; with `options` one of those."""

    name: str
    title: str
    options: Sequence[tuple[str, str]] = ()
    placeholder: str = ""
    otherwise: str = ""
    is_long: bool = False
    is_optional: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Kind:
    """An operation.

    Attributes:
        title: says what is done, as a sentence without a point; with the form's values in braces.
        effect: what this means for a node.
        read: what tells of the present state; an OPTIONS where there is none, which tells whether it can be done.
        old, new: the value before and after; equal texts mean that nothing changes.
        ask: what does it.
        problem: what is wrong with an answer that seems to be well.
        check: refuses values that cannot be right.
        is_danger: something is lost by it.
    """

    name: str
    label: str
    title: Callable[[Values], str]
    effect: str
    read: Callable[[Values], Question]
    old: Callable[[Outcome, Values], str]
    new: Callable[[Values], str]
    ask: Callable[[Values], Question]
    inputs: Sequence[Input] = ()
    problem: Callable[[Outcome], str] = lambda outcome: ""
    check: Callable[[Values], None] = lambda values: None
    is_danger: bool = field(default=False)

    def values(self, get: Callable[[str], str]) -> Values:
        """The values of a form.

        Raises:
            Refusal: 400, one is missing or is none of those that there are.
        """
        found = {}
        for it in self.inputs:
            value = get(it.name).strip() or (it.otherwise if it.options else "")
            if not value and not it.is_optional:
                raise Refusal(400, f"{it.title} is missing")
            if len(value) > MAX_VALUE:
                raise Refusal(400, f"{it.title} has {len(value)} characters, at most {MAX_VALUE} are taken")
            if it.options and value not in dict(it.options):
                raise Refusal(400, f"{it.title} cannot be {value[:100]!r}")
            found[it.name] = value
        self.check(found)
        return found


def _get(path: str) -> Question:
    return Question("GET", path, seconds=READ_SECONDS, most=MAX_BYTES)


def _do(method: str, path: str, body: bytes | None = None, seconds: float = DO_SECONDS) -> Question:
    return Question(method, path, body, seconds=seconds, most=MAX_BYTES)


LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_SWITCH = (("enable", "On"), ("disable", "Off"))
_ON = {"enable": "on", "disable": "off"}


def _flag(name: str) -> Callable[[Outcome, Values], str]:
    def old(outcome: Outcome, values: Values) -> str:
        found = outcome.object().get(name)
        return ("on" if found else "off") if isinstance(found, bool) else NOT_READ

    return old


def _level(outcome: Outcome, values: Values) -> str:
    return outcome.text.rpartition(": ")[2].strip()[:100]


def _bypassed(outcome: Outcome, values: Values) -> str:
    told = outcome.object()
    names, bypassed = told.get("all_backends"), told.get("bypassed_backends")
    if not isinstance(names, list) or not isinstance(bypassed, list):
        return NOT_READ
    if values["backend"] in bypassed:
        return "bypassed"
    return "in use" if values["backend"] in names else Lacks(f"no {values['backend']}")


def _backend(outcome: Outcome, values: Values) -> str:
    told = outcome.object()
    return str(told[values["backend"]])[:200] if values["backend"] in told else Lacks(f"no {values['backend']}")


def _backends(outcome: Outcome, values: Values) -> str:
    asked = places(values)
    found = ", ".join(name for name in outcome.object() if not asked or name in asked)[:200]
    return found or Lacks("no such backend")


def places(values: Values) -> list[str]:
    """The backends that are to be cleared; none for all."""
    return [name for it in values["places"].split(",") if (name := it.strip())]


def settings(values: Values) -> dict[str, object]:
    """The settings of a form: a JSON object, or `name = value` in each line, the value in JSON or as it stands.

    Raises:
        Refusal: 400, they are neither.
    """
    text = values["settings"]
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the settings are no JSON object: {error}") from None
        return {str(name): value for name, value in found.items()}
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, separator, value = line.replace(":", "=", 1 if "=" not in line else 0).partition("=")
        if not separator or not name.strip():
            raise Refusal(400, f"the line {line[:100]!r} is no setting: write name = value")
        try:
            found[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            found[name.strip()] = value.strip()
    return found


def _shown(values: Mapping[str, object]) -> str:
    told = secrets.masked_within(dict(values))
    assert isinstance(told, dict)
    return "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in told.items())[:MAX_VALUE]


def _old_settings(outcome: Outcome, values: Values) -> str:
    told, asked = outcome.object(), settings(values)
    if not any(name in told for name in asked):
        return Lacks("no such setting")
    return _shown({name: told.get(name, "no such setting") for name in asked})


def _refused_settings(outcome: Outcome) -> str:
    errors = outcome.object().get("errors")
    return "; ".join(f"{name}: {why}" for name, why in errors.items())[:500] if isinstance(errors, dict) else ""


def _set(values: Values) -> Question:
    return _do("POST", "/conf", json.dumps(settings(values)).encode())


def _clear(values: Values) -> Question:
    asked = urlencode([("locations", name) for name in places(values)])
    return _do("DELETE", f"/cache/clear?{asked}" if asked else "/cache/clear", seconds=LONG_SECONDS)


KINDS: Mapping[str, Kind] = {
    it.name: it
    for it in (
        Kind(
            "log-level",
            "Log level",
            lambda it: f"Set {it['logger']} to {it['level']}",
            "The logger and all its handlers get this level until the process ends.",
            lambda it: _get("/loglevel?" + urlencode({"logger_name": it["logger"]})),
            _level,
            lambda it: it["level"],
            lambda it: _do("GET", "/loglevel?" + urlencode({"logger_name": it["logger"], "level": it["level"]})),
            (
                Input("logger", "Logger", placeholder="root, lmcache, lmcache.v1 …"),
                Input("level", "Level", [(it, it) for it in LEVELS], otherwise="INFO"),
            ),
        ),
        Kind(
            "freeze",
            "Freeze",
            lambda it: "Freeze" if it["switch"] == "enable" else "Unfreeze",
            "While a node is frozen stores are skipped, only local CPU serves, and nothing is admitted or evicted.",
            lambda it: _get("/freeze/status"),
            _flag("freeze"),
            lambda it: _ON[it["switch"]],
            lambda it: _do("PUT", f"/freeze/{it['switch']}"),
            (Input("switch", "Frozen", _SWITCH, otherwise="enable"),),
        ),
        Kind(
            "bypass",
            "Bypass",
            lambda it: (
                f"{'Bypass' if it['switch'] == 'add' else 'Use'} {it['backend']}{' again' * (it['switch'] != 'add')}"
            ),
            "A backend that is bypassed is neither stored to nor looked up in; what it holds stays there.",
            lambda it: _get("/bypass/list"),
            _bypassed,
            lambda it: "bypassed" if it["switch"] == "add" else "in use",
            lambda it: _do("PUT", f"/bypass/{it['switch']}?" + urlencode({"backend_name": it["backend"]})),
            (
                Input("backend", "Backend", placeholder="LocalDiskBackend"),
                Input("switch", "It is", [("add", "Bypassed"), ("remove", "In use")], otherwise="add"),
            ),
        ),
        Kind(
            "hot-cache",
            "Hot cache",
            lambda it: f"Switch the hot cache {_ON[it['switch']]}",
            "Whether LocalCPUBackend keeps chunks. Off, it forgets those that it has.",
            lambda it: _get("/hot_cache/status"),
            _flag("hot_cache"),
            lambda it: _ON[it["switch"]],
            lambda it: _do("PUT", f"/hot_cache/{it['switch']}"),
            (Input("switch", "Hot cache", _SWITCH, otherwise="enable"),),
        ),
        Kind(
            "clear",
            "Clear the cache",
            lambda it: f"Clear {' and '.join(places(it)) or 'the whole cache'}",
            "Every chunk in these backends is forgotten. Requests compute anew what they would have found.",
            lambda it: _get("/backends"),
            _backends,
            lambda it: "empty",
            _clear,
            (
                Input(
                    "places",
                    "Backends",
                    placeholder="All",
                    is_optional=True,
                    hint="Names with commas; none clears all.",
                ),
            ),
            is_danger=True,
        ),
        Kind(
            "settings",
            "Settings",
            lambda it: f"Set {', '.join(settings(it))}"[:200],
            "A setting holds until the process ends. Some count only for what is made after it.",
            lambda it: _get("/conf?names=" + quote(",".join(settings(it)))),
            _old_settings,
            lambda it: _shown(settings(it)),
            _set,
            (
                Input(
                    "settings",
                    "Settings",
                    placeholder="min_retrieve_tokens = 512",
                    is_long=True,
                    hint="name = value in each line, or a JSON object.",
                ),
            ),
            problem=_refused_settings,
            check=lambda it: _some(settings(it)),
        ),
        Kind(
            "recreate",
            "Recreate a backend",
            lambda it: f"Recreate {it['backend']}",
            "It is closed and made again by the settings of now. What it held in memory is lost.",
            lambda it: _get("/backends"),
            _backend,
            lambda it: "made again",
            lambda it: _do("POST", f"/backends/{quote(it['backend'], safe='')}/recreate", seconds=LONG_SECONDS),
            (Input("backend", "Backend", placeholder="LocalDiskBackend"),),
            is_danger=True,
        ),
        Kind(
            "reset-metrics",
            "Reset metrics",
            lambda it: "Reset the metrics",
            "Counters and histograms begin again at zero. Prometheus takes it as a restart; a rate has no spike.",
            lambda it: Question("OPTIONS", "/metrics/reset", seconds=READ_SECONDS, most=MAX_BYTES),
            lambda outcome, it: NOT_READ,
            lambda it: "at zero",
            lambda it: _do("POST", "/metrics/reset"),
        ),
    )
}


def _some(found: Mapping[str, object]) -> None:
    if not found:
        raise Refusal(400, "there is no setting; write name = value")
    if is_deep(dict(found)):
        raise Refusal(400, f"the settings have more than {MAX_LEVELS} levels")
