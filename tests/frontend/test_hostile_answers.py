"""A node that answers what no engine would: its page is a page all the same, and it keeps nobody else waiting."""

from __future__ import annotations

import html
import json
import re
import time

import aiohttp
import pytest

from lmcache_frontend.pages.asking import Outcome
from lmcache_frontend.pages.checksum_view import MAX_RUNS, runs_of
from lmcache_frontend.pages.kv_layout import natural, read_layout
from lmcache_frontend.pages.operations.kinds import KINDS
from lmcache_frontend.pages.operations_page import cell_of
from lmcache_frontend.pages.reading import number
from lmcache_frontend.pages.settings_form import Setting
from lmcache_frontend.pages.tabs.env_tab import groups
from lmcache_frontend.pages.tabs.loglevel_tab import levels_of, tree
from lmcache_frontend.pages.tabs.meta_tab import layout_of
from lmcache_frontend.pages.tabs.metrics_tab import families
from lmcache_frontend.pages.tabs.threads_tab import stacks
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_shared.errors import Refusal
from tests.frontend.node_pages import act, page, tab, telling
from tests.frontend.upstream import Upstream, serving

LONG = "9" * 4000
HALF = '"\\ud800<b>"'
DEEP = "[" * 300 + "]" * 300

PLENTY_SECONDS = 5.0
"""A busy machine takes less than that for what is linear, and no machine for what is not."""

ANSWERS = {
    "GET /meta": f'{{"a": {HALF}, "kv_shape": [1e300, 1e300, {LONG}], "kv_dtype": "float16", "b": {DEEP}}}',
    "GET /version": HALF,
    "GET /conf": f'{{"a": {HALF}, "b": {LONG}, {HALF}: 1}}',
    "GET /chunk_statistics/status": f'{{"enabled": true, "total_chunks": {LONG}, "timing": {{"a_seconds": {LONG}}}}}',
    "GET /periodic-threads": f'{{"threads": [{{"name": {HALF}, "total_runs": {LONG}}}]}}',
    "GET /periodic-threads-health": f'{{"unhealthy_count": {LONG}}}',
    "GET /cache/kvcache/info": f'{{"layers": {{"{LONG}{LONG}": {{"shape": [2, 3, 4], "dtype": "x{LONG}{LONG}"}},'
    f' "b": {{"shape": {[1 << 39] * 1000}}}}}}}',
    "GET /cache/lookup?tokens_mock=0,9": f'{{"num_hit_tokens": {LONG}, "spans": [{{"start": {LONG}, "end": 3}}]}}',
    "GET /backends": f'{{{HALF}: "x"}}',
    "GET /bypass/list": f'{{"all_backends": [{HALF}], "bypassed_backends": [{DEEP}]}}',
    "GET /controller/workers": f'{{"workers": [{{"worker_id": {LONG}, "instance_id": {HALF}, "key_count": {LONG}}}]}}',
    "GET /controller/key-stats": f'{{"total_key_count": {LONG}, "instances": [{{"instance_id": {HALF}}}]}}',
    "GET /status": f'{{"storage_manager": {{"l1_managers": {{"a": {{"memory_total_bytes": {LONG}}}}}}}}}',
    "GET /quota": f'{{"users": {{{HALF}: {{"limit_gb": {LONG}, "current_usage_gb": {LONG}}}}}}}',
}
PAGES = """
    meta conf chunks periodic cache?view=layout cache?view=tokens&start=0&end=9 switches controller multiprocess
    multiprocess?view=quotas env inference lookup overview
    """.split()


async def test_each_page_is_one_whatever_a_node_answers(frontend_server: StartFrontend) -> None:
    asked: list[str] = []
    async with serving(Upstream(talk=telling(ANSWERS, asked))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_history=True)
        for name in PAGES:
            text = await page(frontend, tab("upstream", name))
            assert "<b>" not in text
        for subject in ("conf", "meta", "versions"):
            assert "<b>" not in await page(frontend, f"/compare?what={subject}")
        assert "<b>" not in await page(frontend, "/?group=label&label=conf:a")
        await act(frontend, f"{tab('upstream', 'switches')}/bypass", backend="a", on="yes")
        await act(frontend, f"{tab('upstream', 'cache')}/store", start="0", end="9")
        await frontend.server.stop()
    assert {line for line in ANSWERS if line.endswith(("/status", "/info", "/meta", "/conf", "/quota"))} <= set(asked)


async def test_a_reason_may_be_of_any_shape(frontend_server: StartFrontend) -> None:
    places: list[object] = [5, None, "x", {"a": 1}, [1, None]]
    body = json.dumps({"detail": [*({"loc": place, "msg": "wrong"} for place in places), 7]})
    answer = f"HTTP/1.1 422 No\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    async with serving(Upstream(answer)) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_history=True)
        assert (await page(frontend, tab("upstream", "meta"))).count("wrong") >= len(places)
        await frontend.server.stop()  # before the node, or a connection to it would be left


def test_json_is_such_that_a_page_can_show_it() -> None:
    def read(body: str) -> object:
        return Outcome("ok", 200, body.encode()).json()

    assert read(f"[{'1' * 299}, 7]") == [int("1" * 299), 7]
    assert read(f"[{'1' * 301}, 7]") == [float("1" * 301), 7]
    assert read('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"
    assert read('"\\\\ud800"') == "\\ud800"
    assert read('"a\\ud800"') == "a?"
    assert read("[" * 90 + "]" * 90) is not None
    assert read("[" * 101 + "]" * 101) is None


@pytest.mark.parametrize(
    ("kind", "part", "status"),
    [
        ("; boundary=a", "--a\r\nContent-Disposition: form-data; name=" + "(" * 20_000 + "\r\n\r\n1\r\n--a--\r\n", 200),
        ("; boundary=" + "(" * 5000, "", 200),
        ("; boundary=a", "--a\r\nContent-Disposition: form-data; name=x\r\n\r\n1\r\n" * 1100, 400),
        (
            "; boundary=0",
            "".join(f"--{i}\r\nContent-Type: multipart/mixed; boundary={i + 1}\r\n\r\n" for i in range(900)),
            200,
        ),
        ("", "--a--", 400),
    ],
    ids=range(5),
)
async def test_any_form_is_read_or_refused(frontend_server: StartFrontend, kind: str, part: str, status: int) -> None:
    frontend = await frontend_server(nodes=[{"name": "w", "host": "127.0.0.1", "port": 9}])
    headers = {"Content-Type": f"multipart/form-data{kind}"}
    path = f"{frontend.url}{tab('w', 'cache')}/record"
    async with frontend.client.post(path, data=part.encode(), headers=headers) as response:
        assert response.status == status, await response.text()


async def test_a_form_with_a_file_is_read(frontend_server: StartFrontend) -> None:
    frontend = await frontend_server()
    form = aiohttp.FormData()
    text = '[{"name": "w", "host": "127.0.0.1", "port": 9}]\r\n--\r\n'
    form.add_field("file", text.encode(), filename="nodes.json", content_type="application/json")
    form.add_field("text", "")
    async with frontend.client.post(f"{frontend.url}/manage/import", data=form) as response:
        assert response.status == 200
        assert html.escape(text[:10]) in (await response.text()).replace("&#34;", "&quot;")


def test_what_is_long_takes_no_longer_than_its_length() -> None:
    begun = time.monotonic()
    text = "Thread: a\n" + '  File "' * 200_000
    assert stacks(text)[0].top == "no Python frame"
    assert set(tree(levels_of("a" + ".a" * 100_000 + ": DEBUG\nroot: INFO"), {})) == set(tree({"root": "INFO"}, {}))
    assert len(groups({f"{i}_{i}": "" for i in range(40_000)})) == 1
    assert len(runs_of([0] * 1_000_000)) == MAX_RUNS
    with pytest.raises(ValueError, match="a line has more than"):
        families("a{" + ",".join(f'b{i}="c"' for i in range(150_000)) + "} 1\n")
    assert time.monotonic() - begun < PLENTY_SECONDS


async def test_a_page_has_so_many_rows(frontend_server: StartFrontend) -> None:
    many = json.dumps({f"name{i}": i for i in range(5000)})
    parts = json.dumps({f"name{i}": {"a": i, "b": i} for i in range(2500)})
    answers = {"GET /env": many, "GET /meta": many, "GET /inference_info": parts}
    async with serving(Upstream(talk=telling(answers, []))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_history=True)
        for name in ("env", "meta", "inference"):
            text = await page(frontend, tab("upstream", name))
            assert text.count("<tr") < 5000
            assert "and 2,000 more that are not listed" in text
        await frontend.server.stop()


async def test_a_search_has_few_words(frontend_server: StartFrontend) -> None:
    loggers = "".join(f"a.{i}: INFO\n" for i in range(2000))
    async with serving(Upstream(talk=telling({"GET /loglevel": loggers}, []))) as upstream:
        frontend = await frontend_server(nodes=[upstream.node], no_history=True)
        text = await page(frontend, tab("upstream", "loglevel") + "?q=" + "+".join(["a."] * 34 + ["nowhere"]))
        assert "a.1999" in text and "Nothing fits the search. " in text
        assert re.search(r"<tr[^>]* hidden[^>]*>", text) is None
        await frontend.server.stop()


def test_a_number_beyond_a_floats_is_none() -> None:
    assert number(10**400) is None
    assert number(10**300) == 10**300


def test_numbers_in_names_and_shapes_may_be_of_any_size() -> None:
    assert sorted(["a10", "a9", f"a{LONG}{LONG}", "10", "b"], key=natural)[:3] == ["10", "a9", "a10"]
    found = read_layout({"layers": {"a": {"shape": [1] * 10_000}, "b": {"shape": [3, 2, 2], "dtype": f"int{LONG}9"}}})
    assert [layer.name for layer in found.layers] == ["b"] and found.bytes
    assert layout_of([1e300, 1e300], "float16", 1) is None
    assert layout_of([2] * 10_000, "float16", 1) is None


def test_no_cell_of_a_table_is_a_formula() -> None:
    for text in ("=1", "+1", "-1", "@a", "\t=1", "\r=1", "\n=1"):
        assert cell_of(text) == f"'{text}"
    assert cell_of("a=1") == "a=1"


def test_settings_have_so_many_levels() -> None:
    deep = "[" * 500 + "]" * 500
    for text in (f"a = {deep}", f'{{"a": {deep}}}'):
        with pytest.raises(Refusal, match="levels"):
            KINDS["settings"].values(lambda name, text=text: text)  # type: ignore[misc]
    assert Setting("a", [], {}).taken(deep)[1]
