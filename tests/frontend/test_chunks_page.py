"""The tabs of chunk statistics and of the lookup."""

import pytest

from lmcache_api.pytest_plugin import RunningApi, StartApi
from lmcache_frontend.pytest_plugin import StartFrontend
from tests.frontend.tabs import Pages, changes, pages_of, pages_of_another, part


@pytest.fixture
async def scheduler(api_server: StartApi) -> RunningApi:
    return await api_server(role="scheduler", enable_chunk_statistics=True)


@pytest.fixture
async def pages(scheduler: RunningApi, frontend_server: StartFrontend) -> Pages:
    return await pages_of(frontend_server, scheduler)


async def test_counting_is_started_stopped_and_reset(pages: Pages) -> None:
    assert "Not counting" in part(await pages.open("chunks"))
    plan = await pages.post("chunks/start")
    assert changes(plan) == [("Statistics", "not counting", "counting")]
    assert "Done It counts from now on." in part(await pages.post("chunks/start", confirmed=True))
    text = part(await pages.open("chunks"))
    assert "Counting Until it is stopped." in text
    assert "Requests 0" in text
    plan = await pages.post("chunks/reset")
    assert changes(plan)[0] == ("Total requests", "0", "0")
    assert 'class="danger"' in plan
    assert "All is at zero." in part(await pages.post("chunks/reset", confirmed=True))
    await pages.post("chunks/stop", confirmed=True)
    assert "Not counting" in part(await pages.open("chunks"))


async def test_without_statistics_the_page_says_how_to_have_them(
    api_server: StartApi, frontend_server: StartFrontend
) -> None:
    pages = await pages_of(frontend_server, await api_server(role="scheduler"))
    text = await pages.open("chunks")
    assert "No statistics here Client does not support statistics." in part(text)
    assert "/conf?q=enable_chunk_statistics" in text
    fields = ("was.enable_chunk_statistics", "false"), ("new.enable_chunk_statistics", "true")
    await pages.post("conf/set", *fields, confirmed=True)
    plan = await pages.post("lookup/recreate")
    assert changes(plan) == [("Lookup", "EmbeddedLookupClient", "ChunkStatisticsLookupClient(EmbeddedLookupClient)")]
    assert "Done EmbeddedLookupClient is closed" in part(await pages.post("lookup/recreate", confirmed=True))
    assert "Not counting" in part(await pages.open("chunks"))


async def test_figures_of_another_server_and_what_is_none(frontend_server: StartFrontend) -> None:
    told = {
        "enabled": True, "total_chunks": 4, "duplicate_chunks": 1, "unique_chunks": "three", "reuse_rate": 0.25,
        "timing": None, "bloom_filter": {"item_count": 11, "expected_elements": 10}, "file": {"name": "x.jsonl"},
    }  # fmt: skip
    async with pages_of_another(frontend_server, {"/chunk_statistics/status": told}) as pages:
        text = part(await pages.open("chunks"))
    for expected in (
        "25.0 %",
        "Different \N{EN DASH}",
        "Seen again 1",
        "It holds more than it was made for",
        "file.name x.jsonl",
    ):
        assert expected in text


async def test_a_worker_has_no_statistics_and_its_lookup_cannot_be_made(
    api_server: StartApi, frontend_server: StartFrontend
) -> None:
    pages = await pages_of(frontend_server, await api_server())
    assert "Chunk statistics" not in await pages.tabs()
    assert "no lookup server" in await pages.post("lookup/create")
    assert "There is nothing to close." in await pages.post("lookup/close")


async def test_the_lookup_is_closed_and_made(pages: Pages) -> None:
    assert "Lookup client There" in part(await pages.open("lookup"))
    plan = await pages.post("lookup/close")
    assert "no request finds what is cached" in plan
    assert "is closed." in part(await pages.post("lookup/close", confirmed=True))
    assert "Lookup client None" in part(await pages.open("lookup"))
    assert changes(await pages.post("lookup/create"))[0][1] == "none"
    await pages.post("lookup/create", confirmed=True)
    assert "Lookup client There" in part(await pages.open("lookup"))


async def test_a_viewer_has_no_switches(scheduler: RunningApi, frontend_server: StartFrontend) -> None:
    pages = await pages_of(frontend_server, scheduler, no_trust_local=True)
    for tab in ("chunks", "lookup"):
        text = await pages.open(tab)
        assert "you need the role operator" in part(text)
        assert f'action="{"/nodes/local_proxy/" + pages.node}/{tab}' not in text
