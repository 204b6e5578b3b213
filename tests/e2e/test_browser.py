"""The pages in a real Chromium."""

import re
from pathlib import Path

from playwright.sync_api import Browser

from lmcache_api.pytest_plugin import free_port
from tests.e2e.conftest import REBOUND
from tests.e2e.pages import Seen
from tests.e2e.processes import read_until, running


def test_the_dashboard_lives_on_its_own_and_tells_when_it_is_old(browser: Browser, tmp_path: Path) -> None:
    port = free_port()
    node = f'[{{"name": "worker0", "host": "localhost", "port": "{tmp_path}/s_7000"}}]'
    frontend = ["-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(port), "--nodes", node]
    frontend += ["--health-interval", "1"]
    seen = Seen(browser, port)
    page = seen.page
    with running(*frontend) as first:
        read_until(first, "serves on")
        page.goto(seen.url)
        page.get_by_text("1 down").wait_for()
        assert page.locator(".tile").get_by_text("No such file or directory").is_visible()
        with running(
            "-m", "lmcache_api", "--role", "worker", f"--set=internal_api_server_socket_path_prefix={tmp_path}/s"
        ) as api:
            read_until(api, "serves on")
            page.get_by_text("1 up").wait_for(timeout=15_000)  # without a reload
            assert page.title() == "LMCache: 1 of 1 nodes up"
            page.goto(f"{seen.url}nodes")
            text = page.get_by_role("row").nth(1).text_content() or ""  # a narrow window hides the version
            for expected in ("worker0", "up", "worker", "0.1.0-embedded", f"{tmp_path}/s_7000"):
                assert expected in text
            page.get_by_role("link", name="worker0", exact=True).click()
            page.get_by_role("link", name="Metrics").click()
            assert page.get_by_text("lmcache:lmcache_is_healthy", exact=True).is_visible()
            page.goto(seen.url)
            assert (seen.errors, seen.outside) == ([], [])
            first.terminate()
            first.wait(10)
            page.locator("#offline").wait_for(timeout=15_000)  # the tab stays open while the frontend is gone
            assert re.fullmatch(r"\d\d:\d\d:\d\d \S+", page.locator("#since").inner_text())
            assert page.title() == "LMCache: no answer"
            with running(*frontend) as second:
                read_until(second, "serves on")
                page.locator("#offline").wait_for(state="hidden", timeout=15_000)
                assert page.get_by_text("1 up").is_visible()
                assert page.title() == "LMCache: 1 of 1 nodes up"
    assert seen.outside == []
    page.close()


def test_a_frontend_without_nodes_says_what_to_do(browser: Browser) -> None:
    port = free_port()
    with running("-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(port)) as frontend:
        read_until(frontend, "serves on")
        seen = Seen(browser, port)
        seen.page.goto(seen.url)
        assert seen.page.get_by_role("heading", name="No nodes yet").is_visible()
        assert (seen.errors, seen.outside) == ([], [])
        seen.page.close()


def test_who_signs_in_needs_no_javascript(browser: Browser) -> None:
    port, token = free_port(), "a-token-of-sixteen"
    options = ["--registry", "memory", "--no-trust-local", "--viewers", "token", "--token", token]
    with running("-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(port), *options) as frontend:
        read_until(frontend, "serves on")
        with browser.new_context(java_script_enabled=False) as context:
            page, url = context.new_page(), f"http://127.0.0.1:{port}"
            opened = page.goto(f"{url}/")
            assert opened is not None
            assert (opened.status, page.url) == (200, f"{url}/sign-in")  # a page that needs a token leads there
            assert page.get_by_text("the one in the URL that the frontend printed when it started").is_visible()
            page.fill("input[name=token]", "a-wrong-token")
            page.click("button:text-is('Sign in')")
            assert "none that this server knows" in page.inner_text("main [role=alert]")
            page.fill("input[name=token]", token)
            page.click("button:text-is('Sign in')")
            page.wait_for_url(f"{url}/")
            assert "LMCache" in page.title()
            page.click("header .who")
            page.click("text=Sign out")
            assert context.cookies() == []


def test_a_page_of_a_name_that_was_made_to_point_here_reads_nothing(browser: Browser) -> None:
    port = free_port()
    with running("-m", "lmcache_frontend", "--host", "127.0.0.1", "--port", str(port)) as frontend:
        read_until(frontend, "serves on")
        page = browser.new_page()
        opened = page.goto(f"http://{REBOUND}:{port}/")
        assert opened is not None
        assert (opened.status, "--allow-host" in opened.text()) == (421, True)
        for fields in ("{}", "{'User-Agent': 'curl/8.0', 'Accept-Language': '', 'Accept': '*/*'}"):
            asked = f"fetch('/api/nodes', {{headers: {fields}, referrerPolicy: 'no-referrer'}}).then(it => it.status)"
            assert page.evaluate(asked) == 421
        page.close()
