"""What changes something is asked twice: first a page says what will be done where, then it is done and told.

Both steps are forms that work without JavaScript (`POST …` shows the plan, `POST …` with `confirmed=yes` does it); with
it, `confirm.js` shows the same two parts in a dialog.
"""

from __future__ import annotations

import email.parser
import email.policy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from aiohttp import web

from lmcache_frontend.pages import rendering
from lmcache_shared.errors import Refusal
from lmcache_shared.schema import read_body

MAX_FORM_BYTES = 1 << 20
MAX_FIELDS = 1000
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
    if request.content_type == "multipart/form-data":
        return Form(_multipart(request.headers.get("Content-Type", ""), body))
    try:
        return Form(parse_qsl(body.decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_FIELDS))
    except ValueError:
        raise Refusal(400, f"the form is no text in UTF-8, or has more than {MAX_FIELDS} fields") from None


def _multipart(content_type: str, body: bytes) -> list[tuple[str, str]]:
    head = b"Content-Type: " + content_type.encode("utf-8", "replace") + b"\r\n\r\n"
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    pairs = []
    for part in message.iter_parts() if message.is_multipart() else ():
        name = part.get_param("name", header="content-disposition")
        data = part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(data, bytes):
            pairs.append((name, data.decode("utf-8", "replace")))
    return pairs[:MAX_FIELDS]


async def plan_page(request: web.Request, plan: Plan, form: Form, back: str) -> web.Response:
    """Asks whether the plan is to be carried out; `back` is where the reader came from."""
    fields = [(name, value) for name, value in form.pairs if name != CONFIRMED]
    context = {"plan": plan, "fields": fields, "back": back, "action": request.path_qs}
    return await rendering.show(request, "confirm.html", context)


async def result_page(request: web.Request, plan: Plan, result: Result, back: str) -> web.Response:
    """Tells what came of it."""
    return await rendering.show(request, "result.html", {"plan": plan, "result": result, "back": back})
