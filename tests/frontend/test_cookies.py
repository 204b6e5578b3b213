"""A node's cookies: for its own paths under the frontend, and none that speaks for the frontend."""

from __future__ import annotations

import pytest

from lmcache_frontend.proxy.headers import answer_fields
from lmcache_frontend.proxy.target import ProxiedPath
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_shared.address import TcpAddress
from tests.frontend.upstream import Upstream, serving


def told(value: bytes, *, skipped: str = "", name: bytes = b"Set-Cookie", path: str = "/x") -> list[bytes]:
    wanted = ProxiedPath(TcpAddress("h", 1), skipped + path, "/proxy2/w", skipped)
    return [found for _, found in answer_fields([(name, value)], wanted)]


@pytest.mark.parametrize(
    "value",
    [
        b"lmcache_frontend_8000=x", b"lmcache_frontend_8000=x; Path=/; HttpOnly", b" lmcache_frontend_8000 =x",
        b"\tlmcache_frontend_8000=x", b"LMCACHE_Frontend_8000=x", b"lmcache_frontend_9=x", b"=lmcache_frontend_8000=x",
        b" = lmcache_frontend_8000=x", b"==lmcache_frontend_8000=x", b"lmcache_frontend_8000",
        b"lmcache_frontend_8000; Path=/", b"lmcache_frontend_8000=; Max-Age=0",
    ],
)  # fmt: skip
def test_nobody_but_the_frontend_says_who_has_signed_in(value: bytes) -> None:
    for name in (b"Set-Cookie", b"set-cookie", b"SET-COOKIE"):
        assert told(value, name=name) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"a=1", b"a=1"),
        (b"a=1; Path=/", b"a=1; Path=/proxy2/w/"),
        (b"a=1; Path=/x; Secure", b"a=1; Path=/proxy2/w/x; Secure"),
        (b"a=1; Domain=example.com; Path=/x", b"a=1; Path=/proxy2/w/x"),
        (b"a=1;domain = .example.com ;path=/x", b"a=1;path=/proxy2/w/x"),
        (b"a=1; Path=/x; DOMAIN=a.b; Domain=c.d", b"a=1; Path=/proxy2/w/x"),
        (b"a=1; Domain", b"a=1"),
        (b"domain=1; Path=/", b"domain=1; Path=/proxy2/w/"),
        (b"a=lmcache_frontend_8000", b"a=lmcache_frontend_8000"),
        (b"a=domain=x; Domains=y", b"a=domain=x; Domains=y"),
    ],
)
def test_a_cookie_is_for_its_node(value: bytes, expected: bytes) -> None:
    assert told(value) == [expected]


@pytest.mark.parametrize("value", [b"a=1", b"a=1; Path", b"a=1; path=", b"a=1; Path=x", b"a=1; Path=/; Path=."])
def test_a_nodes_root_is_not_the_frontends(value: bytes) -> None:
    for path in ("/", "/?path=/"):  # asked for as `/proxy2/w`, whose default is `/proxy2`
        for skipped in ("", "/proxy2/w0"):
            (found,) = told(value, path=path, skipped=skipped)
            assert found.endswith(b"; Path=/proxy2/w/")
    assert told(b"a=1; Path=/x", path="/") == [b"a=1; Path=/proxy2/w/x"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/proxy2/w0", b"/proxy2/w"),
        (b"/proxy2/w0/x", b"/proxy2/w/x"),
        (b"/", b"/proxy2/w/"),  # a frontend of LMCache's in between, which rewrites none
        (b"/proxy2/w00", b"/proxy2/w/"),
    ],
)
def test_through_another_frontend(path: bytes, expected: bytes) -> None:
    assert told(b"a=1; Path=" + path, skipped="/proxy2/w0") == [b"a=1; Path=" + expected]


async def test_what_speaks_for_an_origin_is_not_a_nodes_to_say(frontend_server: StartFrontend) -> None:
    fields = {
        "Strict-Transport-Security": "max-age=1",
        "Alt-Svc": 'h2="evil.example:443"',
        "NEL": "{}",
        "Report-To": "{}",
        "Reporting-Endpoints": 'a="https://evil.example/"',
        "Clear-Site-Data": '"cookies"',
        "Set-Cookie": "lmcache_frontend_1=x",
        "X-Kept": "1",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    async with serving(Upstream(f"HTTP/1.1 200 OK\r\n{lines}Content-Length: 0\r\n\r\n".encode())) as upstream:
        frontend = await frontend_server(nodes=[upstream.node])
        async with frontend.client.get("/proxy2/upstream/") as response:
            assert [name for name in fields if name in response.headers] == ["X-Kept"]
