import io
import logging

import pytest

from lmcache_api.common import loglevel_api
from lmcache_api.pytest_plugin import StartApi


async def get(client, **query: str) -> tuple[int, str]:  # type: ignore[no-untyped-def]
    async with client.get("/loglevel", params=query) as response:
        assert response.content_type in ("text/plain", "application/json")
        return response.status, await response.text()


async def test_a_logger_and_all_its_handlers_are_set(api_server: StartApi) -> None:
    client = (await api_server()).client
    logger = logging.getLogger("test_loglevel.demo")
    handler = logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)
    expected = "Set test_loglevel.demo level to DEBUG (including all handlers)"
    assert await get(client, logger_name="test_loglevel.demo", level="debug") == (200, expected)
    assert (logger.level, handler.level) == (logging.DEBUG, logging.DEBUG)
    assert await get(client, logger_name="test_loglevel.demo") == (200, "test_loglevel.demo: DEBUG")
    _, text = await get(client)
    assert text.startswith("=== Loggers and Levels ===\n")
    assert "\ntest_loglevel.demo: DEBUG\n" in text
    assert "test_loglevel: " not in text  # a placeholder is no logger
    assert await get(client, logger_name="test_loglevel.demo", level="LOUD") == (400, "Invalid log level: LOUD")
    assert logger.level == logging.DEBUG


async def test_asking_after_a_name_keeps_no_logger_for_it(api_server: StartApi) -> None:
    client = (await api_server()).client
    assert await get(client, logger_name="test_loglevel.nobody") == (200, "test_loglevel.nobody: NOTSET")
    assert "test_loglevel.nobody" not in logging.Logger.manager.loggerDict
    assert (await get(client, logger_name="root"))[1].startswith("root: ")


async def test_words_that_are_names_in_the_logging_module_are_no_levels(api_server: StartApi) -> None:
    client = (await api_server()).client
    for word in ("BASIC_FORMAT", "root", "handlers", "12", "", "Level 5"):
        status, text = await get(client, logger_name="test_loglevel.words", level=word)
        assert status == (200 if not word else 400), text


async def test_new_loggers_are_bounded(api_server: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    client = (await api_server()).client
    status, text = await get(client, logger_name="x" * 300, level="INFO")
    assert status == 400
    assert "no logger is made for it" in text
    monkeypatch.setattr(loglevel_api, "MAX_LOGGERS", 0)
    assert (await get(client, logger_name="test_loglevel.another", level="INFO"))[0] == 400
    assert (await get(client, level="INFO"))[0] == 400
