"""A real Prometheus before our frontend, before everything of LMCache that has metrics."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_api.pytest_plugin import StartApi
from tests.e2e.prometheus import check_metrics, fetch, lints_of_ours, running_prometheus
from tests.lmcache.processes import (
    Engine,
    ask,
    client_of,
    node_at,
    running_controller,
    running_frontend,
    running_multiprocess,
    short_folder,
)

pytestmark = [pytest.mark.lmcache, pytest.mark.timeout(300)]

LMCACHES_NAMES = ("lmcache:", "lmcache_mp_", "python_", "process_", "target_info")
"""Whose names promtool may dislike: they are LMCache's to choose."""


@pytest.fixture(scope="module")
def servers(lmcache_python: str) -> Iterator[list[dict[str, object]]]:
    """LMCache's multiprocess server and its controller, as nodes."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(short_folder())
        multiprocess = stack.enter_context(running_multiprocess(lmcache_python, folder))
        controller = stack.enter_context(running_controller(lmcache_python, folder))
        yield [
            {"name": "multiprocess", "host": "127.0.0.1", "port": multiprocess},
            {"name": "controller", "host": "127.0.0.1", "port": controller},
        ]


async def test_prometheus_scrapes_all_of_lmcache_both_ways(
    engine: Engine, servers: list[dict[str, object]], api_server: StartApi, tmp_path: Path
) -> None:
    workers = [await api_server(role="worker"), await api_server(role="worker", worker_id=1, tcp=True)]
    embedded = [{**worker.node, "name": f"embedded{number}"} for number, worker in enumerate(workers)]
    async with client_of(engine.socket) as client:
        assert (await ask(client, "POST", "/cache/store?tokens_mock=0,512")).status == 200
        assert (await ask(client, "POST", "/cache/retrieve?tokens_mock=0,600")).status == 200
    nodes = [node_at(engine.socket), *servers, *embedded]

    def look() -> None:
        with short_folder() as folder, running_frontend(folder, nodes) as url:
            for query in ("", "?node=multiprocess&node=controller"):
                said = check_metrics(fetch(f"{url}/metrics{query}"))
                assert lints_of_ours(said) == []
                assert [line for line in said if not line.startswith(LMCACHES_NAMES)] == []
            with running_prometheus(tmp_path, url.removeprefix("http://")) as prometheus:
                prometheus.wait_until_scraped(len(nodes) + 2)
                assert prometheus.drops() == {}
                assert prometheus.value("count(up == 1)") == len(nodes) + 2
                assert prometheus.value("sum(lmcache_frontend_scrape_success)") == len(nodes)
                assert prometheus.value("max(lmcache_frontend_type_conflicts)") == 0
                for family, named in {
                    "lmcache:lmcache_is_healthy": {"worker0", "embedded0", "embedded1"},
                    "lmcache_mp_l1_usage_ratio": {"multiprocess"},
                    "process_resident_memory_bytes": {str(node["name"]) for node in nodes},
                }.items():
                    for job in ("lmcache", "lmcache_nodes"):
                        found = prometheus.query(f'{family}{{job="{job}"}}')
                        assert {row["metric"]["node"] for row in found} == named, (family, job)

    await asyncio.to_thread(look)


async def test_the_rules_and_the_dashboard_use_families_of_the_real_lmcache(
    engine: Engine, servers: list[dict[str, object]]
) -> None:
    async with client_of(engine.socket) as client:
        text = (await ask(client, "GET", "/metrics")).text
    async with client_of(f"http://127.0.0.1:{servers[0]['port']}") as client:
        text += (await ask(client, "GET", "/metrics")).text
    there = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    config = Path(__file__).parents[2] / "config"
    used = (config / "alerts.yml").read_text() + (config / "grafana-dashboard.json").read_text()
    names = set(re.findall(r"\b(?:lmcache:|lmcache_mp_)\w+", used))
    assert len(names) > 20
    assert {re.sub("_bucket$", "", name) for name in names} - there == set()
