"""An engine that is killed, and comes back: what the frontend says of it meanwhile."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest

from lmcache_shared.address import quote_socket
from tests.lmcache.processes import NODE, ask, client_of, node_at, running_frontend, running_host, short_folder

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(300)]

NOTICED_SECONDS = 15.0
"""Far above what the dashboard may take to see that an engine has gone or come."""


async def dashboard_says(frontend: aiohttp.ClientSession, text: str) -> str:
    """The dashboard, once it has `text`."""
    deadline = time.monotonic() + NOTICED_SECONDS
    while text not in (page := (await ask(frontend, "GET", "/")).text):
        assert time.monotonic() < deadline, f"no {text!r} within {NOTICED_SECONDS:g} seconds: {page}"
        await asyncio.sleep(0.2)
    return page


async def assert_unreachable(frontend: aiohttp.ClientSession, path: Path) -> None:
    """LMCache's frontend says it in these words; the reason is ours."""
    for proxied in (f"/proxy2/{NODE}", *(f"/proxy/localhost/{quote_socket(str(path), times=n)}" for n in (1, 2))):
        answer = await ask(frontend, "GET", f"{proxied}/version")
        assert (answer.status, answer.media_type) == (502, "application/json")
        said = answer.json()
        assert said.pop("reason") in ("Connection refused", "No such file or directory")
        assert said == {"detail": f"Failed to connect to socket: {path}"}


async def test_the_frontend_tells_that_an_engine_is_gone_and_that_it_is_back(lmcache_python: str) -> None:
    with short_folder() as folder, short_folder() as frontend_folder:
        path = folder / "lm_7000"
        with running_frontend(frontend_folder, [node_at(path)]) as url:
            async with client_of(url) as frontend:
                with running_host(lmcache_python, folder) as host:
                    assert host.theirs == path
                    await dashboard_says(frontend, "1 of 1 nodes up")
                    assert (await ask(frontend, "GET", f"/proxy2/{NODE}/version")).status == 200
                    host.kill()

                assert path.is_socket(), "a killed engine leaves its socket behind"
                await assert_unreachable(frontend, path)
                page = await dashboard_says(frontend, "0 of 1 nodes up")
                assert "1 down" in page
                assert NODE in page

                # Both servers take over the sockets that the killed process left.
                with running_host(lmcache_python, folder) as host:
                    assert (await ask(frontend, "GET", f"/proxy2/{NODE}/version")).status == 200
                    await dashboard_says(frontend, "1 of 1 nodes up")
                    async with client_of(host.ours) as ours:
                        assert (await ask(ours, "GET", "/version")).status == 200

                assert not path.exists(), "an engine that ends removes its socket"
                await assert_unreachable(frontend, path)
                await dashboard_says(frontend, "0 of 1 nodes up")
