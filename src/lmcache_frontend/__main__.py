"""`python -m lmcache_frontend`: the dashboard and the proxy."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from lmcache_frontend.options import PROGRAM, read_options
from lmcache_frontend.server import serve
from lmcache_shared import program
from lmcache_shared.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = read_options(arguments, os.environ)
    except ConfigError as error:
        return program.refuse(PROGRAM, error)
    program.configure_logging(options.log_level)

    async def run(stop: asyncio.Event) -> None:
        await serve(options, stop)

    return program.run(PROGRAM, run)


if __name__ == "__main__":
    sys.exit(main())
