"""Which nodes a page shows, by its address."""

from __future__ import annotations

import re

import pytest

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.pages import drawing, wording
from lmcache_frontend.pages.listing import PAGE_NODES
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_frontend.telemetry.health.board import HealthBoard
from tests.frontend.boards import settled


async def names(frontend: RunningFrontend, query: str) -> list[str]:
    async with frontend.client.get(f"/nodes{query}") as response:
        assert response.status == 200
        return re.findall(r'<th scope="row"><a href="[^"]*">([^<]*)<', await response.text())


@pytest.fixture
async def frontend(frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch) -> RunningFrontend:
    """300 nodes that are not asked."""
    monkeypatch.setattr(HealthBoard, "_look", lambda board: None)
    nodes = [{"name": f"n{i}", "host": "127.0.0.1", "port": 1 + i} for i in range(300)]
    return await frontend_server(nodes=nodes)


async def test_pages_of_a_bounded_number_in_the_order_of_people(frontend: RunningFrontend) -> None:
    assert PAGE_NODES == 120
    everyone = [f"n{i}" for i in range(300)]
    assert await names(frontend, "") == everyone[:120]
    assert await names(frontend, "?page=2") == everyone[120:240]
    assert await names(frontend, "?page=3") == everyone[240:]
    assert await names(frontend, "?page=99999") == everyone[240:], "a page that is none is the last one"


async def test_search_and_state(frontend: RunningFrontend) -> None:
    assert await names(frontend, "?q=n29") == ["n29", *(f"n29{i}" for i in range(10))]
    assert await names(frontend, "?q=127.0.0.1:7+N6") == ["n6", "n69"]
    assert await names(frontend, "?state=down") == []
    assert len(await names(frontend, "?state=unhealthy&group=state")) == 120


@pytest.mark.parametrize(
    "query", ["?page=-1", "?page=%C2%B2", "?page=x", "?sort=nope&group=nope&state=nope&range=nope", "?q=" + "x" * 5000]
)
async def test_an_address_that_asks_for_nonsense_is_answered(frontend: RunningFrontend, query: str) -> None:
    await names(frontend, query)


async def test_nodes_stand_by_instance_and_model(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server(role="worker", lmcache_instance_id="rack1")
    scheduler = await api_server(role="scheduler", lmcache_instance_id="rack0")
    frontend = await frontend_server(nodes=[worker.node, scheduler.node])
    await settled(frontend)
    async with frontend.client.get("/nodes?group=instance") as response:
        assert re.findall(r'data-key="([^"]*)"', await response.text()) == ["rack0", "rack1"]
    async with frontend.client.get("/nodes?group=model&q=rack1") as response:
        assert re.findall(r'data-key="([^"]*)"', await response.text()) == ["standalone_model"]


async def groups(frontend: RunningFrontend, query: str) -> list[str]:
    async with frontend.client.get(f"/nodes{query}") as response:
        assert response.status == 200
        return re.findall(r'data-key="([^"]*)"', await response.text())


async def test_nodes_stand_by_what_they_say_of_a_label(
    api_server: StartApi, frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RACK", "<r1>")
    nodes = [(await api_server(worker_id=i, tcp=True, chunk_size=256 << (i == 2))).node for i in range(3)]
    gone = {"name": "gone", "host": "127.0.0.1", "port": 1}
    frontend = await frontend_server(nodes=[*nodes, gone], token="a" * 16)
    await settled(frontend)
    assert await groups(frontend, "?group=label&label=conf:chunk_size") == ["256", "512", "does not tell"]
    assert await groups(frontend, "?group=label&label=conf:chunk_size&only=512") == ["512"]
    assert await names(frontend, "?group=label&label=conf:chunk_size&only=512") == [nodes[2]["name"]]
    assert await groups(frontend, "?group=label&label=env:RACK") == ["&lt;r1&gt;", "does not tell"]
    assert await groups(frontend, "?group=label&label=meta:nope") == ["does not tell", "not set"]
    assert await groups(frontend, "?group=host&only=127.0.0.1") == ["127.0.0.1"]
    for nonsense in ("", "RACK", "env:", "path:/x", "x" * 5000):
        async with frontend.client.get("/", params={"group": "label", "label": nonsense}) as response:
            assert "Write which label: conf:NAME" in await response.text()


async def test_the_environment_is_for_admins_also_as_a_label(
    api_server: StartApi, frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RACK", "rack-of-mine")
    worker = await api_server(tcp=True)
    frontend = await frontend_server(nodes=[worker.node], token="a" * 16, no_trust_local=True)
    await settled(frontend)
    query = "/?group=label&label=env:RACK"
    for _ in range(2):  # in turns: what one role was told is kept for that role alone
        async with frontend.client.get(query, headers={"Authorization": f"Bearer {'a' * 16}"}) as response:
            assert "rack-of-mine" in await response.text()
        async with frontend.client.get(query) as response:
            text = await response.text()
        assert "rack-of-mine" not in text
        assert "1 of 1 nodes refuse to tell you" in text
        assert '<a href="/sign-in">Sign in</a>' in text


async def test_a_part_is_the_same_address(frontend: RunningFrontend) -> None:
    async with frontend.client.get("/?q=n299", headers={"HX-Request": "true"}) as response:
        text = await response.text()
    assert "<html" not in text
    assert "n299" in text


def test_a_gap_is_a_gap() -> None:
    picture = str(drawing.spark([1.0, 2.0, None, 3.0, 4.0]))
    (line,) = re.findall(r'class="line" d="([^"]*)"', picture)
    assert line.count("M") == 2
    assert "none" in str(drawing.spark([None, None]))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.count(None), wording.UNKNOWN),
        (wording.count(1234.0), "1,234"),
        (wording.count(15_500.0), "15.5k"),
        (wording.count(0.25), "0.25"),
        (wording.share(0.123), "12.3 %"),
        (wording.share(1.0), "100 %"),
        (wording.size(0.0), "0 B"),
        (wording.size(1536.0), "1.5 KiB"),
        (wording.span(0.0000005), "0.5 µs"),
        (wording.span(0.25), "250 ms"),
        (wording.span(59.9), "60 s"),
        (wording.span(3700.0), "1 h 1 min"),
        (wording.quantity(None, "s"), wording.UNKNOWN),
    ],
)
def test_values_are_written_for_people(written: str, expected: str) -> None:
    assert written == expected
