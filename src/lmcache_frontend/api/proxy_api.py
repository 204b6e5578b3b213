"""`/proxy/{host}/{port or socket}/{path}` and `/proxy2/{node name}/{path}`, for every method.

Most requests do not come this way but by `proxy/front.py`, which needs less time. This is the way of what that hands
over: bodies, upgrades, and all that a browser asks on a connection on which it has asked for a page.
"""

from aiohttp import web

from lmcache_frontend.proxy import passing

router = web.RouteTableDef()
router.route("*", "/proxy/{host}/{target}{path:(/.*)?}")(passing.by_address)
router.route("*", "/proxy2/{name}{path:(/.*)?}")(passing.by_name)
