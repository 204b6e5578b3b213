"""What every page has in common: its templates, its static files, and the headers that keep it to itself.

A page is a template that extends `base.html`. What of it is asked for again while somebody looks is a *part*: the same
address, asked for by htmx (`HX-Request`), answers the part alone, so that every view has one address.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import aiohttp_jinja2
import jinja2
from aiohttp import web
from markupsafe import Markup

from lmcache_frontend.pages import drawing, wording
from lmcache_frontend.pages.paths import node_path
from lmcache_shared.access.browser import came_from, with_next
from lmcache_shared.access.gate import CALLER
from lmcache_shared.version import VERSION

HERE = Path(__file__).parent

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # without a referrer a form is sent as from nowhere (`Origin: null`), and refused
    "Cache-Control": "no-store",
}
"""Nothing from another origin, no inline script: a node's name or answer cannot become code. Forms go to us."""

SLICE_SECONDS = 0.01
"""How long the making of a page keeps everything else waiting."""

NAVIGATION = (
    ("/", "Overview", "o"),
    ("/nodes", "Nodes", "n"),
    ("/compare", "Compare", "c"),
    ("/operations", "Operations", "p"),
    ("/manage", "Manage", "m"),
)
"""Address, title, and the key that follows `g`; one whose page is not served is not shown."""


def setup(app: web.Application) -> None:
    """Give the application its templates and static files; may be called by every page's module."""
    if app.get(aiohttp_jinja2.APP_KEY) is not None:
        return
    environment = aiohttp_jinja2.setup(
        app, loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        version=VERSION, node_path=node_path, spark=drawing.spark, bars=drawing.bars, cells=drawing.cells
    )
    environment.filters.update(wording.FILTERS)
    app.router.add_static("/static", HERE / "static")


async def show(
    request: web.Request, template: str, context: Mapping[str, object], *, part: str = "", status: int = 200
) -> web.Response:
    """The page that a template makes for this caller.

    Args:
        part: the text of its part when that is made already (`text_in_slices`); asked for by htmx it is the answer.
    """
    if part and wants_part(request):
        return page(part, status)
    told = {
        "sign_in": sign_in_path(request),
        **context,
        "caller": request.get(CALLER),
        "here": request.path,
        "address": request.path_qs,
        "part": Markup(part),  # noqa: S704 - a template made it
    }
    return page(await text_in_slices(request.app, template, {**told, "navigation": _navigation(request)}), status)


def sign_in_path(request: web.Request) -> str:
    """Where somebody signs in and comes back from: to what was opened, or where a form stood."""
    return with_next("/sign-in", request.raw_path if request.method == "GET" else came_from(request))


def wants_part(request: web.Request) -> bool:
    """Whether the page that is open asks for what has changed in it."""
    return request.headers.get("HX-Request") == "true"


async def text_in_slices(app: web.Application, template: str, context: Mapping[str, object]) -> str:
    """A template's text, which may have thousands of rows: others get their turn while it is made."""
    environment = app[aiohttp_jinja2.APP_KEY]
    pieces = []
    begun = time.monotonic()
    for piece in environment.get_template(template).generate(context):
        pieces.append(piece)
        if time.monotonic() - begun > SLICE_SECONDS:
            await asyncio.sleep(0)
            begun = time.monotonic()
    return "".join(pieces)


def page(text: str, status: int = 200) -> web.Response:
    """The answer that carries a page."""
    body = text.encode("utf-8", "replace")
    return web.Response(body=body, status=status, content_type="text/html", charset="utf-8", headers=SECURITY_HEADERS)


def _navigation(request: web.Request) -> list[tuple[str, str, str, bool]]:
    """Those of the pages that are served, and whether the reader is there."""
    served = {resource.canonical for resource in request.app.router.resources()}
    here = request.path
    return [
        (path, title, key, here == path or (path != "/" and here.startswith(f"{path}/")))
        for path, title, key in NAVIGATION
        if path in served
    ]
