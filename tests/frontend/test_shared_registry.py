"""Three frontends on one real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from tests.frontend.redis_server import RedisServer, redis_server

NODE = {"name": "n", "host": "10.0.0.1", "port": 7000}
LOCAL = "/api/proxies/local_proxy/nodes"


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


async def three(frontend_server: StartFrontend, server: RedisServer) -> list[RunningFrontend]:
    return [await frontend_server(registry=server.url) for _ in range(3)]


def names(frontend: RunningFrontend) -> list[str]:
    return [node.name for node in frontend.server.cluster.registry.nodes()]


async def post(frontend: RunningFrontend, name: str) -> tuple[int, Any]:
    async with frontend.client.post(LOCAL, json={**NODE, "name": name}) as response:
        return response.status, await response.json()


async def all_see(frontends: list[RunningFrontend], wanted: list[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(sorted(names(frontend)) != sorted(wanted) for frontend in frontends):
        assert time.monotonic() < deadline, [names(frontend) for frontend in frontends]
        await asyncio.sleep(0.02)


async def test_a_change_is_seen_by_all_within_a_second(frontend_server: StartFrontend, server: RedisServer) -> None:
    frontends = await three(frontend_server, server)
    for number, frontend in enumerate(frontends):
        assert (await post(frontend, f"n{number}"))[0] == 200
        await all_see(frontends, [f"n{each}" for each in range(number + 1)], 1.0)
    async with frontends[2].client.delete("/api/nodes/n0") as response:
        assert response.status == 200
    await all_see(frontends, ["n1", "n2"], 1.0)
    identities = {frontend.server.cluster.registry.identity for frontend in frontends}
    assert len(identities) == 1, "others know them as one frontend"


async def test_of_those_that_add_one_name_at_once_one_wins(frontend_server: StartFrontend, server: RedisServer) -> None:
    frontends = await three(frontend_server, server)
    for number in range(10):
        answers = await asyncio.gather(*(post(frontend, f"n{number}") for frontend in frontends))
        assert sorted(status for status, _ in answers) == [200, 409, 409]
        assert [body["detail"] for status, body in answers if status == 409] == ["Node name already exists"] * 2


async def test_redis_away_and_back(frontend_server: StartFrontend, server: RedisServer) -> None:
    frontends = await three(frontend_server, server)
    assert (await post(frontends[0], "before"))[0] == 200
    await all_see(frontends, ["before"], 1.0)
    server.kill()
    for frontend in frontends:
        status, body = await post(frontend, "during")
        assert (status, body["detail"].startswith("nothing was changed: ")) == (503, True)
        async with frontend.client.get("/api/nodes") as response:
            assert [child["name"] for child in (await response.json())["nodes"][0]["children"]] == ["before"]
    late = await frontend_server(registry=server.url)  # one that comes up without Redis serves, too
    async with late.client.get("/health") as response:
        assert response.status == 200
    await asyncio.to_thread(server.start)
    await all_see([*frontends, late], ["before"], 10.0)
    assert (await post(late, "after"))[0] == 200
    await all_see([*frontends, late], ["before", "after"], 5.0)


async def test_a_redis_that_hangs_refuses_changes_and_holds_nobody_up(
    frontend_server: StartFrontend, server: RedisServer
) -> None:
    frontends = await three(frontend_server, server)
    assert (await post(frontends[0], "before"))[0] == 200
    await all_see(frontends, ["before"], 1.0)
    server.pause()
    try:
        asked = asyncio.create_task(post(frontends[1], "during"))
        async with frontends[1].client.get("/api/nodes") as response:
            assert response.status == 200
        status, _ = await asyncio.wait_for(asked, 15)
        assert status == 503
    finally:
        server.go_on()
    deadline = time.monotonic() + 10
    while (await post(frontends[1], "again"))[0] not in (200, 409):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    await all_see(frontends, [*names(frontends[1])], 5.0)


async def beat(frontend: RunningFrontend, port: int) -> int:
    parameters = {"api_address": f"http://127.0.0.1:{port}", "pid": "7", "version": "0.5.6", "other_info": "{}"}
    async with frontend.client.get("/heartbeat", params=parameters) as response:
        return response.status


async def reporters(frontend: RunningFrontend) -> list[str]:
    async with frontend.client.get("/lmcache_infos") as response:
        return list((await response.json())["processInfos"])


async def all_know(frontends: list[RunningFrontend], ports: list[int], seconds: float) -> None:
    wanted = [f"http://127.0.0.1:{port}" for port in ports]
    deadline = time.monotonic() + seconds
    while [await reporters(frontend) for frontend in frontends] != [wanted] * len(frontends):
        assert time.monotonic() < deadline, [await reporters(frontend) for frontend in frontends]
        await asyncio.sleep(0.05)


async def test_heartbeats_may_arrive_at_any(frontend_server: StartFrontend, server: RedisServer) -> None:
    frontends = await three(frontend_server, server)
    for port, frontend in enumerate(frontends, start=1):
        assert await beat(frontend, port) == 200
    await all_know(frontends, [1, 2, 3], 2.0)
    await all_see(frontends, [f"proxy_127.0.0.1_{port}" for port in (1, 2, 3)], 2.0)
    server.kill()
    assert await beat(frontends[0], 4) == 503
    await all_know(frontends, [1, 2, 3], 1.0)
    await asyncio.to_thread(server.start)
    deadline = time.monotonic() + 10
    while await beat(frontends[0], 4) != 200:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    await all_know(frontends, [1, 2, 3, 4], 5.0)
