"""`GET /favicon.ico`: what a browser asks for by itself, also beside a proxied text."""

from aiohttp import web

from lmcache_frontend.pages.rendering import HERE

router = web.RouteTableDef()


@router.get("/favicon.ico")
async def favicon(_: web.Request) -> web.FileResponse:
    """The icon of the pages."""
    return web.FileResponse(HERE / "static" / "icon.svg")
