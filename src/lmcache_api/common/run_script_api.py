"""`POST /run_script`: run the caller's Python in this process. Off unless the operator turns it on.

As with LMCache the short list of builtins keeps scripts honest, not hostile code out: whoever may call this may do
whatever the process may.
"""

import asyncio
import concurrent.futures
import ctypes
import importlib
import logging
import threading
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from email.errors import MessageError
from email.parser import BytesParser
from email.policy import HTTP
from types import ModuleType, SimpleNamespace
from typing import Any

from aiohttp import web

from lmcache_api.app import COMPONENT, call
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.responses import json_response, text_response
from lmcache_shared.schema import parse_query

logger = logging.getLogger(__name__)
router = web.RouteTableDef()

DISABLED = (
    "The /run_script API is disabled. It executes caller-supplied code in-process, so it is off by default; enable it"
    " explicitly with run_script_api_enabled (LMCACHE_RUN_SCRIPT_API_ENABLED=true, or --run-script-api-enabled on the"
    " standalone server) and only on a trusted network."
)
"""LMCache's words."""

NAME = "<script>"

MAX_PARTS = 16
"""Parts that a form may have."""

FORM_BYTES = 64 << 10
"""What a form may hold beside the script."""

READ_SECONDS = 30.0
"""How long a form may take to come."""

MAX_RESULT_CHARACTERS = 8 << 20
"""Longest result that is answered."""

MAX_PRINTED_CHARACTERS = 1 << 20
"""What a script prints past this is left out."""

MAX_FRAMES = 20
"""Of the script's own, the innermost ones, in the traceback that is answered."""

STOP_SECONDS = 0.5
"""How long a script that is past its deadline has to end when it is told to."""

BUILTINS: dict[str, Any] = {
    function.__name__: function
    for function in (
        abs, all, any, bool, dict, enumerate, float, getattr, hasattr, int, isinstance, len, list, max, min, print,
        range, repr, round, set, sorted, str, sum, tuple, type, zip, Exception, KeyError, ValueError,
    )
}  # fmt: skip
"""What a script finds without an import: LMCache's eight names, and those that a script of ten lines misses first."""


class _Deadline(BaseException):
    """Raised inside a script that has run too long."""

    def __str__(self) -> str:
        return "it ran too long"


class Printed:
    """Takes what a script prints, in the place of the process's standard output."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._room = MAX_PRINTED_CHARACTERS

    def print(self, *values: object, sep: str | None = " ", end: str | None = "\n", **_: object) -> None:
        """As the builtin, without its file."""
        text = (" " if sep is None else sep).join(str(value) for value in values) + ("\n" if end is None else end)
        self._pieces.append(text[: self._room])
        self._room -= len(self._pieces[-1])

    @property
    def text(self) -> str:
        return "".join(list(self._pieces))


class ScriptRunner:
    """Runs one script at a time, each in a thread of its own: one can be told to stop, and holds no other call up."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcome: concurrent.futures.Future[str] | None = None

    @property
    def busy(self) -> bool:
        """Whether a script runs, be it one that was told to stop and goes on."""
        return self._outcome is not None and not self._outcome.done() and self._thread is not None

    async def run(
        self, source: bytes, app: object, allowed: Sequence[str], seconds: float, printed: "Printed | None" = None
    ) -> str:
        """What the script answers; what it prints goes to `printed` where one is given.

        Raises:
            TimeoutError: it ran longer than `seconds`; the text says whether it has stopped since.
            ScriptFailed: it raised.
        """
        self._outcome = concurrent.futures.Future()
        work = (self._outcome, source, app, allowed, printed)
        self._thread = threading.Thread(target=_work, args=work, name="run-script", daemon=True)
        self._thread.start()
        waiting = asyncio.wrap_future(self._outcome)
        try:
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
        except asyncio.CancelledError:  # the caller has left
            self.stop()
            raise
        if done:
            return waiting.result()
        self.stop()
        done, _ = await asyncio.wait({waiting}, timeout=STOP_SECONDS)
        if done:
            waiting.exception()
        raise TimeoutError("it was stopped" if done else "it did not stop when told to and goes on")

    def stop(self) -> None:
        """Tell a script that still runs to stop.

        CPython raises the exception at the thread's next bytecode: a loop ends; a call into C (a sleep, a lock) goes
        on.
        """
        if self._thread is not None and self._thread.is_alive() and self.busy:
            thread_id = ctypes.c_ulong(self._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(_Deadline))


class ScriptFailed(Exception):
    """A script raised; the text is its error's, and `where` the script's own lines that led there."""

    def __init__(self, text: str, where: str = "") -> None:
        super().__init__(text)
        self.where = where


@dataclass(frozen=True)
class ScriptQuery:
    details: bool = False


RUNNER: web.AppKey[ScriptRunner] = web.AppKey("script runner", ScriptRunner)


def setup(app: web.Application) -> None:
    async def lifetime(app: web.Application) -> AsyncIterator[None]:
        yield
        app[RUNNER].stop()

    app[RUNNER] = ScriptRunner()
    app.cleanup_ctx.append(lifetime)


@router.post("/run_script")
@needs(Role.ADMIN)
async def run_script(request: web.Request) -> web.Response:
    """Run the file `script` of a multipart form with `app` in reach; answer `str(result)`.

    With `details` what it printed, where it failed and how long it took are answered too, in JSON.
    """
    component = request.app[COMPONENT]
    settings = component.settings
    if not settings.run_script_api_enabled:
        return text_response(DISABLED, status=404)
    details = parse_query(request, ScriptQuery).details
    try:
        source = await _read_script(request, settings.run_script_max_bytes)
    except _BadForm as error:
        return text_response(str(error), status=error.status)
    runner = request.app[RUNNER]
    if runner.busy:
        return text_response("Another script is still running; try again when it has ended", status=409)
    logger.warning("running a script of %d bytes from %s", len(source), request.remote or "a Unix socket")
    app = SimpleNamespace(state=SimpleNamespace(lmcache_adapter=component.script_adapter))
    seconds = settings.run_script_seconds
    printed = Printed() if details else None
    answer, where, status, began = "", "", 200, time.monotonic()
    try:
        answer = await runner.run(source, app, settings.script_allowed_imports or (), seconds, printed)
    except ScriptFailed as error:
        answer, where, status = f"Error executing script: {error}", error.where, 500
    except TimeoutError as error:
        answer = f"Error executing script: not done within {seconds:g} seconds (run_script_seconds); {error}"
        status = 504
    if printed is None:
        return text_response(answer, status=status)
    told = {"output": printed.text, "traceback": where, "seconds": time.monotonic() - began}
    return json_response({"result" if status == 200 else "error": answer, **told}, status=status)


class _BadForm(Exception):
    """There is no script in the request that could be run."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


async def _read_script(request: web.Request, max_script: int) -> bytes:
    """The bytes of the form's file `script`.

    Raises:
        _BadForm: no form, no script in it, too large, or too slow.
    """
    content_type = request.headers.get("Content-Type", "")
    try:
        body = await asyncio.wait_for(_read_body(request, max_script + FORM_BYTES), READ_SECONDS)
        source = await call(request, lambda: _script_of(content_type, body), "reading the form")
    except asyncio.TimeoutError:
        raise _BadForm(408, f"The form did not come within {READ_SECONDS:g} seconds") from None
    except (ValueError, web.RequestPayloadError) as error:
        raise _BadForm(400, f"The form cannot be read: {error}") from None
    if source is None:
        raise _BadForm(400, "No script file provided")
    if len(source) > max_script:
        raise _BadForm(413, f"The script is larger than {max_script} bytes (run_script_max_bytes)")
    return source


async def _read_body(request: web.Request, limit: int) -> bytes:
    body = bytearray()
    while piece := await request.content.readany():
        body += piece
        if len(body) > limit:
            raise _BadForm(413, f"The form is larger than {limit} bytes (run_script_max_bytes and {FORM_BYTES} beside)")
    return bytes(body)


def _script_of(content_type: str, body: bytes) -> bytes | None:
    """The bytes of the form's file `script`, the last one of that name; `None` when there is none.

    Read by the standard library's MIME parser, off the event loop.

    Raises:
        ValueError: this is no form, or it breaks off: half a script is never run.
    """
    if not content_type.lower().startswith("multipart/form-data"):
        return None
    try:
        head = b"Content-Type: " + content_type.encode("latin-1", "replace") + b"\r\n\r\n"
        message = BytesParser(policy=HTTP).parsebytes(head + body)
        parts = list(message.iter_parts())
    except (RecursionError, MessageError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(type(error).__name__) from None
    if message.defects or any(part.defects or part.is_multipart() for part in parts):
        raise ValueError("it is no whole multipart form")
    if len(parts) > MAX_PARTS:
        raise ValueError(f"more than {MAX_PARTS} parts")
    scripts = [
        part
        for part in parts
        if part.get_param("name", header="content-disposition") == "script" and part.get_filename() is not None
    ]
    if not scripts:
        return None
    payload = scripts[-1].get_payload(decode=True)
    return payload if isinstance(payload, bytes) else None


def _work(
    outcome: "concurrent.futures.Future[str]",
    source: bytes,
    app: object,
    allowed: Sequence[str],
    printed: Printed | None,
) -> None:
    failure, where = "it ended without an answer", ""
    try:
        try:
            answer = _execute(source, app, allowed, printed)
        except BaseException as error:
            failure = type(error).__name__  # its text is the script's own code, which may fail too
            logger.info("a script of /run_script failed%s", _line(error))
            failure, kind = str.__str__(str(error)) or failure, failure
            where = _where(source, error, kind, failure) if printed is not None else ""
        else:
            outcome.set_result(answer)
    except BaseException:
        logger.info("a script's error has no text: %s", failure)
    finally:
        if not outcome.done():
            outcome.set_exception(ScriptFailed(failure, where))


def _line(error: BaseException) -> str:
    """Where in the script it happened, for the log; the answer is LMCache's to the letter."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == NAME]
    return f" in line {lines[-1]}" if lines else ""


def _where(source: bytes, error: BaseException, kind: str, said: str) -> str:
    """The script's own frames and the error, as Python writes them."""
    lines = source.decode("utf-8", "replace").splitlines()
    text = ["Traceback (most recent call last):"]
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == NAME]
    found = [(frame.lineno or 0, frame.name) for frame in own[-MAX_FRAMES:]]
    if isinstance(error, SyntaxError) and not found:
        found = [(error.lineno or 0, "<module>")]
    for number, name in found:
        text.append(f'  File "{NAME}", line {number}, in {name}')
        if 0 < number <= len(lines):
            text.append(f"    {lines[number - 1].strip()}")
    return "\n".join([*text, kind if said == kind else f"{kind}: {said}"])


def _execute(source: bytes, app: object, allowed: Sequence[str], printed: Printed | None) -> str:
    modules = _import_allowed(allowed)

    def allowed_import(name: str, *_: object, **__: object) -> ModuleType:
        if name not in modules:
            listed = ", ".join(sorted(modules)) or "none"
            raise ImportError(f"Import of '{name}' is not allowed (script_allowed_imports: {listed})")
        return modules[name]

    builtins = {**BUILTINS, "__import__": allowed_import, **({} if printed is None else {"print": printed.print})}
    scope: dict[str, Any] = {"__builtins__": builtins, "app": app}
    exec(compile(source, NAME, "exec"), scope)  # noqa: S102 - it is what the endpoint is for
    answer = str.__str__(str(scope.get("result", "Script executed successfully")))  # a plain one, no subclass of theirs
    if len(answer) > MAX_RESULT_CHARACTERS:
        raise ValueError(f"its result has {len(answer)} characters; at most {MAX_RESULT_CHARACTERS} are answered")
    return answer


def _import_allowed(names: Sequence[str]) -> dict[str, ModuleType]:
    modules = {}
    for name in names:
        try:
            modules[name] = importlib.import_module(name)
        except ImportError as error:
            logger.warning("script_allowed_imports: cannot import %s: %s", name, error)
    return modules
