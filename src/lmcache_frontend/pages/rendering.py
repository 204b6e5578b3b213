"""What every page has in common: its templates, its static files, and the headers that keep it to itself."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp_jinja2
import jinja2
from aiohttp import web

from lmcache_shared.version import VERSION

HERE = Path(__file__).parent

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Nothing from another origin, no inline script: a node's name or answer cannot become code."""

SLICE_SECONDS = 0.01
"""How long the making of a page keeps everything else waiting."""


def setup(app: web.Application) -> None:
    """Give the application its templates and static files; may be called by every page's module."""
    if app.get(aiohttp_jinja2.APP_KEY) is not None:
        return
    aiohttp_jinja2.setup(
        app, loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    app.router.add_static("/static", HERE / "static")


def html(request: web.Request, template: str, context: dict[str, Any]) -> str:
    """The page's text, with the version that its static files' addresses carry."""
    return aiohttp_jinja2.render_string(template, request, {**context, "version": VERSION})


async def html_in_slices(request: web.Request, template: str, context: dict[str, Any]) -> str:
    """As `html`, for a page with thousands of rows: others get their turn while it is made."""
    environment = aiohttp_jinja2.get_env(request.app)
    pieces = []
    begun = time.monotonic()
    for piece in environment.get_template(template).generate({**context, "version": VERSION}):
        pieces.append(piece)
        if time.monotonic() - begun > SLICE_SECONDS:
            await asyncio.sleep(0)
            begun = time.monotonic()
    return "".join(pieces)


def page(text: str) -> web.Response:
    """The answer that carries a page."""
    return web.Response(text=text, content_type="text/html", headers=SECURITY_HEADERS)
