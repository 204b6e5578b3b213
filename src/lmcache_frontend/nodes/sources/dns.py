"""Nodes by their names in the DNS: every address of a name, or of the targets of its SRV records.

A name that does not exist, or has no such records, has no addresses. A server that does not answer, or fails, says
nothing: what the same question was answered last still counts.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import dns.asyncresolver
import dns.exception
import dns.name
import dns.rdatatype
import dns.resolver

from lmcache_frontend.nodes.found import MAX_FOUND, found_proxy, reachable
from lmcache_frontend.nodes.node import Proxy
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.nodes.sources import Told
from lmcache_frontend.nodes.sources.dns_names import DnsName, read_names, read_server
from lmcache_shared.address import TcpAddress, tcp_address
from lmcache_shared.errors import AddressError, OpsError

SHORTEST_PAUSE_SECONDS = 1.0
"""Some servers answer with a TTL of 0: such a name is asked for once a second, not without end."""

LONGEST_PAUSE_SECONDS = 300.0
"""A TTL may be days; somebody who moved a node waits five minutes at most."""

NOTHING_PAUSE_SECONDS = 5.0
"""After no answer, and for a name without addresses: as long as Kubernetes' DNS itself keeps that there are none."""

QUESTION_SECONDS = 5.0
NAME_SECONDS = 20.0
"""For a name with all the targets of its SRV records."""

AT_ONCE = 16
MAX_PROBLEMS = 3
"""Of one name."""

MAX_PROBLEM_LENGTH = 300
_BOTH = ("A", "AAAA")


class _Unanswered(OpsError):
    """No server says anything of it; the text is one line."""


@dataclass
class _Resolved:
    """What one round found out of a name."""

    addresses: dict[TcpAddress, None] = field(default_factory=dict)
    ttl: float = LONGEST_PAUSE_SECONDS
    problems: dict[str, None] = field(default_factory=dict)
    answers: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """By name and type: what is taken when the same question is not answered the next time."""


@dataclass
class _Followed:
    """A name, and what is known of it; `last` is None until it was answered."""

    name: DnsName
    last: _Resolved | None = None
    problems: list[str] = field(default_factory=lambda: ["it has not been answered yet"])
    due: float = 0.0

    @property
    def shown(self) -> str:
        return self.name.name if self.name.port is None else f"{self.name.name}:{self.name.port}"


class DnsSource:
    """Publishes the addresses of all names together, and asks for each again when its answer's time is over.

    Args:
        names: as the option `dns` has them.
        server: the server to ask; without one, those of `resolv_conf`.
        resolv_conf: its search list and `ndots` count in any case.

    Raises:
        ConfigError: a name or the server is none.
    """

    name = "dns"

    def __init__(
        self, names: Sequence[str], server: str | None, registry: Registry, *, resolv_conf: str = "/etc/resolv.conf"
    ) -> None:
        self._followed = [_Followed(name) for name in read_names(names)]
        self.place = ", ".join(followed.shown for followed in self._followed)
        self.problems: Sequence[str] = self._problems()
        self._server = read_server(server)
        self._resolv_conf = resolv_conf
        self._registry = registry
        self._now = asyncio.Event()
        self._told = Told(self.name, self.place)

    async def run(self) -> None:
        while True:
            now = time.monotonic()
            due = [followed for followed in self._followed if followed.due <= now or self._now.is_set()]
            self._now.clear()
            await asyncio.gather(*(self._follow(followed) for followed in due))
            self._publish()
            until = min(followed.due for followed in self._followed) - time.monotonic()
            try:
                await asyncio.wait_for(self._now.wait(), max(until, 0.01))
            except asyncio.TimeoutError:
                continue

    def reload(self) -> None:
        self._now.set()

    def _problems(self) -> list[str]:
        return [f"{followed.shown}: {problem}" for followed in self._followed for problem in followed.problems]

    def _publish(self) -> None:
        self.problems = self._problems()
        known = [followed.last for followed in self._followed if followed.last is not None]
        if known:
            proxies: dict[str, Proxy] = {}
            for resolved in known:
                for where in resolved.addresses:
                    proxy = found_proxy(where)
                    proxies[proxy.name] = proxy
            kept = list(proxies.values())[:MAX_FOUND]
            if len(kept) < len(proxies):
                self.problems = [*self.problems, f"{len(proxies)} addresses, of which the first {MAX_FOUND} are taken"]
            self._registry.publish(self.name, kept, lasting=True)
        self._told.tell(self.problems)

    async def _follow(self, followed: _Followed) -> None:
        answers = {} if followed.last is None else followed.last.answers
        pause = NOTHING_PAUSE_SECONDS
        try:
            found = await asyncio.wait_for(self._resolve(followed.name, answers), NAME_SECONDS)
        except _Unanswered as unanswered:
            followed.problems = [str(unanswered)]
        except asyncio.TimeoutError:
            followed.problems = [f"not resolved within {NAME_SECONDS:g} seconds"]
        else:
            followed.last, followed.problems = found, sorted(found.problems)[:MAX_PROBLEMS]
            if found.addresses and not found.problems:
                pause = min(max(found.ttl, SHORTEST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        # Spread, never later than the answer's time: frontends that began together do not keep asking together.
        spread = random.uniform(0.8, 1.0)  # noqa: S311 - keeps no secret
        followed.due = time.monotonic() + max(pause * spread, SHORTEST_PAUSE_SECONDS)

    async def _resolve(self, name: DnsName, last: dict[tuple[str, str], list[str]]) -> _Resolved:
        """Raises:
        _Unanswered: nothing at all is known of it.
        """
        round_ = _Round(await self._resolver(), last)
        if name.port is not None:
            await round_.host(name.name, name.port)
        else:
            await round_.service(name.name)
        if not round_.found.answers:
            raise _Unanswered("; ".join(sorted(round_.found.problems)[:MAX_PROBLEMS]))
        return round_.found

    async def _resolver(self) -> dns.asyncresolver.Resolver:
        """Made anew, as `resolv_conf` may have changed.

        Raises:
            _Unanswered: there is no server to ask.
        """
        try:
            try:
                resolver = await asyncio.to_thread(dns.asyncresolver.Resolver, self._resolv_conf)
            except dns.resolver.NoResolverConfiguration:
                if self._server is None:
                    raise
                resolver = dns.asyncresolver.Resolver(configure=False)
            if self._server is not None:
                loop = asyncio.get_running_loop()
                found = await loop.getaddrinfo(self._server.host, self._server.port, type=socket.SOCK_DGRAM)
                resolver.nameservers = list(dict.fromkeys(str(where[0]) for *_, where in found))
                resolver.port = self._server.port
        except (dns.exception.DNSException, OSError, ValueError) as error:
            raise _Unanswered(f"no DNS server to ask: {_line(error)}") from None
        resolver.lifetime = QUESTION_SECONDS
        return resolver


class _Round:
    """Resolves one name once.

    Args:
        last: the answers of the round before.
    """

    def __init__(self, resolver: dns.asyncresolver.Resolver, last: dict[tuple[str, str], list[str]]) -> None:
        self.found = _Resolved()
        self._resolver = resolver
        self._last = last
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def host(self, name: str, port: int) -> None:
        answers = await asyncio.gather(*(self._ask(name, kind) for kind in _BOTH))
        for text in (text for answer in answers for text in answer):
            try:
                self.found.addresses[reachable(tcp_address(text, port))] = None
            except AddressError as error:
                self.found.problems[_line(error)] = None

    async def service(self, name: str) -> None:
        """Weights and priorities say which target a client takes; here every one is a node."""
        targets = [text.split(" ") for text in await self._ask(name, "SRV")]
        if len(targets) > MAX_FOUND:
            self.found.problems[f"{len(targets)} SRV records, of which the first {MAX_FOUND} are taken"] = None
        hosts = [self.host(target, int(port)) for port, target in targets[:MAX_FOUND] if target != "."]
        await asyncio.gather(*hosts)

    async def _ask(self, name: str, kind: str) -> list[str]:
        """One question's answer; where nobody answers, the last one."""
        try:
            async with self._gate:
                answer = await self._resolver.resolve(name, kind, search=True)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            texts = []
        except (dns.exception.DNSException, OSError, ValueError) as error:
            self.found.problems[_why(error)] = None
            if (name, kind) not in self._last:
                return []
            texts = self._last[name, kind]
        else:
            self.found.ttl = min(self.found.ttl, float(answer.chaining_result.minimum_ttl))
            texts = [_text(record) for record in answer.rrset or ()]
        self.found.answers[name, kind] = texts
        return texts


def _text(record: object) -> str:
    target = getattr(record, "target", None)
    if isinstance(target, dns.name.Name):
        return f"{getattr(record, 'port', 0)} {target.to_text()}"
    return str(getattr(record, "address", ""))


def _why(error: Exception) -> str:
    """Why there is no answer, in words that stay the same as long as the reason does."""
    if isinstance(error, dns.exception.Timeout):
        return f"no answer within {QUESTION_SECONDS:g} seconds"
    if isinstance(error, dns.resolver.NoNameservers):
        failures = {f"{server} answers {why}" for server, _, _, why, _ in error.kwargs.get("errors", ())}
        return ascii("; ".join(sorted(failures)))[1:-1][:MAX_PROBLEM_LENGTH] or "no DNS server to ask"
    return _line(error)


def _line(error: Exception) -> str:
    return ascii(" ".join(str(error).split()))[1:-1][:MAX_PROBLEM_LENGTH] or type(error).__name__
