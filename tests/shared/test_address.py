import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_shared.address import (
    TcpAddress,
    UnixAddress,
    from_node,
    from_proxy_segments,
    is_loopback_host,
    parse,
    quote_socket,
)
from lmcache_shared.errors import AddressError

paths = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30).map(
    lambda text: f"/{text}"
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:6999", TcpAddress("127.0.0.1", 6999)),
        ("http://worker-0.example:80", TcpAddress("worker-0.example", 80)),
        ("http://worker-0.example:80/", TcpAddress("worker-0.example", 80)),
        ("[::1]:8080", TcpAddress("::1", 8080)),
        ("/run/lm.sock", UnixAddress("/run/lm.sock")),
        ("unix:/run/lm.sock", UnixAddress("/run/lm.sock")),
        ("unix:///run/lm.sock", UnixAddress("/run/lm.sock")),
    ],
)
def test_parse(text: str, address: object) -> None:
    assert parse(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "6999", "host:", "host:0", "host:65536", "host:-1", "host:٣", "host:8 0", ":80", "ho st:80", "h/o:80",
     "::1:80", "[::1:80", "host\r\nX:80", "a@b:80", "unix:relative", "x" * 254 + ":80", "[::g]:80"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(AddressError, match="expected|starts with"):
        parse(text)


def test_a_node_has_a_number_a_number_in_a_string_or_a_socket() -> None:
    assert from_node("127.0.0.1", 80) == from_node("127.0.0.1", "80") == TcpAddress("127.0.0.1", 80)
    assert from_node("ignored for sockets", "/run/s") == UnixAddress("/run/s")


def test_printing_and_parsing_are_inverse() -> None:
    for address in (TcpAddress("::1", 1), TcpAddress("localhost", 65535), UnixAddress("/a b%2F")):
        assert parse(str(address)) == address


def test_a_socket_path_has_at_most_107_bytes_not_characters() -> None:
    assert from_node("", "/" + "x" * 106) == UnixAddress("/" + "x" * 106)
    with pytest.raises(AddressError, match="108 bytes, but .* at most 107; choose a shorter folder"):
        from_node("", "/" + "x" * 107)
    with pytest.raises(AddressError, match="109 bytes"):
        from_node("", "/" + "é" * 54)
    with pytest.raises(AddressError, match="NUL"):
        from_node("", "/a\0b")


@given(paths, st.integers(1, 2))
def test_a_socket_quoted_once_or_twice_is_read_back(path: str, times: int) -> None:
    quoted = quote_socket(path, times=times)
    assert "/" not in quoted
    if times == 1 and "%2F" in path.upper():
        return  # a path that holds %2F itself has to be quoted twice
    assert from_proxy_segments("localhost", quoted) == UnixAddress(path)


def test_proxy_paths_are_read_back() -> None:
    for address in (UnixAddress("/tmp/a b/socket_6999"), TcpAddress("::1", 80), TcpAddress("w0", 7000)):
        _, kind, host, target = address.proxy_path().split("/")
        assert kind == "proxy"
        assert from_proxy_segments(host, target) == address


@given(st.text(max_size=40))
def test_no_text_is_more_than_refused(text: str) -> None:
    for reader in (parse, lambda value: from_proxy_segments(value, value)):
        try:
            address = reader(text)
        except AddressError:
            continue
        assert parse(str(address)) == address


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost.", "[::1]", "::1%lo"],
)
def test_loopback(host: str) -> None:
    assert is_loopback_host(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost.evil.example",
        "10.0.0.1",
        "0.0.0.0",
        "::",
        "::ffff:10.0.0.1",
        "0x7f.1",
        "localhost..",
        "[localhost]",
        "[::2]",
    ],
)
def test_not_loopback(host: str) -> None:
    assert not is_loopback_host(host)


def test_half_a_character_is_in_no_path() -> None:
    with pytest.raises(AddressError, match="half a character"):
        parse("/\ud800")
