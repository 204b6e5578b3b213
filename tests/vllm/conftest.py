"""A real vLLM with our connector, found by `VLLM_PYTHON`: the Python of an environment that has vLLM and LMCache."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.lmcache.processes import client_of, short_folder
from tests.vllm.processes import VLLM, make_model, running_manager, running_offline, running_server

HOW_TO_RUN = "run these tests by `make test-vllm`, which installs vLLM's CPU build first"


@pytest.fixture(scope="session")
def vllm_python() -> str:
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.fail(f"VLLM_PYTHON is not set: {HOW_TO_RUN}", pytrace=False)
    if shutil.which(python) is None:
        pytest.fail(f"VLLM_PYTHON={python} is no program: {HOW_TO_RUN}", pytrace=False)
    return python


@pytest.fixture(scope="session")
def model(vllm_python: str) -> Iterator[Path]:
    """A tiny Llama of random numbers."""
    with short_folder() as folder:
        yield make_model(vllm_python, folder)


@pytest.fixture(scope="module")
def vllm(vllm_python: str, model: Path) -> Iterator[VLLM]:
    """vLLM's OpenAI server."""
    with short_folder() as folder, running_server(vllm_python, folder, model) as vllm:
        yield vllm


@pytest.fixture
def offline(vllm_python: str, model: Path) -> Iterator[VLLM]:
    """vLLM in the process that asks it."""
    with short_folder() as folder, running_offline(vllm_python, folder, model, prefix=f"{folder}/ops") as vllm:
        yield vllm


@pytest.fixture
def offline_without_socket(vllm_python: str, model: Path) -> Iterator[VLLM]:
    """The same, with an address that cannot be listened on."""
    with short_folder() as folder:
        prefix = f"{folder}/{'long' * 40}"
        with running_offline(vllm_python, folder, model, prefix=prefix) as vllm:
            yield vllm


@pytest.fixture
def manager(vllm_python: str, model: Path) -> Iterator[VLLM]:
    """LMCache's manager of a vLLM scheduler, with a service factory of the tests."""
    with short_folder() as folder, running_manager(vllm_python, folder, model) as vllm:
        yield vllm


@pytest_asyncio.fixture
async def scheduler(vllm: VLLM) -> AsyncIterator[aiohttp.ClientSession]:
    """Our server in vLLM's scheduler."""
    async with client_of(vllm.scheduler) as client:
        yield client


@pytest_asyncio.fixture
async def api(vllm: VLLM) -> AsyncIterator[aiohttp.ClientSession]:
    """vLLM's own server."""
    async with client_of(vllm.api) as client:
        yield client
