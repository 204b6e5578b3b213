"""The tab of log levels."""

import logging
from collections.abc import Iterator

import pytest

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.pages import changed_levels
from lmcache_frontend.pages.changed_levels import ChangedLevels
from lmcache_frontend.pages.tabs import loglevel_tab
from lmcache_frontend.pages.tabs.loglevel_tab import levels_of, tree
from lmcache_frontend.pytest_plugin import StartFrontend
from tests.frontend.tabs import Pages, changes, pages_of, part

A, B = "levels_page.engine.store", "levels_page.engine.load"


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    for name in (A, B):
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield
    for name in (A, B, "levels_page", "levels_page.new"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
async def pages(api_server: StartApi, frontend_server: StartFrontend) -> Pages:
    return await pages_of(frontend_server, await api_server())


def test_a_tree_has_parents_that_nobody_names_and_levels_that_count() -> None:
    levels = levels_of("=== Loggers and Levels ===\nb.x: NOTSET\na: DEBUG\na.b.c: NOTSET\nodd: name: ERROR\nno level\n")
    assert levels == {"b.x": "NOTSET", "a": "DEBUG", "a.b.c": "NOTSET", "odd: name": "ERROR"}
    found = tree({**levels, "root": "INFO"}, {"b.x": "ERROR"})
    assert [(it.name, it.depth, it.own, it.effective, it.source) for it in found] == [
        ("root", 0, "INFO", "INFO", "root"),
        ("a", 0, "DEBUG", "DEBUG", "a"),
        ("a.b", 1, "", "DEBUG", "a"),
        ("a.b.c", 2, "", "DEBUG", "a"),
        ("b", 0, "", "INFO", "root"),
        ("b.x", 1, "", "INFO", "root"),
        ("odd: name", 0, "ERROR", "ERROR", "odd: name"),
    ]
    assert [it.changed_from for it in found if it.was] == ["ERROR"]


async def test_set_is_confirmed_with_old_and_new_marked_and_reset(pages: Pages) -> None:
    fields = [("level", "debug"), ("logger", A), ("logger", B)]
    plan = await pages.post("loglevel/set", *fields)
    assert changes(plan) == [(A, "inherited", "DEBUG"), (B, "inherited", "DEBUG")]
    assert "Set 2 loggers to DEBUG" in plan
    assert "costs the engine time" in part(plan)
    assert logging.getLogger(A).level == logging.NOTSET
    assert "2 loggers set." in part(await pages.post("loglevel/set", *fields, confirmed=True)).lower()
    assert logging.getLogger(A).level == logging.DEBUG
    text = await pages.open("loglevel", show="changed")
    assert text.count("was inherited") == 2
    assert "2 loggers changed from this dashboard" in part(text)
    await pages.post("loglevel/set", ("level", "ERROR"), ("logger", A), confirmed=True)
    plan = await pages.post("loglevel/reset", ("logger", A))
    assert changes(plan) == [(A, "ERROR", "inherited")]
    await pages.post("loglevel/reset", confirmed=True)
    assert logging.getLogger(A).level == logging.getLogger(B).level == logging.NOTSET
    assert "from this dashboard" not in part(await pages.open("loglevel"))
    assert "No level was changed from here." in await pages.post("loglevel/reset")


async def test_a_logger_that_is_not_listed_can_be_named(pages: Pages) -> None:
    await pages.post("loglevel/set", ("level", "WARNING"), ("other", " levels_page.new "), confirmed=True)
    assert logging.getLogger("levels_page.new").level == logging.WARNING
    async with pages.frontend.client.get("/api/timeline") as response:
        told = [event for event in (await response.json())["events"] if event["kind"] == "setting"]
    assert [event["text"] for event in told] == [f"GET /loglevel at {pages.node}"]  # and not that levels were read


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ([("level", "DEBUG")], "No logger is chosen."),
        ([("level", "LOUD"), ("logger", A)], "'LOUD' is none of DEBUG, INFO"),
        ([("level", "INFO"), *(("logger", f"l{i}") for i in range(101))], "101 loggers are chosen; at most 100"),
        ([("level", "INFO"), ("other", "x" * 300)], "is longer than 255 characters"),
    ],
)
async def test_what_cannot_be_set_has_no_button(pages: Pages, fields: list[tuple[str, str]], problem: str) -> None:
    for confirmed in (False, True):
        text = await pages.post("loglevel/set", *fields, confirmed=confirmed)
        assert problem in part(text)
        assert 'name="confirmed"' not in text


async def test_search_and_views_are_addresses(pages: Pages) -> None:
    logging.getLogger(A).setLevel(logging.DEBUG)
    text = await pages.open("loglevel", q="levels_page store")
    assert f'data-text="{A}">' in text
    assert f'data-text="{B}" hidden>' in text
    for view in ("own", "debug"):
        text = await pages.open("loglevel", show=view)
        assert f'data-text="{A}"' in text
        assert f'data-text="{B}"' not in text
    assert "No logger is like this" in part(await pages.open("loglevel", show="changed"))


async def test_many_loggers_are_searched_by_the_server(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loglevel_tab, "MAX_SHOWN", 3)
    text = await pages.open("loglevel", q="levels_page")
    assert "; the first 3 are shown" in part(text)
    assert text.count("data-text=") == 3
    assert "data-local" not in text


async def test_a_viewer_sees_levels_and_is_told_what_changing_needs(
    api_server: StartApi, frontend_server: StartFrontend
) -> None:
    pages = await pages_of(frontend_server, await api_server(), no_trust_local=True)
    text = await pages.open("loglevel")
    assert "To change levels you need the role operator" in part(text)
    assert 'type="checkbox"' not in text
    answer = await pages.post("loglevel/set", ("level", "DEBUG"), ("logger", A), confirmed=True)
    assert "you need the role operator" in part(answer)
    assert logging.getLogger(A).level == logging.NOTSET


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changed_levels, "MAX_NODES", 2)
    monkeypatch.setattr(changed_levels, "MAX_LOGGERS", 2)
    kept = ChangedLevels()
    for node in ("a", "b", "c"):
        for logger in ("x", "y", "z"):
            kept.note(("p", node), logger, "INFO")
    assert kept.of(("p", "a"), {}) == {}
    assert kept.of(("p", "c"), {"x": "DEBUG", "y": "INFO"}) == {"x": "INFO"}
    kept.note(("p", "c"), "x", "ERROR")
    assert kept.of(("p", "c"), {"x": "DEBUG"}) == {"x": "INFO"}, "the first level is the one to go back to"
