"""The host process of `engine.py` and `operations.py`: an engine with the internal API servers on it.

    python engine_host.py ENGINE CONFIG SOCKET_PREFIX_OF_OURS

`ENGINE` is `lmcache`, by the Python that has LMCache: a real standalone engine with its own internal API server, as it
configures that itself, and ours beside it. Or `embedded`: a worker of ours. The first line written is `READY` when our
server listens. Then each line read is a question, and answered with one line:

    versions      what is installed, as NAME=VERSION
    move          moves every number of LMCache's metrics, and says how many series there were
    busy SECONDS  keeps this thread busy with pure Python, and says how many rounds it made, how many seconds passed,
                  and how many of them the thread slept: it never does but while another thread has the interpreter

The end of the input ends the process. Logs go to standard error.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PACKAGES = (
    "lmcache",
    "torch",
    "fastapi",
    "starlette",
    "uvicorn",
    "httptools",
    "aiohttp",
    "uvloop",
    "prometheus-client",
)
ROUND = 1000
"""Steps of the busy loop between two looks at the clock."""


def main(engine: str, config: str, prefix: str) -> None:
    talk = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what LMCache prints is no answer of ours
    code = 1
    try:
        kept = start_lmcache(config, prefix) if engine == "lmcache" else start_embedded(config)
        talk.write("READY\n")
        for line in sys.stdin:
            question, _, argument = line.strip().partition(" ")
            if question == "versions":
                talk.write(" ".join(versions()) + "\n")
            elif question == "move":
                talk.write(f"{move()}\n")
            elif question == "busy":
                talk.write("{} {} {}\n".format(*busy(float(argument))))
        assert kept, "it lives until here"
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # whoever asked is gone, and no thread of the engine's keeps the process


def start_lmcache(config_path: str, our_prefix: str) -> Any:
    """As the tests against the real LMCache do it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "lmcache"))
    import host  # type: ignore[import-not-found,unused-ignore]

    starter, config = host.start_lmcache(config_path)
    config.internal_api_server_socket_path_prefix = our_prefix  # LMCache's own server has read its prefix by now
    return starter, host.start_ours(starter._manager)


def start_embedded(config_path: str) -> Any:
    from lmcache_api import InternalAPIServer
    from lmcache_api.embedded import EmbeddedComponent
    from lmcache_shared import config

    component = EmbeddedComponent(config.load(config_path), 1)
    component.start()
    server = InternalAPIServer(component)
    server.start()
    if server.failure is not None:
        raise SystemExit(str(server.failure))
    return component, server


def versions() -> list[str]:
    told = []
    for name in PACKAGES:
        try:
            told.append(f"{name}={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return told


def move() -> int:
    """Add one to each counter and gauge of LMCache's, and an observation to each histogram."""
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    moved = 0
    series: Any
    metrics: set[Any] = set(REGISTRY._names_to_collectors.values())
    for metric in metrics:
        if not isinstance(metric, Counter | Gauge | Histogram) or not metric._name.startswith("lmcache"):
            continue
        is_parent = metric._labelnames and not metric._labelvalues
        for series in list(metric._metrics.values()) if is_parent else [metric]:
            if isinstance(series, Histogram):
                series.observe(0.5)
            elif isinstance(series, Counter):
                series.inc()
            elif "_child_samples" not in vars(series):  # a gauge with a function tells what that returns
                series.set(series._value.get() + 1)
            moved += 1
    return moved


def busy(seconds: float) -> tuple[int, float, float]:
    """Rounds of a loop of pure Python, the seconds that passed, and those in which this thread slept."""
    rounds = 0
    on_processor = runnable_seconds()
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        total = 0
        for number in range(ROUND):
            total += number * number
        rounds += 1
    passed = time.monotonic() - began
    return rounds, passed, max(0.0, passed - (runnable_seconds() - on_processor))


def runnable_seconds() -> float:
    """How long this thread has had a processor or waited for one."""
    with open("/proc/thread-self/schedstat", encoding="ascii") as file:
        running, waiting, _ = file.read().split()
    return (int(running) + int(waiting)) / 1e9


if __name__ == "__main__":
    main(*sys.argv[1:])
