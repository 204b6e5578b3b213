import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_shared.responses import plain
from lmcache_shared.secrets import MAX_LOOKED_AT, masked, masked_within

SHOWN = {
    "PATH": "/usr/bin:/bin",
    "PWD": "/home/me",
    "TOKENIZERS_PARALLELISM": "false",
    "LMCACHE_MIN_RETRIEVE_TOKENS": "512",
    "VLLM_MAX_KEYS": "3",
    "MONKEY": "banana",
    "COMPASS": "north",
    "SSH_AUTH_SOCK": "/run/agent",
    "LMCACHE_REMOTE_URL": "redis://cache:6379",
    "AUTHOR": "me",
    "LMCACHE_EXTRA_CONFIG": '{"plugin.frontend.port": 8080, "max_tokens": 5, "token": null}',
}
MASKED = {
    "HF_TOKEN": "x",
    "AWS_SECRET_ACCESS_KEY": "x",
    "OPENAI_API_KEY": "x",
    "redisPassword": "x",
    "PGPASSWORD": "x",
    "DB_PASSWORD": "12345",
    "MYSQL_PWD": "x",
    "SOME_APIKEY": "x",
    "my.private-key": "x",
    "SESSION_COOKIE": "x",
    "A": "redis://user:pass@cache:6379/0",
    "B": "https://store/x?X-Amz-Signature=abcdef",
    "C": "Bearer abcdefgh12345678",
    "D": "hf_abcdefghijklmnopqrstuv",
    "E": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "F": "AKIAABCDEFGHIJKLMNOP",
    "G": "-----BEGIN RSA PRIVATE KEY-----",
    "H": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
    "I": '{"remote": {"password": "x1"}}',
    "J": "host=db password=hunter2",
    "K": "vllm serve --api-key abc123",
    "DB_PASS": "12345678",
    "SSHPASS": "x",
    "TS_AUTHKEY": "x",
    "API_KEY": "123456789",
    "M": '{"s3_secret_key": "abc"}',
    "N": "password=12345",
    "O": "postgres://u:pa/ss@h",
    "P": "https://abcdefghijklmnop1234@host",
    "Q": "DefaultEndpointsProtocol=https;AccountKey=abc==",
    "R": "LS0tLS1CRUdJTiBSU0EgUFJJVkFURSBLRVkt",
    "S": '"passphrase":      "x y"',
    "L": "sk-proj-abcdefghijklmnop1234",
}


@pytest.mark.parametrize("name", SHOWN)
def test_shown(name: str) -> None:
    assert masked({name: SHOWN[name]}) == {name: SHOWN[name]}


@pytest.mark.parametrize("name", MASKED)
def test_masked(name: str) -> None:
    assert masked({name: MASKED[name]}) == {name: "***"}


def test_the_rule_can_be_extended() -> None:
    values = {"CORP_BADGE": "x", "corp_other": "y", "MY_CORP": "z"}
    assert masked(values, ["corp_*"]) == {"CORP_BADGE": "***", "corp_other": "***", "MY_CORP": "z"}


@given(st.dictionaries(st.text(), st.text()))
def test_names_are_kept_and_values_shown_or_masked(values: dict[str, str]) -> None:
    result = masked(values)
    assert result.keys() == values.keys()
    assert all(result[name] in (value, "***") for name, value in values.items())


@pytest.mark.parametrize(
    "piece", ["://", "password ", "eyJ-", "eyJaaaaaaaa.", "pass=", "://a:", "sk-", "token token ", "Bearer ", "a:"]
)
def test_a_long_value_takes_linear_time(piece: str) -> None:
    def seconds(length: int) -> float:
        value = piece * (length // len(piece))
        begun = time.perf_counter()
        masked({"X": value})
        return time.perf_counter() - begun

    seconds(1000)
    assert seconds(100_000) < 2  # 128 KiB is the longest variable of Linux; a quadratic rule takes minutes


def test_what_is_too_long_to_be_read_is_masked() -> None:
    assert masked({"X": "x" * MAX_LOOKED_AT}) == {"X": "x" * MAX_LOOKED_AT}
    assert masked({"X": "x" * (MAX_LOOKED_AT + 1)}) == {"X": "***"}
    assert masked_within({"X": ["x" * 1_000_000]}) == {"X": ["***"]}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"token": "x", "plain": "y"}, {"token": "***", "plain": "y"}),
        ({"list": ["a", "Bearer abcdefgh12345678", {"api_key": "x"}]}, {"list": ["a", "***", {"api_key": "***"}]}),
        ({"keys": ["a", "b"]}, {"keys": ["***", "***"]}),
        ({"deep": {"er": [{"password": "x"}]}}, {"deep": {"er": [{"password": "***"}]}}),
        ({"token": "", "secret": None, "auth": True}, {"token": "", "secret": None, "auth": True}),
        ({"password": 123456, "db_pwd": 1.5}, {"password": "***", "db_pwd": "***"}),
        ({"max_tokens": 512, "num_key_value_heads": 8, "eos_token_id": 128009}, None),
        ({"token": 12345678901}, {"token": "***"}),
        ({"seed": 12345678901, "port": 6379, "share": 0.25}, None),
        ("password=x", "***"),
        (7, 7),
        ({}, {}),
    ],
)
def test_within_what_json_holds(value: Any, shown: Any) -> None:
    assert masked_within(value) == (value if shown is None else shown)


def test_a_name_for_the_whole() -> None:
    assert masked_within("x", "HF_TOKEN") == "***"
    assert masked_within(["x"], "HF_TOKEN") == ["***"]


def test_what_the_operator_names_is_masked_whatever_it_is() -> None:
    values = {"badge": {"a": 1}, "corp_x": [1], "corp_flag": True, "corp_none": None, "corp_empty": "", "other": "x"}
    assert masked_within({"in": values}, extra_names=["Badge", "corp_*"]) == {
        "in": {
            "badge": "***",
            "corp_x": "***",
            "corp_flag": "***",
            "corp_none": None,
            "corp_empty": "",
            "other": "x",
        }
    }


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_what_is_masked_within_keeps_its_shape(value: Any) -> None:
    def check(before: Any, after: Any) -> None:
        if after == "***":
            return
        assert type(before) is type(after)
        if isinstance(before, dict):
            assert list(before) == list(after)
            for name in before:
                check(before[name], after[name])
        elif isinstance(before, list):
            for one, other in zip(before, after, strict=True):
                check(one, other)
        else:
            assert before == after

    before = plain(value)
    check(before, masked_within(before))
