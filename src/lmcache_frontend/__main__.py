"""`python -m lmcache_frontend`: the dashboard and the proxy."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from lmcache_frontend.options import read_options
from lmcache_frontend.server import FrontendServer
from lmcache_shared import program
from lmcache_shared.errors import START_FAILED, ConfigError

PROGRAM = "lmcache-frontend"


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = read_options(arguments, os.environ)
    except ConfigError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return START_FAILED
    program.configure_logging(options.log_level)

    async def serve(stop: asyncio.Event) -> None:
        async with FrontendServer(options) as server:
            count = sum(1 for _ in server.registry.nodes())
            program.say(f"frontend serves on http://{server.address} ({count} nodes)")
            await stop.wait()
            program.say("stopping")

    return program.run(PROGRAM, serve)


if __name__ == "__main__":
    sys.exit(main())
