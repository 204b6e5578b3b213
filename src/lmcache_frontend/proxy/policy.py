"""Whether the proxy may reach a target: a registered node, a socket under the prefix, or, asked by a caller on this
machine, one of its ports.
"""

from __future__ import annotations

import os

from lmcache_frontend.nodes.registry import Registry
from lmcache_shared.access.asking import Asking
from lmcache_shared.access.caller import is_local_caller
from lmcache_shared.address import Address, UnixAddress, unix_address
from lmcache_shared.errors import AddressError, Refusal


class Policy:
    """The rules, in the order in which they are asked.

    Args:
        registry: its nodes and proxies are allowed.
        socket_prefix: so are Unix sockets whose path, with every symbolic link followed, begins like this.
    """

    def __init__(self, registry: Registry, socket_prefix: str | None) -> None:
        self._registry = registry
        self._prefix = socket_prefix

    def allowed(self, request: Asking, address: Address) -> Address:
        """The address to connect to.

        Raises:
            Refusal: 403; the text names the target and, for a socket, the way to allow it.
        """
        if self._registry.has(address):
            return address
        if isinstance(address, UnixAddress):
            return self._socket_under_prefix(address)
        if address.is_loopback and is_local_caller(request):
            return address
        raise Refusal(403, f"Target {address.host}:{address.port} is not a registered node")

    def _socket_under_prefix(self, address: UnixAddress) -> UnixAddress:
        # The text is looked at first: no caller makes this look around in a folder of its choice.
        if self._prefix and os.path.normpath(address.path).startswith(self._prefix):
            folder, name = os.path.split(self._prefix)
            real = os.path.realpath(address.path)
            if real.startswith(os.path.join(os.path.realpath(folder), name)):
                try:
                    return unix_address(real)
                except AddressError:
                    pass
        raise Refusal(
            403,
            f"Socket {address.path} is not a registered node and not under the socket prefix"
            f" {self._prefix or '(none)'}; add it with --nodes or --config, or choose another --socket-prefix",
        )
