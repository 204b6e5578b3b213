"""Which component of a deployment serves on which address.

LMCache's rule: the scheduler has index 0 and worker n has index 1 + n; a component's port is
`internal_api_server_port_start` plus its index; with a socket prefix it listens on `<prefix>_<port>` and on no port;
the include list names the indexes that serve. The controller stands beside them: it has no index in that list and a
port of its own, `controller_port`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmcache_shared.address import Address, TcpAddress, tcp_address, unix_address
from lmcache_shared.errors import AddressError, ConfigError
from lmcache_shared.settings import Settings

Role = Literal["scheduler", "worker", "controller"]

CONTROLLER_INDEX = -1
SCHEDULER_INDEX = 0
DEFAULT_INSTANCE = "lmcache"

MAX_WORKERS = 1024
"""Most workers of one deployment; far above any host, low enough to catch a slip of the keyboard."""


@dataclass(frozen=True)
class Placement:
    """A component that serves: its node name, its role and index, and its address."""

    name: str
    role: Role
    index: int
    address: Address

    @property
    def node(self) -> dict[str, str | int]:
        """The frontend's node for it: name, host, and the port or the socket's path."""
        if isinstance(self.address, TcpAddress):
            return {"name": self.name, "host": self.address.host, "port": self.address.port}
        return {"name": self.name, "host": "localhost", "port": self.address.path}


def place(settings: Settings, index: int) -> Placement:
    """Where the component with this index serves; whether it shall is `serves`.

    Raises:
        ConfigError: the settings give it no usable address.
    """
    instance = settings.lmcache_instance_id or DEFAULT_INSTANCE
    role = role_of(index)
    name = f"{instance}_{role}{index - 1}" if role == "worker" else f"{instance}_{role}"
    return Placement(name, role, index, _address(settings, index))


def role_of(index: int) -> Role:
    if index == CONTROLLER_INDEX:
        return "controller"
    return "scheduler" if index == SCHEDULER_INDEX else "worker"


def serves(settings: Settings, index: int) -> bool:
    """Whether the include list lets the component with this index serve; it says nothing of a controller."""
    included = settings.internal_api_server_include_index_list
    return not included or index in included or index == CONTROLLER_INDEX


def _address(settings: Settings, index: int) -> Address:
    is_controller = index == CONTROLLER_INDEX
    port = settings.controller_port if is_controller else settings.internal_api_server_port_start + index
    prefix = settings.internal_api_server_socket_path_prefix
    try:
        if prefix:
            return unix_address(f"{prefix}_{port}")
        return tcp_address(settings.internal_api_server_host, port)
    except AddressError as error:
        port_key = "controller_port" if is_controller else "_port_start"
        key = "internal_api_server_socket_path_prefix" if prefix else f"internal_api_server_host and {port_key}"
        raise ConfigError(f"{key}: index {index} has no usable address: {error}") from None
