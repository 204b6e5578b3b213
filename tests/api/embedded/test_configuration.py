import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from lmcache_api.embedded import configuration as configuration_module
from lmcache_api.embedded.configuration import EmbeddedConfiguration
from lmcache_shared.settings import DEFINITIONS, Settings

MUTABLE = {name for name, row in DEFINITIONS.items() if row.mutable}


def test_all_settings_are_read_and_those_beyond_the_table() -> None:
    configuration = EmbeddedConfiguration(Settings(chunk_size=99, unknown={"blend_recompute_ratios": 0.1}))
    values = configuration.read(None)
    assert values.keys() == DEFINITIONS.keys() | {"blend_recompute_ratios"}
    assert (values["chunk_size"], values["internal_api_server_socket_mode"]) == (99, "0660")
    assert configuration.read(["chunk_size", "nope", "blend_recompute_ratios"]) == {
        "chunk_size": 99,
        "blend_recompute_ratios": 0.1,
    }
    assert configuration.read([]) == {}


def test_what_can_be_set_is_set_and_the_others_are_told() -> None:
    configuration = EmbeddedConfiguration(Settings(unknown={"other": 1}))
    updated, errors = configuration.update(
        {"min_retrieve_tokens": "7", "local_cpu": "false", "chunk_size": 32, "nope": 1, "other": 2, "engine_load": 101}
    )
    assert updated == {"min_retrieve_tokens": 7, "local_cpu": False}
    assert errors.pop("engine_load").startswith("Failed to set config value: engine_load")
    assert errors == {
        "chunk_size": "Config is not mutable at runtime",
        "nope": "Unknown config",
        "other": "Config is not used by the embedded engine",
    }
    settings = configuration.settings
    assert (settings.min_retrieve_tokens, settings.local_cpu) == (7, False)
    assert (settings.chunk_size, settings.engine_load, settings.unknown) == (256, 0.0, {"other": 1})


@pytest.mark.parametrize("name", sorted(set(DEFINITIONS) - MUTABLE))
def test_what_is_not_mutable_stays(name: str) -> None:
    configuration = EmbeddedConfiguration(Settings())
    before = configuration.settings
    _, errors = configuration.update({name: getattr(before, name)})
    assert errors == {name: "Config is not mutable at runtime"}
    assert configuration.settings == before


@pytest.mark.parametrize("name", sorted(MUTABLE))
@pytest.mark.parametrize("value", [[{}], {"a": 1}, "\ud800", 1e999, -1, [], object()])
def test_garbage_is_refused_or_becomes_the_settings_type(name: str, value: Any) -> None:
    configuration = EmbeddedConfiguration(Settings())
    updated, errors = configuration.update({name: value})
    assert (updated.keys() | errors.keys(), updated.keys() & errors.keys()) == ({name}, set())
    assert getattr(configuration.settings, name) == updated.get(name, getattr(Settings(), name))
    if errors:
        assert errors[name].startswith("Failed to set config value: ")


def test_a_reader_keeps_the_settings_it_took_and_no_change_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = EmbeddedConfiguration(Settings())
    taken = configuration.settings
    meeting = threading.Barrier(2)

    def replace_together(settings: Settings, **changes: Any) -> Settings:
        changed = replace(settings, **changes)
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(0.1)  # two at once meet here, and each would have what the other changed as it was
        return changed

    monkeypatch.setattr(configuration_module, "replace", replace_together)
    changes = {"min_retrieve_tokens": 5, "pin_timeout_sec": 7}
    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(configuration.update, {name: value}) for name, value in changes.items()]:
            each.result()
    assert configuration.read(list(changes)) == changes
    assert taken == Settings()
