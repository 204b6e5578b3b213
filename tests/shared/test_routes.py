import importlib
import sys
from pathlib import Path

import pytest
from aiohttp import web

from lmcache_shared import routes
from lmcache_shared.errors import RouteError

MODULE = """
from aiohttp import web
router = web.RouteTableDef()

@router.{method}("{path}")
async def handler(request):
    return web.Response(text="{name}")
"""


def write(folder: Path, name: str, path: str = "/a", method: str = "get") -> Path:
    file = folder / f"{name}.py"
    file.write_text(MODULE.format(path=path, method=method, name=name))
    return file


def served(*modules: routes.RouteModule) -> web.Application:
    app = web.Application()
    routes.add_routes(app, modules)
    return app


def test_files_of_a_folder_are_found_by_their_suffix(tmp_path: Path) -> None:
    write(tmp_path, "b_api", "/b")
    write(tmp_path, "a_api", "/a")
    write(tmp_path, "helpers", "/c")
    write(tmp_path, "x_page", "/x")
    origins = [module.origin for module in routes.from_folders([tmp_path], "_api")]
    assert origins == [str(tmp_path / "a_api.py"), str(tmp_path / "b_api.py")]


def test_a_file_is_read_anew_at_every_start(tmp_path: Path) -> None:
    write(tmp_path, "a_api", "/old")
    assert [route.path for (m,) in [routes.from_folders([tmp_path], "_api")] for route in m.router] == ["/old"]
    write(tmp_path, "a_api", "/newer")
    assert [route.path for (m,) in [routes.from_folders([tmp_path], "_api")] for route in m.router] == ["/newer"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("/a", "get"), ("/a", "get")),
        (("/a/{x}", "get"), ("/a/{y}", "get")),
        (("/a/{x:[0-9]{2}}", "get"), ("/a/{y:[0-9]{2}}", "get")),
        (("/a", "get"), ("/a", "head")),
        (("/a", "post"), ("/a", "post")),
    ],
)
def test_a_route_that_is_taken_names_both(tmp_path: Path, first: tuple[str, str], second: tuple[str, str]) -> None:
    write(tmp_path, "a_api", *first)
    write(tmp_path, "b_api", *second)
    with pytest.raises(RouteError) as refused:
        served(*routes.from_folders([tmp_path], "_api"))
    assert f"{tmp_path}/b_api.py" in str(refused.value)
    assert f"already served by {tmp_path}/a_api.py" in str(refused.value)


def test_routes_that_differ_live_side_by_side(tmp_path: Path) -> None:
    write(tmp_path, "a_api", "/a", "get")
    write(tmp_path, "b_api", "/a", "post")
    write(tmp_path, "c_api", "/a/{x}", "get")
    write(tmp_path, "d_api", "/a/{x:[0-9]+}", "get")
    assert len(served(*routes.from_folders([tmp_path], "_api")).router.resources()) >= 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 +", "cannot be imported: SyntaxError"),
        ("raise SystemError('no')", "cannot be imported: SystemError: no"),
        ("x = 1", "exports no router; write `router = web.RouteTableDef()`"),
        ("router = []", "exports no router"),
    ],
)
def test_a_broken_module_stops_the_start(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken_api.py").write_text(text)
    with pytest.raises(RouteError) as refused:
        list(routes.from_folders([tmp_path], "_api"))
    assert str(refused.value).startswith(str(tmp_path / "broken_api.py"))
    assert message in str(refused.value)
    assert not [name for name in sys.modules if "broken_api" in name]


def test_a_malformed_route_names_its_module(tmp_path: Path) -> None:
    write(tmp_path, "a_api", "no-slash")
    with pytest.raises(RouteError, match=r"a_api\.py: cannot serve"):
        served(*routes.from_folders([tmp_path], "_api"))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(RouteError, match="no_folder: is no folder"):
        list(routes.from_folders([tmp_path / "no_folder"], "_api"))


def test_setup_gives_a_module_its_state(tmp_path: Path) -> None:
    (tmp_path / "a_api.py").write_text(
        "from aiohttp import web\nrouter = web.RouteTableDef()\nKEY = web.AppKey('key', int)\n"
        "def setup(app):\n    app[KEY] = 5\n"
    )
    app = served(*routes.from_folders([tmp_path], "_api"))
    assert [app[key] for key in app if getattr(key, "_name", "").endswith("key")] == [5]


def test_an_installed_package_declares_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "installed_extra", "/extra")
    info = tmp_path / "extra-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lmcache_test.routes]\nmine = installed_extra\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    (module,) = routes.from_entry_points("lmcache_test.routes")
    assert module.origin == "installed_extra (entry point 'mine' of extra)"
    (info / "entry_points.txt").write_text("[lmcache_test.routes]\nmine = installed_nowhere\n")
    with pytest.raises(RouteError, match=r"installed_nowhere .entry point 'mine' of extra.: cannot be imported"):
        list(routes.from_entry_points("lmcache_test.routes"))
