import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_shared.secrets import masked

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
