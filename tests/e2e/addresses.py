"""Every page that a running frontend leads to, found by following its links from where a reader begins."""

from __future__ import annotations

import urllib.request
from collections import deque
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from urllib.parse import parse_qs, urljoin, urlsplit

from aiohttp import web

MAX_PAGES = 200
"""A view that leads to ever new ones is an error of the test, and shall not become an endless one."""

_NODE = ("/nodes/{proxy}/{name}", "/nodes/{proxy}/{name}/{tab}")


class Found:
    """What was found: each page once in each of its kinds of views, whichever node or operation it is of.

    Attributes:
        pages: addresses of HTML.
        routes: the routes behind all that was asked, and `tab` names with them.
    """

    def __init__(self, url: str, resources: Iterable[web.AbstractResource]) -> None:
        self._url = url
        self._resources = [resource.get_info() for resource in resources]
        self._known: set[object] = set()
        self.pages: list[str] = []
        self.routes: set[str] = set()
        self.tabs: set[str] = set()

    def follow(self, *begin: str) -> None:
        """Ask for these addresses and for all that they lead to; the first of a kind stands for it."""
        waiting = deque(begin)
        while waiting:
            address = waiting.popleft()
            route, parts = self._route(urlsplit(address).path)
            kind = (route, parts.get("tab"), frozenset(parse_qs(urlsplit(address).query)))
            if not route or kind in self._known:
                continue
            assert len(self._known) < MAX_PAGES, f"ever more pages: {self.pages[-10:]}"
            self._known.add(kind)
            self.routes.add(route)
            self.tabs.update({parts["tab"]} if "tab" in parts else ())
            with urllib.request.urlopen(urljoin(self._url, address), timeout=30) as answer:
                if answer.headers.get_content_type() != "text/html":
                    continue
                text = answer.read().decode()
            self.pages.append(address)
            links = _Links()
            links.feed(text)
            waiting.extend(it for href in links.found if (it := _here(urljoin(self._url + address, href), self._url)))

    def _route(self, path: str) -> tuple[str, Mapping[str, str]]:
        """The route of a page that serves this path, and what the path says in it."""
        for info in self._resources:
            if info.get("path") == path:
                return path, {}
            if "pattern" in info and (match := info["pattern"].fullmatch(path)):
                return info["formatter"], match.groupdict()
        return "", {}


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _here(url: str, own: str) -> str:
    """The address within our own site; empty for what is elsewhere."""
    at = urlsplit(url)
    if at.netloc != urlsplit(own).netloc:
        return ""
    return at.path + (f"?{at.query}" if at.query else "")
