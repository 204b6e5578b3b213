"""A request's head as the front reads it: whether the front serves it, and what is to be known of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property

import httptools
from aiohttp import HttpVersion, HttpVersion10, HttpVersion11
from multidict import CIMultiDict, CIMultiDictProxy, MultiDict, MultiDictProxy, MultiMapping
from yarl import URL

MAX_HEAD_BYTES = 8190
"""Of a head that is read here; aiohttp's server takes so much for each field, and refuses what is too long."""

MAX_FIELDS = 100

Fields = tuple[tuple[bytes, bytes], ...]

_PROXIED = re.compile(rb"/proxy(?:/[^/{}?#]+/|2/)[^/{}?#]+(?:/[^?#]*)?(?:\?[^#]*)?")

_FOR_OTHERS = frozenset(
    {b"content-length", b"transfer-encoding", b"upgrade", b"expect", b"sec-websocket-key1", b"cookie"}
)
"""Fields of requests that the front does not serve: what has a body, becomes something else, or is a browser's."""

_ONCE = frozenset(
    {
        b"content-location",
        b"content-range",
        b"content-type",
        b"etag",
        b"host",
        b"max-forwards",
        b"server",
        b"user-agent",
    }
)
"""Fields that aiohttp's server refuses when they are repeated."""

_NO_QUERY: MultiDictProxy[str] = MultiDictProxy(MultiDict())


_VERSIONS = {"1.1": HttpVersion11, "1.0": HttpVersion10}


class Head:
    """What a head says.

    Attributes:
        is_named: the path begins with `/proxy2/`.
    """

    def __init__(self, method: str, path: str, version: HttpVersion, keep_alive: bool, fields: Fields) -> None:
        self.method = method
        self.raw_path = path
        self.version = version
        self.keep_alive = keep_alive
        self.raw_headers = fields
        self.is_named = path.startswith("/proxy2/")
        self.headers = CIMultiDictProxy(
            CIMultiDict([(name.decode("ascii"), value.decode("utf-8", "surrogateescape")) for name, value in fields])
        )

    @cached_property
    def url(self) -> URL:
        path, _, query = self.raw_path.partition("?")
        return URL.build(path=path, query_string=query, encoded=True)

    @property
    def query(self) -> MultiMapping[str]:
        return self.url.query if "?" in self.raw_path else _NO_QUERY


class Heads:
    """Reads heads, with one parser: each is fed whole."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._parser: httptools.HttpRequestParser | None = None
        self._next()

    def _next(self) -> None:
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._is_whole = self._keep_alive = False

    def may_become_one(self, data: bytes) -> bool:
        """Whether what came of a head is HTTP up to here."""
        self._begin()
        may = self._fed(data)
        self._begin()
        return may

    def read(self, data: bytes) -> Head | None:
        """What a whole head says, its empty line included; nothing if the front does not serve such a request."""
        if len(data) > MAX_HEAD_BYTES:
            return None
        self._next()
        if not self._fed(data) or not self._is_whole or self._parser is None:
            self._begin()
            return None
        parser = self._parser
        method = parser.get_method().decode("ascii")
        version = _VERSIONS.get(parser.get_http_version())
        if not self._keep_alive:
            self._parser = None  # it takes nothing after such a request
        fields = self._fields
        names = {name.lower() for name, _ in fields}
        if (
            version is None
            or len(fields) > MAX_FIELDS
            or not _FOR_OTHERS.isdisjoint(names)
            or (len(names) < len(fields) and not _ONCE.isdisjoint(_repeated(fields)))
            or (version is HttpVersion11 and b"host" not in names)
            or not self._url.isascii()
            or not _PROXIED.fullmatch(self._url)
        ):
            return None
        return Head(method, self._url.decode("ascii"), version, self._keep_alive, tuple(fields))

    def _fed(self, data: bytes) -> bool:
        if self._parser is None:
            self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._parser = None
            return False
        return True

    # -- what the parser tells

    def on_url(self, piece: bytes) -> None:
        self._url += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        assert self._parser is not None, "it tells of what it was fed"
        self._keep_alive = self._parser.should_keep_alive()

    def on_message_complete(self) -> None:
        self._is_whole = True


def _repeated(fields: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    return [name for name, count in Counter(name.lower() for name, _ in fields).items() if count > 1]
