"""LMCache's own launchers of runtime plugins, in a process that can be killed.

Run by the Python that has LMCache: `plugin_host.py {JSON}` with

- `config`: an `lmcache.yaml`, `role` and `workers`: what LMCache's vLLM integration gives the launcher; or
- `mp`: the `locations` and `extra_config` of the multiprocess mode, and `port`, that of its HTTP server;
- `older`: start plugins with the older names in their environment alone, as older versions of LMCache do.

It says `READY` when the plugins are started, and ends when its standard input does. Logs go to standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

NEWER = "LMCACHE_RUNTIME_PLUGIN_"


def main(what: dict[str, Any]) -> int:
    talk = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what LMCache prints is no answer of ours
    if what.get("older"):
        subprocess.Popen = OlderPopen  # type: ignore[misc]
    launcher = multiprocess_launcher(**what["mp"]) if "mp" in what else launcher_of(**what)
    launcher.launch_plugins()
    talk.write("READY\n")
    sys.stdin.read()
    return 0  # LMCache stops its plugins when Python exits


class OlderPopen(subprocess.Popen[str]):
    def __init__(self, command: list[str], *, env: dict[str, str], **how: Any) -> None:
        older = {name: value for name, value in env.items() if not name.startswith(NEWER)}
        super().__init__(command, env=older, **how)


def launcher_of(config: str, role: str, workers: int, older: bool = False) -> Any:
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.plugin.runtime_plugin_launcher import RuntimePluginLauncher

    return RuntimePluginLauncher(LMCacheEngineConfig.from_file(config), role, workers, -1)


def multiprocess_launcher(locations: list[str], extra_config: dict[str, Any], port: int) -> Any:
    from lmcache.v1.multiprocess.config import HTTPFrontendConfig, MPServerConfig, RuntimePluginConfig
    from lmcache.v1.multiprocess.mp_runtime_plugin_launcher import MPRuntimePluginLauncher

    plugins = RuntimePluginConfig(locations=locations, extra_config=extra_config)
    return MPRuntimePluginLauncher(
        runtime_plugin_config=plugins,
        mp_config=MPServerConfig(runtime_plugin_config=plugins),
        http_config=HTTPFrontendConfig(http_host="127.0.0.1", http_port=port),
    )


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
