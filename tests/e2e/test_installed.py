"""What is installed: a new file in `common/` is served, and the wheel has all that the programs need."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from lmcache_api.pytest_plugin import free_port
from tests.e2e.processes import ROOT, environment, read_until
from tests.frontend.installation import (
    MULTIPROCESS,
    SCHEDULER,
    bare_python,
    plugin_environ,
    plugin_of,
    started,
    with_dependencies,
)

MY_FEATURE = """
from aiohttp import web
router = web.RouteTableDef()

@router.get("/put_there")
async def put_there(request):
    return web.Response(text="mine")
"""


def test_a_new_file_in_common_is_served_at_the_next_start(tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "lmcache_api" / "common" / "put_there_api.py").write_text(MY_FEATURE)
    folder = Path(tempfile.mkdtemp(prefix="lmc"))
    command = [sys.executable, "-m", "lmcache_api", "--role", "scheduler"]
    child = subprocess.Popen(
        [*command, f"--set=internal_api_server_socket_path_prefix={folder}/s"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(PYTHONPATH=str(source)),
    )  # fmt: skip
    try:
        read_until(child, "serves on")
        curl = ["curl", "-s", "--unix-socket", f"{folder}/s_6999", "http://localhost/put_there"]
        assert subprocess.run(curl, capture_output=True, text=True, timeout=20).stdout == "mine"
    finally:
        child.terminate()
        child.communicate(timeout=20)
        shutil.rmtree(folder)


@pytest.mark.timeout(300)
def test_the_wheel_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=280, capture_output=True)
    (wheel,) = tmp_path.glob("lmcache_ops-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = {line.removeprefix("src/") for line in tracked.splitlines()}
    assert wanted - names == set()
    vendor = "lmcache_frontend/pages/static/vendor/"
    brought = {name.removeprefix(vendor) for name in names if name.startswith(vendor)}
    assert brought - {".lock-hash"} == {
        "htmx.min.js",
        "uPlot.iife.min.js",
        "uPlot.min.css",
    }  # and nothing for tests alone
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "lmcache_shared",
        "lmcache_api",
        "lmcache_frontend",
    }
    assert "lmcache-api = lmcache_api.__main__:main" in points
    assert "lmcache-frontend = lmcache_frontend.__main__:main" in points

    python = bare_python(tmp_path / "venv")
    with_dependencies(python)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=100, capture_output=True)
    command = [str(python.with_name("lmcache-frontend")), "--print-plugin-path"]
    shown = subprocess.run(
        command, check=True, timeout=20, capture_output=True, text=True, env=plugin_environ({})
    ).stdout
    assert shown.split() == [str(plugin_of(python, name)) for name in (SCHEDULER, MULTIPROCESS)]
    port = free_port()
    environ = plugin_environ({"extra_config": {"plugin.frontend.port": port}})
    with started(sys.executable, plugin_of(python), environ) as child:
        assert f":{port} (2 nodes)" in read_until(child, "serves on")
