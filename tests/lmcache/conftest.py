"""A real LMCache for the session, found by `LMCACHE_PYTHON`: the Python of an environment that has it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.conftest import browser  # noqa: F401 - a fixture
from tests.lmcache.processes import (
    Engine,
    Host,
    client_of,
    node_at,
    running_engine,
    running_frontend,
    running_host,
    short_folder,
)

HOW_TO_RUN = "run these tests by `make test-lmcache`, which installs the real LMCache first"


@pytest.fixture(scope="session")
def lmcache_python() -> str:
    python = os.environ.get("LMCACHE_PYTHON")
    if not python:
        pytest.fail(f"LMCACHE_PYTHON is not set: {HOW_TO_RUN}", pytrace=False)
    if shutil.which(python) is None:
        pytest.fail(f"LMCACHE_PYTHON={python} is no program: {HOW_TO_RUN}", pytrace=False)
    return python


@pytest.fixture(scope="session")
def engine(lmcache_python: str) -> Iterator[Engine]:
    """A real standalone engine."""
    with short_folder() as folder, running_engine(lmcache_python, folder) as engine:
        yield engine


@pytest.fixture(scope="session")
def frontend_url(engine: Engine) -> Iterator[str]:
    """Our frontend before the engine."""
    with short_folder() as folder, running_frontend(folder, [node_at(engine.socket)]) as url:
        yield url


@pytest.fixture(scope="session")
def host(lmcache_python: str) -> Iterator[Host]:
    """A real LMCache with its own server and ours."""
    with short_folder() as folder, running_host(lmcache_python, folder) as host:
        yield host


@pytest_asyncio.fixture
async def frontend(frontend_url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with client_of(frontend_url) as client:
        yield client


@pytest_asyncio.fixture
async def direct(engine: Engine) -> AsyncIterator[aiohttp.ClientSession]:
    """The engine, asked without the frontend."""
    async with client_of(engine.socket) as client:
        yield client


@pytest_asyncio.fixture
async def theirs(host: Host) -> AsyncIterator[aiohttp.ClientSession]:
    """LMCache's own internal API server."""
    async with client_of(host.theirs) as client:
        yield client


@pytest_asyncio.fixture
async def ours(host: Host) -> AsyncIterator[aiohttp.ClientSession]:
    """Our internal API server, on the same manager."""
    async with client_of(host.ours) as client:
        yield client


@pytest_asyncio.fixture
async def their_scheduler(host: Host) -> AsyncIterator[aiohttp.ClientSession]:
    """LMCache's own internal API server of the scheduler."""
    async with client_of(host.their_scheduler) as client:
        yield client


@pytest_asyncio.fixture
async def our_scheduler(host: Host) -> AsyncIterator[aiohttp.ClientSession]:
    """Ours, on the same scheduler."""
    async with client_of(host.our_scheduler) as client:
        yield client
