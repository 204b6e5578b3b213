"""A call from a thread to another component's internal API: JSON both ways, bounded in size and time."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from typing import Any

from lmcache_shared.address import Address, TcpAddress

MAX_ANSWER_BYTES = 1 << 20
MAX_REFUSAL_BYTES = 1 << 12


def ask(
    address: Address, method: str, path: str, body: object = None, *, seconds: float, token: str | None = None
) -> dict[str, Any]:
    """The JSON object that the component at `address` answers; connecting, asking and answering have `seconds`.

    Looking up a host's name is not in them: the system's resolver has its own limit (resolv.conf), and no other way to
    be stopped. With `token` the caller shows who it is.

    Raises:
        OSError: it does not answer in time, or with something else; the text names the address.
    """
    connection = _Connection(address, time.monotonic() + seconds)
    text = None if body is None else json.dumps(body, separators=(",", ":"))
    try:
        headers = {"Content-Type": "application/json"} if text is not None else {}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        connection.request(method, path, text, headers)
        with connection.getresponse() as response:  # which holds the socket beyond the connection's end
            content = response.read(MAX_ANSWER_BYTES)
        answer = json.loads(content) if response.status == 200 else {}
    except (http.client.HTTPException, ValueError, RecursionError) as error:
        raise OSError(f"{address}: no answer that can be used: {error}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise OSError(f"{address}: it answers {response.status}{_why(content)}")
    if not isinstance(answer, dict):
        raise OSError(f"{address}: no answer that can be used: expected a JSON object")
    return answer


def _why(content: bytes) -> str:
    """What a refusal says in its `detail`, after a colon."""
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(content[:MAX_REFUSAL_BYTES])
        if isinstance(answer, dict) and isinstance(answer.get("detail"), str):
            return f": {answer['detail']}"
    return ""


class _Connection(http.client.HTTPConnection):
    """All of connecting, asking and answering ends at `until`, by the monotonic clock."""

    def __init__(self, address: Address, until: float) -> None:
        host, port = (address.host, address.port) if isinstance(address, TcpAddress) else ("localhost", 80)
        super().__init__(host, port, timeout=_left(until))
        self._address = address
        self._until = until

    def connect(self) -> None:
        if isinstance(self._address, TcpAddress):
            super().connect()
            self.sock = _Socket(self._until, fileno=self.sock.detach())
            return
        self.sock = _Socket(self._until, family=socket.AF_UNIX)
        self.sock.settimeout(_left(self._until))
        self.sock.connect(self._address.path)


class _Socket(socket.socket):
    """A socket's timeout is that of one piece; here all pieces together have until `until`."""

    def __init__(self, until: float, *, family: int = -1, fileno: int | None = None) -> None:
        super().__init__(family, fileno=fileno)
        self._until = until

    def sendall(self, *data: Any) -> None:
        self.settimeout(_left(self._until))
        super().sendall(*data)

    def recv_into(self, *into: Any) -> int:
        self.settimeout(_left(self._until))
        return super().recv_into(*into)


def _left(until: float) -> float:
    """The seconds until then.

    Raises:
        OSError: it has come.
    """
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
