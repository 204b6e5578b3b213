"""The cache on a node's page: tokens, the paged KV cache, checksums; before real embedded components."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.pages import checksum_view, kv_layout
from lmcache_frontend.pages.token_range import TokenRange
from lmcache_frontend.pytest_plugin import StartFrontend
from tests.frontend.boards import settled
from tests.frontend.node_pages import act, changes, page, problem, tab
from tests.frontend.upstream import Upstream, serving

CACHE = tab("lmcache_worker0", "cache")


def headline(text: str) -> str:
    found = re.search(r'class="headline" role="status">(.*?)</p>', text, re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", "", found[1]).split()) if found else ""


async def test_tokens_are_looked_up_stored_retrieved_and_cleared(
    api_server: StartApi, frontend_server: StartFrontend
) -> None:
    worker = await api_server()
    frontend = await frontend_server(nodes=[worker.node])
    await settled(frontend)
    assert headline(await page(frontend, CACHE)) == "0 of 512 tokens known, 0 %"
    plan = await act(frontend, f"{CACHE}/store", start="0", end="512")
    assert "Store tokens 0 to 512" in plan
    assert changes(plan) == [("Tokens known", "0", "512, in full chunks")]
    done = await act(frontend, f"{CACHE}/store", True, start="0", end="512")
    assert "knows 512 of 512 tokens" in done
    text = await page(frontend, f"{CACHE}?start=0&end=900")
    assert headline(text) == "512 of 900 tokens known, 56.9 %"
    assert "LocalCPUBackend" in text
    done = await act(frontend, f"{CACHE}/retrieve", True, start="0", end="900")
    assert "512 of 900 tokens were brought back" in done
    plan = await act(frontend, f"{CACHE}/clear", location=["LocalCPUBackend"])
    assert changes(plan)[0][0::2] == ("LocalCPUBackend", "nothing")
    assert "512 tokens were forgotten" in await act(frontend, f"{CACHE}/clear", True, location=["LocalCPUBackend"])
    assert "Clear the whole cache" in await act(frontend, f"{CACHE}/clear")
    assert headline(await page(frontend, CACHE)) == "0 of 512 tokens known, 0 %"


async def test_a_store_that_kept_nothing_is_told_as_such(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server()
    frontend = await frontend_server(nodes=[worker.node])
    async with worker.client.put("/freeze/enable"):
        pass
    assert "is it frozen?" in problem(await act(frontend, f"{CACHE}/store", True, start="0", end="512"))


async def test_a_scheduler_tells_of_its_workers_alone(api_server: StartApi, frontend_server: StartFrontend) -> None:
    scheduler = await api_server(role="scheduler")
    frontend = await frontend_server(nodes=[scheduler.node])
    await settled(frontend)
    text = await page(frontend, tab("lmcache_scheduler", "cache"))
    assert "holds no cache itself" in text
    assert "/cache/clear" not in text


@pytest.mark.parametrize("query", ["start=5&end=5", "start=-1", "end=x", "end=" + "9" * 40, "start=%C2%B2"])
async def test_a_range_that_is_none_is_said_and_nothing_is_stored(
    api_server: StartApi, frontend_server: StartFrontend, query: str
) -> None:
    worker = await api_server()
    frontend = await frontend_server(nodes=[worker.node])
    assert problem(await page(frontend, f"{CACHE}?{query}"))
    start, end = (dict(it.split("=") for it in query.split("&")).get(name, "") for name in ("start", "end"))
    assert problem(await act(frontend, f"{CACHE}/store", True, start=start, end=end))


async def test_files_are_loaded_and_slots_recorded(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server()
    frontend = await frontend_server(nodes=[worker.node])
    assert "Write the path" in problem(await act(frontend, f"{CACHE}/load", True, config_path=" "))
    assert "no number" in problem(await act(frontend, f"{CACHE}/load", True, config_path="/a", max_chunks="many"))
    text = await act(frontend, f"{CACHE}/load", True, config_path="/nope.yaml", max_chunks="3")
    assert "Invalid configuration file" in text
    for enabled, word in (("true", "on"), ("false", "off")):
        assert changes(await act(frontend, f"{CACHE}/record", enabled=enabled))[0][2] == word
        assert f"The node says that it is {word}." in await act(frontend, f"{CACHE}/record", True, enabled=enabled)


async def test_the_paged_cache_is_a_picture(api_server: StartApi, frontend_server: StartFrontend) -> None:
    worker = await api_server()
    frontend = await frontend_server(nodes=[worker.node])
    text = await page(frontend, f"{CACHE}?view=layout")
    assert 'aria-label="2 layers of 512 slots in 1 kinds"' in text
    assert (
        "2 \N{MULTIPLICATION SIGN} 2 \N{MULTIPLICATION SIGN} 256 \N{MULTIPLICATION SIGN} 4 \N{MULTIPLICATION SIGN} 16"
        in text
    )
    async with serving(Upstream(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        assert "No paged KV cache" in await page(frontend, f"{tab('upstream', 'cache')}?view=layout")


async def test_checksums_of_two_nodes_are_compared(api_server: StartApi, frontend_server: StartFrontend) -> None:
    workers = [await api_server(worker_id=i) for i in range(2)]
    frontend = await frontend_server(nodes=[worker.node for worker in workers])
    await settled(frontend)
    other = quote(tab("lmcache_worker1", ""), safe="")
    view = f"{CACHE}?view=checksums"
    assert 'value="/nodes/local_proxy/lmcache_worker1"' in await page(frontend, view)
    asked = f"{view}&slots=[0,511]&chunk_size=64&layers=yes"
    alone = await page(frontend, asked)
    assert alone.count('class="sum"') == 16
    assert "448\N{EN DASH}511" in alone
    for worker in workers:
        async with worker.client.post("/cache/retrieve?tokens_mock=0,512"):
            pass
    same = f"{CACHE}?view=checksums&slots=[0,511]&chunk_size=64&layers=yes&with={other}"
    text = await page(frontend, same)
    assert headline(text).startswith(("All equal 16 chunks", "16 of 16 differ"))
    text = await page(frontend, f"{view}&slots=[0,511]&chunk_size=64&with={other}")
    assert "all layers" in text


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("slots=[0,9&chunk_size=4", "Invalid slot"),
        ("slots=[0,99999]&chunk_size=4", "out of bounds"),
        ("slots=0&chunk_size=x", "is no number of slots"),
        ("slots=0&chunk_size=0", "is no number of slots"),
        ("slots=0&chunk_size=1&with=%2Fnodes%2Fa%2Fb", "no longer known"),
        ("slots=%3Cb%3E&chunk_size=1", "&lt;b&gt;"),
    ],
)
async def test_checksums_that_cannot_be_are_explained(
    api_server: StartApi, frontend_server: StartFrontend, query: str, expected: str
) -> None:
    worker = await api_server()
    frontend = await frontend_server(nodes=[worker.node])
    text = await page(frontend, f"{CACHE}?view=checksums&{query}")
    assert expected in text
    assert "<b>" not in text


async def test_another_node_that_tells_nothing_leaves_this_ones_checksums(
    api_server: StartApi, frontend_server: StartFrontend
) -> None:
    worker, scheduler = await api_server(), await api_server(role="scheduler")
    frontend = await frontend_server(nodes=[worker.node, scheduler.node])
    other = quote(tab("lmcache_scheduler", ""), safe="")
    text = await page(frontend, f"{CACHE}?view=checksums&slots=[0,9]&chunk_size=5&with={other}")
    assert "The other node does not tell its checksums" in text
    assert text.count('class="sum"') == 2


def layers(count: int, shape: list[int]) -> dict[str, object]:
    return {f"model.layers.{i}": {"shape": shape, "dtype": "torch.bfloat16", "device": "cuda:0"} for i in range(count)}


def test_a_large_cache_is_a_small_picture() -> None:
    told = {
        "layers": {**layers(100, [2, 20_000, 16, 8, 128]), "mla": {"shape": [9, 16, 576], "dtype": "", "device": ""}}
    }
    layout = kv_layout.read_layout(told)
    assert (layout.slots, layout.layers_a_row, layout.blocks_a_column) == (320_000, 1, 209)
    assert [layer.name for layer in layout.layers[10:12]] == ["model.layers.9", "model.layers.10"]
    assert [(kind.letter, len(kind.layers)) for kind in layout.kinds] == [("A", 1), ("B", 100)]
    assert layout.layers[1].bytes == 2 * 20_000 * 16 * 8 * 128 * 2
    assert len(kv_layout.picture(layout)) < 40_000
    many = kv_layout.read_layout({"layers": layers(5000, [2, 20_000, 16, 8, 128])})
    assert (many.layers_a_row, len(kv_layout.picture(many)) < 40_000) == (40, True)


@pytest.mark.parametrize(
    "told", [{}, {"layers": 3}, {"layers": {"a": 3, "b": {"shape": "x"}, "c": {"shape": [1, -1]}, "d": {"shape": []}}}]
)
def test_shapes_that_are_none_have_no_picture(told: dict[str, object]) -> None:
    assert kv_layout.picture(kv_layout.read_layout(told)) == ""


def test_what_differs_is_told_in_runs_of_chunks() -> None:
    here = {"l10": ["a", "b", "c", "d"], "l9": ["a", "b"]}
    there = {"l10": ["a", "x", "y", "d"], "l9": ["a"]}
    found = checksum_view.compare(here, there, [(0, 3), (100, 103)], 2)
    assert (found.total, found.different, found.missing, found.layers) == (6, 2, 1, 2)
    assert [(it.layer, it.first, it.last, it.slots) for it in found.differences] == [
        ("l9", 1, 1, "2\N{EN DASH}3"),
        ("l10", 1, 2, "2\N{EN DASH}3, 100\N{EN DASH}101"),
    ]
    equal = checksum_view.compare(here, here, [], 2)
    assert equal.is_equal
    assert 'class="different" d=""' in checksum_view.picture(equal)
    big = {f"l{i}": [str(j) for j in range(5000)] for i in range(200)}
    other = {name: [*sums[:-1], "other"] for name, sums in big.items()}
    found = checksum_view.compare(big, other, [(0, 4999)], 1)
    assert (found.layers_a_row, found.chunks_a_column, found.runs, len(found.differences)) == (4, 53, 200, 100)
    assert len(checksum_view.picture(found)) < 20_000


def test_a_range_of_tokens_is_bounded() -> None:
    asked = {"start": "0", "end": "1000"}
    assert TokenRange.of(lambda name, _: asked[name]).query == "tokens_mock=0,1000"
    assert "1,000 tokens" in TokenRange.of(lambda name, _: asked[name], most=999).problem
