"""LMCache's own controller server and ours, in one process and on one controller manager.

Run by the Python that has LMCache: `controller_host.py THEIR_SOCKET OUR_PREFIX PULL_PORT REPLY_PORT`. It says `READY`
when both serve, and ends when its standard input does. Logs go to standard error.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path


async def serve_theirs(socket: str, pull: int, reply: int, made: asyncio.Future[object]) -> None:
    import uvicorn
    from lmcache.v1.api_server.__main__ import create_app

    urls = {"pull": f"127.0.0.1:{pull}", "reply": f"127.0.0.1:{reply}", "heartbeat": None}
    app = create_app(urls, -1, 300)  # type: ignore[arg-type]
    made.set_result(app.state.lmcache_controller_manager)
    await uvicorn.Server(uvicorn.Config(app, uds=socket, log_level="warning")).serve()


async def main(socket: str, our_prefix: str, pull: str, reply: str) -> None:
    from lmcache.v1.config import LMCacheEngineConfig

    from lmcache_api import ComponentServer
    from lmcache_api.bridge.controller import ControllerComponent
    from lmcache_shared.settings import Settings

    talk = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what LMCache prints is no answer of ours

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    made = asyncio.run_coroutine_threadsafe(_future(), loop).result()
    serving = asyncio.run_coroutine_threadsafe(serve_theirs(socket, int(pull), int(reply), made), loop)
    manager = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_wait(made), loop))
    settings = Settings(internal_api_server_enabled=True, internal_api_server_socket_path_prefix=our_prefix)
    component = ControllerComponent(manager, loop, LMCacheEngineConfig.from_defaults(), settings)
    async with ComponentServer(component):
        while not Path(socket).is_socket():
            await asyncio.sleep(0.05)
        talk.write("READY\n")
        await asyncio.to_thread(sys.stdin.read)
    serving.cancel()


async def _future() -> asyncio.Future[object]:
    return asyncio.get_running_loop().create_future()


async def _wait(made: asyncio.Future[object]) -> object:
    return await made


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
