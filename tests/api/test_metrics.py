from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from lmcache_api.embedded import EmbeddedComponent
from lmcache_api.pytest_plugin import RunningApi, StartApi


async def scrape(server: RunningApi) -> dict[str, float]:
    async with server.client.get("/metrics") as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = text_string_to_metric_families(await response.text())
        return {
            sample.name
            + str(
                {k: v for k, v in sample.labels.items() if k not in ("model_name", "role", "served_model_name")}
            ): sample.value
            for family in families
            for sample in family.samples
        }


async def test_families_carry_lmcaches_names(api_server: StartApi) -> None:
    found = await scrape(await api_server(role="worker", worker_id=3))
    assert found["lmcache:lmcache_is_healthy{'worker_id': '3'}"] == 1
    assert found["lmcache:periodic_threads_total_count{'worker_id': '3'}"] == 2
    assert found["lmcache:periodic_threads_critical_active{'worker_id': '3'}"] == 2
    assert found["lmcache:periodic_threads_low_total{'worker_id': '3'}"] == 0
    assert found["process_resident_memory_bytes{}"] > 1e6


async def test_reset_puts_counters_and_histograms_back_and_leaves_gauges(api_server: StartApi) -> None:
    server = await api_server()
    assert isinstance(server.component, EmbeddedComponent)
    registry = server.component.metrics.registry
    Counter("plain", "x", registry=registry).inc(3)
    Counter("labelled", "x", ["a"], registry=registry).labels("1").inc(3)
    Histogram("spread", "x", ["a"], registry=registry, buckets=[1]).labels("1").observe(0.5)
    Gauge("now", "x", registry=registry).set(3)
    names = ["plain_total{}", "labelled_total{'a': '1'}", "spread_count{'a': '1'}", "spread_sum{'a': '1'}", "now{}"]
    before = await scrape(server)
    assert [before[name] for name in names] == [3, 3, 1, 0.5, 3]
    async with server.client.post("/metrics/reset") as response:
        assert (response.status, await response.text()) == (200, "ok")
    after = await scrape(server)
    assert [after[name] for name in names] == [0, 0, 0, 0, 3]
    assert after["spread_bucket{'a': '1', 'le': '+Inf'}"] == 0


async def test_two_servers_in_one_process_do_not_see_each_other(api_server: StartApi) -> None:
    first, second = await api_server(role="scheduler"), await api_server(role="worker")
    assert isinstance(first.component, EmbeddedComponent)
    Counter("mine", "x", registry=first.component.metrics.registry).inc()
    assert "mine_total{}" in await scrape(first)
    assert "mine_total{}" not in await scrape(second)
    async with second.client.post("/metrics/reset"):
        pass
    assert (await scrape(first))["mine_total{}"] == 1
    for server, role in ((first, "scheduler"), (second, "worker")):
        async with server.client.get("/meta?names=role") as response:
            assert f'"role": "{role}"' in await response.text()
