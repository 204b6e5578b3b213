"""Parts of pages that look the same to everybody, made once and kept for whoever asks until something has changed."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

from aiohttp import web

from lmcache_frontend.pages import rendering

REST = 10
"""A part is made anew after so many times the seconds that making it took: thousands of nodes change all the time."""

MAX_REST_SECONDS = 2.0
"""And after so many at the latest: the first making has templates to compile."""

MAX_VIEWS = 64
"""Different ones that are kept: each search is one."""


class _View:
    """One part as it was made last; one is made at a time."""

    def __init__(self) -> None:
        self.text = ""
        self.shows: object = None
        self.not_before = 0.0
        self.making: asyncio.Task[str] | None = None


class Views:
    """The parts, by what they show."""

    def __init__(self) -> None:
        self._views: OrderedDict[Hashable, _View] = OrderedDict()

    async def get(
        self,
        app: web.Application,
        template: str,
        key: Hashable,
        revision: object,
        context: Callable[[], Mapping[str, object]],
    ) -> str:
        """The part's text.

        Args:
            key: what it shows.
            revision: another one whenever that has changed.
            context: what the template gets, called when it is made.
        """
        view = self._views.setdefault((template, key), _View())
        self._views.move_to_end((template, key))
        while len(self._views) > MAX_VIEWS:
            self._views.popitem(last=False)
        if view.making is None:
            if view.shows is not None and (time.monotonic() < view.not_before or view.shows == revision):
                return view.text
            making = self._make(view, app, template, revision, context)
            view.making = asyncio.create_task(making, name=f"make {template}")
        return await asyncio.shield(view.making)  # a reader who leaves stops it for nobody else

    async def _make(
        self,
        view: _View,
        app: web.Application,
        template: str,
        revision: object,
        context: Callable[[], Mapping[str, object]],
    ) -> str:
        begun = time.monotonic()
        try:
            view.text = await rendering.text_in_slices(app, template, context())
            view.shows = revision
            now = time.monotonic()
            view.not_before = now + min(REST * (now - begun), MAX_REST_SECONDS)
            return view.text
        finally:
            view.making = None


VIEWS: web.AppKey[Views] = web.AppKey("views", Views)
