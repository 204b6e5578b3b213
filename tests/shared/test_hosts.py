"""For which hosts a server answers: names that the public DNS can give to anybody are none, when a browser asks."""

from __future__ import annotations

import socket
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.options import read_options
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_shared.access.hosts import Hosts, names_of_this_machine
from lmcache_shared.errors import ConfigError, Refusal

CHROME = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/142.0.0.0 Safari/537.36"}
BROWSERS = [
    CHROME,
    {"Origin": "http://evil.example"},
    {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Mode": "navigate"},
    {"Sec-Fetch-Dest": "document"},
    {"User-Agent": "curl/8.0", "Accept-Language": "en"},  # a page may call its browser so
]
PROGRAMS = [
    {},
    {"User-Agent": "curl/8.14.1"},
    {"User-Agent": "Prometheus/3.7.3"},
    {"User-Agent": "Python/3.13 aiohttp/3"},
]

KNOWN = [
    "localhost", "LOCALHOST:8080", "localhost.", "127.0.0.1:8080", "10.0.0.5", "[::1]:8080", "[2001:db8::1]",
    "8.8.8.8:80", "worker0", "worker0:7000", "under_score", "a.localhost", "printer.local", "x.internal",
    "lmcache.serving.svc", "lmcache.serving.svc.cluster.local:7000", "nas.home.arpa", "nas.lan", "a.b.corp",
    "localhost:", socket.gethostname(),
]  # fmt: skip
UNKNOWN = [
    "evil.example", "evil.example:8080", "evil.com", "localhost.evil.com", "127.0.0.1.nip.io",
    "10.0.0.5.evil.com", "local.evil.com", "evil.com.", "evillocal.com", "home.arpa.com", "2130706433",
    "0x7f000001", "127.1", "evil.1", "a..local", ".local", "localhost@evil.com", "evil.com/localhost",
    "evil.com#.local", "localhost, evil.com", "localhost evil.com", "[::1", "[::1]x", "[evil]", "localhost:x",
    "localhost:123456", "", "ⓛocalhost", "xn--ocalhost-x.com", "a" * 300 + ".local", "*.local", "%6cocalhost",
]  # fmt: skip


def asked(hosts: Hosts, *values: str, **fields: str) -> int:
    headers = CIMultiDict([*(("Host", value) for value in values), *fields.items()])
    try:
        hosts.check(make_mocked_request("GET", "/", headers=headers))
    except Refusal as refused:
        return refused.status
    return 200


@pytest.mark.parametrize("host", KNOWN)
def test_names_of_this_machine_and_of_no_public_dns(host: str) -> None:
    assert Hosts(None).knows(host)
    assert asked(Hosts(None), host, **CHROME) == 200
    assert asked(Hosts(["lmcache.example.com"]), host) == 200


@pytest.mark.parametrize("host", UNKNOWN)
def test_names_that_anybody_can_have(host: str) -> None:
    for browser in BROWSERS:
        assert asked(Hosts(None), host, **browser) == 421
    for program in PROGRAMS:
        assert asked(Hosts(None), host, **program) == 200  # no curl line breaks
        assert asked(Hosts(["lmcache.example.com"]), host, **program) == 421


def test_two_hosts() -> None:
    assert asked(Hosts(None), "localhost", "evil.com", **CHROME) == 421
    assert asked(Hosts(None), **CHROME) == 200  # HTTP/1.0; no browser leaves it out
    assert asked(Hosts(["a.com"])) == 200


@pytest.mark.parametrize(
    ("allowed", "host", "known"),
    [
        ("lmcache.example.com", "LMCACHE.example.com.:443", True),
        ("lmcache.example.com", "x.lmcache.example.com", False),
        ("lmcache.example.com", "example.com", False),
        ("*.example.com", "a.example.com", True),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "evilexample.com", False),
        ("*.example.com", "a.example.com.evil.com", False),
        ("*", "evil.com", True),
        ("*", "evil.com/x", False),
    ],
)
def test_what_the_operator_allows(allowed: str, host: str, known: bool) -> None:
    assert Hosts([allowed]).knows(host) is known
    assert asked(Hosts([allowed]), host, **CHROME) == (200 if known else 421)


def test_the_names_a_server_is_given_are_its_own() -> None:
    assert Hosts(None, own=["ops.example.com", "0.0.0.0", ""]).knows("ops.example.com:80")


def test_this_machines_names(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(
        "127.0.0.1 localhost evil.com\n127.0.1.1\tGPU7.rack.example.com gpu7 # not.this\n# 10.0.0.1 gpu7 nor.this\n"
        "10.0.0.2\n"
    )
    (tmp_path / "resolv").write_text("nameserver 10.0.0.1\nsearch dc.example.com example.com. .\noptions ndots:5\n")
    for hostname in ("gpu7", "GPU7.Rack.example.com"):
        found = names_of_this_machine(hostname, str(tmp_path / "hosts"), str(tmp_path / "resolv"))
        assert found == {"gpu7", "gpu7.rack.example.com", "gpu7.dc.example.com", "gpu7.example.com"}
    assert names_of_this_machine("gpu7", str(tmp_path / "no"), str(tmp_path)) == {"gpu7"}
    assert all(Hosts(None).knows(name) for name in names_of_this_machine())


@pytest.mark.parametrize("name", ["a b", "http://a.com", "a.com:80", "*a.com", "a.*.com", "a..com", "", "10.0.0.0/8"])
def test_names_that_are_none_stop_the_start(name: str) -> None:
    with pytest.raises(ConfigError):
        Hosts([name], option="--allow-host")
    if name:
        with pytest.raises(ConfigError, match="^--allow-host"):
            read_options(["--allow-host", name], {})


async def test_both_servers(api_server: StartApi, frontend_server: StartFrontend) -> None:
    evil = {**CHROME, "Host": "evil.example:8080"}

    async def get(client: aiohttp.ClientSession, path: str, headers: dict[str, str]) -> tuple[int, str]:
        async with client.get(path, headers=headers) as response:
            return response.status, await response.text()

    for chosen in ([], ["*.example"]):
        worker = await api_server(tcp=True, internal_api_server_allow_host=chosen or None)
        frontend = await frontend_server(allow_host=chosen or None, nodes=[{**worker.node, "name": "w"}])
        for client, path, option in (
            (worker.client, "/version", "internal_api_server_allow_host"),
            (frontend.client, "/api/nodes", "--allow-host"),
            (frontend.client, "/proxy2/w/version", "--allow-host"),
            (frontend.client, "/static/icon.svg", "--allow-host"),
            (frontend.client, "/sign-in", "--allow-host"),
        ):
            status, said = await get(client, path, evil)
            assert status == (200 if chosen else 421)
            assert chosen or (option in said and "'evil.example:8080'" in said)
            assert (await get(client, path, CHROME))[0] == 200
            assert (await get(client, path, {"Host": "other.com"}))[0] == (421 if chosen else 200)
