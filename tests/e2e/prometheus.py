"""A real Prometheus, and promtool: what they think of our metrics, our discovery and our configuration."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmcache_api.pytest_plugin import free_port
from tests.e2e.processes import ROOT

CONFIG = ROOT / "config" / "prometheus.yml"
START_SECONDS = 20.0
ASK_SECONDS = 10.0
LINT = 3
"""promtool's exit code when it reads everything and dislikes names; 1 is an error."""

NO_DROPS = (
    "prometheus_target_scrapes_sample_duplicate_timestamp_total",
    "prometheus_target_scrapes_sample_out_of_order_total",
    "prometheus_target_scrapes_sample_out_of_bounds_total",
    "prometheus_target_scrapes_exceeded_sample_limit_total",
    "prometheus_target_scrapes_exceeded_body_size_limit_total",
    "prometheus_target_scrapes_exemplar_out_of_order_total",
    "prometheus_sd_http_failures_total",
)
"""Prometheus' own counters of what it does not keep."""


@dataclass
class Prometheus:
    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        found = self.get("/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        assert found["status"] == "success", found
        return list(found["data"]["result"])

    def value(self, expression: str) -> float | None:
        """The value of a query that has one, or none."""
        result = self.query(expression)
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def targets(self) -> list[dict[str, Any]]:
        return list(self.get("/api/v1/targets?state=active")["data"]["activeTargets"])

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path, timeout=ASK_SECONDS) as response:
            return dict(json.loads(response.read()))

    def wait_until_scraped(self, targets: int, *, times: int = 3) -> None:
        """Until so many targets have each been scraped so often; what a target fails with is told."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            found = self.targets()
            often = self.query(f"count_over_time(up[5m]) >= {times}")
            if len(found) == targets and len(often) >= targets:
                assert [target["lastError"] for target in found] == [""] * targets
                return
            assert time.monotonic() < deadline, (found, often)
            time.sleep(0.2)

    def drops(self) -> dict[str, float]:
        """Which of `NO_DROPS` have counted something, by Prometheus' own exposition."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=ASK_SECONDS) as response:
            text = response.read().decode()
        found = dict(re.findall(r"^(\w+)(?:\{[^}]*\})? ([0-9.e+]+)$", text, re.MULTILINE))
        assert set(NO_DROPS) <= found.keys()
        return {name: float(found[name]) for name in NO_DROPS if float(found[name])}


@contextlib.contextmanager
def running_prometheus(folder: Path, frontend: str) -> Iterator[Prometheus]:
    """Prometheus with `config/prometheus.yml`, scraping the frontend at `frontend` (host:port) each second."""
    config = yaml.safe_load(CONFIG.read_text().replace("localhost:8080", frontend))
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s"}
    config["rule_files"] = [str(CONFIG.with_name("alerts.yml"))]
    for job in config["scrape_configs"]:
        for discovery in job.get("http_sd_configs", []):
            discovery["refresh_interval"] = "1s"
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder}/data"]
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}", "--log.level=warn"], stdout=output, stderr=output
        )
    try:
        prometheus = Prometheus(f"http://{address}")
        deadline = time.monotonic() + START_SECONDS
        while not _is_ready(prometheus.url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield prometheus
        complaints = [line for line in log.read_text().splitlines() if "scrape" in line or "discovery" in line]
        assert complaints == []
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def check_metrics(text: bytes) -> list[str]:
    """promtool reads all of it; what it says of names, which are another's to choose."""
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=30)
    said = done.stderr.decode().splitlines() + done.stdout.decode().splitlines()
    assert done.returncode in (0, LINT), said[-5:]
    return said


def lints_of_ours(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith("lmcache_frontend_")]


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=ASK_SECONDS) as response:
        return bytes(response.read())
