"""A plugin's run: the deployment's frontend, until SIGTERM or until the process that has started it is gone."""

from __future__ import annotations

import asyncio
import os
import select

from lmcache_frontend.hosted.deployment import read_deployment
from lmcache_frontend.options import PROGRAM
from lmcache_frontend.server import serve
from lmcache_shared import program
from lmcache_shared.errors import StartError

PARENT_SECONDS = 0.25
"""How often the parent is looked for. The kernel's own signal (PR_SET_PDEATHSIG) would come when the thread ends that
has started this process, and LMCache may start plugins in a thread."""


def main(parent: int) -> int:
    """Run as the child of the process `parent`; the exit code."""
    try:
        deployment = read_deployment(os.environ)
    except StartError as error:
        return program.refuse(PROGRAM, error)
    program.configure_logging(deployment.options.log_level)
    for hint in deployment.hints:
        program.say(hint)

    async def run(stop: asyncio.Event) -> None:
        watch = asyncio.create_task(_stop_without(parent, stop), name="parent watch")
        try:
            await serve(deployment.options, stop, deployment.nodes)
        finally:
            watch.cancel()

    return program.run(PROGRAM, run)


async def _stop_without(parent: int, stop: asyncio.Event) -> None:
    if not _output_is_broken():  # a parent that was killed before this process could look who it is
        while os.getppid() == parent:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(PARENT_SECONDS)
    program.say("the process that has started this plugin is gone")
    stop.set()


def _output_is_broken() -> bool:
    """Whether nobody has the other end of the pipe that LMCache gives a plugin as its output."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
