"""A node's tabs as somebody without JavaScript sees them."""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from aiohttp import web
from aiohttp.test_utils import TestServer

from lmcache_api.pytest_plugin import RunningApi
from lmcache_frontend.nodes.node import LOCAL_PROXY
from lmcache_frontend.pages.paths import node_path
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from tests.frontend.boards import settled


@dataclass
class Pages:
    """The pages of one node of a frontend."""

    frontend: RunningFrontend
    node: str

    async def open(self, tab: str, **query: str) -> str:
        async with self.frontend.client.get(node_path(LOCAL_PROXY, self.node, tab), params=query) as response:
            assert response.status == 200
            return await response.text()

    async def tabs(self) -> list[str]:
        """The titles of those that are shown."""
        await settled(self.frontend)
        text = await self.open("overview")
        nav = text[text.index('<nav class="tabs"') :]
        return [html.unescape(it) for it in re.findall(r">([^<]+)</a>", nav[: nav.index("</nav>")])]

    async def post(self, action: str, *fields: tuple[str, str], confirmed: bool = False) -> str:
        """What the form answers: first what it will do, confirmed what came of it."""
        data = [*fields, ("confirmed", "yes")] if confirmed else list(fields)
        path = f"{node_path(LOCAL_PROXY, self.node)}/{action}"
        body, headers = io.BytesIO(urlencode(data).encode()), {"Content-Type": "application/x-www-form-urlencoded"}
        async with self.frontend.client.post(path, data=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            return await response.text()


async def pages_of(frontend_server: StartFrontend, server: RunningApi, **options: object) -> Pages:
    """A frontend of this node alone."""
    return Pages(await frontend_server(nodes=[server.node], **options), str(server.node["name"]))


def part(text: str) -> str:
    """The tab's part of a page, without tags, in one line."""
    begin = text.index('<div id="part"') if '<div id="part"' in text else text.index("<main")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text[begin : text.index("</main>")])).split())


def changes(text: str) -> list[tuple[str, str, str]]:
    """What a plan says: each value, old and new."""
    found = re.findall(r'<th scope="row">(.*?)</th><td><del>(.*?)</del></td><td><ins>(.*?)</ins>', text)
    return [(html.unescape(what), html.unescape(old), html.unescape(new)) for what, old, new in found]


@contextlib.asynccontextmanager
async def pages_of_another(frontend_server: StartFrontend, answers: Mapping[str, object]) -> AsyncIterator[Pages]:
    """A frontend of a node that is not ours: GET of these paths answers this in JSON, of all others 404."""

    async def answer(request: web.Request) -> web.Response:
        if request.path not in answers:
            return web.json_response({"detail": "Not Found"}, status=404)
        return web.json_response(answers[request.path])

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    async with TestServer(app, host="127.0.0.1") as server:
        node = {"name": "another", "host": "127.0.0.1", "port": server.port}
        frontend = await frontend_server(nodes=[node])
        yield Pages(frontend, "another")
        await frontend.server.stop()  # before the node is gone, or a connection to it would be left
