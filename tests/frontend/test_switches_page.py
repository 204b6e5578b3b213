"""Freeze, hot cache, backends and bypass on a node's page, before real embedded components."""

from __future__ import annotations

import re
from pathlib import Path

from lmcache_api.pytest_plugin import RunningApi, StartApi, free_port
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from tests.frontend.boards import settled
from tests.frontend.node_pages import act, changes, page, problem, tab
from tests.frontend.upstream import Upstream, serving

SWITCHES = tab("lmcache_worker0", "switches")


async def started(
    api_server: StartApi, frontend_server: StartFrontend, tmp_path: Path
) -> tuple[RunningApi, RunningFrontend]:
    worker = await api_server(local_disk=f"file://{tmp_path}/disk", max_local_disk_size=1)
    frontend = await frontend_server(nodes=[worker.node])
    await settled(frontend)
    return worker, frontend


def states(text: str) -> list[str]:
    return re.findall(r'class="switch (\w+)"><span class="knob" aria-hidden="true"></span>([^<]+)<', text)


async def said(worker: RunningApi, path: str) -> object:
    async with worker.client.get(path) as response:
        return await response.json()


async def test_each_switch_shows_its_state_and_is_changed_after_a_plan(
    api_server: StartApi, frontend_server: StartFrontend, tmp_path: Path
) -> None:
    worker, frontend = await started(api_server, frontend_server, tmp_path)
    assert states(await page(frontend, SWITCHES)) == [
        ("off", "Off"),
        ("on", "On"),
        ("on", "In use"),
        ("on", "In use"),
    ]
    for name, title, old, new in (("freeze", "Freeze", "off", "on"), ("hot_cache", "Hot cache", "on", "off")):
        on = "yes" if new == "on" else "no"
        plan = await act(frontend, f"{SWITCHES}/{name}", on=on)
        assert changes(plan) == [(title, old, new)]
        assert await said(worker, f"/{name}/status") != {"status": "success"}
        assert ((await said(worker, f"/{name}/status"))[name] is True) is (old == "on"), "a plan changes nothing"  # type: ignore[index]
        done = await act(frontend, f"{SWITCHES}/{name}", confirmed=True, on=on)
        assert f"Asked again, the node says that it is {new}." in done
        assert ((await said(worker, f"/{name}/status"))[name] is True) is (new == "on")  # type: ignore[index]
        again = await act(frontend, f"{SWITCHES}/{name}", confirmed=True, on=on)
        assert f"It is {new} already" in problem(again)
    assert states(await page(frontend, SWITCHES))[:2] == [("on", "On"), ("off", "Off")]


async def test_a_backend_is_bypassed_closed_and_made_again(
    api_server: StartApi, frontend_server: StartFrontend, tmp_path: Path
) -> None:
    worker, frontend = await started(api_server, frontend_server, tmp_path)
    disk = {"backend": "LocalDiskBackend"}
    assert changes(await act(frontend, f"{SWITCHES}/bypass", on="yes", **disk)) == [
        ("LocalDiskBackend", "in use", "bypassed")
    ]
    assert "is bypassed." in await act(frontend, f"{SWITCHES}/bypass", True, on="yes", **disk)
    plan = await act(frontend, f"{SWITCHES}/close", **disk)
    assert changes(plan) == [("LocalDiskBackend", "LocalDiskBackend", "none")]
    assert 'class="danger"' in plan
    assert "There are now: LocalCPUBackend." in await act(frontend, f"{SWITCHES}/close", True, **disk)
    text = await page(frontend, SWITCHES)
    assert "closed" in text, "a bypass outlives its backend"
    assert states(text)[2:] == [("on", "In use"), ("off", "Bypassed")]
    assert "Made: LocalDiskBackend." in await act(frontend, f"{SWITCHES}/create", True)
    assert "Nothing was missing." in await act(frontend, f"{SWITCHES}/create", True)
    assert "is in use." in await act(frontend, f"{SWITCHES}/bypass", True, on="no", **disk)
    assert "Made: LocalDiskBackend." in await act(frontend, f"{SWITCHES}/recreate", True, **disk)
    assert await said(worker, "/backends") == {
        "LocalCPUBackend": "LocalCPUBackend",
        "LocalDiskBackend": "LocalDiskBackend",
    }


async def test_a_backend_that_is_not_there_is_named_and_nothing_is_asked(
    api_server: StartApi, frontend_server: StartFrontend, tmp_path: Path
) -> None:
    _, frontend = await started(api_server, frontend_server, tmp_path)
    for action in ("bypass", "close", "recreate"):
        text = await act(frontend, f"{SWITCHES}/{action}", True, backend="<b>/../freeze", on="yes")
        assert problem(text) == "The node has no backend '<b>/../freeze' now."
        assert "<b>" not in text


async def test_only_a_node_with_an_engine_has_switches(api_server: StartApi, frontend_server: StartFrontend) -> None:
    scheduler, controller = await api_server(role="scheduler"), await api_server(role="controller")
    gone = {"name": "gone", "host": "127.0.0.1", "port": free_port()}
    frontend = await frontend_server(nodes=[scheduler.node, controller.node, gone])
    await settled(frontend)
    for node in (scheduler.node, controller.node):
        assert f'href="{tab(node["name"], "switches")}"' not in await page(frontend, tab(node["name"], "overview"))
    text = await page(frontend, tab("lmcache_scheduler", "switches"))
    assert text.count("The node cannot do this") == 1, "said once for all four"
    text = await page(frontend, tab("gone", "switches"))
    assert text.count("The node cannot be reached") == 1, "said once for all"


async def test_a_node_that_says_one_thing_and_does_another_is_not_believed(frontend_server: StartFrontend) -> None:
    body = b'{"freeze": false, "bypassed_backends": 7, "all_backends": [3], "LocalCPUBackend": {}}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with serving(Upstream(answer)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        await settled(frontend)
        text = await act(frontend, f"{tab('upstream', 'switches')}/freeze", True, on="yes")
        assert "tells now that it is off" in problem(text)
        assert "not known" in await page(frontend, tab("upstream", "switches"))
