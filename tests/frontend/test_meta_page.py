"""The tabs of metadata and of the inference engine."""

from typing import Any

import pytest

from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.pages.tabs.meta_tab import layout_of
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_shared.settings import Settings
from tests.frontend.tabs import pages_of, pages_of_another, part


async def test_version_layout_and_every_value(api_server: StartApi, frontend_server: StartFrontend) -> None:
    pages = await pages_of(frontend_server, await api_server())
    text = part(await pages.open("meta")).replace("\N{MULTIPLICATION SIGN}", "x")
    for expected in (
        "Version 0.1.0-embedded Release 0.1.0 Commit embedded",
        "2 layers x 2 K and V x 256 tokens x 4 heads x 16 head size of float16",
        "128 KiB a chunk, 512 B a token",
        "engine_id not set",
        "use_mla false",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("shape", "dtype", "tokens", "chunk", "token"),
    [
        ([2, 2, 256, 4, 16], "torch.bfloat16", 256, 131072, 512),
        ([2, 1, 256, 1, 576], "torch.float8_e4m3fn", 256, 294912, 1152),
        ([1, 2, 4], "odd", 4, None, None),
        ([1, 2, 4], "uint8", None, 8, None),
    ],
)
def test_sizes_of_a_layout(shape: Any, dtype: str, tokens: Any, chunk: Any, token: Any) -> None:
    layout = layout_of(shape, dtype, tokens)
    assert layout is not None
    assert (layout.chunk_bytes, layout.token_bytes) == (chunk, token)


@pytest.mark.parametrize("shape", [None, "x", [], [1, "2"], [0], {"a": 1}, [True]])
def test_a_shape_that_is_none(shape: Any) -> None:
    assert layout_of(shape, "torch.float16", 256) is None


async def test_a_node_that_tells_part_of_it(frontend_server: StartFrontend) -> None:
    told = {"/meta": {"engine": {"a": {"b": "<i>"}, "empty": {}}}, "/version": "9"}
    async with pages_of_another(frontend_server, told) as pages:
        text = await pages.open("meta")
        assert "engine.a.b" in text
        assert "&lt;i&gt;" in text
        assert "Version 9 Release \N{EN DASH} Not Found" in part(text)
    async with pages_of_another(frontend_server, {"/meta": []}) as pages:
        assert "No metadata" in part(await pages.open("meta"))


INFO = {"vllm_version": "0.11", "model": {"dtype": "bfloat16", "parallel": {"size": 2}}, "none": None, "password": "x"}


class Inference:
    def info(self) -> Any:
        return INFO

    def version(self) -> str:
        return "0.11.0"


async def test_what_the_inference_engine_tells(api_server: StartApi, frontend_server: StartFrontend) -> None:
    def component(settings: Settings, index: int) -> EmbeddedComponent:
        made = EmbeddedComponent(settings, index)
        made.inference = Inference()  # type: ignore[assignment]
        return made

    pages = await pages_of(frontend_server, await api_server(component=component))
    assert "Inference" in await pages.tabs()
    text = await pages.open("inference", q="parallel")
    assert "vLLM 0.11.0" in part(text)
    assert "1 of 5 values" in part(text)
    assert "parallel.size" in text
    assert text.count(" hidden>") >= 4
    assert "password ***" in part(text)


async def test_where_there_is_no_inference_engine(api_server: StartApi, frontend_server: StartFrontend) -> None:
    pages = await pages_of(frontend_server, await api_server())
    assert "Inference" not in await pages.tabs()
    assert "Nothing told" in part(await pages.open("inference"))
