"""`/sign-in` and `/sign-out`: a token, kept by a browser in a cookie. Works without JavaScript.

The cookie is for this origin's own pages alone (`HttpOnly`, `SameSite=Strict`) and goes on to no node. It holds the
token, so that it ends with the token, and every replica and worker knows it.
"""

from urllib.parse import parse_qs, quote

from aiohttp import web

from lmcache_frontend.pages import rendering
from lmcache_shared.access.browser import came_from, followed_here, own_path, with_next
from lmcache_shared.access.gate import GATE
from lmcache_shared.access.roles import Role, needs
from lmcache_shared.errors import Refusal
from lmcache_shared.schema import read_body

MAX_BODY_BYTES = 4096
COOKIE_SECONDS = 12 * 3600

router = web.RouteTableDef()


def setup(app: web.Application) -> None:
    rendering.setup(app)


@router.get("/sign-in")
@needs(Role.NOBODY)
async def form(request: web.Request) -> web.Response:
    """The page; with `?token=`, as a starting frontend prints it, the browser is signed in at once.

    Afterwards one is back at `?next=`, a path of this frontend, or at the page on which the link was followed.
    """
    token = request.query.get("token")
    if token and followed_here(request):
        return await _signed_in(request, token, _next(request))
    return await _page(request, "", _next(request))


@router.post("/sign-in")
@needs(Role.NOBODY)
async def sign_in(request: web.Request) -> web.Response:
    """Take the form's `token`."""
    fields = parse_qs((await read_body(request, MAX_BODY_BYTES)).decode("ascii", "replace"), max_num_fields=8)
    return await _signed_in(request, fields.get("token", [""])[-1].strip(), own_path(fields.get("next", [""])[-1]))


@router.post("/sign-out")
@needs(Role.NOBODY)
async def sign_out(request: web.Request) -> web.Response:
    """Take the cookie back."""
    response = _to("/sign-in")
    response.del_cookie(_cookie(request), path="/", httponly=True, samesite="Strict")
    return response


async def _signed_in(request: web.Request, token: str, back: str) -> web.Response:
    try:
        await request.app[GATE].holder(request, token)
    except Refusal as refusal:
        return await _page(request, str(refusal.detail), back, refusal.status)
    response = _to(back)
    is_https = "https" in (request.scheme, request.headers.get("X-Forwarded-Proto", ""))
    response.set_cookie(
        _cookie(request),
        quote(token, safe=""),
        path="/",
        max_age=COOKIE_SECONDS,
        httponly=True,
        samesite="Strict",
        secure=is_https,
    )
    return response


def _cookie(request: web.Request) -> str:
    return request.app[GATE].cookie or ""


def _to(path: str) -> web.Response:
    return web.Response(status=303, headers={**rendering.SECURITY_HEADERS, "Location": path})


def _next(request: web.Request) -> str:
    asked = request.query.get("next")
    back = came_from(request) if asked is None else own_path(asked)
    return "/" if back.partition("?")[0] == "/sign-in" else back


async def _page(request: web.Request, problem: str, back: str, status: int = 200) -> web.Response:
    context = {"problem": problem, "next": back, "sign_in": with_next("/sign-in", back)}
    return await rendering.show(request, "sign_in.html", context, status=status)
