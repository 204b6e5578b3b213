"""For which host a server is asked: a page of a name that was made to point here (DNS rebinding) is refused.

To its browser such a page and this server are one site, so `browser.py` sees nothing, and it could read all that a
viewer may. Its name gives it away: one that the public DNS can give to anybody. Browsers may ask for addresses,
this machine's names, names without a dot, names under a suffix that no public DNS has, and what the operator allows.
Programs cannot be made to do this, and may ask for any name until the operator allows some.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence

from aiohttp import web

from lmcache_shared.access.asking import Asking, HandlerOf, R
from lmcache_shared.address import without_brackets
from lmcache_shared.errors import ConfigError, Refusal

NOT_PUBLIC = frozenset("local internal localhost svc lan home corp private intranet home.arpa cluster.local".split())
"""Suffixes that nobody gets from a registrar: RFC 6761, 6762 (appendix G), 8375, ICANN's `.internal`, Kubernetes'."""

MAX_ALLOWED = 256
MAX_SEEN = 256
"""Values of `Host` that are known to be known: the next request with one costs a look into a set."""

MAX_FILE_CHARACTERS = 1 << 16

_PATTERN = re.compile(r"(\*\.)?[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,30}\.?", re.ASCII)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{0,5})?", re.ASCII)
_NUMERAL = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)

_BROWSERS_FIELDS = ("Origin", "Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-Fetch-Dest", "Accept-Language")
"""A page can give its requests another `User-Agent` in some browsers, and can leave none of `Accept-Language` out."""


class Hosts:
    """The names of hosts for which a server answers.

    Args:
        allowed: what the operator allows: names, `*.` before one for all below it, or `*`.
        option: how that is called, for refusals.
        own: further names of the server.

    Raises:
        ConfigError: one of them is no such name.
    """

    def __init__(self, allowed: Sequence[str] | None, *, option: str = "", own: Iterable[str] = ()) -> None:
        for text in allowed or ():
            if text != "*" and not _PATTERN.fullmatch(text):
                raise ConfigError(f"{text}: expected a host name, *.name for all below it, or *")
        if len(allowed or ()) > MAX_ALLOWED:
            raise ConfigError(f"more than {MAX_ALLOWED} names; *.name is all below it")
        names = [text.lower().rstrip(".") for text in allowed or ()]
        self._holds_for_programs = bool(names)
        self._is_any = "*" in names
        self._names = {name for name in names if not name.startswith("*")}
        self._names |= {name.lower().rstrip(".") for name in (*own, *names_of_this_machine()) if name}
        self._suffixes = NOT_PUBLIC | {name[2:] for name in names if name.startswith("*.")}
        self._option = option
        self._seen: set[str] = set()

    def check(self, request: Asking) -> None:
        """Let a request pass that is for this server.

        Raises:
            Refusal: 421 (RFC 9110, section 15.5.20); the text names the host and the option.
        """
        for host in request.headers.getall("Host", ()):
            if host in self._seen or self.knows(host):
                continue
            if self._holds_for_programs or is_browser(request):
                raise Refusal(
                    421,
                    f"this server does not answer for the host {host[:100]!a}; allow the name with {self._option}",
                )

    def knows(self, host: str) -> bool:
        """Whether a value of `Host` is one for which this server answers."""
        if not self._is_known(host):
            return False
        if len(self._seen) >= MAX_SEEN:
            self._seen.clear()
        self._seen.add(host)
        return True

    def _is_known(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].lower().rstrip(".")
        if self._is_any or name in self._names or _is_address(name):
            return True
        labels = name.split(".")
        if not all(labels) or _NUMERAL.fullmatch(labels[-1]):
            return False  # an address that is written like no other
        if len(labels) == 1:
            return True
        return any(".".join(labels[at:]) in self._suffixes for at in range(1, len(labels)))


def is_browser(request: Asking) -> bool:
    """Whether a browser may have sent it; a page cannot make its browser look otherwise."""
    headers = request.headers
    return headers.get("User-Agent", "").startswith("Mozilla/") or any(name in headers for name in _BROWSERS_FIELDS)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(without_brackets(name))
    except ValueError:
        return False
    return True


def names_of_this_machine(
    hostname: str = "", hosts: str = "/etc/hosts", resolver: str = "/etc/resolv.conf"
) -> set[str]:
    """Its host name, what the file of hosts has beside it, and with the domains in which the resolver searches.

    The DNS is not asked: it would hold the start up where it does not answer.
    """
    name = (hostname or socket.gethostname()).lower()
    names = {name}
    for words in _lines(hosts):
        if name in words[1:]:
            names.update(words[1:])
    for words in _lines(resolver):
        if words[0] in ("search", "domain"):
            names.update(f"{name.partition('.')[0]}.{domain.strip('.')}" for domain in words[1:] if domain.strip("."))
    return names


def _lines(file: str) -> list[list[str]]:
    """The words of its lines, in small letters and without comments; nothing where it cannot be read."""
    try:
        with open(file, encoding="ascii", errors="replace") as stream:
            text = stream.read(MAX_FILE_CHARACTERS).lower()
    except OSError:
        return []
    return [words for line in text.splitlines() if (words := line.partition("#")[0].split())]


HOSTS: web.AppKey[Hosts] = web.AppKey("hosts", Hosts)


@web.middleware
async def own_host_only(request: R, handler: HandlerOf[R]) -> web.StreamResponse:
    """Refuse what a browser asks of another host.

    Raises:
        Refusal: 421.
    """
    request.app[HOSTS].check(request)
    return await handler(request)
