"""Stores chunks in a folder, from several threads and without end: a child process that `test_kill.py` kills.

python -m tests.api.embedded.killed_writer FOLDER BUDGET SEED
"""

import itertools
import random
import sys
import threading
from pathlib import Path

from lmcache_api.embedded.disk import LocalDiskBackend
from lmcache_api.embedded.layout import pattern
from tests.api.embedded.making import key_of

TOKEN_BYTES = 64
KEYS = 500


def size_of(number: int) -> int:
    """A chunk's bytes, by its number: from one token to some 250 KiB."""
    return TOKEN_BYTES * (1 + number * 7919 % 4000)


def data_of(number: int) -> bytes:
    return pattern(key_of(number), size_of(number))


def store(backend: LocalDiskBackend, seed: int) -> None:
    choose = random.Random(seed)
    for turn in itertools.count():
        number = choose.randrange(KEYS)
        backend.put(key_of(number), data_of(number))
        if turn % 1000 == 999:
            backend.clear()


def main() -> None:
    folder, budget, seed = sys.argv[1:]
    backend = LocalDiskBackend(Path(folder), int(budget), TOKEN_BYTES)
    for number in range(4):
        threading.Thread(target=store, args=(backend, 10 * int(seed) + number)).start()
    print("stores", flush=True)


if __name__ == "__main__":
    main()
