"""Every alert of `config/alerts.yml`, evaluated by promtool: it fires, and ends when its cause does."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.processes import ROOT

ALERTS = ROOT / "config" / "alerts.yml"
FRONTEND = {"job": "lmcache", "instance": "f:8080"}
NODE = {"job": "lmcache", "node": "w0", "proxy": "rack", "instance": "h:7000"}
OF_NODE = {"node": "w0", "proxy": "rack"}
"""What `sum by (node, proxy)` leaves."""


@dataclass(frozen=True)
class Case:
    """`series` is what Prometheus has scraped each minute from minute 0 on, in promtool's notation; `quiet` and `fires`
    are minutes; `value` is how the annotations tell the alert's.
    """

    alert: str
    series: dict[str, str]
    labels: dict[str, str]
    fires: tuple[int, ...]
    quiet: tuple[int, ...]
    value: str = ""


def series(name: str, labels: dict[str, str], **more: str) -> str:
    return name + "{" + ",".join(f"{key}={json.dumps(value)}" for key, value in {**labels, **more}.items()) + "}"


def then(*parts: tuple[float, float, int]) -> str:
    """One after the other: a first value, what each following minute adds, and how many follow."""
    return " ".join(f"{first}+{step}x{times}" for first, step, times in parts)


def bad_from_6_to_20(good: float, bad: float) -> str:
    return then((good, 0, 5), (bad, 0, 14), (good, 0, 60))


def rising_for(minutes: int, each: float) -> str:
    return then((0, each, minutes), (each * minutes, 0, 60))


CASES = [
    Case("LMCacheFrontendDown", {series("up", FRONTEND): bad_from_6_to_20(1, 0)}, FRONTEND, (8, 20), (5, 22)),
    Case(
        "LMCacheNodeScrapeFailing",
        {series("lmcache_frontend_scrape_success", NODE): bad_from_6_to_20(1, 0)},
        NODE,
        (9, 20),
        (7, 22),
    ),
    Case(
        "LMCacheNodeScrapeFailing",
        {series("up", {**NODE, "job": "lmcache_nodes"}): bad_from_6_to_20(1, 0)},
        {**NODE, "job": "lmcache_nodes"},
        (9, 20),
        (7, 22),
    ),
    Case(
        "LMCacheNodesDown",
        {
            series("lmcache_frontend_nodes", FRONTEND, state="down"): bad_from_6_to_20(0, 2),
            series("lmcache_frontend_nodes", FRONTEND, state="up"): then((5, 0, 60)),
        },
        FRONTEND,
        (9, 20),
        (7, 22),
        "2",
    ),
    Case(
        "LMCacheUnhealthy",
        {
            series("lmcache:lmcache_is_healthy", NODE, role="worker"): bad_from_6_to_20(1, 0),
            series("process_start_time_seconds", NODE): then((0, 0, 60)),
        },
        {**NODE, "role": "worker"},
        (12, 20),
        (10, 22),
    ),
    Case(
        "LMCacheCriticalThreadStopped",
        {
            series("lmcache:periodic_threads_critical_running", NODE): bad_from_6_to_20(2, 1),
            series("lmcache:periodic_threads_critical_total", NODE): then((2, 0, 60)),
        },
        NODE,
        (12, 20),
        (10, 22),
    ),
    Case(
        "LMCacheHitRateLow",
        {
            series("lmcache:num_hit_tokens_total", NODE): rising_for(60, 600),
            series("lmcache:num_requested_tokens_total", NODE): rising_for(60, 60_000),
        },
        OF_NODE,
        (35, 60),
        (25, 80),
        "1%",
    ),
    Case(
        "LMCacheEvictsMuch",
        {
            series("lmcache:local_cpu_evict_keys_count_total", NODE): rising_for(40, 600),
            series("lmcache:local_cpu_hot_cache_count", NODE): then((100, 0, 100)),
        },
        OF_NODE,
        (20, 40),
        (10, 60),
        "10%",
    ),
    Case(
        "LMCacheEvictionFails",
        {series("lmcache:local_cpu_evict_failed_count_total", NODE): rising_for(30, 1)},
        NODE,
        (10, 30),
        (3, 40),
    ),
    Case(
        "LMCacheRetrieveSlow",
        {
            series("lmcache:time_to_retrieve_bucket", NODE, le="1"): then((0, 0, 100)),
            series("lmcache:time_to_retrieve_bucket", NODE, le="5"): rising_for(30, 60),
            series("lmcache:time_to_retrieve_bucket", NODE, le="+Inf"): rising_for(30, 60),
        },
        OF_NODE,
        (15, 30),
        (8, 45),
        "4.8s",
    ),
    *[
        Case(
            "LMCacheTransfersFail",
            {series(name, NODE): then((4, 0, 9), (7, 0, 80))},
            NODE,
            (16, 18),
            (9, 12, 25, 80),
        )
        for name in ("lmcache:put_failed_count", "lmcache:get_blocking_failed_count")
    ],
    Case(
        "LMCacheRemoteUnreachable",
        {series("lmcache:remote_ping_errors_total", NODE): rising_for(30, 2)},
        NODE,
        (10, 30),
        (3, 40),
    ),
    Case(
        "LMCacheMultiprocessMemoryFull",
        {series("lmcache_mp_l1_usage_ratio", NODE): then((0.5, 0, 4), (0.99, 0, 24), (0.5, 0, 60))},
        NODE,
        (21, 29),
        (15, 31),
    ),
    Case(
        "LMCacheMultiprocessEventsDropped",
        {series("lmcache_mp_event_bus_dropped_events_total", NODE): then((3, 0, 9), (5, 0, 60))},
        NODE,
        (11, 18),
        (9, 25),
    ),
    Case(
        "LMCacheFrontendErrors",
        {series("lmcache_frontend_proxy_errors_total", NODE, reason="late"): rising_for(30, 60)},
        {**OF_NODE, "reason": "late"},
        (10, 30),
        (3, 40),
    ),
    Case(
        "LMCacheFrontendSlow",
        {
            series("lmcache_frontend_proxy_request_seconds_bucket", FRONTEND, kind="node", le="10"): then((0, 0, 100)),
            series("lmcache_frontend_proxy_request_seconds_bucket", FRONTEND, kind="node", le="30"): rising_for(30, 6),
            series("lmcache_frontend_proxy_request_seconds_bucket", FRONTEND, kind="node", le="+Inf"): rising_for(
                30, 6
            ),
        },
        {"kind": "node"},
        (15, 30),
        (8, 45),
        "29s",
    ),
    Case(
        "LMCacheMetricTypesConflict",
        {series("lmcache_frontend_type_conflicts", FRONTEND): then((0, 0, 4), (2, 0, 24), (0, 0, 60))},
        FRONTEND,
        (21, 29),
        (15, 31),
        "2",
    ),
]


def rules() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}


def test_every_alert_is_evaluated() -> None:
    assert {case.alert for case in CASES} == set(rules())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_an_alert_fires_and_ends(tmp_path: Path, case: Case) -> None:
    rule = rules()[case.alert]
    expected = {
        "exp_labels": {**case.labels, **rule["labels"]},
        "exp_annotations": {name: told(text, case) for name, text in rule["annotations"].items()},
    }
    checks = [
        {"eval_time": f"{minute}m", "alertname": case.alert, "exp_alerts": [expected] if minute in case.fires else []}
        for minute in sorted(case.fires + case.quiet)
    ]
    given = [{"series": name, "values": values} for name, values in case.series.items()]
    test = {"interval": "1m", "input_series": given, "alert_rule_test": checks}
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def told(annotation: str, case: Case) -> str:
    """The annotation as Prometheus fills it in; a label that the alert does not have fails."""
    text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: case.labels[found[1]], annotation)
    return re.sub(r"\{\{ \$value[^}]* \}\}", case.value, text)
