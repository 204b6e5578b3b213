"""The page of LMCache's multiprocess server, before what a real one has answered; `tests/lmcache` asks a real one."""

from __future__ import annotations

import json

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.pages.tabs.multiprocess_tab import flat, read_memories, read_parts
from lmcache_frontend.pytest_plugin import StartFrontend
from tests.frontend.boards import settled
from tests.frontend.node_pages import act, changes, page, problem, tab, telling
from tests.frontend.upstream import Upstream, serving

SERVER = tab("upstream", "multiprocess")
L1 = {
    "is_healthy": True,
    "total_object_count": 3,
    "write_locked_count": 1,
    "read_locked_count": 1,
    "memory_used_bytes": 1 << 29,
    "memory_total_bytes": 1 << 30,
}
STATUS = {
    "is_healthy": False,
    "engine_type": "MPCacheServer",
    "chunk_size": 256,
    "storage_manager": {
        "is_healthy": False,
        "l1_managers": {"_default": L1},
        "l1_manager": L1,
        "prefetch_controller": {"is_healthy": False, "thread_alive": False},
    },
    "worker_liveness": {"tracked_instances": 2},
    "p2p_peers": [],
}
ANSWERS = {
    "GET /version": '"0.5.6"',
    "GET /status": json.dumps(STATUS),
    "GET /quota": json.dumps(
        {"users": {"a": {"limit_gb": 1, "current_usage_gb": 0.5}, "full": {"limit_gb": 1, "current_usage_gb": 2}}}
    ),
    "GET /quota/a": '{"cache_salt": "a", "limit_gb": 1.0, "exists": true}',
    "GET /quota/new": '{"cache_salt": "new", "limit_gb": 0.0, "exists": false}',
    "PUT /quota/a": '{"status": "ok"}',
    "DELETE /quota/a": '{"status": "removed"}',
    "DELETE /quota/new": '{"status": "not_found"}',
    "GET /config": '{"mp": {"port": 5555, "modules": []}, "storage_manager": {"adapters": [{"kind": "fs"}]}}',
    "POST /cache/clear": '{"status": "ok", "cleared": {"tier": "l1"}}',
}


async def test_status_quotas_and_configuration(frontend_server: StartFrontend) -> None:
    asked: list[str] = []
    async with serving(Upstream(talk=telling(ANSWERS, asked))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_history=True)
        await settled(frontend)
        assert f'href="{SERVER}"' in await page(frontend, tab("upstream", "overview"))
        text = await page(frontend, SERVER)
        for expected in (
            "Not healthy",
            "prefetch controller",
            "512 MiB</strong> of 1 GiB, 50.0 %",
            "3 objects, 2 of them",
        ):
            assert expected in text
        text = await page(frontend, f"{SERVER}?view=quotas")
        assert text.index(">full") < text.index(">a<"), "the fullest first"
        assert "above its limit" in text
        text = await page(frontend, f"{SERVER}?view=config&q=adapters")
        assert "storage_manager.adapters.0.kind" in text
        assert 'mp.port 5555" hidden' in text


async def test_quotas_are_set_and_removed_after_a_plan(frontend_server: StartFrontend) -> None:
    asked: list[str] = []
    async with serving(Upstream(talk=telling(ANSWERS, asked))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_history=True)
        await settled(frontend)
        plan = await act(frontend, f"{SERVER}/set-quota", salt="a", limit_gb="2.5")
        assert changes(plan) == [("a", "1 GiB", "2.5 GiB")]
        assert changes(await act(frontend, f"{SERVER}/set-quota", salt="new", limit_gb="1"))[0][1] == "none: evicted"
        assert not [it for it in asked if it.startswith("PUT")]
        assert "1 GiB" in await act(frontend, f"{SERVER}/set-quota", True, salt="a", limit_gb="2.5")
        assert [it for it in asked if it.startswith("PUT")] == ['PUT /quota/a {"limit_gb":2.5}']
        for salt, limit in (("a", "nan"), ("a", "-1"), ("a", "x"), ("", "1"), ("..", "1"), ("a/b", "1")):
            assert problem(await act(frontend, f"{SERVER}/set-quota", True, salt=salt, limit_gb=limit)), (salt, limit)
        assert "It is removed." in await act(frontend, f"{SERVER}/remove-quota", True, salt="a")
        assert "none any longer" in await act(frontend, f"{SERVER}/remove-quota", True, salt="new")
        plan = await act(frontend, f"{SERVER}/clear", force="yes")
        assert "may be corrupted" in plan
        assert changes(plan) == [("_default", "3 objects, 512 MiB", "nothing")]
        assert "Asked again, L1 holds" in await act(frontend, f"{SERVER}/clear", True, force="yes")
        assert [it for it in asked if it.startswith("POST")] == ['POST /cache/clear {"tier":"l1","force":true}']


async def test_other_nodes_have_no_such_tab(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server()
    frontend = await frontend_server(nodes=[worker.node])
    await settled(frontend)
    assert "multiprocess" not in await page(frontend, tab("lmcache_worker0", "overview"))
    assert "does not serve this" in await page(frontend, tab("lmcache_worker0", "multiprocess"))


def test_what_is_no_status_is_nothing() -> None:
    for told in ({}, {"storage_manager": 3}, {"storage_manager": {"l1_managers": {"a": 3}, "x": {"is_healthy": 1}}}):
        assert [memory.total for memory in read_memories(told)] in ([], [0.0])
        assert len(read_parts(told)) < 2
    deep: dict[str, object] = {}
    for _ in range(50):
        deep = {"a": deep}
    assert len(list(flat(deep))) == 1
    assert [part.name for part in read_parts(STATUS)] == ["prefetch controller", "l1 manager"], "each once"
