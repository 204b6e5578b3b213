"""The runtime plugins: what they make of LMCache's environment, which Python runs them, and how they end."""

import ast
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_api.pytest_plugin import StartApi, free_port
from lmcache_frontend import plugins
from lmcache_frontend.cluster import Cluster
from lmcache_frontend.hosted.deployment import Deployment, read_deployment
from lmcache_frontend.hosted.interpreter import NEEDED, python_of
from lmcache_frontend.nodes.node import Node
from lmcache_frontend.nodes.sources import file as file_source
from lmcache_frontend.options import DEFINITIONS, Options
from lmcache_shared.errors import ConfigError, StartError
from lmcache_shared.settings import DEFINITIONS as SETTINGS
from tests.e2e.processes import read_until
from tests.frontend.discovery import discovery_service
from tests.frontend.installation import (
    MULTIPROCESS,
    SCHEDULER,
    bare_python,
    installed_python,
    packages_of,
    plugin_environ,
    plugin_of,
    refusal,
    started,
    started_by_another,
    with_dependencies,
)

QUICK_SECONDS = 2.0


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the frontend."""
    return installed_python(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has nothing."""
    return bare_python(tmp_path_factory.mktemp("bare"))


def deployment(configuration: object, *, workers: object = 1, older: bool = False, **more: str) -> Deployment:
    return read_deployment(plugin_environ(configuration, workers=workers, older=older, **more))


def written(found: Deployment) -> list[tuple[str, str, int | str]]:
    assert all(isinstance(node, Node) for node in found.nodes)
    return [(node.name, node.host, node.port) for node in found.nodes]


def config_on(port: int, **more: Any) -> dict[str, Any]:
    return {"extra_config": {"plugin.frontend.port": port, "plugin.frontend.host": "127.0.0.1"}, **more}


def ask(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return json.load(response)


# --- nodes


@pytest.mark.parametrize("older", [False, True], ids=["", "older names"])
@pytest.mark.parametrize(
    ("configuration", "workers", "nodes"),
    [
        ({}, 1, [("lmcache_scheduler", "127.0.0.1", 6999), ("lmcache_worker0", "127.0.0.1", 7000)]),
        (
            {
                "lmcache_instance_id": "i",
                "internal_api_server_host": "h",
                "internal_api_server_port_start": 9000,
                "pd_allocation_timeout_sec": float("inf"),  # LMCache writes Infinity
            },
            2,
            [("i_scheduler", "h", 9000), ("i_worker0", "h", 9001), ("i_worker1", "h", 9002)],
        ),
        (
            {"internal_api_server_socket_path_prefix": "/run/s", "internal_api_server_host": "h"},
            1,
            [("lmcache_scheduler", "localhost", "/run/s_6999"), ("lmcache_worker0", "localhost", "/run/s_7000")],
        ),
        ({"internal_api_server_include_index_list": [0, 2]}, 3, [
            ("lmcache_scheduler", "127.0.0.1", 6999), ("lmcache_worker1", "127.0.0.1", 7001),
        ]),
        ({"internal_api_server_include_index_list": []}, 0, [("lmcache_scheduler", "127.0.0.1", 6999)]),
        ({"internal_api_server_include_index_list": [7]}, 1, []),
    ],
)  # fmt: skip
def test_nodes_are_where_the_internal_api_servers_are(
    configuration: dict[str, Any], workers: int, nodes: list[Any], older: bool
) -> None:
    found = deployment(configuration, workers=workers, older=older)
    assert written(found) == nodes
    assert found.options == Options()
    assert found.hints == ("internal_api_server_enabled is false: no node answers",)
    assert deployment({**configuration, "internal_api_server_enabled": True}).hints == ()


def test_the_newer_names_win_and_no_count_is_no_worker() -> None:
    environ = plugin_environ({"lmcache_instance_id": "new"}) | plugin_environ(
        {"lmcache_instance_id": "old"}, older=True, workers=9
    )
    del environ["LMCACHE_RUNTIME_PLUGIN_WORKER_COUNT"], environ["LMCACHE_PLUGIN_WORKER_COUNT"]
    assert [name for name, _, _ in written(read_deployment(environ))] == ["new_scheduler"]


# --- options


def test_every_plugin_frontend_key_is_an_option() -> None:
    extra = {
        "plugin.frontend.port": "9100",
        "plugin.frontend.host": "127.0.0.1",
        "plugin.frontend.socket_prefix": "/run/x",
        "plugin.frontend.log-level": "INFO",
        "plugin.frontend.route_folder": ["/a", "/b,c"],
        "plugin.frontend.nodes": [{"name": "n", "host": "h", "port": 1}],
        "plugin.frontend.heartbeat_url": "https://h/x",
        "plugin.frontend.heartbeat-interval": 60,
        "plugin.frontend.no_http": False,
        "plugin.frontend.config": None,
        "plugin.other.port": 1,
        "internal_api_server_drain_seconds": 1,
    }
    found = deployment({"extra_config": extra}).options
    assert found == Options(
        port=9100, host="127.0.0.1", socket_prefix=["/run/x"], log_level="info", route_folder=["/a", "/b,c"],
        nodes='[{"name": "n", "host": "h", "port": 1}]', heartbeat_url="https://h/x", heartbeat_interval=60.0,
    )  # fmt: skip
    assert deployment({"extra_config": json.dumps(extra)}).options == found


def test_the_configuration_over_the_environment() -> None:
    environ = {"LMCACHE_FRONTEND_PORT": "9200", "LMCACHE_FRONTEND_HOST": "h1"}
    found = deployment({"extra_config": {"plugin.frontend.host": "h2"}}, **environ).options
    assert (found.port, found.host) == (9200, "h2")
    assert deployment({"extra_config": None}, **environ).options.port == 9200


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ("", "LMCACHE_RUNTIME_PLUGIN_CONFIG is not set: LMCache sets it when it starts this plugin (docs/plugins.md)"),
        ("{", "LMCACHE_RUNTIME_PLUGIN_CONFIG: no JSON: Expecting property name"),
        ("[" * 60_000, "LMCACHE_RUNTIME_PLUGIN_CONFIG: no JSON: maximum recursion depth"),
        ("[]", "LMCACHE_RUNTIME_PLUGIN_CONFIG: expected a JSON object, found list"),
        ("1" * 5000, "LMCACHE_RUNTIME_PLUGIN_CONFIG: no JSON: Exceeds the limit"),
        ({"internal_api_server_port_start": "x"}, "CONFIG: internal_api_server_port_start: expected int"),
        ({"internal_api_server_port_start": 65535}, "index 1 has no usable address"),
        ({"internal_api_server_socket_path_prefix": "s"}, "the path of a Unix socket starts with /"),
        ({"internal_api_server_include_index_list": ["a"]}, "include_index_list[0]: expected int"),
        ({"lmcache_instance_id": "a\nb"}, "nodes: [0]: expected a node"),
        ({"lmcache_instance_id": "\ud800"}, 'lmcache_instance_id: expected text, found "\\ud800"'),
        ({"extra_config": []}, "extra_config: expected keys with values, found []"),
        ({"extra_config": {"plugin.frontend.port": "x"}}, 'plugin.frontend.port: expected int, found "x"'),
        ({"extra_config": {"plugin.frontend.port": 0}}, "plugin.frontend.port: expected int from 1 to 65535"),
        ({"extra_config": {"plugin.frontend.host": {}}}, "plugin.frontend.host: expected text, found {}"),
        ({"extra_config": {"plugin.frontend.log_level": "x"}}, "plugin.frontend.log_level: x: expected one of"),
        (
            {"extra_config": {"plugin.frontend.prot": 1}},
            "extra_config: plugin.frontend.prot: the frontend has no such option (did you mean plugin.frontend.port?)",
        ),
        ({"extra_config": {"plugin.frontend.\x1b[2J\n": 1}}, "'plugin.frontend.\\x1b[2J\\n': the frontend has no such"),
        ({"extra_config": {"plugin.frontend.": 1}}, "plugin.frontend.: the frontend has no such option"),
        (
            {"extra_config": {"plugin.frontend.log_level": "info", "plugin.frontend.log-level": "info"}},
            "plugin.frontend.log-level is there twice, with - and with _",
        ),
        ({"extra_config": {"plugin.frontend.no_http": True}}, "plugin.frontend.no_http: without a heartbeat URL"),
        ({"extra_config": {"plugin.frontend.nodes": [1]}}, None),
    ],
)
def test_what_cannot_be_used_names_its_place(configuration: object, message: str | None) -> None:
    if message is None:  # the list of nodes is read when the frontend starts, as that of the command line
        assert deployment(configuration).options.nodes == "[1]"
        return
    with pytest.raises(ConfigError) as refused:
        deployment(configuration)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("count", ["x", "-1", "1025", "1e3", "٣", "1" * 5000])
def test_a_worker_count_that_is_none(count: str) -> None:
    with pytest.raises(ConfigError, match="LMCACHE_RUNTIME_PLUGIN_WORKER_COUNT: expected a number of workers from 0"):
        deployment({}, workers=count)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [row.name for row in SETTINGS.values() if row.section is None and not row.engine]
    + ["mp_config", "http_config", "http_frontend_config", "runtime_plugin_extra_config", "extra_config"]
)
OPTION_KEYS = st.sampled_from([f"plugin.frontend.{name}" for name in [*DEFINITIONS, "none"]])
SECTIONS = st.dictionaries(OPTION_KEYS, JSON, max_size=3)


@given(st.dictionaries(KEYS, JSON | SECTIONS, max_size=4), st.text(max_size=5))
@settings(deadline=None, max_examples=300)
def test_whatever_the_configuration_is_it_is_read_or_refused_in_one_line(configuration: Any, workers: str) -> None:
    environ = {
        "LMCACHE_RUNTIME_PLUGIN_CONFIG": json.dumps(configuration),
        "LMCACHE_RUNTIME_PLUGIN_WORKER_COUNT": workers,
    }
    try:
        read_deployment(environ)
    except StartError as error:
        assert "\n" not in str(error)


# --- the multiprocess mode

URL = {"plugin.frontend.heartbeat_url": "http://h/x"}


@pytest.mark.parametrize(
    ("configuration", "node", "port"),
    [
        ({"http_config": {"http_host": "10.0.0.1", "http_port": 8085}}, ("10.0.0.1", 8085), 8085),
        ({"http_config": {"http_host": "0.0.0.0", "http_port": "8085"}}, ("localhost", 8085), 8085),
        ({"http_frontend_config": {"http_host": "::", "http_port": 8085}}, ("localhost", 8085), 8085),
        ({"http_config": {"http_port": 8085, "http_socket_path": "/run/s"}}, ("localhost", "/run/s"), 8085),
        ({"http_config": None, "http_frontend_config": {"http_port": 1}}, ("localhost", 1), 1),
        ({"mp_config": {"host": "x", "port": 5555}}, ("localhost", 8080), 8080),
    ],
)
def test_the_one_http_server_of_the_multiprocess_mode(
    configuration: dict[str, Any], node: tuple[str, int | str], port: int
) -> None:
    found = deployment({**configuration, "runtime_plugin_extra_config": URL})
    assert written(found) == [("lmcache_server", *node)]
    assert found.options == Options(port=port, no_http=True, heartbeat_url="http://h/x")


def test_options_in_the_multiprocess_mode() -> None:
    extra = {**URL, "plugin.frontend.report_host": "r", "plugin.frontend.port": 1, "plugin.frontend.no-http": False}
    served = {"http_config": {"http_port": 8085}, "runtime_plugin_extra_config": extra}
    assert deployment(served).options == Options(
        port=8085, no_http=True, heartbeat_url="http://h/x", report_host="r"
    ), "the port is that of the HTTP server, as LMCache's plugin has it"
    assert deployment({"runtime_plugin_extra_config": extra}).options.port == 1


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"mp_config": {}}, "runtime_plugin_extra_config has no plugin.frontend.heartbeat_url"),
        ({"mp_config": {}, "runtime_plugin_extra_config": 1}, "runtime_plugin_extra_config: expected keys with values"),
        ({"http_config": {"http_port": "x"}}, "http_config: Expected `int | null`"),
        ({"http_config": 1}, "http_config: Expected `object`"),
        ({"http_config": {"http_host": "a b"}, "runtime_plugin_extra_config": URL}, "nodes: [0]: 'lmcache_server'"),
        ({"http_config": {"http_port": 70000}, "runtime_plugin_extra_config": URL}, "http_config.http_port: expected"),
    ],
)
def test_what_the_multiprocess_mode_refuses(configuration: object, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        deployment(configuration)
    assert message in str(refused.value)


# --- the files


def test_print_plugin_path() -> None:
    command = [sys.executable, "-m", "lmcache_frontend", "--print-plugin-path"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    paths = [Path(line) for line in shown.splitlines()]
    assert [path.name for path in paths] == [SCHEDULER, MULTIPROCESS]
    assert paths == list(plugins.FILES)
    assert all(path.is_file() for path in paths)
    assert {path.name for path in paths[0].parent.glob("*.py")} == {SCHEDULER, MULTIPROCESS, "__init__.py"}


def test_both_files_have_one_code() -> None:
    codes = [ast.parse(path.read_text()).body[1:] for path in plugins.FILES]
    assert len({ast.dump(ast.Module(code, [])) for code in codes}) == 1


def test_they_need_what_the_distribution_needs() -> None:
    for name in NEEDED:
        __import__(name)
    assert "lmcache" not in NEEDED


# --- which Python


def other_pythons(bare: Path) -> list[Path]:
    """Pythons without the frontend: an empty environment's, and the system's if it has one."""
    system = shutil.which("python3", path=os.defpath)
    return [bare, *([Path(system)] if system else [])]


def test_another_python_hands_over_to_the_one_it_is_installed_for(installed: Path, bare: Path, tmp_path: Path) -> None:
    link = tmp_path / "scheduler_linked.py"
    link.symlink_to(plugin_of(installed))
    (tmp_path / "json.py").write_text("raise SystemExit('the folder of the plugin is not looked into')")
    for python in other_pythons(bare):
        for file in (plugin_of(installed), link):
            port = free_port()
            # what is meant for the other Python is no help to ours
            wrong = {"PYTHONPATH": str(tmp_path)} if file == plugin_of(installed) else {}
            with started(python, file, plugin_environ(config_on(port), **wrong), cwd=tmp_path) as child:
                assert f"frontend serves on http://127.0.0.1:{port} (2 nodes)" in read_until(child, "serves on")
                exe = Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0")[0].decode()
                assert exe == str(packages_of(installed).parents[2] / "bin" / packages_of(installed).parent.name)
                assert ask(port, "/health")["status"] == "healthy"
                child.send_signal(signal.SIGTERM)
                clock = time.monotonic()
                assert child.wait(10) == 0
                assert time.monotonic() - clock < QUICK_SECONDS


def test_the_right_python_goes_on_by_itself(installed: Path) -> None:
    port = free_port()
    with started(installed, plugin_of(installed), plugin_environ(config_on(port), older=True)) as child:
        read_until(child, "serves on")
        assert Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0")[0].decode() == str(installed)


def test_a_copy_needs_a_python_that_has_the_frontend(installed: Path, bare: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(plugin_of(installed), tmp_path / "scheduler_copied.py"))
    assert refusal(bare, copy, plugin_environ(config_on(free_port()))) == (
        f"lmcache-frontend: {bare} has no lmcache-ops; set LMCACHE_FRONTEND_PYTHON to the Python that has it"
    )
    for python, more in ((installed, {}), (bare, {"LMCACHE_FRONTEND_PYTHON": str(installed)})):
        port = free_port()
        with started(python, copy, plugin_environ(config_on(port), **more)) as child:
            assert f":{port} (2 nodes)" in read_until(child, "serves on")


def test_lmcache_frontend_python_wins_and_is_checked(installed: Path, bare: Path, tmp_path: Path) -> None:
    environ = plugin_environ(config_on(free_port()))
    file = plugin_of(installed)
    nowhere = str(tmp_path / "python")
    assert refusal(installed, file, environ | {"LMCACHE_FRONTEND_PYTHON": nowhere}) == (
        f"lmcache-frontend: LMCACHE_FRONTEND_PYTHON={nowhere}: there is no such program"
    )
    line = refusal(installed, file, environ | {"LMCACHE_FRONTEND_PYTHON": str(bare)})
    assert line.startswith(f"lmcache-frontend: {bare} cannot run the frontend in {packages_of(installed)}: it has no ")
    assert line.endswith("; set LMCACHE_FRONTEND_PYTHON to the Python that it is installed for")
    name = {"LMCACHE_FRONTEND_PYTHON": installed.name, "PATH": f"{installed.parent}:{os.environ['PATH']}"}
    with started(bare, file, environ | name | {"PYTHONHOME": ""}) as child:
        read_until(child, "serves on")


def test_what_is_no_program_is_refused_in_one_line(installed: Path, tmp_path: Path) -> None:
    for content in ("hello", "#!/no/such/program\n"):
        text = tmp_path / "text"
        text.write_text(content)
        text.chmod(0o755)
        line = refusal(installed, plugin_of(installed), plugin_environ({}, LMCACHE_FRONTEND_PYTHON=str(text)))
        assert line.startswith(f"lmcache-frontend: LMCACHE_FRONTEND_PYTHON={text}: cannot be run: ")


@pytest.mark.parametrize("pid", ["\u00b2", "1" * 5000, "-1", "x", "1\n"])
def test_a_parent_that_is_no_process(installed: Path, pid: str) -> None:
    line = refusal(installed, plugin_of(installed), plugin_environ({}, LMCACHE_FRONTEND_PLUGIN_PARENT=pid))
    assert line.startswith("lmcache-frontend: LMCACHE_FRONTEND_PLUGIN_PARENT: expected the pid of a process, found '")
    assert line.isascii()
    assert len(line) < 300


def test_files_and_lists_of_nodes_that_cannot_be_used_name_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_source, "PIPE_SECONDS", 0.3)
    os.mkfifo(tmp_path / "pipe")
    place = "LMCACHE_RUNTIME_PLUGIN_CONFIG: extra_config: plugin.frontend.nodes: [0]: expected a node"
    for option, value, message in (
        ("config", "/x\0y", "'/x\\x00y': is no path"),
        ("config", str(tmp_path / "pipe"), f"{tmp_path}/pipe: nobody has written the nodes within 0.3 seconds"),
        ("config", str(tmp_path), f"{tmp_path}: cannot read the nodes: Is a directory"),
        ("nodes", [1], place),
    ):
        options = deployment({"extra_config": {f"plugin.frontend.{option}": value}}).options
        with pytest.raises(ConfigError) as refused:
            Cluster(options)
        assert str(refused.value).startswith(message)


def test_nodes_through_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    nodes = [{"name": f"n{number}", "host": "h", "port": 1} for number in range(5000)]  # more than a pipe holds
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(json.dumps(nodes),))
    writer.start()
    cluster = Cluster(Options(config=str(tmp_path / "pipe"), registry="memory"))
    assert sum(1 for _ in cluster.registry.nodes()) == 5000
    writer.join()


def test_an_installation_that_lost_what_it_needs(bare: Path, tmp_path: Path) -> None:
    broken = installed_python(tmp_path / "broken")
    (packages_of(broken) / "dependencies.pth").unlink()
    for python in (bare, broken):
        assert "it has no aiohttp, " in refusal(python, plugin_of(broken), plugin_environ({}))


def test_a_checkout_uses_its_environment(bare: Path, tmp_path: Path) -> None:
    shutil.copytree(plugins.FILES[0].parents[2], tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "src" / "lmcache_frontend" / "plugins" / SCHEDULER
    assert "it has no aiohttp, " in refusal(bare, file, plugin_environ({}))
    python = bare_python(tmp_path / ".venv")
    with_dependencies(python)
    (packages_of(python) / "editable.pth").write_text(str(tmp_path / "src"))
    with started(bare, file, plugin_environ(config_on(free_port()))) as child:
        read_until(child, "serves on")
        assert Path(f"/proc/{child.pid}/cmdline").read_bytes().startswith(str(python).encode())


def test_the_python_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("usr/bin/python3.98", "usr/bin/python3", "other/python3.99"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    usr = tmp_path / "usr"
    assert python_of(f"{usr}/lib/python3.98/site-packages") == f"{usr}/bin/python3.98"
    assert python_of(f"{usr}/lib64/python3.98/site-packages") == f"{usr}/bin/python3.98"
    assert python_of(f"{usr}/lib/python3/dist-packages") == f"{usr}/bin/python3"
    assert python_of(f"{tmp_path}/home/.local/lib/python3.99/site-packages") == f"{tmp_path}/other/python3.99"
    assert python_of(f"{usr}/lib/python3.97/site-packages") == ""
    assert python_of(f"{usr}/elsewhere") == ""


# --- as a process


async def test_it_serves_the_nodes_of_the_deployment(installed: Path, bare: Path, api_server: StartApi) -> None:
    worker = await api_server(role="worker")
    prefix, _, port_of_worker = worker.node["port"].rpartition("_")
    port = free_port()
    configuration = config_on(
        port,
        internal_api_server_enabled=True,
        internal_api_server_socket_path_prefix=prefix,
        internal_api_server_port_start=int(port_of_worker) - 1,
        lmcache_instance_id="i",
    )
    with started(bare, plugin_of(installed), plugin_environ(configuration, workers=1)) as child:
        told = read_until(child, "serves on")  # behind a warning, when the first check of the scheduler was quicker
        assert told.endswith(f"frontend serves on http://127.0.0.1:{port} (2 nodes)\n")
        (local,) = (await _json(f"http://127.0.0.1:{port}/api/nodes"))["nodes"]
        assert [node["name"] for node in local["children"]] == ["i_scheduler", "i_worker0"]
        async with worker.client.get("/version") as response:
            assert await _json(f"http://127.0.0.1:{port}/proxy2/i_worker0/version") == await response.json()


async def _json(url: str) -> Any:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.status == 200
        return await response.json()


def test_what_cannot_start_is_one_line_and_code_2(installed: Path) -> None:
    file = plugin_of(installed)
    assert refusal(installed, file, {"PATH": os.environ["PATH"]}) == (
        "lmcache-frontend: LMCACHE_RUNTIME_PLUGIN_CONFIG is not set: LMCache sets it when it starts this plugin"
        " (docs/plugins.md)"
    )
    assert "no JSON" in refusal(installed, file, plugin_environ("{"))
    assert "has no such option" in refusal(installed, file, plugin_environ({"extra_config": {"plugin.frontend.x": 1}}))
    assert "expected a node" in refusal(
        installed,
        file,
        plugin_environ({"internal_api_server_enabled": True, "extra_config": {"plugin.frontend.nodes": [1]}}),
    )
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        line = refusal(installed, file, plugin_environ(config_on(port, internal_api_server_enabled=True)))
        assert line == (
            f"lmcache-frontend: 127.0.0.1:{port}: the port is in use; stop what listens there or choose another port"
        )


@pytest.mark.parametrize("another", [False, True], ids=["", "another Python"])
def test_it_ends_when_its_parent_is_killed(installed: Path, bare: Path, another: bool) -> None:
    python = bare if another else installed
    environ = plugin_environ(config_on(free_port()))
    with started_by_another(python, plugin_of(installed), environ) as parent:
        read_until(parent, "serves on")
        clock = time.monotonic()
        parent.kill()
        output, _ = parent.communicate(timeout=20)
        assert time.monotonic() - clock < QUICK_SECONDS
    told = [line for line in output.splitlines() if " is down: " not in line]  # its nodes: nobody serves there
    assert told == ["the process that has started this plugin is gone", "stopping"]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_parent_that_is_gone_at_once(installed: Path, bare: Path) -> None:
    """It takes longer to start a Python than to be killed: LMCache's pipe, not the parent's pid, tells of it."""
    starts = "p = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)"
    program = f"import os, subprocess, sys\n{starts}\nprint(p.pid, flush=True)\nos._exit(0)"
    command = [sys.executable, "-c", program, str(bare), str(plugin_of(installed))]
    environ = plugin_environ(config_on(free_port()))
    shown = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=20).stdout
    clock = time.monotonic()
    while runs(int(shown)):
        assert time.monotonic() - clock < 5, "it lives on"
        time.sleep(0.05)


def test_the_end_of_the_thread_that_started_it_is_not_the_end(installed: Path) -> None:
    port = free_port()
    with started_by_another(installed, plugin_of(installed), plugin_environ(config_on(port)), in_a_thread=True) as host:
        read_until(host, "serves on")
        time.sleep(1)
        assert ask(port, "/health")["status"] == "healthy"
        host.kill()
        host.communicate(timeout=QUICK_SECONDS)


async def test_the_multiprocess_plugin_sends_heartbeats_and_serves_nothing(installed: Path, bare: Path) -> None:
    port = free_port()
    async with discovery_service() as service:
        extra = {"plugin.frontend.heartbeat_url": service.url, "plugin.frontend.report_host": "h"}
        configuration = {"http_config": {"http_port": port}, "runtime_plugin_extra_config": extra}
        environ = plugin_environ(configuration, LMCACHE_RUNTIME_PLUGIN_ROLE="")
        with started(bare, plugin_of(installed, MULTIPROCESS), environ) as child:
            (sent,) = await service.receive(1)
            assert (sent["api_address"], sent["pid"]) == (f"http://h:{port}", str(child.pid))
            assert (sent["version"], json.loads(sent["other_info"])["nodes_count"]) == ("1.0.0", 1)
            child.send_signal(signal.SIGTERM)
            assert child.wait(QUICK_SECONDS) == 0
    assert "heartbeat_url" in refusal(
        installed, plugin_of(installed, MULTIPROCESS), plugin_environ({"mp_config": {}, "http_config": {}})
    )


def test_sigterm_at_any_time_is_no_failure(installed: Path) -> None:
    for seconds in (0.1, 0.2, 0.3, 0.5):
        with started(installed, plugin_of(installed), plugin_environ(config_on(free_port()))) as child:
            time.sleep(seconds)
            child.send_signal(signal.SIGTERM)
            assert child.wait(QUICK_SECONDS) in (0, -signal.SIGTERM)  # the latter: Python itself has not started yet
