"""Sockets that share a port: the kernel spreads new connections over those that listen (SO_REUSEPORT, socket(7))."""

from __future__ import annotations

import os
import socket

from lmcache_shared.errors import AddressError


def beside(listening: socket.socket) -> socket.socket:
    """A socket bound where another one listens already; it does not listen yet.

    That one was bound without SO_REUSEPORT and gets it only now: nobody else can be there, and a second frontend that
    binds in the same way is refused.

    Raises:
        AddressError: the system does not share the port.
    """
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock = socket.socket(listening.family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if listening.family == socket.AF_INET6:
            only = listening.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        sock.setblocking(False)
        sock.bind(listening.getsockname())
    except OSError as error:
        sock.close()
        raise AddressError(f"--workers: the port cannot be shared among processes: {error.strerror}") from None
    return sock


def duplicate(sock: socket.socket) -> socket.socket:
    """The same socket once more, to be closed by itself."""
    return socket.socket(fileno=os.dup(sock.fileno()))
