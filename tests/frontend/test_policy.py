"""Where the proxy goes, and where it does not, whatever the spelling: the rules, and attacks on servers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp.test_utils import make_mocked_request

from lmcache_frontend.nodes.node import read_list
from lmcache_frontend.options import Options, read_options
from lmcache_frontend.proxy import connect as connecting
from lmcache_frontend.proxy import policy as policies
from lmcache_frontend.proxy.exchange import Outgoing, Transport
from lmcache_frontend.proxy.native import NativeTransport
from lmcache_frontend.proxy.plain import PlainTransport
from lmcache_frontend.proxy.policy import Policy
from lmcache_frontend.proxy.rules import GuardedName, GuardedSocket, NotAllowed, number_of, read_rules
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_shared.access.caller import Caller, is_local_caller
from lmcache_shared.access.gate import CALLER
from lmcache_shared.access.roles import Role
from lmcache_shared.address import Address, TcpAddress, UnixAddress
from lmcache_shared.errors import ConfigError, Refusal
from tests.frontend.dns_server import dns_server
from tests.frontend.registries import registry_of
from tests.frontend.upstream import Upstream, raw, serving


class Peer:
    def __init__(self, peer: object) -> None:
        self._peer = peer

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._peer if name == "peername" else default


def request(peer: object = ("127.0.0.1", 5), host: str = "localhost:8080", role: Role = Role.ADMIN, **headers: str):  # type: ignore[no-untyped-def]
    fields = {"Host": host} | {name.replace("_", "-"): value for name, value in headers.items()}
    made = make_mocked_request("GET", "/", headers=fields, transport=Peer(peer))
    made[CALLER] = Caller("somebody", role)
    return made


AWAY = request(("10.0.0.9", 5))


def policy(prefixes: list[str] | None = None, *nodes: str, allow: list[str] | None = None) -> Policy:
    entries = read_list(f"[{','.join(nodes)}]".encode(), "test")
    return Policy(registry_of(entries), read_rules(prefixes, allow))


def allowed(chosen: Policy, address: Address, caller: Any = AWAY) -> bool:
    try:
        found = chosen.allowed(caller, address)
    except Refusal as refused:
        assert refused.status == 403
        return False
    assert str(found) == str(address)
    return True


def led_to(target: Address) -> str:
    """Where a socket leads, or what is said instead."""
    assert isinstance(target, GuardedSocket)
    try:
        with target.opened() as path:
            return os.readlink(path)
    except Refusal as refused:
        return f"{refused.status}"
    except OSError:
        return "nobody"


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        yield sock


def test_registered_nodes_and_proxies_for_everybody() -> None:
    proxy = '{"name":"p","host":"p1","port":"8000","nodes":[{"name":"w","host":"w1","port":7000}]}'
    chosen = policy(None, '{"name":"a","host":"h1","port":"80"}', '{"name":"b","host":"x","port":"/run/b"}', proxy)
    for address in (TcpAddress("h1", 80), UnixAddress("/run/b"), TcpAddress("p1", 8000), TcpAddress("w1", 7000)):
        assert chosen.allowed(AWAY, address) == address
    for address in (TcpAddress("h1", 81), UnixAddress("/run/c"), TcpAddress("h2", 80)):
        assert not allowed(chosen, address)


def test_what_is_decided_is_remembered_until_the_registry_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "MAX_DECIDED", 10)
    registry = registry_of(read_list(b'[{"name":"a","host":"h1","port":80}]', "test"))
    chosen = Policy(registry, read_rules(None, ["10.0.0.0/8:81"]))
    assert allowed(chosen, TcpAddress("h1", 80))
    registry.publish("nodes", read_list(b'[{"name":"a","host":"h2","port":80}]', "test"))
    assert not allowed(chosen, TcpAddress("h1", 80))
    assert allowed(chosen, TcpAddress("h2", 80))
    for number in range(100):
        assert allowed(chosen, TcpAddress(f"10.0.0.{number}", 81))
        assert not allowed(chosen, TcpAddress(f"11.0.0.{number}", 81))
    assert len(chosen._decided) <= 10


# --- hosts and networks

ALLOWED = [
    ("10.0.0.0/8:7000-7010", "10.1.2.3", 7000, True),
    ("10.0.0.0/8:7000-7010", "10.1.2.3", 7010, True),
    ("10.0.0.0/8:7000-7010", "10.1.2.3", 7011, False),
    ("10.0.0.0/8:7000-7010", "11.1.2.3", 7000, False),
    ("10.0.0.0/8:7000-7010", "::ffff:10.1.2.3", 7000, True),
    ("10.0.0.0/8", "10.1.2.3", 1, True),
    ("10.0.0.5:*", "10.0.0.5", 9, True),
    ("10.0.0.5:*", "10.0.0.6", 9, False),
    ("fd00::/8:7000", "fd00::1", 7000, True),
    ("[fd00::]/8:7000", "FD00:0::1", 7000, True),
    ("[fd00::1]:7000", "fd00:0:0::1", 7000, True),
    ("[fd00::1]:7000", "fd00::2", 7000, False),
    ("fe80::/10", "fe80::1%eth0", 80, True),
    ("worker0:7000", "worker0", 7000, True),
    ("worker0:7000", "WORKER0.", 7000, True),
    ("worker0:7000", "worker0.evil.example", 7000, False),
    ("worker0:7000", "worker00", 7000, False),
    ("Worker0.:7000", "worker0", 7000, True),
    ("worker*:7000", "worker12", 7000, True),
    ("worker*:7000", "worker1.evil.example", 7000, False),
    ("*.pods.svc:7000", "a.pods.svc", 7000, True),
    ("*.pods.svc:7000", "a.b.pods.svc", 7000, False),
    ("*.pods.svc:7000", "pods.svc", 7000, False),
    ("*.pods.svc:7000", ".pods.svc", 7000, False),
    ("*.pods.svc:7000", "a.podsXsvc", 7000, False),
    ("a.b:7000", "axb", 7000, False),
    ("*:7000", "anybody", 7000, True),
    ("*:7000", "a.b", 7000, False),
    # numbers are meant by networks alone, however they are written
    ("*:80", "2130706433", 80, False),
    ("*:80", "0x7f000001", 80, False),
    ("*:80", "017700000001", 80, False),
    ("*.1:80", "127.1", 80, None),
    ("*.*.*.*:80", "127.0.0.1", 80, None),
    ("*.*:80", "127.1", 80, None),
    ("*.*.*.x1:80", "127.0.0.1", 80, False),
    # this machine, its links and a cloud's credentials are meant by their own networks and names alone
    ("*:80", "localhost", 80, False),
    ("*:80", "localhost.", 80, False),
    ("*.*.*:80", "a.b.localhost", 80, None),
    ("*.localhost:80", "a.localhost", 80, False),
    ("local*:80", "LocalHost", 80, False),
    ("localhost:80", "localhost", 80, True),
    ("0.0.0.0/0", "10.0.0.1", 80, True),
    ("0.0.0.0/0", "127.0.0.1", 80, False),
    ("0.0.0.0/0", "127.0.0.1.", 80, False),
    ("0.0.0.0/0", "0.0.0.0", 80, False),
    ("0.0.0.0/0", "0.0.0.1", 80, False),
    ("0.0.0.0/0", "169.254.169.254", 80, False),
    ("0.0.0.0/0", "::ffff:169.254.169.254", 80, False),
    ("0.0.0.0/0", "::ffff:7f00:1", 80, False),
    ("0.0.0.0/0", "::1", 80, False),
    ("::/0", "::1", 80, False),
    ("::/0", "::", 80, False),
    ("::/0", "0:0:0:0:0:0:0:1%lo", 80, False),
    ("::/0", "fe80::1%eth0", 80, False),
    ("::/0", "fd00:ec2::254", 80, False),
    ("fd00::/8", "fd00:ec2::254", 80, False),
    ("::/0", "2001:db8::1", 80, True),
    ("127.0.0.0/8:80", "127.9.9.9", 80, True),
    ("126.0.0.0/7", "127.0.0.1", 80, False),
    ("169.254.169.254:80", "169.254.169.254", 80, True),
]


@pytest.mark.parametrize(("rule", "host", "port", "expected"), ALLOWED)
def test_what_allow_target_allows(rule: str, host: str, port: int, expected: bool | None) -> None:
    if expected is None:
        with contextlib.suppress(ConfigError):  # refused as a rule, or it allows nothing
            assert not allowed(policy(allow=[rule]), TcpAddress(host, port))
        return
    assert allowed(policy(allow=[rule]), TcpAddress(host, port)) is expected
    assert not allowed(policy(), TcpAddress(host, port))


@pytest.mark.parametrize(
    "rule",
    [
        "", "worker0", "worker0:", "worker0:0", "worker0:70000", "worker0:7010-7000", "worker0:7-", "worker0:x", ":80",
        "a b:80", "a..b:80", "evil@h:80", "http://h:80", "::1:80", "10.0.0.5/8", "10.0.0.0/33", "10.0.0/8",
        "10.0.0.*:80", "[::1:80", "x/y", "10.0.0.0/8:", "/run/../etc/*.sock", "/run/lmcache/", "/", "a" * 70 + ":80",
    ],
)  # fmt: skip
def test_rules_that_are_none_stop_the_start(rule: str) -> None:
    with pytest.raises(ConfigError, match=r"^--allow-target"):
        read_options(["--allow-target", rule], {})


def test_options_can_be_given_again_and_stand_in_the_environment() -> None:
    options = read_options(["--allow-target", "a:1", "--allow-target", "b:2", "--socket-prefix", "/a"], {})
    assert (options.allow_target, options.socket_prefix) == (["a:1", "b:2"], ["/a"])
    options = read_options(["--socket-prefix", "/a/", "--socket-prefix", "/b,c/"], {})
    assert options.socket_prefix == ["/a/", "/b,c/"]
    environ = {"LMCACHE_FRONTEND_SOCKET_PREFIX": "/run/x", "LMCACHE_FRONTEND_ALLOW_TARGET": "10.0.0.0/8:7000,a:1"}
    options = read_options([], environ)
    assert (options.socket_prefix, options.allow_target) == (["/run/x"], ["10.0.0.0/8:7000", "a:1"])
    assert read_options(["--socket-prefix", ""], environ).socket_prefix is None
    with pytest.raises(ConfigError, match=r"environment: LMCACHE_FRONTEND_SOCKET_PREFIX: x: .* starts with /"):
        read_options([], {"LMCACHE_FRONTEND_SOCKET_PREFIX": "x"})
    assert allowed(policy(list(Options().socket_prefix or ())), UnixAddress("/tmp/lmcache_internal_api_server/s"))


def test_loopback_ports_for_callers_here_alone() -> None:
    chosen = policy()
    for host in ("localhost", "127.0.0.1", "::1", "LOCALHOST.", "::ffff:127.0.0.1", "127.9.9.9"):
        assert allowed(chosen, TcpAddress(host, 80), request())
        assert not allowed(chosen, TcpAddress(host, 80))
        assert not allowed(chosen, TcpAddress(host, 80), request(X_Forwarded_For="10.0.0.9"))
        assert not allowed(chosen, TcpAddress(host, 80), request(role=Role.VIEWER))  # --no-trust-local, without a token
    for host in ("10.0.0.1", "0.0.0.0", "::", "2130706433", "127.1", "0177.0.0.1", "a.localhost", "169.254.169.254"):
        assert not allowed(chosen, TcpAddress(host, 80), request())
    found = chosen.allowed(request(), TcpAddress("localhost", 80))
    assert isinstance(found, GuardedName)
    assert [found.check(number) for number in ("127.0.0.1", "::1", "10.0.0.1")] == [True, True, False]


@pytest.mark.parametrize("peer", [("127.0.0.1", 1), ("::1", 1, 0, 0), ("::ffff:127.0.0.1", 1, 0, 0)])
def test_local_callers(peer: object) -> None:
    assert is_local_caller(request(peer))
    assert is_local_caller(request(peer, host="127.0.0.1"))
    assert is_local_caller(request(peer, host="[::1]:8080", Sec_Fetch_Site="same-origin"))


@pytest.mark.parametrize(
    "caller",
    [
        request(("10.0.0.1", 1)),
        request(None),
        request(""),
        request(host="evil.example:8080"),
        request(host="a b:x:y"),
        request(host=""),
        request(Via="1.1 lmcache-frontend"),
        request(X_Forwarded_For="10.0.0.1"),
        request(Forwarded="for=10.0.0.1"),
        request(X_Real_IP="10.0.0.1"),
    ],
)
def test_callers_from_elsewhere(caller) -> None:  # type: ignore[no-untyped-def]
    assert not is_local_caller(caller)


def test_a_refusal_names_the_target_and_the_way_out() -> None:
    for address, detail, option in (
        (UnixAddress("/run/x"), "Socket /run/x", "--socket-prefix or --allow-target /run/x"),
        (TcpAddress("::2", 1), "Target [::2]:1", "--allow-target [::2]:1"),
    ):
        with pytest.raises(NotAllowed) as refused:
            policy(["/run/lm/"]).allowed(request(), address)
        assert refused.value.detail == f"{detail} is not a registered node"
        assert refused.value.reason == f"add it with --nodes or --config, or allow it with {option}"


# --- sockets


def test_sockets_under_the_prefixes(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    chosen = policy([f"{folder}/socket", "/run/other/"])
    for path in (
        f"{folder}/socket_1",
        f"{folder}/./socket_1",
        f"/{folder}//socket_1",
        "/run/other/any",
        "/run/other/a/b",
    ):
        assert allowed(chosen, UnixAddress(path)), path
    paths = ("other", "socket/../../x", "../socket_1", "Socket_1", "", "../../etc/x", "%2e%2e/socket_1", "socke")
    for path in [*(f"{folder}/{path}" for path in paths), f"{tmp_path}/socket_1", "/", "/run/other", "/run/otherx/y"]:
        assert not allowed(chosen, UnixAddress(path)), path
    assert not allowed(policy(None), UnixAddress(f"{folder}/any"))
    assert not allowed(policy([]), UnixAddress(f"{folder}/any"))


def test_sockets_by_a_pattern() -> None:
    chosen = policy(allow=["/run/lmcache/*.sock", "/run/*/api", "/run/one.sock"])
    for path in ("/run/lmcache/a.sock", "/run/lmcache/.sock", "/run/x/api", "/run/one.sock"):
        assert allowed(chosen, UnixAddress(path)), path
    for path in (
        "/run/lmcache/a/b.sock",
        "/run/lmcache/a.sockx",
        "/run/x/y/api",
        "/run/two.sock",
        "/run/lmcache/asock",
    ):
        assert not allowed(chosen, UnixAddress(path)), path


def test_real_sockets_alone_whatever_leads_there(tmp_path: Path) -> None:
    folder, outside = tmp_path / "lm", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    with listening(outside / "docker.sock"), listening(folder / "real"):
        (folder / "file").write_text("")
        (folder / "folder").mkdir()
        os.mkfifo(folder / "fifo")
        (folder / "to_real").symlink_to("real")
        (folder / "out").symlink_to(outside / "docker.sock")
        (folder / "out_and_back").symlink_to(f"{outside}/../lm/real")
        (folder / "folder_out").symlink_to(outside)
        (folder / "nowhere").symlink_to(tmp_path / "nothing")
        (folder / "circle").symlink_to("circle")
        (folder / "by_proc").symlink_to(f"/proc/self/root{outside}/docker.sock")
        (folder / "in_by_proc").symlink_to(f"/proc/{os.getpid()}/root{folder}/real")
        (folder / "null").symlink_to("/dev/null")
        (tmp_path / "alias").symlink_to(folder)
        found = {}
        for prefix in (f"{folder}/", f"{tmp_path}/alias/"):
            chosen = policy([prefix])
            for name in (
                "real", "to_real", "folder/../real", "folder_out/../lm/real", "out_and_back", "in_by_proc", "file",
                "folder", "fifo", "out", "folder_out/docker.sock", "by_proc", "null", "nowhere", "circle", "missing",
                "real/x",
            ):  # fmt: skip
                found[name] = led_to(chosen.allowed(AWAY, UnixAddress(prefix + name)))
            there = str(folder / "real")
            assert found == {
                **dict.fromkeys(("real", "to_real", "folder/../real", "out_and_back", "in_by_proc"), there),
                "folder_out/../lm/real": there,
                **dict.fromkeys(("file", "folder", "fifo", "out", "folder_out/docker.sock", "by_proc", "null"), "403"),
                **dict.fromkeys(("nowhere", "circle", "missing", "real/x"), "nobody"),
            }
    proc = policy([f"{folder}/"])
    for path in (
        f"/proc/self/root{folder}/real",
        f"/proc/self/cwd{folder}/real",
        f"/proc/{os.getpid()}/root{folder}/real",
    ):
        assert not allowed(proc, UnixAddress(path))


IN_ANOTHER_CONTAINER = """
import socket, subprocess, sys
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
with socket.socket(socket.AF_UNIX) as sock:
    sock.bind(folder + "/real")
    sock.listen()
    print("there", flush=True)
    sys.stdin.read()
"""


def test_a_socket_of_the_same_path_in_another_container(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    folder.mkdir()
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        sys.executable,
        "-c",
        IN_ANOTHER_CONTAINER,
        str(folder),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as other:
        assert other.stdout is not None
        if other.stdout.readline() != b"there\n":
            pytest.skip("the kernel lets this user make no mount namespace, which is what is tried")
        root = f"/proc/{other.pid}/root"
        with listening(folder / "real"):
            (folder / "theirs").symlink_to(f"{root}{folder}/real")
            handle = os.open(folder / "theirs", os.O_PATH)
            assert os.readlink(f"/proc/self/fd/{handle}") == str(folder / "real")  # by its path alone it is ours
            os.close(handle)
            chosen = policy([f"{folder}/"])
            assert led_to(chosen.allowed(AWAY, UnixAddress(f"{folder}/real"))) == str(folder / "real")
            assert led_to(chosen.allowed(AWAY, UnixAddress(f"{folder}/theirs"))) == "403"
        other.communicate(b"")


@pytest.mark.parametrize("transport", [NativeTransport, PlainTransport])
async def test_a_socket_that_is_swapped_for_a_link_is_not_followed(transport: Any, tmp_path: Path) -> None:
    """While another process swaps the two, no connection gets out, and those that are made are to the real one."""
    folder = tmp_path / "lm"
    folder.mkdir()
    stop = threading.Event()
    with listening(tmp_path / "secret") as secret, listening(folder / "real") as real:

        def serve() -> None:
            real.settimeout(0.1)
            while not stop.is_set():
                with contextlib.suppress(OSError), real.accept()[0] as sock:
                    sock.settimeout(1)
                    sock.recv(4096)
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        def swap() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                fresh = folder / f"fresh{number % 2}"
                with contextlib.suppress(FileExistsError):
                    if number % 2:
                        os.link(folder / "real", fresh)
                    else:
                        fresh.symlink_to(tmp_path / "secret")
                os.replace(fresh, folder / "socket")

        threads = [threading.Thread(target=serve), threading.Thread(target=swap)]
        for thread in threads:
            thread.start()
        try:
            address = policy([f"{folder}/"]).allowed(AWAY, UnixAddress(f"{folder}/socket"))
            ended: set[int] = set()
            asked, deadline = 0, time.monotonic() + 20
            while asked < 300 or (not {200, 403} <= ended and time.monotonic() < deadline):
                asked += 1
                way: Transport = transport(address)
                try:
                    answer = await way.request(Outgoing("GET", "/", []))
                    ended.add(answer.status)
                    answer.release()
                except Refusal as refused:
                    ended.add(refused.status)
                finally:
                    await way.close()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert {200, 403} <= ended <= {200, 403, 502, 504}
        secret.setblocking(False)
        with pytest.raises(BlockingIOError):
            secret.accept()


# --- what a name resolves to


@contextlib.asynccontextmanager
async def resolving(monkeypatch: pytest.MonkeyPatch, zone: dict[str, list[str]]) -> AsyncIterator[Any]:
    """The loop's names come from a real DNS server."""
    import dns.asyncresolver

    async with dns_server(zone=zone, ttl=0) as server:
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.nameservers, resolver.port, resolver.cache = ["127.0.0.1"], server.port, None

        async def look_up(host: str, port: int) -> list[Any]:
            try:
                answer = await resolver.resolve(host, "A", search=False)
            except Exception as error:
                raise OSError(str(error)) from None
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (it.address, port)) for it in answer]

        monkeypatch.setattr(connecting, "look_up", look_up)
        yield server


@pytest.mark.parametrize("transport", [NativeTransport, PlainTransport])
async def test_a_name_that_changes_its_mind(transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(Upstream()) as upstream, resolving(monkeypatch, {}) as server:
        chosen = policy(allow=["10.0.0.0/8", f"*.pods.example:{upstream.port}", f"exact.example:{upstream.port}"])

        async def ask(host: str, *addresses: str) -> int:
            server.zone[f"{host}. A"] = list(addresses)
            server.asked.clear()
            way: Transport = transport(chosen.allowed(AWAY, TcpAddress(host, upstream.port)))
            try:
                answer = await way.request(Outgoing("GET", "/", []))
                answer.release()
                return answer.status
            except Refusal as refused:
                return refused.status
            finally:
                await way.close()
                assert len(server.asked) == 1  # what was checked is what was connected to

        assert await ask("evil.example", "127.0.0.1") == 403
        assert await ask("evil.example", "169.254.169.254") == 403
        assert await ask("evil.example", "127.0.0.1", "192.0.2.1") == 403
        assert await ask("a.pods.example", "127.0.0.1") == 403  # a pattern is for nobody who says he is this machine
        assert await ask("exact.example", "127.0.0.1") == 200  # whom the operator names is believed
        assert upstream.connections == 1


async def test_of_what_a_name_resolves_to_the_allowed_ones_are_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(Upstream()) as upstream, resolving(monkeypatch, {"both.example. A": ["192.0.2.1", "127.0.0.1"]}):
        address = policy(allow=["127.0.0.0/8"]).allowed(AWAY, TcpAddress("both.example", upstream.port))
        way = NativeTransport(address)
        answer = await way.request(Outgoing("GET", "/", []))
        assert answer.status == 200
        answer.release()
        await way.close()


# --- attacks on a server that serves

FORBIDDEN = """
    localhost/{port} LOCALHOST/{port} localhost./{port} 127.0.0.1/{port} 127.1/{port} 2130706433/{port}
    0x7f000001/{port} 0X7F.1/{port} 017700000001/{port} 0177.0.0.1/{port} 0.0.0.0/{port} 0/{port} [::1]/{port}
    ::1/{port} [::]/{port} [::ffff:127.0.0.1]/{port} [::ffff:7f00:1]/{port} [0:0:0:0:0:ffff:127.0.0.1]/{port}
    %6cocalhost/{port} %256cocalhost/{port} 127%2E0.0.1/{port} 127.0.0.1./{port} [::1%25lo]/{port}
    ::1%25lo/{port} 169.254.169.254/80 [::ffff:169.254.169.254]/80 metadata.google.internal/80
    127.0.0.1%20/{port} 127.0.0.1%00/{port} x%40127.0.0.1/{port} x@127.0.0.1/{port} 127.0.0.1%23/{port}
    127.0.0.1%3f/{port} 127.0.0.1%0d%0aX:/{port} 127.0.0.1:{port}/{port} 127.0.0.1%3A{port}/{port}
    127.0.0.1%2F/{port} localhost/{port}%20 localhost/0{port} localhost/%2B{port} localhost/{port}.0
    localhost/-1 localhost/0 localhost/65536 localhost/http %EF%BD%8Cocalhost/{port} 127%E3%80%820.0.1/{port}
    a.localhost/{port} ip6-localhost/{port} /{port} ../{port}
""".split()
SOCKETS = """
    %2Frun%2Fdocker.sock %252Frun%252Fdocker.sock {folder}%2F..%2Fsecret {folder}%252F..%252Fsecret
    {folder}%2F%2E%2E%2Fsecret {folder}%2F%252E%252E%2Fsecret {folder}%2Fout {folder}%2Fup%2Fsecret
    {folder}%2F%2F..%2Fsecret {folder}%2Ffile %2Fproc%2Fself%2Froot{folder}%2F..%2Fsecret
    %2Fproc%2Fself%2Froot{folder}%2Freal {folder}%2Fby_proc %00lmcache %2500lmcache @lmcache %2F%00lmcache
    {folder}%2Freal%00 {folder}%2Freal%0a {folder} secret .%2Fsecret
    {folder}%2Faaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
""".split()


class TestAttacks:
    """From elsewhere, on a frontend that also listens for callers here; `ways` are those of a proxied path."""

    HEAD = "{method} {path} HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-For: 10.0.0.9\r\nConnection: close\r\n\r\n"

    async def ask(self, port: int, path: str, *, host: str = "localhost") -> bytes:
        return await raw(port, self.HEAD.format(method="GET", path=path, host=host).encode("utf-8"))

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "lm"
        folder.mkdir()
        (folder / "file").write_text("")
        (folder / "out").symlink_to(tmp_path / "secret")
        (folder / "up").symlink_to(tmp_path)
        (folder / "by_proc").symlink_to(f"/proc/self/root{tmp_path}/secret")
        with listening(tmp_path / "secret") as secret:
            yield folder
            secret.setblocking(False)
            with pytest.raises(BlockingIOError):
                secret.accept()

    async def test_directly_and_nested(self, frontend_server: StartFrontend, folder: Path) -> None:
        options = {"socket_prefix": [f"{folder}/"], "allow_target": ["*.pods.example:*", "*:80", "0.0.0.0/0:81"]}
        inner = await frontend_server(**options)
        rack = {"name": "rack", "host": "127.0.0.1", "port": inner.server.address.port, "nodes": []}
        outer = await frontend_server(nodes=[rack], **options)
        port = outer.server.address.port
        async with serving(Upstream()) as upstream:
            quoted = str(folder).replace("/", "%2F")
            paths = [f"/proxy/{path.format(port=upstream.port)}/x" for path in FORBIDDEN]
            paths += [f"/proxy/localhost/{path.replace('{folder}', quoted)}/x" for path in SOCKETS]
            for way in ("", "/proxy2/rack", f"/proxy/127.0.0.1/{inner.server.address.port}"):
                for path in paths:
                    answer = await self.ask(port, way + path)
                    status = int(answer.split(b" ", 2)[1])
                    nobody_there = (502,) if "%252E" in path else ()  # a folder of that name, in the folder
                    assert status in (400, 403, 404, *nobody_there), (way, path, answer[:300])
                    assert b"Traceback" not in answer
            for path in (
                f"http://localhost:{upstream.port}/x",
                f"http://x/proxy/localhost/{upstream.port}/x",
                "*",
                "//x",
            ):
                answer = await self.ask(port, path)
                assert answer.split(b" ", 2)[1] in (b"400", b"403", b"404"), (path, answer[:300])
            assert upstream.connections == 0
            node = {"name": "w", "host": "127.0.0.1", "port": upstream.port}
            async with outer.client.post("/api/proxies/local_proxy/nodes", json=node) as response:
                assert response.status == 200
            assert (await self.ask(port, "http://x/proxy2/w/there")).startswith(b"HTTP/1.1 200")
            assert (await self.ask(port, f"http://x/proxy/127.0.0.1/{upstream.port}/there")).startswith(b"HTTP/1.1 200")

    async def test_a_name_stands_for_no_target(self, frontend_server: StartFrontend) -> None:
        frontend = await frontend_server()
        for name in ("127.0.0.1", "localhost", quote("../proxy/localhost", safe=""), "127.0.0.1%3A80", "%2Frun%2Fx"):
            answer = await self.ask(frontend.server.address.port, f"/proxy2/{name}/x")
            assert answer.startswith(b"HTTP/1.1 404"), (name, answer)

    async def test_a_redirect_is_the_callers(self, frontend_server: StartFrontend) -> None:
        async with serving(Upstream()) as elsewhere, serving(Upstream()) as upstream:
            frontend = await frontend_server(nodes=[upstream.node])
            for place in (f"http://127.0.0.1:{elsewhere.port}/x", "http://169.254.169.254/latest", "//evil.example/"):
                for status in (301, 302, 303, 307, 308):
                    upstream.answer = f"HTTP/1.1 {status} X\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()
                    answer = await self.ask(frontend.server.address.port, "/proxy2/upstream/x")
                    assert answer.startswith(b"HTTP/1.1 %d" % status)
                    assert f"\r\nLocation: {place}\r\n".encode() in answer
            assert elsewhere.connections == 0


async def test_what_is_allowed_is_reached(frontend_server: StartFrontend, tmp_path: Path) -> None:
    async with serving(Upstream()) as upstream:
        frontend = await frontend_server(allow_target=[f"127.0.0.0/8:{upstream.port}"])
        away = {"X-Forwarded-For": "10.0.0.9"}
        for host in ("127.0.0.1", "localhost", "127.0.0.2"):
            async with frontend.client.get(f"/proxy/{host}/{upstream.port}/x", headers=away) as response:
                assert response.status == (502 if host == "127.0.0.2" else 200), await response.text()
        async with frontend.client.get(f"/proxy/localhost/{upstream.port + 1}/x", headers=away) as response:
            assert response.status == 403
            assert "--allow-target" in await response.text()


def test_how_a_number_is_read() -> None:
    assert str(number_of("::ffff:10.0.0.1")) == "10.0.0.1"
    assert str(number_of("fe80::1%eth0")) == "fe80::1"
    assert number_of("127.1") is number_of("2130706433") is number_of("localhost") is None
