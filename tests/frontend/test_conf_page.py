"""The tab of settings."""

from typing import Any

import pytest

from lmcache_api.pytest_plugin import RunningApi, StartApi
from lmcache_frontend.pages.settings_form import Setting
from lmcache_frontend.pytest_plugin import StartFrontend
from tests.frontend.tabs import Pages, changes, pages_of, pages_of_another, part


@pytest.fixture
async def worker(api_server: StartApi) -> RunningApi:
    return await api_server(chunk_size=16, internal_api_server_token="a-token-of-sixteen")


@pytest.fixture
async def pages(worker: RunningApi, frontend_server: StartFrontend) -> Pages:
    return await pages_of(frontend_server, worker)


def edit(name: str, was: str, new: str) -> list[tuple[str, str]]:
    return [(f"was.{name}", was), (f"new.{name}", new)]


async def value(worker: RunningApi, name: str) -> Any:
    async with worker.client.get("/conf", params={"names": name}) as response:
        return (await response.json(content_type=None))[name]


async def test_what_is_not_the_default_stands_out_and_secrets_are_masked(pages: Pages) -> None:
    text = await pages.open("conf", show="changed")
    assert "chunk_size not the default Tokens in a chunk. 16 default 256" in part(text)
    assert "internal_api_server_token not the default" in part(text)
    assert "a-token-of-sixteen" not in text
    assert "min_retrieve_tokens" not in text
    text = await pages.open("conf", show="mutable")
    assert 'name="new.min_retrieve_tokens" value="0"' in text
    assert "chunk_size" not in text


async def test_a_search_is_an_address(pages: Pages) -> None:
    text = await pages.open("conf", q="RETRIEVE tokens")
    shown = [it for it in text.split('<div class="setting')[1:] if " hidden>" not in it.partition("\n")[0]]
    assert ["min_retrieve_tokens" in it for it in shown] == [True]


async def test_several_are_changed_at_once_after_old_and_new_were_shown(pages: Pages, worker: RunningApi) -> None:
    fields = [
        *edit("min_retrieve_tokens", "0", "32"),
        *edit("save_decode_cache", "false", "true"),
        *edit("store_location", "", "LocalCPUBackend"),
        *edit("retrieve_locations", "", '["LocalCPUBackend"]'),
        *edit("max_local_cpu_size", "5.0", "5.0"),
    ]
    plan = await pages.post("conf/set", *fields)
    assert changes(plan) == [
        ("min_retrieve_tokens", "0", "32"),
        ("save_decode_cache", "false", "true"),
        ("store_location", "not set", "LocalCPUBackend"),
        ("retrieve_locations", "not set", '["LocalCPUBackend"]'),
    ]
    assert await value(worker, "min_retrieve_tokens") == 0
    result = part(await pages.post("conf/set", *fields, confirmed=True))
    assert "4 settings changed. min_retrieve_tokens: 32" in result
    assert await value(worker, "retrieve_locations") == ["LocalCPUBackend"]
    assert "min_retrieve_tokens changed while running" in part(await pages.open("conf", show="running"))
    await pages.post("conf/set", *edit("store_location", "LocalCPUBackend", ""), confirmed=True)
    assert await value(worker, "store_location") is None


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("min_retrieve_tokens", "many", "min_retrieve_tokens: 'many' is no whole number."),
        ("min_retrieve_tokens", "-1", "-1 is out of range (0 or more)"),
        ("max_local_cpu_size", "nan", "'nan' is no number"),
        ("save_decode_cache", "maybe", "'maybe' is neither true nor false"),
        ("store_location", "Tape", "'Tape' is none of LocalCPUBackend, LocalDiskBackend"),
        ("chunk_size", "32", "chunk_size cannot be changed while this node runs."),
        ("nope", "1", "nope cannot be changed while this node runs."),
        ("internal_api_server_token", "x", "internal_api_server_token cannot be changed while this node runs."),
    ],
)
async def test_what_does_not_fit_is_told_before_anything_is_sent(
    pages: Pages, name: str, text: str, problem: str
) -> None:
    plan = await pages.post("conf/set", *edit(name, "other", text), confirmed=True)
    assert problem in part(plan)
    assert 'name="confirmed"' not in plan


async def test_nothing_changed_is_told(pages: Pages) -> None:
    assert "No field was changed." in await pages.post("conf/set", *edit("min_retrieve_tokens", "0", "0"))


async def test_what_somebody_else_has_changed_meanwhile_is_told(pages: Pages, worker: RunningApi) -> None:
    async with worker.client.post("/conf", json={"min_retrieve_tokens": 7}) as response:
        assert response.status == 200
    plan = await pages.post("conf/set", *edit("min_retrieve_tokens", "0", "32"))
    assert changes(plan) == [("min_retrieve_tokens", "7", "32")]
    assert "was 0 when you opened the page: somebody has changed it since" in part(plan)


async def test_what_the_node_refuses_is_told_beside_what_it_took(pages: Pages, worker: RunningApi) -> None:
    fields = [*edit("min_retrieve_tokens", "0", "32"), *edit("retrieve_locations", "", '["Tape"]')]
    result = part(await pages.post("conf/set", *fields, confirmed=True))
    assert "1 of 2 settings refused by the node." in result
    assert "retrieve_locations: not changed." in result
    assert await value(worker, "min_retrieve_tokens") == 32


async def test_a_viewer_gets_no_fields(api_server: StartApi, frontend_server: StartFrontend) -> None:
    pages = await pages_of(frontend_server, await api_server(), no_trust_local=True)
    text = await pages.open("conf")
    assert "To change settings you need the role operator" in part(text)
    assert 'name="new.' not in text
    answer = await pages.post("conf/set", *edit("min_retrieve_tokens", "0", "1"), confirmed=True)
    assert "you need the role operator" in part(answer)


async def test_a_node_that_tells_no_defaults_marks_nothing(frontend_server: StartFrontend) -> None:
    values = {"chunk_size": 256, "local_disk": None, "extra": {"a": 1}}
    async with pages_of_another(frontend_server, {"/conf": values}) as pages:
        text = await pages.open("conf")
    assert "This node does not tell types and defaults (Not Found)" in part(text)
    assert 'name="new.chunk_size" value="256"' in text
    assert "not the default" not in part(text)


@pytest.mark.parametrize(
    ("now", "told", "text", "taken"),
    [
        (5, {}, "7", 7),
        (True, {}, "false", False),
        (None, {}, "", None),
        (None, {}, "x", "x"),
        ("a", {}, "7", "7"),
        ([], {"type": "list"}, "a, b", ["a", "b"]),
        ({}, {"type": "mapping"}, '{"a": [1]}', {"a": [1]}),
        (1.5, {"type": "float"}, " 2 ", 2.0),
        ("a", {"type": "str"}, "", ""),
        ("a", {"type": "str", "optional": True}, "", None),
    ],
)
def test_values_of_texts(now: Any, told: dict[str, Any], text: str, taken: Any) -> None:
    assert Setting("s", now, told).taken(text) == (taken, "")
