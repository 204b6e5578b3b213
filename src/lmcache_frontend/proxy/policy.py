"""Whether the proxy may reach a target: the one place that decides it.

Allowed are registered nodes and proxies, what `--socket-prefix` and `--allow-target` say (`rules.py`), and, asked by a
caller on this machine, its ports. A registered name is allowed wherever it leads: whoever registers it answers for it.
"""

from __future__ import annotations

from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.proxy.rules import LOOPBACK, GuardedName, NotAllowed, Rules, number_of
from lmcache_shared.access.asking import Asking
from lmcache_shared.access.caller import is_local_caller
from lmcache_shared.access.gate import caller_of
from lmcache_shared.access.roles import Role
from lmcache_shared.address import Address, TcpAddress, UnixAddress

MAX_DECIDED = 4096
"""Addresses for which it is remembered that they are allowed, until the registry changes."""


class Policy:
    """The rules, in the order in which they are asked.

    Args:
        registry: its nodes and proxies are allowed.
        rules: what the options allow beside them.
    """

    def __init__(self, registry: Registry, rules: Rules) -> None:
        self._registry = registry
        self._rules = rules
        self._decided: dict[Address, Address] = {}
        self._revision = registry.revision

    def allowed(self, request: Asking, address: Address) -> Address:
        """The address to connect to, as it is allowed: pass on this one. Nothing is looked up for it.

        Raises:
            Refusal: 403; the text names the target and the options that would allow it.
        """
        if self._revision != self._registry.revision:
            self._decided.clear()
            self._revision = self._registry.revision
        found = self._decided.get(address)
        if found is not None:
            return found
        found = self._for_everybody(address)
        if found is None:
            return self._for_a_caller_here(request, address)
        if len(self._decided) >= MAX_DECIDED:
            self._decided.clear()
        self._decided[address] = found
        return found

    def names(self, address: TcpAddress) -> bool:
        """Whether `--allow-target` says that this is a target, whatever the DNS says."""
        return self._rules.names(address)

    def _for_everybody(self, address: Address) -> Address | None:
        if self._registry.has(address):
            return address
        if isinstance(address, UnixAddress):
            return self._rules.unix(address)
        return self._rules.tcp(address)

    def _for_a_caller_here(self, request: Asking, address: Address) -> Address:
        """Its own ports are there for an admin on this machine; where callers here are not trusted, with a token."""
        ways = "add it with --nodes or --config, or allow it with"
        if isinstance(address, UnixAddress):
            reason = f"{ways} --socket-prefix or --allow-target {address}"
            raise NotAllowed(f"Socket {address} is not a registered node", reason)
        if address.is_loopback and is_local_caller(request) and caller_of(request).role >= Role.ADMIN:
            return address if number_of(address.host) is not None else _loopback(address)
        raise NotAllowed(f"Target {address} is not a registered node", f"{ways} --allow-target {address}")


def _loopback(address: TcpAddress) -> GuardedName:
    return GuardedName(address.host, address.port, LOOPBACK)
