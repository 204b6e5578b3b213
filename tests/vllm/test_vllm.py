"""Our internal API server inside a real vLLM scheduler, on a CPU.

LMCache has no connector between a CPU's KV cache and its engine: its worker side starts, says so and leaves vLLM to
compute. So a worker's server, and KV that is stored and comes back, need a GPU and are not shown here.
"""

from __future__ import annotations

import asyncio
import re

import aiohttp
import pytest

from tests.lmcache.processes import SECRETS, ask, client_of
from tests.vllm.processes import MODEL_NAME, SECRET, VLLM, completion

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

Client = aiohttp.ClientSession
ANSWER_SECONDS = 60.0


def families(exposition: str) -> dict[str, int]:
    """How many metrics each program has: those of `lmcache:…`, `vllm:…`."""
    owners = re.findall(r"^# TYPE ([a-z]+):", exposition, re.MULTILINE)
    return {owner: owners.count(owner) for owner in set(owners)}


async def test_inference(scheduler: Client) -> None:
    answer = await ask(scheduler, "GET", "/inference_info")
    assert answer.head == (200, "application/json", None)
    told = answer.json()
    assert told["model_config"]["num_layers"] == 2
    assert (told["model_config"]["max_model_len"], told["model_config"]["head_size"]) == (512, 32)
    assert told["cache_config"]["enable_prefix_caching"] is True
    assert f"served_model_name={MODEL_NAME}" in told["vllm_config"]
    version = (await ask(scheduler, "GET", "/inference_version")).json()
    assert version == {"vllm_version": told["vllm_version"]}
    assert re.match(r"\d+\.\d+", told["vllm_version"])


async def test_version_meta_lookup(scheduler: Client) -> None:
    version = (await ask(scheduler, "GET", "/version")).json()
    assert version.startswith((await ask(scheduler, "GET", "/lmc_version")).json())
    assert (await ask(scheduler, "GET", "/inference_info")).json()["lmcache_version"] == version
    meta = (await ask(scheduler, "GET", "/meta")).json()
    assert (meta["role"], meta["served_model_name"], meta["kv_dtype"]) == ("scheduler", MODEL_NAME, "torch.float32")
    assert meta["kv_shape"] == [2, 2, 16, 2, 32]
    assert meta["kv_connector_extra_config"] == {"a_password": "***"}
    info = (await ask(scheduler, "GET", "/lookup/info")).json()
    assert info == {"client": "LMCacheLookupClient", "server": "None"}


async def test_settings_are_read_and_set(vllm: VLLM, scheduler: Client) -> None:
    """Those that LMCache reads from its file; the switch is told as it was set, not as LMCache's server found it."""
    conf = (await ask(scheduler, "GET", "/conf")).json()
    assert conf["internal_api_server_enabled"] is True
    assert conf["internal_api_server_socket_path_prefix"] == str(vllm.scheduler).rpartition("_")[0]
    assert conf["chunk_size"] == 16
    assert conf["remote_url"] == "***"
    answer = await ask(scheduler, "POST", "/conf", json={"min_retrieve_tokens": 32, "nothing": 1})
    assert (answer.status, answer.json()["updated"]) == (200, {"min_retrieve_tokens": 32})
    assert list(answer.json()["errors"]) == ["nothing"]
    read = await ask(scheduler, "GET", "/conf?names=min_retrieve_tokens")
    assert read.json() == {"min_retrieve_tokens": 32}


async def test_lmcache_obeys_a_setting_of_ours(vllm: VLLM, scheduler: Client, api: Client) -> None:
    await ask(scheduler, "POST", "/conf", json={"min_retrieve_tokens": 77})
    answer = await ask(api, "POST", "/v1/completions", json=completion("which setting counts? " * 8))
    assert answer.status == 200
    assert "min_retrieve 77" in vllm.said()  # in LMCache's own words, for this request


async def test_metrics(scheduler: Client) -> None:
    """vLLM counts in the process of its API server; where all is one process, both are told (below)."""
    answer = await ask(scheduler, "GET", "/metrics")
    assert answer.head == (200, "text/plain", "utf-8")
    assert families(answer.text)["lmcache"] > 50
    assert f'role="scheduler",served_model_name="{MODEL_NAME}"' in answer.text


async def test_diagnostics(scheduler: Client) -> None:
    threads = (await ask(scheduler, "GET", "/threads")).text
    assert "vllm/v1/engine/core.py" in threads  # the scheduler's own loop
    assert (await ask(scheduler, "GET", "/periodic-threads-health")).json()["healthy"] is True
    env = (await ask(scheduler, "GET", "/env")).json()
    assert {env[name] for name in SECRETS} == {"***"}
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    loggers = (await ask(scheduler, "GET", "/loglevel")).text
    assert "lmcache_api" in loggers
    assert "vllm" in loggers


async def test_lmcaches_own_server_is_not_there(vllm: VLLM, scheduler: Client) -> None:
    assert (await ask(scheduler, "GET", "/openapi.json")).status == 404  # theirs has it
    threads = (await ask(scheduler, "GET", "/threads?name=api-server-thread")).text
    assert threads.count("Thread: ") == 1
    assert "lmcache_api/server.py" in threads
    assert "uvicorn" not in (await ask(scheduler, "GET", "/threads")).text
    assert "Running LMCache internal API server" not in vllm.said()
    assert [path.name for path in vllm.scheduler.parent.glob("ops_*")] == [vllm.scheduler.name]


async def test_completions_are_answered_meanwhile(scheduler: Client, api: Client) -> None:
    """The prompts fill chunks, so LMCache looks them up; the worker does not answer, which takes it three seconds."""
    prompts = [f"Count to {number}, and count slowly. " * 2 for number in range(3)]
    asked = [asyncio.create_task(ask(api, "POST", "/v1/completions", json=completion(prompt))) for prompt in prompts]
    questions = 0
    while not all(task.done() for task in asked):
        assert (await ask(scheduler, "GET", "/metrics")).status == 200
        questions += 1
        await asyncio.sleep(0.1)
    answers = [task.result() for task in asked]
    assert [answer.status for answer in answers] == [200] * 3
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [8] * 3
    assert questions > 1


async def test_a_runtime_plugin_is_told_that_there_is_a_server(vllm: VLLM) -> None:
    """Once, and in LMCache's words: our frontend is such a plugin."""
    told = (vllm.scheduler.parent / "told.json").read_text()
    assert re.findall(r'"internal_api_server_enabled": (\w+)', told) == ["true"]


async def test_what_a_scheduler_has_not_is_said(scheduler: Client) -> None:
    answer = await ask(scheduler, "GET", "/backends")
    assert (answer.status, answer.json()["message"]) == (503, "LMCache engine not configured.")


async def test_a_worker_without_a_gpu_has_no_server_and_hinders_nobody(vllm: VLLM) -> None:
    """If this fails, LMCache has learnt to use a CPU, and these tests can show more."""
    assert "No supported cpu connector found" in vllm.said()
    assert "no internal API in this process" in vllm.said()


async def test_sigterm_ends_everything(vllm: VLLM) -> None:
    """The last test of this vLLM."""
    assert vllm.terminate() == 0
    assert vllm.left_behind() == []
    assert not vllm.scheduler.exists()


async def test_vllm_in_the_process_that_asks_it(offline: VLLM) -> None:
    """All counts in one registry; the settings come from vLLM's command line."""
    offline.tell("tell me of caches")
    offline.expect("TOKENS 4", seconds=ANSWER_SECONDS)
    async with client_of(offline.scheduler) as client:
        exposition = (await ask(client, "GET", "/metrics")).text
        conf = (await ask(client, "GET", "/conf?names=internal_api_server_enabled,chunk_size")).json()
        info = await ask(client, "GET", "/inference_info")
    assert families(exposition)["lmcache"] > 50
    assert families(exposition)["vllm"] > 50
    assert f'vllm:generation_tokens_total{{engine="0",model_name="{MODEL_NAME}"}} 4.0' in exposition
    assert conf == {"internal_api_server_enabled": True, "chunk_size": 16}
    assert SECRET not in info.text
    assert info.json()["vllm_config"] == "***"
    assert info.json()["model_config"]["num_layers"] == 2
    assert offline.process.stdin is not None
    offline.process.stdin.close()
    offline.expect("ENDED", seconds=ANSWER_SECONDS)
    assert not offline.scheduler.exists()


async def test_a_server_that_cannot_serve_does_not_hinder_the_engine(offline_without_socket: VLLM) -> None:
    offline_without_socket.tell("tell me of caches")
    offline_without_socket.expect("TOKENS 4", seconds=ANSWER_SECONDS)
    assert "internal API does not serve" in offline_without_socket.said()


async def test_the_second_way(manager: VLLM) -> None:
    """`InternalAPIServer` where LMCache's manager expects its own class: started and stopped with the others."""
    async with client_of(manager.scheduler) as client:
        assert (await ask(client, "GET", "/lookup/info")).json()["client"] == "LMCacheLookupClient"
        assert (await ask(client, "GET", "/meta")).json()["role"] == "scheduler"
    assert manager.process.stdin is not None
    manager.process.stdin.close()
    manager.expect("ENDED", seconds=ANSWER_SECONDS)
    assert not manager.scheduler.exists()
