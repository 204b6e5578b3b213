"""The storage backends of the embedded engine: made by the settings, closed and bypassed by name, in one order."""

from __future__ import annotations

import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lmcache_api.embedded import disk, memory
from lmcache_api.embedded.disk import LocalDiskBackend
from lmcache_api.embedded.memory import Count, LocalCPUBackend
from lmcache_shared.settings import Settings

GIB = 1 << 30

Backend = LocalCPUBackend | LocalDiskBackend


class StorageBackends:
    """`LocalCPUBackend` always, `LocalDiskBackend` where the settings give it a folder and space.

    Args:
        settings: tells the settings of now.
        token_bytes: what a token takes.
        count: adds to a counter.
        owner: the name of the worker: its folder below `local_disk`.
        worker_id: which of several folders of `local_disk` is its.

    Raises:
        DiskError: the folder cannot be used.
    """

    def __init__(
        self, settings: Callable[[], Settings], token_bytes: int, count: Count, *, owner: str, worker_id: int
    ) -> None:
        self._settings = settings
        self._count = count
        self._token_bytes = token_bytes
        self._owner = owner
        self._worker_id = worker_id
        self._changing = threading.RLock()
        self._backends: dict[str, Backend] = {}  # replaced as a whole, so that a reader needs no lock
        self._bypassed: frozenset[str] = frozenset()
        self._frozen = False
        self.create()

    @property
    def frozen(self) -> bool:
        return self._frozen

    def freeze(self, frozen: bool) -> None:
        """Frozen, no backend admits anything once this has returned."""
        with self._changing:
            self._frozen = frozen
            for backend in self._backends.values():
                backend.set_frozen(frozen)

    @property
    def cpu(self) -> LocalCPUBackend | None:
        backend = self._backends.get(memory.NAME)
        return backend if isinstance(backend, LocalCPUBackend) else None

    @property
    def disk(self) -> LocalDiskBackend | None:
        backend = self._backends.get(disk.NAME)
        return backend if isinstance(backend, LocalDiskBackend) else None

    def active(self, only: Sequence[str] | None) -> Iterator[tuple[str, Backend]]:
        """The backends to look chunks up in, memory first: not the bypassed ones, when frozen memory alone."""
        for name, backend in self._backends.items():
            if name in self._bypassed or (self._frozen and name != memory.NAME) or (only and name not in only):
                continue
            yield name, backend

    def get(self, name: str) -> Backend | None:
        return self._backends.get(name)

    def classes(self) -> Mapping[str, str]:
        return {name: type(backend).__name__ for name, backend in self._backends.items()}

    def create(self) -> Mapping[str, str]:
        with self._changing:
            settings = self._settings()
            made: list[str] = []
            if memory.NAME not in self._backends:  # first: a folder that cannot be used costs the disk alone
                size = int(settings.max_local_cpu_size * GIB)
                cpu = LocalCPUBackend(size, self._token_bytes, self._count, hot=settings.local_cpu)
                self._replace({**self._backends, memory.NAME: cpu})
                made.append(memory.NAME)
            folder = self._folder(settings)
            if disk.NAME not in self._backends and folder is not None:
                self._replace({**self._backends, disk.NAME: self._make_disk(folder, settings)})
                made.append(disk.NAME)
            return {name: type(self._backends[name]).__name__ for name in made}

    def close(self, name: str) -> bool:
        with self._changing:
            backend = self._backends.get(name)
            if backend is None:
                return False
            self._replace({other: kept for other, kept in self._backends.items() if other != name})
            backend.close()
            return True

    def recreate(self, name: str) -> Mapping[str, str] | None:
        with self._changing:
            backend = self._backends.get(name)
            if backend is None:
                return None
            settings = self._settings()
            folder = self._folder(settings)
            if not isinstance(backend, LocalDiskBackend) or folder is None:
                self.close(name)
                return self.create()
            disk.check_usable(folder)  # before the old one is touched: a failed change leaves it as it was
            if backend.folder.exists() and folder.samefile(backend.folder):
                with backend.handing_over() as lock:
                    new = self._make_disk(folder, settings, lock=lock)
            else:
                new = self._make_disk(folder, settings)
                backend.close()
            self._replace({**self._backends, name: new})
            return {name: type(new).__name__, **self.create()}

    def bypassed(self) -> Sequence[str]:
        return sorted(self._bypassed)

    def set_bypass(self, name: str, bypass: bool) -> bool:
        with self._changing:
            before = name in self._bypassed
            self._bypassed = self._bypassed | {name} if bypass else self._bypassed - {name}
            return before

    def close_all(self) -> None:
        for name in list(self._backends):
            self.close(name)

    def _make_disk(self, folder: Path, settings: Settings, *, lock: int | None = None) -> LocalDiskBackend:
        return LocalDiskBackend(folder, int(settings.max_local_disk_size * GIB), self._token_bytes, lock=lock)

    def _replace(self, backends: Mapping[str, Backend]) -> None:
        for backend in backends.values():
            backend.set_frozen(self._frozen)
        self._backends = {name: backends[name] for name in (memory.NAME, disk.NAME) if name in backends}

    def _folder(self, settings: Settings) -> Path | None:
        """This worker's folder: below one of the paths, under its name."""
        paths = [path for text in (settings.local_disk or "").split(",") if (path := text.strip())]
        if not paths or settings.max_local_disk_size <= 0:
            return None
        path = paths[self._worker_id % len(paths)].removeprefix("file://")
        return Path(path) / folder_name(self._owner)


def folder_name(owner: str) -> str:
    """The folder of a worker below `local_disk`."""
    return urllib.parse.quote(owner, safe="")
