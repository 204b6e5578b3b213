import pytest

from lmcache_shared.address import TcpAddress, UnixAddress
from lmcache_shared.errors import ConfigError
from lmcache_shared.placement import CONTROLLER_INDEX, place, role_of, serves
from lmcache_shared.settings import Settings


def test_ports_follow_the_index() -> None:
    settings = Settings(internal_api_server_port_start=7000, internal_api_server_host="10.1.2.3")
    assert place(settings, 0).address == TcpAddress("10.1.2.3", 7000)
    assert place(settings, 3).address == TcpAddress("10.1.2.3", 7003)
    assert place(settings, 3).node == {"name": "lmcache_worker2", "host": "10.1.2.3", "port": 7003}


def test_sockets_are_named_by_the_port() -> None:
    settings = Settings(internal_api_server_socket_path_prefix="/run/lm/socket", lmcache_instance_id="prod")
    scheduler, worker = place(settings, 0), place(settings, 1)
    assert (scheduler.role, scheduler.address) == ("scheduler", UnixAddress("/run/lm/socket_6999"))
    assert (worker.role, worker.address) == ("worker", UnixAddress("/run/lm/socket_7000"))
    assert worker.node == {"name": "prod_worker0", "host": "localhost", "port": "/run/lm/socket_7000"}


@pytest.mark.parametrize(("included", "served"), [(None, [0, 1, 2]), ([], [0, 1, 2]), ([0, 2], [0, 2]), ([9], [])])
def test_the_include_list(included: list[int] | None, served: list[int]) -> None:
    settings = Settings(internal_api_server_include_index_list=included)
    assert [index for index in range(3) if serves(settings, index)] == served


def test_the_controller_stands_beside_them() -> None:
    by_port = place(Settings(controller_port=9001, internal_api_server_host="10.1.2.3"), CONTROLLER_INDEX)
    assert by_port.node == {"name": "lmcache_controller", "host": "10.1.2.3", "port": 9001}
    settings = Settings(internal_api_server_socket_path_prefix="/run/lm/socket", lmcache_instance_id="prod")
    by_socket = place(settings, CONTROLLER_INDEX)
    assert (by_socket.name, by_socket.role, by_socket.index) == ("prod_controller", "controller", -1)
    assert by_socket.address == UnixAddress("/run/lm/socket_9000")
    assert [role_of(index) for index in (-1, 0, 1, 2)] == ["controller", "scheduler", "worker", "worker"]
    assert serves(Settings(internal_api_server_include_index_list=[9]), CONTROLLER_INDEX)
    with pytest.raises(ConfigError, match="internal_api_server_host and controller_port: index -1 has no usable"):
        place(Settings(controller_port=65536), CONTROLLER_INDEX)


def test_an_address_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="index 9 has no usable address: '65544'"):
        place(Settings(internal_api_server_port_start=65535), 9)
    with pytest.raises(ConfigError, match="socket_path_prefix: index 0 has no usable address: .* at most 107"):
        place(Settings(internal_api_server_socket_path_prefix="/" + "x" * 110), 0)
    with pytest.raises(ConfigError, match="starts with /"):
        place(Settings(internal_api_server_socket_path_prefix="relative"), 0)
