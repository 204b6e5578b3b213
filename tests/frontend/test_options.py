from pathlib import Path

import pytest

from lmcache_frontend.options import DEFINITIONS, Options, parser, read_options
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_shared.errors import ConfigError


def test_defaults_are_the_contracts() -> None:
    options = read_options([], {})
    assert options == Options()
    assert (options.port, options.host, options.config, options.nodes) == (8000, "0.0.0.0", None, None)
    assert options.log_level == "warning"


def test_the_command_line_over_the_environment() -> None:
    environ = {"LMCACHE_FRONTEND_PORT": "9000", "LMCACHE_FRONTEND_HOST": "h1", "LMCACHE_FRONTEND_ROUTE_FOLDER": "a,b"}
    options = read_options(["--port", "9001"], environ)
    assert (options.port, options.host, options.route_folder) == (9001, "h1", ["a", "b"])
    assert read_options(["--route-folder", "x", "--route-folder", "y"], environ).route_folder == ["x", "y"]
    assert read_options(["--socket-prefix", ""], {}).socket_prefix is None


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--port", "x"], {}, '--port: expected int, found "x"'),
        (["--port", "0"], {}, "--port: expected int from 1 to 65535"),
        ([], {"LMCACHE_FRONTEND_PORT": ""}, 'environment: LMCACHE_FRONTEND_PORT: expected int, found ""'),
        (
            ["--log-level", "loud"],
            {},
            "--log-level loud: expected one of critical, error, warning, warn, info, debug, trace",
        ),
        (["--registry", "disk"], {}, "--registry disk: expected memory, sqlite, sqlite:/a/file, redis://"),
        ([], {"LMCACHE_FRONTEND_REGISTRY": "redis://:pw@/0"}, "environment: LMCACHE_FRONTEND_REGISTRY: the redis://"),
    ],
)
def test_errors_name_where_the_value_came_from(arguments: list[str], environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_options(arguments, environ)
    assert message in str(refused.value)


def test_every_option_is_in_the_help() -> None:
    text = parser().format_help()
    for name in DEFINITIONS:
        assert "--" + name.replace("_", "-") in text
        assert f"LMCACHE_FRONTEND_{name.upper()}" in text


async def test_route_folders_serve_endpoints_and_pages(frontend_server: StartFrontend, tmp_path: Path) -> None:
    for name in ("mine_api", "mine_page"):
        (tmp_path / f"{name}.py").write_text(
            "from aiohttp import web\nrouter = web.RouteTableDef()\n"
            f"@router.get('/{name}')\nasync def mine(request):\n    return web.Response(text='{name}')\n"
        )
    frontend = await frontend_server(route_folder=[str(tmp_path)])
    for name in ("mine_api", "mine_page"):
        async with frontend.client.get(f"/{name}") as response:
            assert await response.text() == name
