"""Our frontend, as a process, before a real LMCache engine."""

from __future__ import annotations

from html.parser import HTMLParser

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lmcache_shared.address import quote_socket
from tests.lmcache.processes import NODE, Engine, ask

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(300)]

SAME_EVERY_TIME = [
    ("GET", "/version"),
    ("GET", "/lmc_version"),
    ("GET", "/commit_id"),
    ("GET", "/inference_info"),
    ("GET", "/meta"),
    ("GET", "/meta?names=worker_id,model_name"),
    ("GET", "/conf"),
    ("GET", "/conf?names=chunk_size,local_cpu,nope"),
    ("GET", "/backends"),
    ("GET", "/bypass/list"),
    ("GET", "/env"),
    ("GET", "/cache/kvcache/info"),
    ("GET", "/cache/kvcache/check?slot_mapping=0,[4,7],9&chunk_size=2&layerwise=true"),
    ("GET", "/cache/kvcache/check?slot_mapping=0%2C%5B4,7%5D&chunk_size=2"),
    ("GET", "/openapi.json"),
    ("GET", "/version/"),  # a redirect, which the proxy hands on
    ("GET", "/threads?thread_id=abc"),
    ("GET", "/nope"),
    ("GET", "/nope/%2F%2520?a=%26&a=b+c"),
    ("HEAD", "/version"),
    ("DELETE", "/version"),
    ("OPTIONS", "/conf"),
    ("PUT", "/bypass/add?backend_name=Nope"),
    ("POST", "/cache/store?tokens_mock=5"),
    ("POST", "/metrics/reset"),
]


def names_of(exposition: str) -> set[str]:
    return {family.name for family in text_string_to_metric_families(exposition)}


class Rows(HTMLParser):
    """The cells' texts of every row of a page's tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data.strip()


async def test_the_nodes_list_the_engine(frontend: aiohttp.ClientSession, engine: Engine) -> None:
    (proxy,) = (await ask(frontend, "GET", "/api/nodes")).json()["nodes"]
    assert proxy["name"] == "local_proxy"
    (node,) = proxy["children"]
    assert node == {
        "id": f"node_{NODE}",
        "name": NODE,
        "host": "localhost",
        "port": str(engine.socket),
        "is_proxy": False,
        "proxy_id": "local_proxy",
    }


@pytest.mark.parametrize("times", [1, 2])
async def test_a_socket_in_the_path_is_quoted_once_or_twice(
    frontend: aiohttp.ClientSession, direct: aiohttp.ClientSession, engine: Engine, times: int
) -> None:
    path = f"/proxy/localhost/{quote_socket(str(engine.socket), times=times)}/version"
    answer = await ask(frontend, "GET", path)
    assert answer == await ask(direct, "GET", "/version")
    assert answer.status == 200
    assert answer.json().startswith("0.5.6")


@pytest.mark.parametrize(("method", "path"), SAME_EVERY_TIME)
async def test_an_answer_comes_through_byte_for_byte(
    frontend: aiohttp.ClientSession, direct: aiohttp.ClientSession, method: str, path: str
) -> None:
    expected = await ask(direct, method, path)
    assert await ask(frontend, method, f"/proxy2/{NODE}{path}") == expected


async def test_the_chosen_settings_come_through(frontend: aiohttp.ClientSession) -> None:
    answer = await ask(frontend, "GET", f"/proxy2/{NODE}/conf?names=chunk_size,local_cpu")
    assert (answer.status, answer.media_type) == (200, "text/plain")
    assert answer.json() == {"chunk_size": 256, "local_cpu": True}


async def test_a_body_goes_to_the_engine(frontend: aiohttp.ClientSession, direct: aiohttp.ClientSession) -> None:
    for value in (512, 0):
        answer = await ask(frontend, "POST", f"/proxy2/{NODE}/conf", json={"min_retrieve_tokens": value})
        assert (answer.status, answer.json()) == (200, {"updated": {"min_retrieve_tokens": value}})
        seen = await ask(direct, "GET", "/conf?names=min_retrieve_tokens")
        assert seen.json() == {"min_retrieve_tokens": value}


async def test_a_form_goes_to_the_engine(frontend: aiohttp.ClientSession) -> None:
    form = aiohttp.FormData()
    form.add_field("script", "result = 1 + 1", filename="s.py")
    answer = await ask(frontend, "POST", f"/proxy2/{NODE}/run_script", data=form)
    assert answer.status == 404
    assert answer.text.startswith("The /run_script API is disabled.")


async def test_the_metrics_come_through(frontend: aiohttp.ClientSession, direct: aiohttp.ClientSession) -> None:
    answer = await ask(frontend, "GET", f"/proxy2/{NODE}/metrics")
    assert (answer.status, answer.media_type) == (200, "text/plain")
    names = names_of(answer.text)
    assert "lmcache:num_store_requests" in names
    assert names == names_of((await ask(direct, "GET", "/metrics")).text)


async def test_bytes_are_stored_found_and_cleared(
    frontend: aiohttp.ClientSession, direct: aiohttp.ClientSession, engine: Engine
) -> None:
    by_name = f"/proxy2/{NODE}"
    by_socket = f"/proxy/localhost/{quote_socket(str(engine.socket), times=2)}"
    stored = await ask(frontend, "POST", f"{by_socket}/cache/store?tokens_mock=0,512")
    assert (stored.status, stored.json()) == (200, {"status": "success", "num_tokens": 512})

    found = await ask(frontend, "POST", f"{by_name}/cache/retrieve?tokens_mock=0,600")
    assert (found.status, found.json()) == (200, {"status": "success", "num_tokens": 600, "num_retrieved": 512})
    assert found == await ask(direct, "POST", "/cache/retrieve?tokens_mock=0,600")

    cleared = await ask(
        frontend, "DELETE", f"{by_name}/cache/clear?locations=LocalDiskBackend&locations=LocalCPUBackend"
    )
    assert (cleared.status, cleared.json()) == (200, {"status": "success", "num_removed": 512})


async def test_what_the_engine_does_not_know_is_its_404(frontend: aiohttp.ClientSession) -> None:
    answer = await ask(frontend, "GET", f"/proxy2/{NODE}/nope")
    assert (answer.status, answer.media_type, answer.json()) == (404, "application/json", {"detail": "Not Found"})


async def test_a_node_that_nobody_registered_is_our_404(frontend: aiohttp.ClientSession) -> None:
    answer = await ask(frontend, "GET", "/proxy2/nobody/version")
    assert (answer.status, answer.json()) == (404, {"detail": "Node with name 'nobody' not found"})


async def test_the_dashboard_shows_the_engine_up(
    frontend: aiohttp.ClientSession, direct: aiohttp.ClientSession, engine: Engine
) -> None:
    version = (await ask(direct, "GET", "/version")).json()
    page = await ask(frontend, "GET", "/")
    assert (page.status, page.media_type) == (200, "text/html")
    assert "1 of 1 nodes up" in page.text
    page = await ask(frontend, "GET", "/nodes")
    (row,) = [row for row in Rows(page.text).rows if any(cell.startswith(NODE) for cell in row)]
    for told in (NODE, str(engine.socket), "worker", version, "up"):
        assert any(told in cell for cell in row), (told, row)
