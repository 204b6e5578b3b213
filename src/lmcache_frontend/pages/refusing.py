"""What a browser is shown where a program gets `{"detail": …}`: the page says the same, and the way on."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from lmcache_frontend.pages import rendering
from lmcache_shared.errors import Refusal

_TITLES = {
    401: "You are not signed in",
    403: "You may not do this",
    404: "There is nothing here",
    413: "That is too large",
    429: "Too many attempts",
    503: "Too much at once",
}


@web.middleware
async def shown_to_browsers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Show a refusal of a page as a page; before `refusals`, which gives everybody else its JSON."""
    if not _is_for_reading(request):
        return await handler(request)
    try:
        response = await handler(request)
    except Refusal as refusal:
        if "text/html" not in request.headers.get("Accept", ""):
            raise
        return await _page(request, refusal.status, refusal.detail, dict(refusal.headers or {}))
    return response


def _is_for_reading(request: web.Request) -> bool:
    """Whether the route is one of a page. What leads nowhere is no page, and answers as it always did."""
    return "_page" in getattr(request.match_info.handler, "__module__", "").rpartition(".")[2]


async def _page(request: web.Request, status: int, detail: object, headers: dict[str, str]) -> web.Response:
    title = _TITLES.get(status, f"The frontend answers {status}")
    context = {
        "status": status,
        "title": title,
        "detail": detail if isinstance(detail, str) else "The request is wrong.",
    }
    response = await rendering.show(request, "refused.html", context, status=status)
    response.headers.update(headers)
    return response
