"""The tab of periodic threads."""

from typing import Any

import pytest

from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.pages.tabs.periodic_tab import row_of
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_shared.settings import Settings
from tests.frontend.tabs import Pages, pages_of, part


def thread(name: str, **more: Any) -> Any:
    told = {
        "name": name, "level": "low", "interval": 10.0, "init_wait": 0.0, "is_running": True, "is_active": True,
        "last_run_time": 1.0, "last_run_ago": 2.0, "total_runs": 9, "failed_runs": 0, "success_rate": 100.0,
        "last_summary": {"duration_ms": 5.0, "success": True, "message": "all well", "extra_info": {}},
    }  # fmt: skip
    return {**told, **more}


FAILED = {"success": False, "message": "no disk", "extra_info": {"path": "/x"}}
THREADS = [
    thread("fine"),
    thread("stopped", is_running=False, is_active=False),
    thread("late <b>", level="critical", is_active=False, last_run_ago=70.0),
    thread("fails/odd", level="high", failed_runs=3, last_summary=FAILED),
]  # fmt: skip


class Component(EmbeddedComponent):
    def periodic_threads(self) -> Any:
        return THREADS


@pytest.fixture
async def pages(api_server: StartApi, frontend_server: StartFrontend) -> Pages:
    def component(settings: Settings, index: int) -> Component:
        return Component(settings, index)

    return await pages_of(frontend_server, await api_server(component=component))


@pytest.mark.parametrize(
    ("told", "state", "word"),
    [
        (thread("a"), "up", "on time"),
        (thread("a", last_summary=None), "up", "has not run yet"),
        (thread("a", is_active=False), "slow", "late"),
        (thread("a", level="high", is_active=False), "down", "late"),
        (thread("a", is_running=False), "unknown", "stopped"),
        (thread("a", last_summary={"success": False}), "slow", "last run failed"),
        ({}, "unknown", "stopped"),
    ],
)
def test_what_a_thread_is_said_to_be(told: Any, state: str, word: str) -> None:
    row = row_of(told)
    assert (row.state, row.word) == (state, word)


async def test_what_is_wrong_comes_first_and_makes_the_verdict(pages: Pages) -> None:
    text = await pages.open("periodic")
    assert "Unhealthy 1 critical or high thread is late" in part(text)
    order = [text.index(name) for name in (">late &lt;b&gt;<", ">fails/odd<", ">fine<", ">stopped<")]
    assert order == sorted(order)
    assert "no disk" in text
    assert "late <b>" not in text


async def test_views_are_addresses(pages: Pages) -> None:
    text = part(await pages.open("periodic", show="problems"))
    assert "fails/odd" in text
    assert "all well" in text  # of the late one
    assert "stopped" not in text
    assert "fails/odd" not in part(await pages.open("periodic", show="problems", level="critical"))
    assert "No thread is of this level" in part(await pages.open("periodic", level="medium"))


async def test_one_thread_has_a_page_and_a_name_of_none_says_so(pages: Pages) -> None:
    text = part(await pages.open("periodic", thread="fails/odd"))
    for expected in ("last run failed", "no disk", "Path /x", "Failed 3"):
        assert expected in text
    assert "Thread not found: nope" in part(await pages.open("periodic", thread="nope"))


async def test_a_healthy_node(api_server: StartApi, frontend_server: StartFrontend) -> None:
    pages = await pages_of(frontend_server, await api_server())
    text = part(await pages.open("periodic"))
    assert "Healthy Every critical and high thread runs on time." in text
    assert "PinMonitor-thread on time critical" in text
    assert "No thread is late or fails All 2 are as they should be." in part(
        await pages.open("periodic", show="problems")
    )
