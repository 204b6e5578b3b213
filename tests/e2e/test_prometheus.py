"""Prometheus before our frontend: `config/prometheus.yml` as it is, both ways, with embedded workers."""

import asyncio
import json
import re
import subprocess
from pathlib import Path

import yaml

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.pytest_plugin import StartFrontend
from tests.e2e.processes import ROOT
from tests.e2e.prometheus import CONFIG, Prometheus, check_metrics, fetch, lints_of_ours, running_prometheus

ALERTS = ROOT / "config" / "alerts.yml"
DASHBOARD = ROOT / "config" / "grafana-dashboard.json"

NOT_HERE = {"lmcache:remote_time_to_get_bucket", "lmcache:remote_time_to_put_bucket"}
"""What exists when there is a remote backend."""


def test_promtool_takes_the_configuration_and_the_rules() -> None:
    for command in (["config", CONFIG], ["rules", ALERTS]):
        done = subprocess.run(["promtool", "check", *command], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "SUCCESS" in done.stdout


async def test_promtool_takes_the_merge_and_likes_our_names(
    api_server: StartApi, frontend_server: StartFrontend
) -> None:
    workers = [await api_server(role="worker", worker_id=number) for number in range(2)]
    frontend = await frontend_server(nodes=[worker.node for worker in workers])
    await (await frontend.client.get("/proxy2/lmcache_worker0/version")).read()
    await (await frontend.client.get("/proxy/10.9.9.9/80/a")).read()
    said = await asyncio.to_thread(lambda: check_metrics(fetch(f"{frontend.url}/metrics")))
    assert lints_of_ours(said) == []
    assert {line.split(":")[0] for line in said} <= {"lmcache"}, said


async def test_prometheus_scrapes_all_nodes_both_ways(
    api_server: StartApi, frontend_server: StartFrontend, tmp_path: Path
) -> None:
    on_socket = await api_server(role="worker")
    on_port = await api_server(role="worker", worker_id=1, tcp=True)
    scheduler = await api_server(role="scheduler")
    behind = {"name": "rack", "host": "127.0.0.1"}
    far = await frontend_server(nodes=[scheduler.node])
    nodes = [
        {**on_socket.node, "name": "a worker/with 50% of it"},
        {**on_port.node, "name": "ünïcode"},
        {**behind, "port": far.server.address.port, "nodes": [scheduler.node]},
    ]
    frontend = await frontend_server(nodes=nodes)
    for worker in (on_socket, on_port):
        await (await worker.client.post("/cache/store?tokens_mock=0,512")).read()
        await (await worker.client.post("/cache/retrieve?tokens_mock=0,512")).read()

    await (await frontend.client.get("/proxy/10.9.9.9/80/refused")).read()

    def look() -> None:
        with running_prometheus(tmp_path, f"127.0.0.1:{frontend.server.address.port}") as prometheus:
            prometheus.wait_until_scraped(len(nodes) + 2)
            assert prometheus.drops() == {}
            both_ways_tell_the_same(prometheus, len(nodes))
            what_rules_and_panels_use_exists(prometheus)

    await asyncio.to_thread(look)


def both_ways_tell_the_same(prometheus: Prometheus, nodes: int) -> None:
    assert prometheus.value("count(up == 1)") == nodes + 2
    assert prometheus.value("sum(lmcache_frontend_scrape_success)") == nodes
    assert prometheus.value('sum(lmcache_frontend_nodes{job="lmcache_frontend"})') == nodes
    found = {
        job: {
            tuple(sorted((key, value) for key, value in row["metric"].items() if key not in ("job", "__name__")))
            for row in prometheus.query(f'{{__name__=~"lmcache:.*", job="{job}"}}')
        }
        for job in ("lmcache", "lmcache_nodes")
    }
    assert found["lmcache"] == found["lmcache_nodes"]
    assert len(found["lmcache"]) > 100
    for labels in map(dict, found["lmcache"]):
        assert labels.keys() >= {"node", "proxy", "instance"}
        assert not any(name.startswith("exported_") for name in labels)
    proxies = {dict(labels)["proxy"] for labels in found["lmcache"]}
    assert proxies == {"local_proxy", "rack"}
    assert prometheus.value('sum(lmcache:num_stored_tokens_total{job="lmcache"})') == 1024


def what_rules_and_panels_use_exists(prometheus: Prometheus) -> None:
    rules = [rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    expressions = [expression.replace("$__rate_interval", "1m") for expression in rules + panels]
    expressions = [expression.replace('"$node"', '".*"').replace('"$proxy"', '".*"') for expression in expressions]
    without_strings = [re.sub('"[^"]*"', '""', expression) for expression in expressions]
    used = {name for text in without_strings for name in re.findall(r"\b(?:lmcache|process_)[\w:]*", text)}
    assert len(used) > 30
    used = {name for name in used - NOT_HERE if not name.startswith("lmcache_mp_")}
    there = {row["metric"]["__name__"] for row in prometheus.query('count by (__name__) ({__name__!=""})')}
    assert used - there == set()
    for expression in expressions:
        prometheus.query(expression)  # it is PromQL
    states = prometheus.get("/api/v1/rules")["data"]["groups"]
    assert [rule["lastError"] for group in states for rule in group["rules"] if rule.get("lastError")] == []


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert names == {"datasource", "proxy", "node"}
    identities = [panel["id"] for panel in dashboard["panels"]]
    assert len(identities) == len(set(identities))
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    taken = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(taken) == len(set(taken)), "no panel lies on another"
    assert max(x for x, _ in taken) < 24
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
