from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.api.embedded.making import Made, make


@pytest.fixture
def made() -> Iterator[Callable[..., Made]]:
    """Engines that are closed at the test's end: `made(cpu_chunks=4, local_disk=folder, disk_chunks=8)`."""
    engines: list[Made] = []

    def new(**given: Any) -> Made:
        engines.append(make(**given))
        return engines[-1]

    yield new
    for one in engines:
        one.engine.close()
