"""What changes something is asked twice: first a page says what will be done where, then it is done and told.

Both steps are forms that work without JavaScript (`POST …` shows the plan, `POST …` with `confirmed=yes` does it); with
it, `confirm.js` shows the same two parts in a dialog.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from aiohttp import web
from aiohttp.helpers import parse_mimetype

from lmcache_frontend.pages import rendering
from lmcache_shared.errors import Refusal
from lmcache_shared.schema import read_body

MAX_FORM_BYTES = 1 << 20
MAX_FIELDS = 1000
MAX_HEAD_BYTES = 2000
"""Of the lines before a field of a multipart form."""

_FIELD_NAME = re.compile(rb'form-data;[^\r\n]*?\bname=(?:"([^"\r\n]+)"|([^\s;"]+))', re.IGNORECASE)

CONFIRMED = "confirmed"


@dataclass(frozen=True)
class Change:
    """One value before and after."""

    what: str
    old: str
    new: str


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        title: the action, as a heading and as the button's text ("Clear the cache").
        where: what it is done to, each a line.
        effect: what this means, in a sentence or two.
        changes: values, old and new.
        is_danger: something is lost by it.
        problem: why it cannot be done; then there is no button.
    """

    title: str
    where: Sequence[str] = ()
    effect: str = ""
    changes: Sequence[Change] = ()
    is_danger: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Result:
    """What came of it: a sentence, and what there is to see more."""

    ok: bool
    text: str
    detail: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)


class Form:
    """The fields of a form, of a repeated one the last value; a file's text is a field as well."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self.pairs = pairs
        self._last = dict(pairs)

    def get(self, name: str, otherwise: str = "") -> str:
        return self._last.get(name, otherwise)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.pairs if key == name]

    @property
    def is_confirmed(self) -> bool:
        return self.get(CONFIRMED) == "yes"


async def read_form(request: web.Request) -> Form:
    """The form that a request carries, urlencoded or multipart.

    Raises:
        Refusal: 400 or 413.
    """
    body = await read_body(request, MAX_FORM_BYTES)
    kind = parse_mimetype(request.headers.get("Content-Type", ""))
    if (kind.type, kind.subtype) == ("multipart", "form-data"):
        return Form(_multipart(kind.parameters.get("boundary", ""), body))
    try:
        return Form(parse_qsl(body.decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_FIELDS))
    except ValueError:
        raise Refusal(400, f"the form is no text in UTF-8, or has more than {MAX_FIELDS} fields") from None


def _multipart(boundary: str, body: bytes) -> list[tuple[str, str]]:
    """The fields of a multipart form as browsers write it: nothing is nested in it, or encoded once more.

    Raises:
        Refusal: 400.
    """
    if not boundary:
        raise Refusal(400, "the form is multipart/form-data and names no boundary")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("utf-8", "replace"), MAX_FIELDS + 2)
    if len(pieces) > MAX_FIELDS + 2:
        raise Refusal(400, f"the form has more than {MAX_FIELDS} fields")
    pairs = []
    for piece in pieces[1:]:
        if piece.startswith(b"--"):  # behind the last one
            break
        head, _, data = piece.partition(b"\r\n\r\n")
        name = _FIELD_NAME.search(head[:MAX_HEAD_BYTES])
        if name is not None:
            pairs.append(((name[1] or name[2]).decode("utf-8", "replace"), data.decode("utf-8", "replace")))
    return pairs


async def plan_page(request: web.Request, plan: Plan, form: Form, back: str) -> web.Response:
    """Asks whether the plan is to be carried out; `back` is where the reader came from."""
    fields = [(name, value) for name, value in form.pairs if name != CONFIRMED]
    context = {"plan": plan, "fields": fields, "back": back, "action": request.path_qs}
    return await rendering.show(request, "confirm.html", context)


async def result_page(request: web.Request, plan: Plan, result: Result, back: str) -> web.Response:
    """Tells what came of it."""
    return await rendering.show(request, "result.html", {"plan": plan, "result": result, "back": back})
