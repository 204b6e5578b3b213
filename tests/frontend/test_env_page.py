"""The tab of the environment."""

import pytest

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.pages.tabs.env_tab import groups
from lmcache_frontend.pytest_plugin import StartFrontend
from tests.frontend.tabs import pages_of, part


def test_groups_by_prefix_known_ones_first() -> None:
    values = {
        "ZED_A": "1",
        "ZED_B": "1",
        "ZED_C": "1",
        "PATH": "/bin",
        "CUDA_X": "0",
        "LMCACHE_A": "1",
        "NCCL_Y": "1",
        "_": "x",
    }
    found = [(group.title, [it.name for it in group.variables]) for group in groups(values)]
    assert found == [
        ("LMCache", ["LMCACHE_A"]),
        ("GPU", ["CUDA_X", "NCCL_Y"]),
        ("ZED_", ["ZED_A", "ZED_B", "ZED_C"]),
        ("Everything else", ["PATH", "_"]),
    ]


async def test_values_in_groups_secrets_masked_searched_by_address(
    api_server: StartApi, frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PAGE", "<script>")
    monkeypatch.setenv("VLLM_API_KEY", "do-not-tell")
    monkeypatch.setenv("PAGE_LONG", "x" * 1000)
    pages = await pages_of(frontend_server, await api_server())
    text = await pages.open("env")
    assert "vLLM 2" in part(text)
    assert "VLLM_API_KEY masked" in part(text)
    assert "do-not-tell" not in text
    assert "<script>" not in text[text.index('id="rows"') :]
    assert '<details class="long">' in text
    text = await pages.open("env", q="vllm script")
    assert 'data-text="VLLM_PAGE=&lt;script&gt;">' in text
    assert 'data-text="VLLM_API_KEY=***" hidden>' in text
    assert "1 of " in part(text)


async def test_who_is_no_admin_is_told_so_and_how_to_become_one(
    api_server: StartApi, frontend_server: StartFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PAGE", "for-admins")
    pages = await pages_of(frontend_server, await api_server(), no_trust_local=True, token="a-token-of-sixteen")
    text = await pages.open("env")
    assert "Your role is not enough To see the environment you need the role admin" in part(text)
    assert '<a href="/sign-in">Sign in</a>' in text
    assert "for-admins" not in text
    pages.frontend.client.headers["Authorization"] = "Bearer a-token-of-sixteen"
    assert "for-admins" in await pages.open("env")
