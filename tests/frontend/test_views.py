"""Parts of pages that are made once for everybody."""

from types import SimpleNamespace

import pytest
from aiohttp import web

from lmcache_frontend.pages import views
from lmcache_frontend.pages.views import MAX_REST_SECONDS, Views


async def test_what_took_long_to_make_is_soon_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    async def text_in_slices(app: web.Application, template: str, context: dict[str, str]) -> str:
        clock[0] += 1.0  # as long as templates take that are compiled on a busy machine
        return context["text"]

    monkeypatch.setattr(views, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(views, "rendering", SimpleNamespace(text_in_slices=text_in_slices))
    made, app = Views(), web.Application()
    assert await made.get(app, "a", "key", 1, lambda: {"text": "one"}) == "one"
    assert await made.get(app, "a", "key", 2, lambda: {"text": "two"}) == "one"
    clock[0] += MAX_REST_SECONDS
    assert await made.get(app, "a", "key", 2, lambda: {"text": "two"}) == "two"
