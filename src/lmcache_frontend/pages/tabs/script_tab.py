"""Runs a script inside the node's process, where that is enabled, and tells what came of it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from lmcache_frontend.audit import AUDIT
from lmcache_frontend.pages import wording
from lmcache_frontend.pages.asking import Outcome, Question
from lmcache_frontend.pages.confirming import Form, Plan, Result
from lmcache_frontend.pages.reading import listed, number, text
from lmcache_frontend.pages.tabs import Action, Tab, View

ENABLED = "run_script_api_enabled"
SETTINGS = (ENABLED, "script_allowed_imports", "run_script_seconds", "run_script_max_bytes")
DEFAULT_SECONDS = 30.0
MORE_SECONDS = 10.0
"""Above what the node gives a script, for the way and for the node to stop it."""

MAX_BYTES = 512 << 10
"""Of a script that is typed here: a form may be twice as long."""

SAMPLES = (
    (
        "A setting",
        "What the process uses now, and not what the file says.",
        "manager = app.state.lmcache_adapter\nresult = manager.config.chunk_size\n",
    ),
    (
        "What the manager has",
        "The attributes that a script can reach.",
        """\
manager = app.state.lmcache_adapter
for name in sorted(manager.__dict__):
    print(name, "=", type(getattr(manager, name)).__name__)
""",
    ),
    (
        "The engine's parts",
        "The classes behind the engine, on a worker.",
        """\
engine = getattr(app.state.lmcache_adapter, "lmcache_engine", None)
if engine is None:
    result = "this component has no engine"
else:
    result = {name: type(value).__name__ for name, value in engine.__dict__.items()}
""",
    ),
)
"""Title, what it is for, and the script."""


async def show(view: View) -> Mapping[str, object]:
    outcome = await view.get(f"/conf?names={','.join(SETTINGS)}")
    said = outcome.object()
    if outcome.kind in ("missing", "unavailable"):  # LMCache's controllers and servers have scripts and no `/conf`
        outcome, said = Outcome("ok", 200), {}
    return {
        "outcome": outcome,
        "is_off": said.get(ENABLED) is False,
        "lacks": view.lacks("POST", "/run_script"),
        "imports": [text(it) for it in listed(said.get("script_allowed_imports"))],
        "seconds": number(said.get("run_script_seconds")),
        "bytes": number(said.get("run_script_max_bytes")),
        "is_audited": AUDIT in view.request.app,
        "samples": SAMPLES,
        "script": view.query("script"),
    }


async def plan_run(view: View, form: Form) -> Plan:
    script = form.get("script")
    title, problem = "Run the script", ""
    if not script.strip():
        problem = "There is no script."
    elif len(script.encode()) > MAX_BYTES:
        problem = f"The script is larger than {MAX_BYTES >> 10} KiB."
    return Plan(title, [view.name], "It runs inside the process, with all that the process may do.", (), True, problem)


async def run(view: View, form: Form) -> Result:
    allowed = await view.get(f"/conf?names={SETTINGS[2]}")
    seconds = number(allowed.object().get(SETTINGS[2])) or DEFAULT_SECONDS
    boundary = secrets.token_hex(16)
    script = form.get("script").replace("\r\n", "\n").encode("utf-8", "replace")
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="script"; filename="script.py"\r\n\r\n'
    body = head.encode() + script + f"\r\n--{boundary}--\r\n".encode()
    asked = Question(
        "POST",
        "/run_script?details=true",
        body,
        f"multipart/form-data; boundary={boundary}",
        seconds=seconds + MORE_SECONDS,
    )
    return result_of(await view.ask(asked))


def result_of(outcome: Outcome) -> Result:
    """What the node says of a run; one that does not know of details says the result alone."""
    said = outcome.object()
    seconds = number(said.get("seconds"))
    if seconds is None or not (said.keys() & {"result", "error"}):
        if outcome.ok:
            return Result(True, "The script has run.", extra={"sections": [("Result", outcome.text)]})
        return Result(False, outcome.problem, extra={"outcome": outcome})
    took = wording.span(seconds)
    failure = "traceback" if said.get("traceback") else "error"  # which ends in the error
    names = (("Result", "result"), ("Error", failure), ("Output", "output"))
    sections = [(title, text(said.get(name))) for title, name in names if said.get(name)]
    failed = f"The script failed after {took}."
    return Result(outcome.ok, f"The script has run in {took}." if outcome.ok else failed, extra={"sections": sections})


TAB = Tab(
    "script",
    "Run script",
    100,
    show,
    serves=("/run_script",),
    setting=ENABLED,
    actions={"run": Action(plan_run, run)},
)
