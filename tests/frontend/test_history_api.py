"""What a frontend tells of its history over HTTP: columns, latest values, the timeline, the stream and its end."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.api import stream_api
from lmcache_frontend.pytest_plugin import RunningFrontend, StartFrontend
from lmcache_frontend.telemetry.history.counting import Point
from lmcache_frontend.telemetry.history.series import KEPT, OF_NODES, SERIES
from lmcache_frontend.telemetry.history.timeline import Event

NODES = [{"name": name, "host": "127.0.0.1", "port": 1 + place} for place, name in enumerate("ab")]
KEY = ("local_proxy", "a")


def point(**values: float) -> Point:
    return Point([values.get(series.key, math.nan) for series in KEPT])


async def frontend_with_a_past(start: StartFrontend, **options: Any) -> RunningFrontend:
    """Node a has five slots, the third of them a gap; nobody else records."""
    frontend = await start(nodes=NODES, no_history=True, **options)
    history = frontend.server.cluster.history
    for back in (4, 3, 1, 0):
        slot = history.slot() - back
        history.record(KEY, point(hit_tokens=3 + back, requested_tokens=10, load=1 / 3), slot)
        history.end_round(slot, 1, {"up": 2, "slow": 0, "down": 0, "unknown": 0})
    return frontend


async def get(frontend: RunningFrontend, path: str, status: int = 200) -> Any:
    async with frontend.client.get(path) as response:
        assert response.status == status, await response.text()
        return await response.json()


async def test_columns(frontend_server: StartFrontend) -> None:
    frontend = await frontend_with_a_past(frontend_server)
    told = await get(frontend, "/api/history?series=hit_tokens,hit_rate,load&node=a&range=15m&points=1440")
    assert (told["proxy"], told["node"], told["step"], told["interval"]) == (*KEY, 5.0, 5.0)
    assert told["units"] == {"hit_tokens": "tokens/s", "hit_rate": "share", "load": "s/s"}
    at = told["series"]["hit_tokens"].index(7)
    assert told["series"]["hit_tokens"][at : at + 5] == [7, 6, None, 4, 3]
    assert told["series"]["hit_rate"][at : at + 5] == [0.7, 0.6, None, 0.4, 0.3]
    assert told["series"]["load"][at] == 0.3333333
    assert len(told["times"]) == len(told["series"]["load"]) <= 181
    assert abs(told["times"][at + 4] - time.time()) < 20
    assert told["age"] < 20
    assert told["recording"] is False
    cluster = await get(frontend, "/api/history?series=nodes_up,hit_tokens&range=5m")
    assert cluster["node"] is None
    assert set(cluster["series"]["nodes_up"]) == {None, 2}
    some = await get(frontend, f"/api/history?node=a&since={time.time() - 3000}&until={time.time() - 2000}&points=7")
    assert 0 < len(some["times"]) <= 7
    day = await get(frontend, "/api/history?node=a&series=hit_tokens&range=24h&points=100")
    assert len(day["times"]) <= 100
    assert day["step"] % 60 == 0
    assert any(value is not None for value in day["series"]["hit_tokens"])


async def test_a_node_that_was_never_recorded_has_no_columns(frontend_server: StartFrontend) -> None:
    frontend = await frontend_with_a_past(frontend_server)
    told = await get(frontend, "/api/history?series=load&node=b")
    assert (told["times"], told["series"], told["time"]) == ([], {"load": []}, None)
    assert told["problem"] == "nothing was recorded of it yet"


@pytest.mark.parametrize(
    ("query", "status", "word"),
    [
        ("history?series=nonsense", 422, "requested_tokens"),
        ("history?series=", 422, "requested_tokens"),
        ("history?series=nodes_up&node=a", 422, "of the cluster alone"),
        ("history?range=2h", 422, "5m, 15m, 1h, 6h, 24h"),
        ("history?points=0", 422, "from 1 to 1440"),
        ("history?points=1441", 422, "from 1 to 1440"),
        ("history?points=x", 422, "valid integer"),
        ("history?since=x", 422, "Unix time"),
        ("history?since=nan", 422, "Unix time"),
        ("history?until=1e300", 422, "Unix time"),
        ("history?since=2000&until=1000", 422, "later than until"),
        ("history?node=nobody", 404, "nobody"),
        ("history?node=a&proxy=nobody", 404, "nobody"),
        ("history?proxy=local_proxy", 422, "give node too"),
        ("history/latest?series=x", 422, "hit_rate"),
        ("history/latest?sparklines=nodes_up", 422, "of the cluster alone"),
        ("timeline?limit=0", 422, "from 1 to 1000"),
        ("timeline?limit=1001", 422, "from 1 to 1000"),
        ("timeline?before=x", 422, "valid integer"),
        ("stream?topics=x", 422, "totals, nodes, node, timeline, health"),
        ("stream?topics=node", 422, "say which"),
        ("stream?series=x", 422, "hit_rate"),
        ("stream?node=nobody", 404, "nobody"),
    ],
)
async def test_refusals_say_what_can_be_had(frontend_server: StartFrontend, query: str, status: int, word: str) -> None:
    frontend = await frontend_with_a_past(frontend_server)
    told = await get(frontend, f"/api/{query}", status)
    assert word in str(told["detail"])


async def test_latest_values_of_all(frontend_server: StartFrontend) -> None:
    frontend = await frontend_with_a_past(frontend_server)
    told = await get(frontend, "/api/history/latest?series=hit_tokens,hit_rate&sparklines=hit_tokens")
    first, second = told["nodes"]
    assert (first["node"], first["values"], first["sparkline"][-5:]) == ("a", [3, 0.3], [7, 6, None, 4, 3])
    assert len(first["sparkline"]) == 60
    assert (second["node"], second["values"], second["age"], second["sparkline"]) == ("b", [None, None], None, [])
    assert told["totals"]["hit_rate"] == 0.3
    assert told["totals"].keys() == SERIES.keys()
    everything = await get(frontend, "/api/history/latest")
    assert everything["series"] == [series.key for series in OF_NODES]
    assert "sparkline" not in everything["nodes"][0]
    async with frontend.client.head("/api/history/latest") as response:
        assert response.status == 200


async def test_latest_values_of_many_nodes_come_in_pieces(frontend_server: StartFrontend) -> None:
    nodes = [{"name": f"n{i}", "host": "127.0.0.1", "port": 1 + i} for i in range(120)]
    frontend = await frontend_server(nodes=nodes, no_history=True)
    told = await get(frontend, "/api/history/latest?series=load")
    assert [row["node"] for row in told["nodes"]] == [node["name"] for node in nodes]


async def test_changes_through_the_frontend_are_events(frontend_server: StartFrontend, api_server: StartApi) -> None:
    worker = await api_server(role="worker")
    frontend = await frontend_server(nodes=[worker.node], no_history=True)
    name = worker.node["name"]
    async with frontend.client.get(f"/proxy2/{name}/version") as response:
        assert response.status == 200
    async with frontend.client.get(f"/proxy2/{name}/loglevel?logger_name=a&level=secretive") as response:
        assert response.status != 200  # nothing was changed
    async with frontend.client.put(f"/proxy2/{name}/freeze/enable?why=hunter2") as response:
        assert response.status == 200
    async with frontend.client.get(f"/proxy2/{name}/loglevel?logger_name=a&level=debug") as response:
        assert response.status == 200
    async with frontend.client.post("/api/proxies", json={"name": "r", "host": "127.0.0.1", "port": 9}) as response:
        assert response.status == 200
    events = (await get(frontend, "/api/timeline"))["events"]
    mine = [event for event in events if event["who"]]
    told = [(event["kind"], event["text"], event["node"], event["detail"]) for event in reversed(mine)]
    assert told == [
        ("operation", f"PUT /freeze/enable at {name}", name, "parameters: why"),
        ("setting", f"GET /loglevel at {name}", name, "parameters: logger_name, level"),
        ("operation", "POST /api/proxies", "", ""),
    ]
    assert "hunter2" not in str(events)
    assert events[0]["time"] == pytest.approx(time.time(), abs=20)
    assert (await get(frontend, "/api/timeline?limit=1"))["events"] == events[:1]
    assert (await get(frontend, f"/api/timeline?before={events[1]['number']}"))["events"] == events[2:]


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    name = ""
    async for line in response.content:
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


async def test_the_stream_tells_all_and_then_what_changes(frontend_server: StartFrontend) -> None:
    frontend = await frontend_with_a_past(frontend_server)
    cluster = frontend.server.cluster
    cluster.timeline.record(Event("setting", "before"))
    query = "topics=totals,nodes,node,timeline,health&node=a&series=hit_tokens,load"
    async with frontend.client.get(f"/api/stream?{query}", timeout=aiohttp.ClientTimeout(20)) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        events = events_of(response)
        found: dict[str, Any] = {}
        while found.keys() != {"totals", "nodes", "node", "health"}:
            name, data = await anext(events)
            found[name] = data
        assert found["totals"]["values"]["hit_rate"] == 0.3
        assert [row[:2] + row[3:] for row in found["nodes"]] == [[*KEY, [3, 0.3333333], None]]
        assert found["node"]["values"] == {"hit_tokens": 3, "load": 0.3333333}
        assert sum(found["health"]["states"].values()) == 2
        cluster.timeline.record(Event("setting", "now"))
        async for name, data in events:
            if name == "timeline":
                assert [event["text"] for event in data if event["kind"] == "setting"] == ["now"]
                break
        cluster.history.record(KEY, point(load=2), cluster.history.slot())
        async for name, data in events:
            if name == "nodes":
                assert data[0][3] == [None, 2]
                break


async def test_a_page_that_asks_again_misses_no_event(frontend_server: StartFrontend) -> None:
    frontend = await frontend_with_a_past(frontend_server)
    timeline = frontend.server.cluster.timeline
    seen = timeline.record(Event("setting", "seen"))
    timeline.record(Event("setting", "missed"))
    for path, headers in (
        ("/api/stream?topics=timeline", {"Last-Event-ID": str(seen.number)}),
        (f"/api/stream?topics=timeline&after={seen.number}", {}),
    ):
        async with frontend.client.get(path, headers=headers, timeout=aiohttp.ClientTimeout(20)) as response:
            _, data = await anext(events_of(response))
            assert data[0]["text"] == "missed"


async def test_streams_are_bounded(frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_api, "MAX_STREAMS", 2)
    frontend = await frontend_with_a_past(frontend_server)
    get = frontend.client.get
    async with get("/api/stream"), get("/api/stream"), get("/api/stream") as response:
        assert response.status == 503
        assert response.headers["Retry-After"]
    deadline = time.monotonic() + 10
    while True:  # both have left
        async with frontend.client.get("/api/stream") as response:
            if response.status == 200:
                break
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_a_quiet_stream_shows_that_it_lives(
    frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_api, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(stream_api, "PUSH_SECONDS", 0.02)
    frontend = await frontend_with_a_past(frontend_server)
    async with frontend.client.get("/api/stream?topics=node&node=b") as response:
        body = b""
        while b": \n\n" not in body:
            body += await asyncio.wait_for(response.content.readany(), 10)


async def test_streams_end_at_once_when_the_frontend_does(frontend_server: StartFrontend) -> None:
    frontend = await frontend_with_a_past(frontend_server)
    async with frontend.client.get("/api/stream") as response:
        await response.content.readline()
        began = time.monotonic()
        stopping = asyncio.create_task(frontend.server.stop())
        while await response.content.readline():
            pass
        assert time.monotonic() - began < 0.9  # the drain time is a second
        await stopping


async def test_a_frontend_records_its_nodes_unless_told_not_to(
    frontend_server: StartFrontend, api_server: StartApi
) -> None:
    worker = await api_server(role="worker")
    on, off = await frontend_server(nodes=[worker.node]), await frontend_server(nodes=[worker.node], no_history=True)
    tasks = [task.get_name() for task in asyncio.all_tasks()]
    assert tasks.count("recorder") == 1
    assert (await get(on, "/api/history"))["recording"] is True
    assert (await get(off, "/api/history"))["recording"] is False
