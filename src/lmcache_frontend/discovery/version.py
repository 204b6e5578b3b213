"""The version that a heartbeat reports: that of the nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import aiohttp

from lmcache_frontend.nodes.node import Node
from lmcache_frontend.proxy.transport import Target

TOTAL_SECONDS = 4.0
"""Within these a node has answered, or the heartbeat goes without."""

AT_ONCE = 8
NODE_SECONDS = 2.0
MAX_ANSWER_BYTES = 4096
MAX_LENGTH = 100


async def first_version(nodes: Sequence[Node]) -> str | None:
    """The first version that a node answers; a few are asked at a time, in their order."""
    try:
        return await asyncio.wait_for(_first_of_all(nodes), TOTAL_SECONDS)
    except asyncio.TimeoutError:
        return None


async def _first_of_all(nodes: Sequence[Node]) -> str | None:
    for start in range(0, len(nodes), AT_ONCE):
        tasks = [asyncio.create_task(_version_of(node)) for node in nodes[start : start + AT_ONCE]]
        try:
            for answer in asyncio.as_completed(tasks):
                if version := await answer:
                    return version
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return None


async def _version_of(node: Node) -> str | None:
    target = Target(node.reach.address)
    try:
        return await asyncio.wait_for(_ask(target, f"{node.reach.prefix}/version"), NODE_SECONDS)
    except (aiohttp.ClientError, OSError, ValueError, asyncio.TimeoutError):
        return None
    finally:
        await target.session.close()


async def _ask(target: Target, path: str) -> str | None:
    async with target.session.get(target.url(path), allow_redirects=False) as response:
        body = await response.content.read(MAX_ANSWER_BYTES)
    if response.status != 200:
        return None
    text = body.decode("utf-8", "replace").strip()
    try:
        version = json.loads(text)  # as LMCache's servers write it, in quotes
    except (ValueError, RecursionError):
        version = text.strip("'")
    if not isinstance(version, str) or len(version) > MAX_LENGTH or not version.isprintable():
        return None
    return version or None
