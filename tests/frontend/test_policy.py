import socket
from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request

from lmcache_frontend.nodes.node import read_list
from lmcache_frontend.proxy.policy import Policy
from lmcache_shared.access.caller import is_local_caller
from lmcache_shared.address import Address, TcpAddress, UnixAddress
from lmcache_shared.errors import Refusal
from tests.frontend.registries import registry_of


class Transport:
    def __init__(self, peer: object) -> None:
        self._peer = peer

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._peer if name == "peername" else default


def request(peer: object = ("127.0.0.1", 5), host: str = "localhost:8080", **headers: str):  # type: ignore[no-untyped-def]
    fields = {"Host": host} | {name.replace("_", "-"): value for name, value in headers.items()}
    return make_mocked_request("GET", "/", headers=fields, transport=Transport(peer))


def policy(prefix: str | None = None, *nodes: str) -> Policy:
    entries = read_list(f"[{','.join(nodes)}]".encode(), "test")
    return Policy(registry_of(entries), prefix)


def allowed(chosen: Policy, address: Address, caller=None) -> Address | None:  # type: ignore[no-untyped-def]
    try:
        return chosen.allowed(caller or request(("10.0.0.9", 5)), address)
    except Refusal as refused:
        assert refused.status == 403
        return None


def test_registered_nodes_and_proxies_for_everybody() -> None:
    proxy = '{"name":"p","host":"p1","port":"8000","nodes":[{"name":"w","host":"w1","port":7000}]}'
    chosen = policy(None, '{"name":"a","host":"h1","port":"80"}', '{"name":"b","host":"x","port":"/run/b"}', proxy)
    for address in (TcpAddress("h1", 80), UnixAddress("/run/b"), TcpAddress("p1", 8000), TcpAddress("w1", 7000)):
        assert allowed(chosen, address) == address
    for address in (TcpAddress("h1", 81), UnixAddress("/run/c"), TcpAddress("h2", 80)):
        assert allowed(chosen, address) is None


def test_sockets_under_the_prefix(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    folder.mkdir()
    chosen = policy(f"{folder}/socket")
    assert allowed(chosen, UnixAddress(f"{folder}/socket_1")) == UnixAddress(f"{folder}/socket_1")
    for path in (f"{folder}/other", f"{folder}/socket/../../x", f"{tmp_path}/socket_1", f"{folder}", "/"):
        assert allowed(chosen, UnixAddress(path)) is None
    whole = policy(f"{folder}/")
    assert allowed(whole, UnixAddress(f"{folder}/any")) == UnixAddress(f"{folder}/any")
    assert allowed(whole, UnixAddress(f"{folder}2/any")) is None
    assert allowed(policy(None), UnixAddress(f"{folder}/any")) is None


def test_a_symbolic_link_does_not_lead_out(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    folder.mkdir()
    secret = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(secret))
    (folder / "socket_1").symlink_to(secret)
    (folder / "socket_2").symlink_to(folder / "real")
    chosen = policy(f"{folder}/")
    assert allowed(chosen, UnixAddress(f"{folder}/socket_1")) is None
    assert allowed(chosen, UnixAddress(f"{folder}/socket_2")) == UnixAddress(f"{folder}/real")
    (tmp_path / "alias").symlink_to(folder)
    assert allowed(policy(f"{tmp_path}/alias/"), UnixAddress(f"{tmp_path}/alias/s")) == UnixAddress(f"{folder}/s")


def test_loopback_ports_for_local_callers_alone() -> None:
    chosen = policy()
    for host in ("localhost", "127.0.0.1", "::1"):
        assert allowed(chosen, TcpAddress(host, 80), request()) == TcpAddress(host, 80)
        assert allowed(chosen, TcpAddress(host, 80)) is None
    assert allowed(chosen, TcpAddress("10.0.0.1", 80), request()) is None


@pytest.mark.parametrize("peer", [("127.0.0.1", 1), ("::1", 1, 0, 0), ("::ffff:127.0.0.1", 1, 0, 0)])
def test_local_callers(peer: object) -> None:
    assert is_local_caller(request(peer))
    assert is_local_caller(request(peer, host="127.0.0.1"))
    assert is_local_caller(request(peer, host="[::1]:8080", Sec_Fetch_Site="same-origin"))


@pytest.mark.parametrize(
    "caller",
    [
        request(("10.0.0.1", 1)),
        request(None),
        request(""),
        request(host="evil.example:8080"),
        request(host="a b:x:y"),
        request(host=""),
        request(Via="1.1 lmcache-frontend"),
        request(X_Forwarded_For="10.0.0.1"),
        request(Forwarded="for=10.0.0.1"),
        request(X_Real_IP="10.0.0.1"),
    ],
)
def test_callers_from_elsewhere(caller) -> None:  # type: ignore[no-untyped-def]
    assert not is_local_caller(caller)


def test_a_refusal_names_the_target_and_the_way_out() -> None:
    with pytest.raises(Refusal) as refused:
        policy("/run/lm/").allowed(request(), UnixAddress("/run/x"))
    assert refused.value.detail == (
        "Socket /run/x is not a registered node and not under the socket prefix /run/lm/;"
        " add it with --nodes or --config, or choose another --socket-prefix"
    )
    with pytest.raises(Refusal) as refused:
        policy().allowed(request(), TcpAddress("h", 1))
    assert refused.value.detail == "Target h:1 is not a registered node"
