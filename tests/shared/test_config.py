import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_shared import config
from lmcache_shared.config import convert
from lmcache_shared.errors import ConfigError
from lmcache_shared.settings import DEFINITIONS, Settings


def load(
    tmp_path: Path, text: str = "", environ: dict[str, str] | None = None, overrides: list[str] | None = None
) -> Settings:
    file = tmp_path / "lmcache.yaml"
    file.write_text(text)
    return config.load(file, environ=environ or {}, overrides=overrides or [])


def test_nothing_given_is_the_defaults() -> None:
    settings = config.load(environ={})
    assert settings == Settings()
    assert not settings.internal_api_server_enabled
    assert (settings.internal_api_server_host, settings.internal_api_server_port_start) == ("127.0.0.1", 6999)


def test_the_seed_configuration(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        """
extra_config:
  plugin.frontend.port: 8080
internal_api_server_enabled: True
internal_api_server_port_start: 9090
plugin_locations: ["/scripts/scheduler_lmc_frontend_plugin.py"]
internal_api_server_socket_path_prefix: "/tmp/lmcache_internal_api_server/socket"
chunk_size: 256
""",
    )
    assert settings.internal_api_server_enabled
    assert settings.internal_api_server_port_start == 9090
    assert settings.runtime_plugin_locations == ["/scripts/scheduler_lmc_frontend_plugin.py"]
    assert settings.internal_api_server_socket_path_prefix == "/tmp/lmcache_internal_api_server/socket"
    assert settings.extra_config == {"plugin.frontend.port": 8080}
    assert settings.chunk_size == 256
    assert "internal_api_server_host" not in settings.given


def test_file_then_environment_then_command_line(tmp_path: Path) -> None:
    text = "internal_api_server_port_start: 1\ninternal_api_server_host: a\nlmcache_instance_id: x"
    environ = {"LMCACHE_INTERNAL_API_SERVER_PORT_START": "2", "LMCACHE_INTERNAL_API_SERVER_HOST": "b"}
    settings = load(tmp_path, text, environ, ["internal_api_server_port_start=3"])
    found = (settings.internal_api_server_port_start, settings.internal_api_server_host, settings.lmcache_instance_id)
    assert found == (3, "b", "x")


def test_the_environment_names_the_file_and_the_command_line_another(tmp_path: Path) -> None:
    named = tmp_path / "named.yaml"
    named.write_text("lmcache_instance_id: named")
    other = tmp_path / "other.yaml"
    other.write_text("lmcache_instance_id: other")
    environ = {"LMCACHE_CONFIG_FILE": str(named)}
    assert config.load(environ=environ).lmcache_instance_id == "named"
    assert config.load(other, environ=environ).lmcache_instance_id == "other"


@pytest.mark.parametrize(
    ("spelling", "value"),
    [("true", True), ("TRUE", True), ("1", True), ("'true'", True), ('"1"', True), ("false", False), ("0", False)],
)
def test_booleans(tmp_path: Path, spelling: str, value: bool) -> None:
    assert load(tmp_path, f"run_script_api_enabled: {spelling}").run_script_api_enabled is value
    environ = {"LMCACHE_RUN_SCRIPT_API_ENABLED": spelling}
    assert load(tmp_path, environ=environ).run_script_api_enabled is value


@pytest.mark.parametrize("spelling", ["0,1", "[0,1]", "[0, 1]", '"0,1"', "'[0,1]'", " 0 , 1 "])
def test_lists(tmp_path: Path, spelling: str) -> None:
    environ = {"LMCACHE_INTERNAL_API_SERVER_INCLUDE_INDEX_LIST": spelling}
    assert load(tmp_path, environ=environ).internal_api_server_include_index_list == [0, 1]
    found = load(tmp_path, overrides=[f"internal_api_server_include_index_list={spelling}"])
    assert found.internal_api_server_include_index_list == [0, 1]
    found = load(tmp_path, f"internal_api_server_include_index_list: {spelling}")
    assert found.internal_api_server_include_index_list == [0, 1]


def test_one_value_is_a_list_of_one_and_nothing_is_none(tmp_path: Path) -> None:
    assert load(tmp_path, "internal_api_server_include_index_list: 2").internal_api_server_include_index_list == [2]
    assert load(tmp_path, "internal_api_server_include_index_list:").internal_api_server_include_index_list is None
    assert load(tmp_path, "internal_api_server_include_index_list: []").internal_api_server_include_index_list == []
    assert load(tmp_path, "script_allowed_imports: time").script_allowed_imports == ["time"]


def test_an_empty_environment_value_unsets_a_text(tmp_path: Path) -> None:
    environ = {"LMCACHE_INTERNAL_API_SERVER_SOCKET_PATH_PREFIX": ""}
    text = "internal_api_server_socket_path_prefix: /run/s"
    assert load(tmp_path, text, environ).internal_api_server_socket_path_prefix is None


def test_our_settings_stand_in_extra_config(tmp_path: Path) -> None:
    settings = load(tmp_path, 'extra_config: {internal_api_server_socket_mode: "0600", other.key: 1}')
    assert settings.internal_api_server_socket_mode == 0o600
    assert settings.extra_config == {"internal_api_server_socket_mode": "0600", "other.key": 1}
    overrides = ["extra_config.internal_api_server_socket_mode=0666", "extra_config.plugin.frontend.port=9"]
    settings = load(tmp_path, overrides=overrides)
    assert settings.internal_api_server_socket_mode == 0o666
    assert settings.extra_config == {"internal_api_server_socket_mode": "0666", "plugin.frontend.port": 9}
    assert load(tmp_path, overrides=["internal_api_server_socket_mode=0606"]).internal_api_server_socket_mode == 0o606


def test_our_settings_at_the_top_level_win_over_the_section(tmp_path: Path) -> None:
    text = "run_script_max_bytes: 5\nextra_config: {run_script_max_bytes: 6, run_script_seconds: 7}"
    settings = load(tmp_path, text)
    assert (settings.run_script_max_bytes, settings.run_script_seconds) == (5, 7.0)


def test_extra_config_as_json_from_the_environment_replaces_the_files(tmp_path: Path) -> None:
    environ = {"LMCACHE_EXTRA_CONFIG": '{"run_script_max_bytes": 5}'}
    settings = load(tmp_path, "extra_config: {run_script_seconds: 2, run_script_max_bytes: 4}", environ)
    assert (settings.run_script_max_bytes, settings.run_script_seconds) == (5, 30.0)
    assert settings.extra_config == {"run_script_max_bytes": 5}


def test_the_older_name_gives_way_to_the_newer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        settings = load(tmp_path, "plugin_locations: [/old]\nruntime_plugin_locations: [/new]")
    assert settings.runtime_plugin_locations == ["/new"]
    assert "plugin_locations is the older name of runtime_plugin_locations" in caplog.text
    environ = {"LMCACHE_PLUGIN_LOCATIONS": "/from/env"}
    assert load(tmp_path, environ=environ).runtime_plugin_locations == ["/from/env"]


def test_unknown_keys_are_kept_and_can_be_overridden(tmp_path: Path) -> None:
    environ = {"LMCACHE_BLEND_MIN_TOKENS": "128", "LMCACHE_UNRELATED": "x"}
    settings = load(tmp_path, "blend_min_tokens: 256\nremote_url: null", environ, ["enable_p2p=false"])
    assert settings.unknown == {"blend_min_tokens": 128, "remote_url": None, "enable_p2p": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("internal_api_server_include_index_list: [0, a]",
         'internal_api_server_include_index_list[1]: expected int, found "a"'),
        ("internal_api_server_port_start: many", 'internal_api_server_port_start: expected int, found "many"'),
        ("internal_api_server_port_start: 0", "internal_api_server_port_start: expected int from 1 to 65535, found 0"),
        ("internal_api_server_port_start: true", "expected int, found true"),
        ("internal_api_server_port_start:", "internal_api_server_port_start: expected int, found nothing"),
        ("internal_api_server_port_start: 1.5", "expected int, found 1.5"),
        ("internal_api_server_enabled: maybe", 'expected true or false, found "maybe"'),
        ("internal_api_server_host: [a]", 'expected text, found ["a"]'),
        ("extra_config: 5", "extra_config: expected keys with values, found 5"),
        ("extra_config: {1: 2}", "extra_config: expected a text as key, found 1"),
        ("extra_config: {internal_api_server_socket_mode: 0660}",
         'internal_api_server_socket_mode: expected permissions as an octal text such as "0660", found 432'),
        ("extra_config: {run_script_seconds: .nan}", "extra_config.run_script_seconds: expected number, found NaN"),
        ("- a", 'expected keys with values at the top, found ["a"]'),
        ("1: 2", "expected a text as key, found 1"),
        ("a: [", ": no YAML: "),
        ("a: \x00", "no YAML"),
        ("[" * 3000, "no YAML"),
        ("a: !!int ''", "no YAML that can be used: "),
        ("a: !!bool x", "no YAML that can be used: "),
        ("internal_api_server_enabled: 0x" + "f" * 9000, "expected true or false"),
        ("lmcache_instance_id: 0x" + "f" * 9000, "expected text"),
        ('lmcache_instance_id: "\\ud800"', "lmcache.yaml: "),
        ("extra_config: {internal_api_server_socket_mode: '-1'}", "expected permissions as an octal text"),
        ("a: 2026-99-99", "no YAML that can be used: "),
    ],
)  # fmt: skip
def test_errors_name_the_file_the_key_and_both_sides(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text)
    assert str(refused.value).startswith(str(tmp_path / "lmcache.yaml"))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("environ", "overrides", "message"),
    [
        ({"LMCACHE_INTERNAL_API_SERVER_PORT_START": "x"}, [],
         'environment: LMCACHE_INTERNAL_API_SERVER_PORT_START: expected int, found "x"'),
        ({"LMCACHE_EXTRA_CONFIG": "{"}, [], "environment: LMCACHE_EXTRA_CONFIG: expected a JSON object"),
        ({}, ["run_script_api_enabled"], "--set run_script_api_enabled: expected key=value"),
        ({}, ["run_script_max_bytes=-1"], "--set run_script_max_bytes: expected int from 1"),
        ({}, ["blend_min_tokens=["], "--set blend_min_tokens: cannot be read as a value"),
    ],
)  # fmt: skip
def test_errors_name_the_variable_or_the_option(environ: dict[str, str], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(environ=environ, overrides=overrides)
    assert message in str(refused.value)


def test_a_slip_in_a_name_of_ours_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"no such setting .did you mean internal_api_server_port_start\?."):
        load(tmp_path, overrides=["internal_api_server_prot_start=3"])
    with pytest.raises(ConfigError, match="there is no such setting"):
        load(tmp_path, overrides=["extra_config.run_script_second=3"])
    environ = {"LMCACHE_INTERNAL_API_SERVER_SOCKET_MOD": "0600"}
    text = "internal_api_server_prot_start: 3\nextra_config: {run_script_second: 1, plugin.x: 2}"
    settings = load(tmp_path, text, environ)
    assert settings.unknown == {"internal_api_server_prot_start": 3}
    assert [line for line in caplog.messages if "there is no such setting; it is ignored" in line] == caplog.messages
    assert len(caplog.messages) == 3


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.yaml: cannot read the configuration: No such file"):
        config.load(tmp_path / "missing.yaml", environ={})
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(tmp_path, environ={})
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (config.MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        config.load(large, environ={})


def test_a_configuration_object_such_as_lmcaches() -> None:
    made = SimpleNamespace(
        internal_api_server_enabled=True,
        internal_api_server_include_index_list=None,
        extra_config={"internal_api_server_socket_mode": "0600"},
    )
    settings = config.from_object(made)
    assert settings.internal_api_server_enabled
    assert settings.internal_api_server_socket_mode == 0o600
    with pytest.raises(ConfigError, match="internal_api_server_port_start: expected int"):
        config.from_object(SimpleNamespace(internal_api_server_port_start="x"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(sorted(DEFINITIONS)),
)
def test_any_value_is_taken_or_refused(value: Any, name: str) -> None:
    definition = DEFINITIONS[name]
    try:
        config.convert(value, definition, name)
    except ConfigError as refused:
        assert str(refused).startswith(name)


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [1,1,1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1},*a{n - 1},*a{n - 1}]\n" for n in range(1, 12)),
        "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [*a{n - 1},*a{n - 1},*a{n - 1}]\n" for n in range(1, 12)),
        "a: &a [*a]\n",
        "a: [" + "1," * 60_000 + "]\n",
    ],
    ids=["aliases", "merges", "a circle", "many values"],
)
def test_what_unfolds_into_something_huge_is_refused_at_once(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="more than 50000 values"):
        load(tmp_path, text)


def test_long_texts_are_not_read_as_lists() -> None:
    row = DEFINITIONS["internal_api_server_env_mask"]
    for text in ("[" + "a," * 5000 + "]", "a," * 5000):
        with pytest.raises(ConfigError, match="at most 8192 are read"):
            convert(text, row, "it")


def test_a_large_value_is_not_written_down_to_be_shown() -> None:
    with pytest.raises(ConfigError, match="found a large list"):
        convert([[0] * 100] * 100, DEFINITIONS["chunk_size"], "it")
