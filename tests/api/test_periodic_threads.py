import asyncio
import threading
import time
from typing import Any

import pytest

from lmcache_api.component import Level, PeriodicThreadStatus
from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.embedded.health import HealthMonitor
from lmcache_api.embedded.periodic_threads import PeriodicThread
from lmcache_api.pytest_plugin import RunningApi, StartApi


class Counting(PeriodicThread):
    def __init__(self, name: str, level: Level, interval: float = 0.02, fails: bool = False) -> None:
        super().__init__(name, interval=interval, level=level)
        self._fails = fails

    def run_once(self) -> tuple[str, dict[str, str]]:
        if self._fails:
            raise ValueError("on purpose")
        return "counted", {"n": "1"}


def made(name: str, level: Level, running: bool, active: bool) -> PeriodicThreadStatus:
    return {**Counting(name, level).status(), "is_running": running, "is_active": active}


class FourThreads(EmbeddedComponent):
    def periodic_threads(self) -> list[PeriodicThreadStatus]:
        return [
            made("a", "critical", True, True),
            made("b", "high", True, False),
            made("c", "medium", False, False),
            made("d", "low", True, True),
        ]


@pytest.fixture
async def four(api_server: StartApi) -> RunningApi:
    return await api_server(component=FourThreads)


async def get(server: RunningApi, path: str) -> Any:
    async with server.client.get(path) as response:
        assert response.content_type == "application/json"
        return await response.json()


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", "abcd"),
        ("?level=HIGH", "b"),
        ("?level=", "abcd"),
        ("?running_only=true", "abd"),
        ("?active_only=1", "ad"),
        ("?level=medium&running_only=true", ""),
    ],
)
async def test_filters_choose_threads_and_leave_the_summary(four: RunningApi, query: str, names: str) -> None:
    body = await get(four, f"/periodic-threads{query}")
    assert [thread["name"] for thread in body["threads"]] == list(names)
    assert body["summary"] == {
        "total_count": 4,
        "running_count": 3,
        "active_count": 2,
        "by_level": {
            "critical": {"total": 1, "running": 1, "active": 1},
            "high": {"total": 1, "running": 1, "active": 0},
            "medium": {"total": 1, "running": 0, "active": 0},
            "low": {"total": 1, "running": 1, "active": 1},
        },
    }


async def test_health_names_important_threads_that_run_and_are_not_active(four: RunningApi) -> None:
    assert await get(four, "/periodic-threads-health") == {
        "healthy": False,
        "unhealthy_count": 1,
        "unhealthy_threads": [{"name": "b", "level": "high", "last_run_ago": None, "interval": 0.02}],
    }


def wait_for_runs(thread: PeriodicThread, runs: int) -> PeriodicThreadStatus:
    deadline = time.monotonic() + 10
    while (status := thread.status())["total_runs"] < runs and time.monotonic() < deadline:
        time.sleep(0.01)
    return status


def test_a_thread_tells_how_it_goes() -> None:
    thread = Counting("counting", "low")
    assert not thread.status()["is_running"]
    assert thread.status()["last_summary"] is None
    thread.start()
    status = wait_for_runs(thread, 2)
    assert status["is_running"]
    assert status["is_active"]
    assert status["success_rate"] == 100
    assert status["last_summary"] is not None
    assert status["last_summary"]["message"] == "counted"
    thread.stop()
    assert not thread.status()["is_running"]


def test_a_run_that_fails_is_told_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    thread = Counting("failing", "low", fails=True)
    thread.start()
    status = wait_for_runs(thread, 2)
    thread.stop()
    assert status["failed_runs"] == status["total_runs"] >= 2
    assert status["last_summary"] is not None
    assert status["last_summary"]["message"] == "ValueError: on purpose"


def test_the_health_monitor_sees_a_stalled_thread() -> None:
    threads = [made("ok", "critical", True, True), made("idle", "low", True, False)]
    monitor = HealthMonitor(lambda: threads)
    assert monitor.run_once() == ("Checked 2 threads, all active", {"total_checks": "2", "failed_checks": "0"})
    assert monitor.is_healthy()
    threads.append(made("stuck", "high", True, False))
    assert monitor.run_once()[0] == "Stalled threads: stuck"
    assert not monitor.is_healthy()


async def test_a_component_that_hangs_is_a_504_and_the_loop_goes_on(api_server: StartApi) -> None:
    class Hanging(EmbeddedComponent):
        def periodic_threads(self) -> list[PeriodicThreadStatus]:
            time.sleep(1)
            return []

    server = await api_server(component=Hanging, internal_api_server_call_seconds=0.1)
    slow = asyncio.create_task(server.client.get("/periodic-threads").__aenter__())
    async with server.client.get("/version") as response:
        assert response.status == 200
    response = await slow
    assert response.status == 504
    assert "not done within 0.1 seconds" in (await response.json())["detail"]


async def test_threads_are_told_while_every_call_hangs(api_server: StartApi) -> None:
    gate = threading.Event()

    class Stuck(EmbeddedComponent):
        def periodic_threads(self) -> list[PeriodicThreadStatus]:
            gate.wait(30)
            return []

    server = await api_server(component=Stuck, internal_api_server_call_seconds=2.0)
    calls = [asyncio.create_task(server.client.get("/periodic-threads").__aenter__()) for _ in range(10)]
    await asyncio.sleep(0.2)
    async with server.client.get("/threads?name=lmcache-api") as response:
        assert response.status == 200
        assert "gate.wait(30)" in await response.text()
    gate.set()
    await asyncio.gather(*calls)


async def test_a_component_that_fails_is_a_500_without_a_traceback(
    api_server: StartApi, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(EmbeddedComponent):
        def periodic_threads(self) -> list[PeriodicThreadStatus]:
            raise RuntimeError("inside")

    server = await api_server(component=Failing)
    async with server.client.get("/periodic-threads") as response:
        assert (response.status, await response.json()) == (500, {"detail": "Internal Server Error"})
    assert "inside" in caplog.text
