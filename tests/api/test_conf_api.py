"""`/conf` over HTTP: what is told, what can be set, and that it then counts."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from lmcache_api.pytest_plugin import RunningApi, StartApi
from lmcache_shared.settings import DEFINITIONS

CPU, DISK = "LocalCPUBackend", "LocalDiskBackend"
NOT_MUTABLE = "Config is not mutable at runtime"


@pytest.fixture
async def worker(api_server: StartApi) -> RunningApi:
    return await api_server(chunk_size=16)


async def ask(server: RunningApi, method: str, path: str, **more: Any) -> tuple[int, Any]:
    async with server.client.request(method, path, **more) as response:
        assert response.content_type == "application/json"
        return response.status, json.loads(await response.text(), parse_constant=pytest.fail)


async def told(server: RunningApi, *names: str) -> Any:
    async with server.client.get("/conf", params={"names": ",".join(names)} if names else {}) as response:
        text = await response.text()
        assert (response.status, response.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        values = json.loads(text, parse_constant=pytest.fail)
        assert text == json.dumps(values, indent=2)
        return values


async def post(server: RunningApi, body: str | bytes) -> tuple[int, Any]:
    return await ask(server, "POST", "/conf", data=io.BytesIO(body.encode() if isinstance(body, str) else body))


async def change(server: RunningApi, **values: Any) -> None:
    assert await ask(server, "POST", "/conf", json=values) == (200, {"updated": values})


# What is told


async def test_all_settings_or_those_asked_for(api_server: StartApi) -> None:
    worker = await api_server(chunk_size=16, unknown={"chunk_size": 5, "enable_p2p": False, "odd": float("inf")})
    everything = await told(worker)
    assert everything.keys() == DEFINITIONS.keys() | {"enable_p2p", "odd"}
    assert everything["chunk_size"] == 16
    assert everything["odd"] == "inf"
    assert await told(worker, "odd", "nope", "chunk_size", " chunk_size", "") == {"odd": "inf", "chunk_size": 16}
    assert list(await told(worker, "local_cpu", "chunk_size")) == ["local_cpu", "chunk_size"]
    assert await told(worker, "nope") == {}
    async with worker.client.get("/conf?names=chunk_size&names=local_cpu") as response:
        assert json.loads(await response.text()) == {"local_cpu": True}


async def test_permissions_are_told_as_they_are_written(api_server: StartApi) -> None:
    worker = await api_server(internal_api_server_socket_mode=0o640)
    assert await told(worker, "internal_api_server_socket_mode") == {"internal_api_server_socket_mode": "0640"}


async def test_secrets_are_not_told(api_server: StartApi, tmp_path: Path) -> None:
    worker = await api_server(
        local_disk=f"{tmp_path}/badge",
        engine_hash_salt="pepper",
        engine_model_name="shown",
        extra_config={
            "hf_token": "hf_abcdefghijklmnopqrstuvwxyz",
            "redis": {"host": "cache", "password": 123456, "tokens": 512, "list": [{"api_key": "x"}, "plain"]},
            "note": "user=me password=hunter2",
            "badge": {"number": 7},
            "empty_token": "",
        },
        unknown={"remote_url": "redis://user:hunter2@cache:6379", "blend_special_str": " # # "},
        internal_api_server_env_mask=["BADGE", "local_c*"],
    )
    everything = await told(worker)
    assert "hunter2" not in json.dumps(everything)
    assert everything["remote_url"] == "***"
    assert everything["engine_hash_salt"] == "***"
    assert everything["local_cpu"] == "***"  # the operator's own pattern hides whatever is there
    assert (everything["engine_model_name"], everything["blend_special_str"]) == ("shown", " # # ")
    assert everything["internal_api_server_max_tokens"] == 1 << 20
    assert everything["extra_config"] == {
        "hf_token": "***",
        "redis": {"host": "cache", "password": "***", "tokens": 512, "list": [{"api_key": "***"}, "plain"]},
        "note": "***",
        "badge": "***",
        "empty_token": "",
    }


async def test_secrets_are_not_told_when_they_are_set(api_server: StartApi) -> None:
    worker = await api_server(internal_api_server_env_mask=["STORE_*", "min_retrieve_tokens"])
    values = {
        "local_disk": "file://me:hunter2@/disk",
        "store_location": CPU,
        "min_retrieve_tokens": 5,
        "retrieve_locations": [CPU],
        "pin_timeout_sec": 7,
    }
    masked = {"local_disk": "***", "store_location": "***", "min_retrieve_tokens": "***"}
    expected = {**masked, "retrieve_locations": [CPU], "pin_timeout_sec": 7}
    assert await ask(worker, "POST", "/conf", json=values) == (200, {"updated": expected})
    assert await told(worker, *values) == expected
    assert worker.component.settings.local_disk == "file://me:hunter2@/disk"


async def test_a_value_of_a_megabyte_holds_nobody_up(worker: RunningApi) -> None:
    for text in ("x" * 1_000_000, "://a:" * 200_000):
        assert await ask(worker, "POST", "/conf", json={"local_disk": text}) == (
            200,
            {"updated": {"local_disk": "***"}},
        )
        assert await told(worker, "local_disk") == {"local_disk": "***"}
    assert (await post(worker, b'{"local_disk": "%s"}' % (b"x" * (1 << 20))))[0] == 413


# What can be set


@pytest.mark.parametrize(
    ("name", "value", "now"),
    [
        ("save_decode_cache", True, True),
        ("save_decode_cache", "yes", True),
        ("save_decode_cache", 0, False),
        ("min_retrieve_tokens", 7, 7),
        ("min_retrieve_tokens", "7", 7),
        ("min_retrieve_tokens", 7.0, 7),
        ("min_retrieve_tokens", 0, 0),
        ("max_local_cpu_size", 1, 1.0),
        ("max_local_cpu_size", "2.5", 2.5),
        ("internal_api_server_call_seconds", 0.01, 0.01),
        ("internal_api_server_call_seconds", 3600, 3600.0),
        ("store_location", None, None),
        ("store_location", "", None),
        ("store_location", DISK, DISK),
        ("local_disk", 5, "5"),
        ("local_disk", "ä\u2028\x00", "ä\u2028\x00"),
        ("retrieve_locations", f"{DISK}, {CPU}", [DISK, CPU]),
        ("retrieve_locations", [CPU, DISK], [CPU, DISK]),
        ("retrieve_locations", [], []),
        ("retrieve_locations", None, None),
        ("max_local_disk_size", 0.0001, 0.0001),
    ],
)
async def test_what_is_set(worker: RunningApi, name: str, value: object, now: object) -> None:
    assert await ask(worker, "POST", "/conf", json={name: value}) == (200, {"updated": {name: now}})
    assert await told(worker, name) == {name: now}


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("save_decode_cache", "maybe", 'expected true or false, found "maybe"'),
        ("save_decode_cache", 2, "expected true or false, found 2"),
        ("save_decode_cache", None, "expected true or false, found nothing"),
        ("min_retrieve_tokens", -1, "expected int at least 0, found -1"),
        ("min_retrieve_tokens", 1.5, "expected int, found 1.5"),
        ("min_retrieve_tokens", True, "expected int, found true"),
        ("min_retrieve_tokens", [1], "expected int, found [1]"),
        ("min_retrieve_tokens", {}, "expected int, found {}"),
        ("min_retrieve_tokens", "9" * 30, f'expected int, found "{"9" * 30}"'),
        ("internal_api_server_call_seconds", 0, "expected number from 0.01 to 3600, found 0"),
        ("internal_api_server_call_seconds", 3601, "expected number from 0.01 to 3600, found 3601"),
        ("internal_api_server_max_tokens", 0, "expected int from 1 to 67108864, found 0"),
        ("lookup_timeout_ms", 600001, "expected int from 1 to 600000, found 600001"),
        ("store_location", True, "expected text, found true"),
        ("store_location", "Nope", 'expected one of LocalCPUBackend, LocalDiskBackend, found "Nope"'),
        ("retrieve_locations", [CPU, "x"], '[1]: expected one of LocalCPUBackend, LocalDiskBackend, found "x"'),
        ("store_location", ["x"], 'expected text, found ["x"]'),
        ("retrieve_locations", [CPU, []], "[1]: expected text, found []"),
        ("chunk_statistics_mem_bf_false_positive_rate", 0.6, "from 0.0001 to 0.5, found 0.6"),
    ],
    ids=lambda value: ascii(value)[:30],
)
async def test_what_does_not_fit(worker: RunningApi, name: str, value: object, why: str) -> None:
    before = await told(worker)
    status, answer = await ask(worker, "POST", "/conf", json={name: value})
    assert (status, answer["updated"], list(answer["errors"])) == (400, {}, [name])
    assert answer["errors"][name].startswith(f"Failed to set config value: {name}")
    assert answer["errors"][name].endswith(why)
    assert await told(worker) == before


async def test_only_what_is_mutable_can_be_set(worker: RunningApi) -> None:
    before = await told(worker)
    for name, row in DEFINITIONS.items():
        if not row.mutable:
            for value in (before[name], None, "x"):
                assert await ask(worker, "POST", "/conf", json={name: value}) == (
                    400,
                    {"updated": {}, "errors": {name: NOT_MUTABLE}},
                )
    assert await told(worker) == before
    assert {"run_script_api_enabled", "script_allowed_imports", "chunk_size", "pre_caching_hash_algorithm"} <= {
        name for name, row in DEFINITIONS.items() if not row.mutable
    }


async def test_what_fits_is_set_and_the_rest_told(api_server: StartApi) -> None:
    worker = await api_server(unknown={"enable_p2p": False})
    body = {
        "min_retrieve_tokens": 7, "lookup_timeout_ms": 0, "chunk_size": 32, "nope": 1, "enable_p2p": True,
        "unknown": 1, "given": 1, "save_decode_cache": True,
    }  # fmt: skip
    status, answer = await ask(worker, "POST", "/conf", json=body)
    assert (status, answer["updated"]) == (200, {"min_retrieve_tokens": 7, "save_decode_cache": True})
    too_small = "lookup_timeout_ms: expected int from 1 to 600000, found 0"
    assert answer["errors"] == {
        "lookup_timeout_ms": f"Failed to set config value: {too_small}",
        "chunk_size": NOT_MUTABLE,
        "nope": "Unknown config",
        "enable_p2p": "Config is not used by the embedded engine",
        "unknown": "Unknown config",
        "given": "Unknown config",
    }
    assert await told(worker, *body) == {
        "min_retrieve_tokens": 7, "lookup_timeout_ms": 3000, "chunk_size": 256, "enable_p2p": False,
        "save_decode_cache": True,
    }  # fmt: skip


async def test_nothing_to_set_is_no_error(worker: RunningApi) -> None:
    assert await post(worker, "{}") == (200, {"updated": {}})


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"not json", b"{", b'{"a": }', b"\xff", b'{"a": 1} x', b"{'a': 1}", b"[" * 100_000,
        b'{"a":' * 100_000, b'{"min_retrieve_tokens": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf\xef\xbb\xbf{}",
    ],
    ids=lambda body: ascii(body)[:24],
)  # fmt: skip
async def test_what_is_no_json(worker: RunningApi, body: bytes) -> None:
    status, answer = await post(worker, body)
    assert (status, answer["error"]) == (400, "Invalid JSON body")
    assert 0 < len(answer["message"]) < 200


@pytest.mark.parametrize("body", ["[1]", "null", "1", '"x"', "true", "NaN", "[" * 500 + "]" * 500])
async def test_what_is_no_object(worker: RunningApi, body: str) -> None:
    assert await post(worker, body) == (400, {"error": "Request body must be a JSON object"})


@pytest.mark.parametrize(
    "value",
    [
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "9" * 4000,
        "-" + "9" * 4000,
        '"\\ud800"',
        "[" * 900 + "]" * 900,
        '[{"":[]}]',
    ],
    ids=lambda value: value[:12],
)
async def test_hostile_values_are_refused_and_told_as_json(worker: RunningApi, value: str) -> None:
    for name in ("min_retrieve_tokens", "max_local_cpu_size", "save_decode_cache"):
        status, answer = await post(worker, f'{{"{name}": {value}, "pin_timeout_sec": 7}}')
        assert (status, answer["updated"]) == (200, {"pin_timeout_sec": 7})
        assert len(answer["errors"][name]) < 250
    assert (await told(worker, "min_retrieve_tokens"))["min_retrieve_tokens"] == 0


async def test_no_depth_is_a_server_error(worker: RunningApi) -> None:
    for depth in range(860, 1000):
        nested = "[" * depth + "]" * depth
        for name in ("store_location", "retrieve_locations", "min_retrieve_tokens", "nope"):
            status, _ = await post(worker, f'{{"{name}": {nested}}}')
            assert status == 400, depth


async def test_a_text_that_cannot_be_written_is_refused(worker: RunningApi) -> None:
    for name in ("store_location", "local_disk", "retrieve_locations"):
        status, answer = await post(worker, f'{{"{name}": "\\ud800"}}')
        assert (status, answer["updated"]) == (400, {})
    status, answer = await post(worker, '{"\\ud800": 1}')
    assert (status, answer["errors"]) == (400, {"\ud800": "Unknown config"})


async def test_long_and_many_keys(worker: RunningApi) -> None:
    key = "k" * 1_000_000
    assert await post(worker, f'{{"{key}": 1}}') == (400, {"updated": {}, "errors": {key: "Unknown config"}})
    assert await post(worker, f'{{"{key * 2}": 1}}') == (413, {"detail": "the body is larger than 1048576 bytes"})
    many = {f"k{number}": number for number in range(50_000)}
    status, answer = await ask(worker, "POST", "/conf", json={**many, "min_retrieve_tokens": 1})
    assert (status, answer["updated"], len(answer["errors"])) == (200, {"min_retrieve_tokens": 1}, 50_000)
    assert await post(worker, '{"min_retrieve_tokens": 1, "min_retrieve_tokens": 2}') == (
        200,
        {"updated": {"min_retrieve_tokens": 2}},
    )


# And then it counts


async def where(server: RunningApi, tokens: str = "0,16") -> list[list[str]]:
    status, answer = await ask(server, "POST", f"/cache/lookup?tokens_mock={tokens}")
    assert status == 200
    return [span["locations"] for span in answer["spans"]]


async def test_the_most_tokens(worker: RunningApi) -> None:
    await change(worker, internal_api_server_max_tokens=10)
    for path in ("/cache/store?tokens_mock=0,11", "/cache/lookup?tokens_mock=0,11"):
        assert (await ask(worker, "POST", path))[1]["error"] == "Too many tokens"
    assert (await ask(worker, "GET", "/cache/kvcache/check?slot_mapping=[0,10]"))[1]["error"] == "Too many slots"
    await change(worker, internal_api_server_max_tokens=11)
    assert (await ask(worker, "POST", "/cache/store?tokens_mock=0,11"))[0] == 200


async def test_where_chunks_are_stored_and_looked_up(api_server: StartApi, tmp_path: Path) -> None:
    worker = await api_server(chunk_size=16, local_disk=str(tmp_path), max_local_disk_size=0.01)
    await change(worker, store_location=DISK)
    await ask(worker, "POST", "/cache/store?tokens_mock=0,16")
    assert await where(worker) == [[DISK]]
    await change(worker, store_location=None)
    await ask(worker, "POST", "/cache/store?tokens_mock=0,16")
    assert await where(worker) == [[CPU, DISK]]
    await change(worker, retrieve_locations=[DISK])
    assert await where(worker) == [[DISK]]
    await ask(worker, "DELETE", f"/cache/clear?locations={DISK}")
    assert await where(worker) == []
    assert (await ask(worker, "POST", "/cache/retrieve?tokens_mock=0,16"))[1]["num_retrieved"] == 0
    await change(worker, retrieve_locations=None)
    assert (await ask(worker, "POST", "/cache/retrieve?tokens_mock=0,16"))[1]["num_retrieved"] == 16


async def test_a_disk_that_is_made_and_moved(worker: RunningApi, tmp_path: Path) -> None:
    await change(worker, local_disk=f"file://{tmp_path}/one", max_local_disk_size=0.01)
    assert await ask(worker, "GET", "/backends") == (200, {CPU: CPU})
    assert (await ask(worker, "POST", "/backends"))[1]["created"] == {DISK: DISK}
    await ask(worker, "POST", "/cache/store?tokens_mock=0,16")
    assert len(list(tmp_path.glob("one/*/*.kv"))) == 1
    await change(worker, local_disk=f"{tmp_path}/two")
    assert await where(worker) == [[CPU, DISK]]  # not before it is made again
    assert (await ask(worker, "POST", f"/backends/{DISK}/recreate"))[1]["recreated"] == {DISK: DISK}
    assert await where(worker) == [[CPU]]
    await ask(worker, "POST", "/cache/store?tokens_mock=0,16")
    assert len(list(tmp_path.glob("two/*/*.kv"))) == 1
    await change(worker, local_disk=f"{tmp_path}/one")
    await ask(worker, "POST", f"/backends/{DISK}/recreate")
    await ask(worker, "DELETE", f"/cache/clear?locations={CPU}")
    assert await where(worker) == [[DISK]]  # what lies there is found again


async def test_a_disk_that_cannot_be_used_is_told_and_changes_nothing(api_server: StartApi, tmp_path: Path) -> None:
    worker = await api_server(chunk_size=16, local_disk=str(tmp_path / "disk"), max_local_disk_size=0.01)
    await ask(worker, "POST", "/cache/store?tokens_mock=0,16")
    (tmp_path / "file").write_text("x")
    await change(worker, local_disk=str(tmp_path / "file"))
    status, answer = await ask(worker, "POST", f"/backends/{DISK}/recreate")
    assert (status, answer["error"]) == (500, "Failed to recreate backend")
    assert str(tmp_path / "file") in answer["message"]
    assert await where(worker) == [[CPU, DISK]]


async def test_memory_that_is_made_again(worker: RunningApi) -> None:
    await change(worker, max_local_cpu_size=0.0)
    await ask(worker, "POST", "/cache/store?tokens_mock=0,16")
    assert await where(worker) == [[CPU]]
    await ask(worker, "POST", f"/backends/{CPU}/recreate")
    await ask(worker, "POST", "/cache/store?tokens_mock=0,16")
    assert await where(worker) == []
    await change(worker, max_local_cpu_size=1.0, local_cpu=False)
    await ask(worker, "POST", f"/backends/{CPU}/recreate")
    assert (await ask(worker, "GET", "/hot_cache/status"))[1]["hot_cache"] is False
    await change(worker, local_cpu=True)
    await ask(worker, "POST", f"/backends/{CPU}/recreate")
    await ask(worker, "POST", "/cache/store?tokens_mock=0,16")
    assert await where(worker) == [[CPU]]


async def test_each_component_has_its_own_settings(api_server: StartApi) -> None:
    one, other = await api_server(), await api_server(role="scheduler")
    await change(one, min_retrieve_tokens=9)
    assert await told(other, "min_retrieve_tokens") == {"min_retrieve_tokens": 0}
    assert await told(one, "min_retrieve_tokens") == {"min_retrieve_tokens": 9}


async def test_a_setting_of_another_role_is_refused_and_says_where_it_counts(api_server: StartApi) -> None:
    for role, other, name, value in (
        ("worker", "scheduler", "engine_load", 1),
        ("scheduler", "worker", "local_cpu", 0),
    ):
        server = await api_server(role=role)
        expected = {name: f"Config is not used by a {role}; set it on the {other}"}
        assert await ask(server, "POST", "/conf", json={name: value}) == (400, {"updated": {}, "errors": expected})
        served = await api_server(role=other)
        assert (await ask(served, "POST", "/conf", json={name: value}))[0] == 200


# What is known of a setting beside its value


async def definitions(server: RunningApi) -> Any:
    status, found = await ask(server, "GET", "/conf/definitions")
    assert status == 200
    return found


async def test_definitions_tell_type_default_limits_and_where_the_value_is_from(api_server: StartApi) -> None:
    worker = await api_server(chunk_size=16)
    found = await definitions(worker)
    assert found.keys() == DEFINITIONS.keys()
    assert found["chunk_size"].items() >= {
        "type": "int", "optional": False, "default": 256, "minimum": 16, "mutable": False, "source": "configured",
    }.items()  # fmt: skip
    assert found["store_location"]["choices"] == [CPU, DISK]
    assert found["store_location"]["optional"]
    assert (found["retrieve_locations"]["type"], found["extra_config"]["type"]) == ("list", "mapping")
    assert found["internal_api_server_socket_mode"]["default"] == "0660"
    assert (found["min_retrieve_tokens"]["mutable"], found["min_retrieve_tokens"]["source"]) == (True, "default")
    await change(worker, min_retrieve_tokens=32)
    assert (await definitions(worker))["min_retrieve_tokens"]["source"] == "running"


async def test_what_another_role_uses_cannot_be_changed_here(api_server: StartApi) -> None:
    found = await definitions(await api_server(role="scheduler"))
    assert not found["min_retrieve_tokens"]["mutable"]
    assert found["lookup_timeout_ms"]["mutable"]
    assert "chunk_size" not in await definitions(await api_server(role="controller"))
