"""A node's tabs, asked for as a browser without JavaScript does it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from html import unescape

from yarl import URL

from lmcache_frontend.pages import paths
from lmcache_frontend.pytest_plugin import RunningFrontend
from tests.frontend.upstream import Talk


def tab(name: object, of: str) -> str:
    return paths.node_path("local_proxy", str(name), of)


async def page(frontend: RunningFrontend, path: str) -> str:
    async with frontend.client.get(URL(frontend.url + path, encoded=True)) as response:
        text = await response.text()
        assert response.status == 200, text
        return text


async def act(frontend: RunningFrontend, path: str, confirmed: bool = False, **fields: str | list[str]) -> str:
    """What the frontend says of an action: its plan, or with `confirmed` what came of it."""
    data = [(name, it) for name, value in fields.items() for it in ([value] if isinstance(value, str) else value)]
    data += [("confirmed", "yes")] if confirmed else []
    async with frontend.client.post(frontend.url + path, data=data) as response:
        text = await response.text()
        assert response.status == 200, text
        return text


def changes(text: str) -> list[tuple[str, str, str]]:
    """What a plan says it changes: what, the old value, the new one."""
    found = re.findall(r'<th scope="row">(.*?)</th><td><del>(.*?)</del></td><td><ins>(.*?)</ins></td>', text)
    return [(unescape(what), unescape(old), unescape(new)) for what, old, new in found]


def problem(text: str) -> str:
    """Why it is not done; empty where it is."""
    found = re.search(r'class="problem" role="alert">(.*?)</p>', text, re.DOTALL)
    return unescape(found[1]) if found else ""


def telling(found: Mapping[str, str], asked: list[str]) -> Talk:
    """A node that answers each `GET /status` with what is written for it, anything else with 404; `asked` keeps all."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"(?i)content-length: (\d+)", head)
            body = (await reader.readexactly(int(length[1]))).decode() if length else ""
            line = head.partition(" HTTP/")[0]
            asked.append(f"{line} {body}".strip())
            answer = found.get(line)
            status = "200 OK" if answer is not None else "404 Not Found" if not line.startswith("OPTIONS") else "405 No"
            if line.startswith("OPTIONS") and f"GET {line.partition(' ')[2]}" not in found:
                status = "404 Not Found"
            content = answer or '{"detail":"Not Found"}'
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(content.encode())}\r\n\r\n{content}".encode())
            await writer.drain()

    return talk
