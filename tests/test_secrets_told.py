"""Who is told secrets, and where they are written down: to admins who ask for them, and nowhere."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lmcache_api.pytest_plugin import StartApi
from lmcache_frontend.pytest_plugin import StartFrontend
from lmcache_shared.listen import without_secrets
from tests.test_access import CALLERS, RANK, SECRETS, status, token_file

__all__ = ["token_file"]

PASSWORD = "swordfish-of-a-store"


@pytest.mark.parametrize("way", ["", "/proxy2/w"])
async def test_settings_that_hold_credentials(
    api_server: StartApi, frontend_server: StartFrontend, token_file: str, way: str
) -> None:
    extra = {"remote_url": f"redis://:{PASSWORD}@store:6379"}
    worker = await api_server(extra_config=extra, internal_api_server_token_file=token_file)
    frontend = await frontend_server(nodes=[{**worker.node, "name": "w"}], token_file=token_file)
    client = frontend.client if way else worker.client
    for caller, headers in CALLERS.items():
        for path in ("/conf", "/conf?names=extra_config", "/meta"):
            found, said = await status(client, "GET", way + path, headers)
            assert found == 200
            assert PASSWORD.encode() not in said
        for query in ("show_secrets=true", "show%5Fsecrets=1", "names=extra_config&show_secrets=yes", "show_secrets"):
            found, said = await status(client, "GET", f"{way}/conf?{query}", headers)
            if RANK[caller] < RANK["admin"]:
                assert found in (401, 403)
            elif "=" in query:
                assert found == 200
                assert PASSWORD.encode() in said
    async with client.get(f"{way}/conf?show_secrets=true") as response:
        assert response.headers["Cache-Control"] == "no-store"
    async with client.get(f"{way}/conf?show_secrets=false") as response:
        assert PASSWORD not in await response.text()


async def test_no_token_stands_in_a_log(
    api_server: StartApi,
    frontend_server: StartFrontend,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    token_file: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    worker = await api_server(tcp=True, internal_api_server_access_log=True, internal_api_server_token=SECRETS["admin"])
    node: dict[str, Any] = {**worker.node, "name": "w", "token": SECRETS["viewer"]}
    frontend = await frontend_server(nodes=[node], token_file=token_file, audit_log=str(tmp_path / "audit"))
    bearer = {"X-Forwarded-For": "10.0.0.9", "Authorization": f"Bearer {SECRETS['operator']}"}
    for token in (SECRETS["admin"], "wrong-token-of-nobody"):
        for path in (f"/sign-in?token={token}", f"/proxy2/w/version?token={token}", f"/api/nodes?token={token}&a=b"):
            async with frontend.client.get(path, headers=bearer, allow_redirects=False) as response:
                assert response.status in (200, 303, 401)
                assert response.headers.get("Referrer-Policy", "same-origin") in ("same-origin", "no-referrer")
                assert token not in response.headers.get("Location", "")
        await status(frontend.client, "POST", f"/proxy2/w/metrics/reset?api_key={token}", bearer)
    assert '"GET /sign-in?token=*** HTTP/1.1" 303' in caplog.text
    assert "/api/nodes?token=***&a=b" in caplog.text
    await frontend.server.stop()
    written = caplog.text + (tmp_path / "audit").read_text()
    for secret in (*SECRETS.values(), "wrong-token-of-nobody"):
        assert secret not in written


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/a", "/a"),
        ("/a?", "/a?"),
        ("/a?b=c&d", "/a?b=c&d"),
        ("/sign-in?token=abc", "/sign-in?token=***"),
        ("/a?b=1&PASSWORD=x&c=2", "/a?b=1&PASSWORD=***&c=2"),
        ("/a?url=http://u:p@h/", "/a?url=***"),
        ("/a?" + "b=c&" * 1000, "/a?..."),
    ],
)
def test_what_a_log_line_shows(target: str, shown: str) -> None:
    assert without_secrets(target) == shown
