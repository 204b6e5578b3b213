"""Every route of both programs: the role that it needs, whoever asks, whichever way; and tricks to look local."""

from __future__ import annotations

import re
import socket

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from lmcache_api import create_app
from lmcache_api.embedded import EmbeddedComponent
from lmcache_frontend.app import create_app as create_frontend
from lmcache_frontend.cluster import Cluster
from lmcache_frontend.options import Options
from lmcache_shared.access.caller import is_local_caller
from lmcache_shared.access.roles import Needs, Role, by_method, declared
from lmcache_shared.access.table import BY_METHOD, DECLARED, of_proxied
from lmcache_shared.settings import Settings

PROXY = ("/proxy/{}/{}", "/proxy2/{}", "/nodes/{}", "/compare", "/operations", "/manage")
"""What they need is told by what they ask a node. A page of a further frontend is none that the table knows, so that no
token is shown there for it but an admin's caller's."""


def routes() -> dict[tuple[str, str], Needs]:
    """Of all of them what they declare, `{}` for a variable."""
    found: dict[tuple[str, str], Needs] = {}
    frontend = create_frontend(Options(), Cluster(Options(registry="memory")))
    for app in (create_app(EmbeddedComponent(Settings()), ("common", "vllm", "controller")), frontend):
        for route in app.router.routes():
            assert route.resource is not None
            path = re.sub(r"\{path:.*\}$", "", route.resource.canonical)
            path = re.sub(r"\{\w+\}", "{}", path)
            if route.method != "HEAD" and not path.startswith(("/static", *PROXY)):
                found[route.method, path] = declared(route.handler, route.method)
    return found


def test_the_table_of_the_proxy_is_what_the_routes_declare() -> None:
    table = {**{key: by_method(key[0]) for key in BY_METHOD}, **DECLARED}
    assert not BY_METHOD & DECLARED.keys()
    assert table == routes()


def test_nobody_is_asked_for_less_than_the_issue_says() -> None:
    needs = routes()
    for key in (("GET", "/env"), ("POST", "/run_script")):
        assert needs[key].role == Role.ADMIN
    assert needs["GET", "/threads"].role == Role.OPERATOR
    assert needs["GET", "/loglevel"].of(["logger_name"]) == Role.VIEWER
    assert needs["GET", "/loglevel"].of(["logger_name", "level"]) == Role.OPERATOR
    reading = {
        path for (method, path), it in needs.items() if method not in ("GET", "HEAD") and it.role < Role.OPERATOR
    }
    asking = {
        "/sign-in",
        "/sign-out",
        "/cache/lookup",
        "/lookup",
        "/health",
        "/query_instance",
        "/query_worker_info",
        "/check_finish",
    }
    assert reading == asking


@pytest.mark.parametrize(
    ("method", "target", "role", "known"),
    [
        ("GET", "/version", Role.VIEWER, True),
        ("HEAD", "/metrics", Role.VIEWER, True),
        ("GET", "/loglevel?logger_name=a", Role.VIEWER, True),
        ("GET", "/loglevel?logger_name=a&level=debug", Role.OPERATOR, True),
        ("GET", "/loglevel?l%65vel=debug", Role.OPERATOR, True),
        ("GET", "/loglevel?level", Role.OPERATOR, True),
        ("GET", "/env", Role.ADMIN, True),
        ("GET", "/env/", Role.ADMIN, False),
        ("GET", "//env", Role.ADMIN, False),
        ("GET", "/./env", Role.ADMIN, False),
        ("GET", "/version/../env", Role.ADMIN, False),
        ("GET", "/%65nv", Role.ADMIN, False),
        ("GET", "/%2565nv", Role.ADMIN, False),
        ("GET", "/env#", Role.ADMIN, False),
        ("GET", "/env#x?y", Role.ADMIN, False),
        ("GET", "//proxy2/rack2/env", Role.ADMIN, False),
        ("GET", "/x/../proxy2/rack2/./env", Role.ADMIN, False),
        ("GET", "/x%2F..%2Fenv", Role.ADMIN, False),
        ("GET", "/proxy2/rack2/env", Role.ADMIN, True),
        ("GET", "/proxy2/rack2/proxy2/w0/env", Role.ADMIN, True),
        ("GET", "/proxy/h/7000/env", Role.ADMIN, True),
        ("GET", "/proxy/localhost/%252Ftmp%252Fs/env", Role.ADMIN, True),
        ("GET", "/%70roxy2/rack2/env", Role.ADMIN, False),
        ("GET", "/proxy2%2Frack2/env", Role.ADMIN, False),
        ("GET", "/proxy2/env", Role.VIEWER, True),
        ("GET", "/proxy2/env/version", Role.VIEWER, True),
        ("GET", "/periodic-threads/x", Role.VIEWER, True),
        ("GET", "/of-my-own", Role.VIEWER, False),
        ("POST", "/of-my-own", Role.OPERATOR, False),
        ("POST", "/run_script", Role.ADMIN, True),
        ("POST", "/run%5Fscript", Role.ADMIN, False),
        ("DELETE", "/backends/LocalCPUBackend", Role.OPERATOR, True),
        ("DELETE", "/backends/a%2Fb", Role.OPERATOR, False),
        ("POST", "/cache/lookup", Role.VIEWER, True),
        ("BREW", "/version", Role.OPERATOR, False),
        ("get", "/version", Role.OPERATOR, False),
        ("GET", "", Role.VIEWER, False),
    ],
)
def test_what_a_proxied_request_needs(method: str, target: str, role: Role, known: bool) -> None:
    found = of_proxied(method, target)
    assert (found.role, found.known) == (role, known)


@pytest.mark.parametrize(("method", "path"), [*DECLARED, *BY_METHOD])
def test_every_route_in_every_spelling(method: str, path: str) -> None:
    path = path.replace("{}", "name")
    plain = of_proxied(method, path)
    assert plain.known
    spelled = [
        f"//{path[1:]}",
        f"/.{path}",
        f"/x/..{path}",
        path + "/",
        "/" + "".join(f"%{ord(it):02x}" for it in path[1:]),
    ]
    for way in ("", "/proxy2/rack", "/proxy/host/7000", "/proxy2/rack/proxy2/w"):
        assert of_proxied(method, way + path) == plain
        assert all(
            of_proxied(method, way + other).role == max(plain.role, of_proxied(method, "/x").role) for other in spelled
        )


class Transport:
    def __init__(self, peer: object, family: socket.AddressFamily) -> None:
        self.values = {"peername": peer, "socket": type("Socket", (), {"family": family})()}

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self.values.get(name, default)


def asked(peer: object = ("127.0.0.1", 5), *fields: tuple[str, str], host: str | None = "localhost:8080"):  # type: ignore[no-untyped-def]
    headers = [("Host", host)] if host is not None else []
    family = socket.AF_INET if isinstance(peer, tuple) else socket.AF_UNIX
    return make_mocked_request(
        "GET",
        "/",
        headers=CIMultiDict([*headers, *fields]),
        transport=Transport(peer, family),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "localhost.:8080", "127.0.0.1", "127.9.9.9", "[::1]:80"])
@pytest.mark.parametrize("peer", [("127.0.0.1", 1), ("::1", 1, 0, 0), ("::ffff:127.0.0.1", 1, 0, 0), ""])
def test_a_caller_here(peer: object, host: str) -> None:
    assert is_local_caller(asked(peer, host=host))


@pytest.mark.parametrize(
    "host",
    [
        None, "", "evil.example", "localhost.evil.example", "evil@localhost", "localhost@evil.example", "localhost/x",
        "localhost#", "localhost?", "localhost:x", "localhost:8080:1", "localhost, evil.example", "localhost evil",
        "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "127.0.0.1.nip.io", "0.0.0.0", "[::]", "[::ffff:10.0.0.1]",
        "localhost..", ".localhost", "a.localhost", "ⓛocalhost", "localhost\x00", "[::1", "::1]", "%6cocalhost",
    ],
)  # fmt: skip
def test_a_host_that_is_not_this_machine(host: str | None) -> None:
    assert not is_local_caller(asked(host=host))


@pytest.mark.parametrize(
    "peer",
    [("10.0.0.9", 1), ("::ffff:10.0.0.9", 1, 0, 0), ("0.0.0.0", 1), ("128.0.0.1", 1), ("fe80::1%lo", 1, 0, 0)],
)
def test_a_caller_elsewhere(peer: object) -> None:
    assert not is_local_caller(asked(peer))


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For", "X-Real-IP", "x-forwarded-FOR"])
@pytest.mark.parametrize("value", ["10.0.0.9", "127.0.0.1", "", "for=localhost"])
@pytest.mark.parametrize("via", [[], ["1.1 varnish"], ["1.1 varnish, 1.1 lmcache-frontend"]])
def test_a_proxy_speaks_for_somebody(name: str, value: str, via: list[str]) -> None:
    for peer in (("127.0.0.1", 1), ""):
        request = asked(peer, (name, value), *(("Via", it) for it in via))
        assert not is_local_caller(request)
        assert not is_local_caller(request, through_frontends=True)


@pytest.mark.parametrize(
    ("fields", "local"),
    [
        ([("X-Forwarded-For", "127.0.0.1")], True),
        ([("X-Forwarded-For", "::1, 127.0.0.1")], True),
        ([("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-For", "127.0.0.1")], True),
        ([("X-Forwarded-For", "10.0.0.9")], False),
        ([("X-Forwarded-For", "10.0.0.9, 127.0.0.1")], False),
        ([("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-For", "10.0.0.9")], False),
        ([("X-Forwarded-For", "127.0.0.1,")], False),
        ([("X-Forwarded-For", "")], False),
        ([("X-Forwarded-For", "127.0.0.1"), ("X-Real-IP", "127.0.0.1")], False),
        ([("Forwarded", "for=127.0.0.1")], False),
    ],
)
def test_a_frontend_speaks_for_a_caller_here(fields: list[tuple[str, str]], local: bool) -> None:
    via = ("Via", "1.1 lmcache-frontend")
    assert is_local_caller(asked(("127.0.0.1", 1), via, *fields), through_frontends=True) is local
    assert not is_local_caller(asked(("127.0.0.1", 1), via, *fields))
    assert not is_local_caller(asked(("10.0.0.9", 1), via, *fields), through_frontends=True)


@pytest.mark.parametrize(
    ("via", "local"),
    [
        (["1.1 lmcache-frontend"], True),
        (["1.1 lmcache-frontend, 1.1 lmcache-frontend"], True),
        (["1.1 lmcache-frontend", "1.1 lmcache-frontend"], True),
        (["1.1 varnish, 1.1 lmcache-frontend"], False),
        (["1.1 lmcache-frontend, 1.1 varnish"], False),
        (["1.1 lmcache-frontend", "1.1 varnish"], False),
        (["1.1 lmcache-frontend-not"], False),
        ([""], False),
    ],
)
def test_frontends_between(via: list[str], local: bool) -> None:
    request = asked(("127.0.0.1", 1), *(("Via", value) for value in via))
    assert is_local_caller(request, through_frontends=True) is local
    assert not is_local_caller(request)


def test_two_hosts_are_none() -> None:
    assert not is_local_caller(asked(("127.0.0.1", 1), ("Host", "localhost")))
