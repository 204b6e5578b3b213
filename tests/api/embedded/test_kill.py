"""`kill -9` at random moments: what the folder serves afterwards is whole, and within the budget."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from lmcache_api.embedded.disk import LocalDiskBackend
from tests.api.embedded.killed_writer import KEYS, TOKEN_BYTES, data_of
from tests.api.embedded.making import key_of

BUDGET = 8 << 20
KILLS = 10


def kill_while_it_stores(folder: Path, seed: int, seconds: float) -> None:
    command = [sys.executable, "-m", "tests.api.embedded.killed_writer", str(folder), str(BUDGET), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"stores\n"
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def test_whatever_the_moment_of_the_kill_only_whole_chunks_are_served(tmp_path: Path) -> None:
    moment = random.Random()
    unfinished = served = 0
    for number in range(KILLS):
        kill_while_it_stores(tmp_path, number, moment.uniform(0.02, 0.25))
        unfinished += len(list(tmp_path.glob("*.tmp")))
        backend = LocalDiskBackend(tmp_path, BUDGET, TOKEN_BYTES)
        try:
            assert backend.damaged == 0
            assert {path.suffix for path in tmp_path.iterdir()} <= {".kv", ""}
            here = [each for each in range(KEYS) if key_of(each) in backend]
            assert len(here) == backend.chunks == len(list(tmp_path.glob("*.kv")))
            for each in here:
                assert backend.get(key_of(each)) == data_of(each)
            sizes = [path.stat().st_size for path in tmp_path.glob("*.kv")]
            assert sum(-(-size // 4096) * 4096 for size in sizes) == backend.used_bytes <= BUDGET
            served += len(here)
        finally:
            backend.close()
    assert unfinished > 0, "no kill met a write: this shows nothing"
    assert served > 10 * KILLS
