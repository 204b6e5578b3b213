"""Whatever a node answers, its page is a page: nothing of it is taken for what it is not."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from lmcache_frontend.pytest_plugin import StartFrontend
from tests.frontend.node_pages import act, page, tab
from tests.frontend.upstream import Upstream, serving

SHAPES = [[2, 10**30, 3, 4, 5], [2, 4, 4, 1, 1], [0, 0, 0], [1], "x", None]
ODD: list[object] = [None, True, "<b>", -1, 10**30, 1e300, [], [None, [1], "x"], {}, {"a": None}]
KEYS = """
    freeze hot_cache bypassed_backends all_backends backends created recreated num_hit_tokens spans workers layers
    slot_mapping_ranges chunk_checksums num_removed num_retrieved loaded_chunks failed_keys kvcache_check_log_enabled
    total_key_count total_instance_count instances error_codes layout_info num_tokens status storage_manager users
    worker_liveness is_healthy limit_gb
    """.split()
NESTED: dict[str, object] = {
    "layers": {str(i): {"shape": shape, "dtype": i, "device": []} for i, shape in enumerate(SHAPES)},
    "slot_mapping_ranges": [5, [9, 2], [0, 10**30], [-4, 4], [1], "x"],
    "chunk_checksums": {"a": [1, None, "x"], "b": 3},
    "spans": [{"start": 9, "end": -9, "chunks": "x", "locations": 3}, {}, 3],
    "workers": [{"worker_id": [], "instance_id": None, "ip": 3, "port": 10**9, "last_heartbeat_time": 1e300}, 3],
    "instances": [{"instance_id": [], "key_count": "x", "worker_count": {}}, None],
    "error_codes": {"0": [], "1": 7, "2": "x"},
    "layout_info": {"one": ["A", 10**9], "two": 3, "three": [1, -5]},
    "storage_manager": {"l1_managers": {"a": {"memory_total_bytes": "x"}, "b": 3}, "l1_manager": {"is_healthy": None}},
    "users": {"a": {"limit_gb": -1, "current_usage_gb": 1e300}, "b": {"limit_gb": 0}, "c": None},
}
MIXED = [{key: ODD[(7 * i + k) % len(ODD)] for i, key in enumerate(KEYS)} for k in range(0, len(ODD), 3)]
BODIES = [*(json.dumps(odd) for odd in (*MIXED, NESTED)), "[]", "\x00"]

LONE = '"\\ud800 <b>"'
UNREADABLE = (
    (200, f'{{"a": {LONE}, "status": {LONE}, "layers": {{{LONE}: 1}}, "threads": [{{"name": {LONE}}}]}}'),
    (200, '{"a": 1%s, "total_requests": 1%s, "threads": [{"interval": 1%s}]}' % (("0" * 400,) * 3)),
    (200, '{"kv_shape": [1e300, 1e300], "kv_dtype": "float16", "chunk_size": 1}'),
    (200, '{"storage_manager": {"l1_managers": {"a": {"memory_used_bytes": 1%s}}}}' % ("0" * 400)),
    (200, f'{{"layers": {{"a": {{"shape": {[1 << 39] * 99}, "dtype": "float16"}}}}}}'),
    (200, '# TYPE a counter\na_#otal{l="v", ="w"} 3.0 123\n'),
    (422, f'{{"detail": [{{"loc": 5, "msg": {LONE}}}, {{"loc": "x"}}, 3]}}'),
    (500, f'{{"error": {LONE}}}'),
)
TABS = ("switches", "cache", "controller", "multiprocess", "metrics", "threads", "periodic", "loglevel", "conf", "meta")
TABS += ("inference", "env", "chunks", "lookup", "script")

PATHS = [
    ("switches", ""),
    ("cache", "?start=0&end=9"),
    ("cache", "?view=layout"),
    ("cache", "?view=checksums&slots=0&chunk_size=4&layers=yes&with=%2Fnodes%2Flocal_proxy%2Fupstream"),
    ("controller", "?instance=one&start=0&end=5&event=e&page=99999"),
    ("multiprocess", ""),
    ("multiprocess", "?view=quotas"),
    ("multiprocess", "?view=config"),
]
ACTIONS = [
    ("switches", "freeze"),
    ("switches", "bypass"),
    ("switches", "close"),
    ("switches", "recreate"),
    ("switches", "create"),
    ("cache", "store"),
    ("cache", "retrieve"),
    ("cache", "clear"),
    ("cache", "load"),
    ("cache", "record"),
    ("controller", "clear"),
    ("controller", "pin"),
    ("controller", "move"),
    ("multiprocess", "set-quota"),
    ("multiprocess", "remove-quota"),
    ("multiprocess", "clear"),
]
FIELDS = {"backend": "status", "on": "yes", "start": "0", "end": "5", "config_path": "/a", "enabled": "true"}
FIELDS |= {"instance": "[]", "location": "A", "salt": "a", "limit_gb": "1", "old_instance": "a", "old_location": "b"}
FIELDS |= {"new_instance": "c", "new_location": "d"}


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
async def test_any_answer_makes_a_page(frontend_server: StartFrontend, body: str) -> None:
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body.encode())}\r\n\r\n{body}".encode()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            writer.write(answer)
            await writer.drain()

    async with serving(Upstream(talk=talk)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_history=True)
        for name, query in PATHS:
            assert "<b>" not in await page(frontend, tab("upstream", name) + query)
        for name, action in ACTIONS:
            assert "<b>" not in await act(frontend, f"{tab('upstream', name)}/{action}", **FIELDS)  # type: ignore[arg-type]
            assert "<b>" not in await act(frontend, f"{tab('upstream', name)}/{action}", True, **FIELDS)  # type: ignore[arg-type]


@pytest.mark.parametrize(("status", "body"), UNREADABLE, ids=range(len(UNREADABLE)))
async def test_what_cannot_be_told_on_makes_a_page(frontend_server: StartFrontend, status: int, body: str) -> None:
    answer = f"HTTP/1.1 {status} It\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    async with serving(Upstream(answer)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_history=True)
        for name in TABS:
            assert "<b>" not in await page(frontend, tab("upstream", name))
        assert "<b>" not in await page(frontend, f"{tab('upstream', 'cache')}?view=layout")
        text = await page(frontend, "/compare?what=meta&key=a%26q%3Db")
        assert 'name="back" value="?what=meta&amp;key=a%26q%3Db"' in text
