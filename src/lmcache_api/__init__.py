"""The internal API server of an LMCache component.

`InternalAPIServer(manager)` with `start()` and `stop()` takes the place of LMCache's class of that name;
`create_app(component)` gives the aiohttp application; `ComponentServer` serves it in the caller's event loop.
"""

from lmcache_api.app import create_app
from lmcache_api.component import Component
from lmcache_api.server import ComponentServer, InternalAPIServer

__all__ = ["Component", "ComponentServer", "InternalAPIServer", "create_app"]
