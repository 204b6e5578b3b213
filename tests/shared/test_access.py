import pytest
from aiohttp.test_utils import make_mocked_request

from lmcache_shared.access.browser import is_from_another_site


def asked(method: str = "GET", **fields: str) -> bool:
    headers = {"Host": "here:8080"} | {name.replace("_", "-"): value for name, value in fields.items()}
    return is_from_another_site(make_mocked_request(method, "/", headers=headers))


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("POST", {}),
        ("POST", {"Sec_Fetch_Site": "same-origin"}),
        ("GET", {"Sec_Fetch_Site": "none"}),
        ("GET", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}),
        ("POST", {"Origin": "http://here:8080"}),
    ],
)
def test_own(method: str, fields: dict[str, str]) -> None:
    assert not asked(method, **fields)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("POST", {"Sec_Fetch_Site": "cross-site"}),
        ("POST", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}),
        ("GET", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}),
        ("GET", {"Sec_Fetch_Site": "same-site"}),
        ("POST", {"Origin": "http://evil.example"}),
        ("POST", {"Origin": "null"}),
    ],
)
def test_of_another_site(method: str, fields: dict[str, str]) -> None:
    assert asked(method, **fields)
