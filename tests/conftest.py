"""The fixtures of both programs, as a developer of an endpoint uses them."""

pytest_plugins = ["pytester", "lmcache_api.pytest_plugin", "lmcache_frontend.pytest_plugin"]
