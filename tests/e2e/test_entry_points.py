"""Installed packages add endpoints to both programs."""

import importlib
from pathlib import Path

import pytest

from lmcache_api import create_app
from lmcache_api.embedded import EmbeddedComponent
from lmcache_frontend.app import create_app as create_frontend
from lmcache_frontend.cluster import Cluster
from lmcache_frontend.options import Options
from lmcache_shared.settings import Settings


@pytest.mark.parametrize("program", ["lmcache_api", "lmcache_frontend"])
def test_an_installed_package_is_served(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"from_elsewhere_{program}"
    (tmp_path / f"{module}.py").write_text(
        "from aiohttp import web\nrouter = web.RouteTableDef()\n"
        "@router.get('/from_elsewhere')\nasync def handler(request):\n    return web.Response()\n"
    )
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{program}.routes]\nmine = {module}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    if program == "lmcache_api":
        app = create_app(EmbeddedComponent(Settings()))
    else:
        app = create_frontend(Options(), Cluster(Options(registry="memory")))
    assert "/from_elsewhere" in {resource.canonical for resource in app.router.resources()}
