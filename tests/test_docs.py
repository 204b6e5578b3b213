"""The docs cannot drift: settings, options, routes, links and code are held against the programs."""

import ast
import asyncio
import json
import re
import sys
from pathlib import Path

import pytest

from lmcache_api import create_app
from lmcache_api.__main__ import parser as api_parser
from lmcache_api.embedded import EmbeddedComponent
from lmcache_frontend.app import create_app as create_frontend
from lmcache_frontend.cluster import Cluster
from lmcache_frontend.options import Options
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_shared.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

sys.path.insert(0, str(ROOT / "tools"))
import docs_tables  # noqa: E402


@pytest.mark.parametrize("page", docs_tables.TABLES)
def test_tables_are_made_from_the_definitions(page: str) -> None:
    name, table = docs_tables.TABLES[page]
    text = (ROOT / "docs" / page).read_text()
    assert text == docs_tables.with_table(text, name, table()), "run `make docs`"
    assert len(table()) > 5


def paths(app) -> set[str]:  # type: ignore[no-untyped-def]
    return {re.sub(r"\{(\w+):[^}]*\}", "{path}", resource.canonical) for resource in app.router.resources()}


def test_every_route_of_a_component_is_told() -> None:
    text = (ROOT / "docs" / "internal-api.md").read_text()
    missing = [path for path in paths(create_app(EmbeddedComponent(Settings()))) if f"`{path}`" not in text]
    assert missing == [], "tell of it in docs/internal-api.md"


def test_every_route_of_the_frontend_is_told() -> None:
    text = (ROOT / "docs" / "frontend.md").read_text()
    app = create_frontend(Options(), Cluster(Options(registry="memory")))
    assert [path for path in paths(app) if f"`{path}`" not in text] == [], "tell of it in docs/frontend.md"


def test_every_option_of_the_api_server_is_told() -> None:
    text = (ROOT / "docs" / "internal-api.md").read_text()
    flags = [flag for action in api_parser()._actions for flag in action.option_strings if flag.startswith("--")]
    assert len(flags) > 6
    assert [flag for flag in flags if f"`{flag}" not in text and flag != "--help"] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, as GitHub makes it of them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#{1,6} (.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_picture_is_shown_and_says_what_it_shows() -> None:
    shown = dict(
        match[::-1]
        for page in PAGES
        for match in re.findall(r"!\[([^]]*)\]\((?:docs/)?(img/[^)]+)\)", page.read_text())
    )
    pictures = {f"img/{it.name}" for it in (ROOT / "docs" / "img").iterdir()}
    assert shown.keys() == pictures, "show it, or take it no longer (tools/screenshots.py)"
    assert len(pictures) > 8
    assert all(len(text) > 20 for text in shown.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


def test_how_a_heading_is_called() -> None:
    assert {"where-nodes-are-kept", "the-frontends-own"} <= anchors(ROOT / "docs" / "frontend.md") | anchors(
        ROOT / "docs" / "metrics.md"
    )
    assert "heartbeats" not in anchors(ROOT / "docs" / "frontend.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_python(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(code)


def test_the_readme_begins_with_the_two_commands_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert [line.split("#")[0].strip() for line in blocks[0].splitlines()] == ["make run", "make test"]
    assert [page.name for page in PAGES[1:] if f"]({page.relative_to(ROOT)})" not in text] == []


def test_the_makefile_has_what_the_docs_name() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)", page.read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


async def test_the_curl_lines_of_nodes_by_hand_work(frontend_server: StartFrontend) -> None:
    text = (ROOT / "docs" / "frontend.md").read_text().partition("**By hand.**")[2]
    lines = re.findall(r"^curl .*$", text.partition("### ")[0], re.MULTILINE)
    assert len(lines) == 5
    rack = await frontend_server()
    proxy = {"name": "rack2", "host": "127.0.0.1", "port": rack.server.address.port, "nodes": []}
    frontend = await frontend_server(nodes=[{"name": "worker0", "host": "10.0.0.5", "port": 7000}, proxy])
    for line in lines:
        words = line.replace("http://localhost:8080", frontend.url)
        done = await asyncio.create_subprocess_shell(
            f"curl -sS --fail-with-body {words[5:]}", stdout=asyncio.subprocess.PIPE
        )
        said, _ = await done.communicate()
        assert (done.returncode, json.loads(said)["status"]) == (0, "success"), (line, said)
    nodes = {node.name: str(node.address) for node in frontend.server.cluster.registry.nodes()}
    assert nodes == {"worker0": "10.0.0.5:7000", "worker9": "10.0.0.9:7010"}


async def test_the_example_of_an_endpoint_and_its_test_work(tmp_path: Path, pytester: pytest.Pytester) -> None:
    text = (ROOT / "docs" / "extending.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        name = re.match(r"# (\S+\.py)\n", code)
        assert name, code
        (pytester.path / name[1]).write_text(code)
    assert {path.name for path in pytester.path.glob("*.py")} == {"my_feature_api.py", "test_my_feature.py"}
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function")
    pytester.runpytest_subprocess().assert_outcomes(passed=1)
