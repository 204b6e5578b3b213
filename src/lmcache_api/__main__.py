"""`python -m lmcache_api`: the internal API servers of one deployment, in one process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lmcache_api.component import Component
from lmcache_api.embedded import EmbeddedComponent, EmbeddedControllerComponent
from lmcache_api.server import ComponentServer
from lmcache_shared import config, program
from lmcache_shared.errors import ConfigError
from lmcache_shared.placement import CONTROLLER_INDEX, MAX_WORKERS, SCHEDULER_INDEX, serves
from lmcache_shared.settings import Settings
from lmcache_shared.version import VERSION

PROGRAM = "lmcache-api"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Serve the internal API of an LMCache scheduler and its workers, or of a controller.",
        epilog="Settings come from the file, then the environment (LMCACHE_<KEY>), then the command line.",
    )
    parser.add_argument(
        "--engine",
        choices=("embedded", "lmcache"),
        default="embedded",
        help="what is served: an engine that needs nothing, or LMCache's standalone engine (default: %(default)s)",
    )
    parser.add_argument("--config", metavar="FILE", help="lmcache.yaml; default: what LMCACHE_CONFIG_FILE names")
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument(
        "--role",
        choices=("all", "scheduler", "worker", "controller"),
        default="all",
        help="what to serve (default: %(default)s)",
    )
    parser.add_argument("--workers", metavar="N", type=int, help="number of workers (default: 1)")
    parser.add_argument("--worker-id", metavar="I", type=int, help="serve this worker alone, with --role worker")
    parser.add_argument("--host", metavar="H", help="the host to listen on; the setting internal_api_server_host")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="set one setting; may be repeated"
    )
    parser.add_argument(
        "--log-level", type=str.lower, choices=tuple(program.LOG_LEVELS), default="info", help="default: %(default)s"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    program.configure_logging(options.log_level)
    return program.run(PROGRAM, functools.partial(serve, options))


async def serve(options: argparse.Namespace, stop: asyncio.Event) -> None:
    """Serve until `stop` is set.

    Raises:
        StartError: an option, a setting or an address cannot be used; nothing is left behind.
    """
    host = [f"internal_api_server_host={options.host}"] if options.host is not None else []
    overrides = [*options.set, *host]
    wanted = _indexes(options)
    async with contextlib.AsyncExitStack() as stack:
        if options.engine == "lmcache":
            components: Sequence[Component] = [await _lmcache(options, overrides, wanted, stack)]
        else:
            components = _embedded(options, overrides, wanted, stack)
        settings = components[0].settings
        serving = [component for component in components if serves(settings, component.index)]
        if not settings.internal_api_server_enabled or not serving:
            program.say(_why_off(settings, [component.index for component in components]))
            return
        servers: list[ComponentServer] = []
        try:
            for component in serving:
                server = ComponentServer(component)
                await server.start()
                servers.append(server)
                program.say(f"{server.placement.name} ({component.role}) serves on {server.placement.address}")
            await stop.wait()
            program.say("stopping")
        finally:
            await asyncio.gather(*(server.stop() for server in servers))  # together: each may drain for seconds


async def _lmcache(
    options: argparse.Namespace, overrides: Sequence[str], wanted: Sequence[int], stack: contextlib.AsyncExitStack
) -> Component:
    """LMCache's standalone engine, started, and stopped by `stack`: the one worker that is wanted."""
    if options.role == "controller":
        from lmcache_api.bridge.standalone_controller import StandaloneController

        controller = await asyncio.to_thread(
            StandaloneController, options.config, overrides, log_level=options.log_level
        )
        stack.push_async_callback(asyncio.to_thread, controller.stop)
        return controller.component
    from lmcache_api.bridge.standalone import StandaloneEngine

    if options.role == "scheduler" or (options.workers != 1 and options.worker_id is None):
        raise ConfigError("--engine lmcache: a process has one worker; start each by --role worker --worker-id I")
    worker_id = options.worker_id or 0
    world_size = max(options.workers, worker_id + 1)
    engine = await asyncio.to_thread(
        StandaloneEngine,
        options.config,
        overrides,
        worker_id=worker_id,
        world_size=world_size,
        log_level=options.log_level,
    )
    stack.push_async_callback(asyncio.to_thread, engine.stop)
    return engine.component


def _embedded(
    options: argparse.Namespace, overrides: Sequence[str], wanted: Sequence[int], stack: contextlib.AsyncExitStack
) -> Sequence[Component]:
    """The components that are wanted, started, and stopped by `stack`: the scheduler, if so, and its workers."""
    settings = config.load(options.config, overrides=overrides)
    if "internal_api_server_enabled" not in settings.given:
        settings = replace(settings, internal_api_server_enabled=True)  # run by hand, it is wanted
    if options.role == "controller":
        return [stack.enter_context(EmbeddedControllerComponent(settings))]
    world_size = max([options.workers, *wanted])
    workers: list[EmbeddedComponent] = []
    stack.push_async_callback(_stop_all, workers)
    for index in wanted:
        if index != SCHEDULER_INDEX:
            workers.append(EmbeddedComponent(settings, index, world_size=world_size))
            workers[-1].start()
    if SCHEDULER_INDEX not in wanted:
        return workers
    scheduler = EmbeddedComponent(settings, SCHEDULER_INDEX, world_size=options.workers, workers=workers)
    return [stack.enter_context(scheduler), *workers]


async def _stop_all(components: Sequence[EmbeddedComponent]) -> None:
    """Stop them together: each may wait for a second, for a controller that hangs."""
    if components:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(len(components), thread_name_prefix="stop") as threads:
            await asyncio.gather(*(loop.run_in_executor(threads, component.stop) for component in components))


def _indexes(options: argparse.Namespace) -> list[int]:
    """The indexes of the components that the command line asks for."""
    options.workers_given = options.workers is not None
    options.workers = 1 if options.workers is None else options.workers
    if not 0 <= options.workers <= MAX_WORKERS:
        raise ConfigError(f"--workers {options.workers}: expected 0 to {MAX_WORKERS}")
    if options.role == "worker" and options.workers == 0:
        raise ConfigError("--role worker --workers 0: there is nothing to serve")
    if options.worker_id is not None:
        if options.role != "worker":
            raise ConfigError(f"--worker-id {options.worker_id}: goes with --role worker")
        if not 0 <= options.worker_id < MAX_WORKERS:
            raise ConfigError(f"--worker-id {options.worker_id}: expected 0 to {MAX_WORKERS - 1}")
        if options.workers_given and options.worker_id >= options.workers:
            raise ConfigError(f"--worker-id {options.worker_id}: there are --workers {options.workers}, counted from 0")
        return [1 + options.worker_id]
    workers = [1 + worker for worker in range(options.workers)]
    return {
        "controller": [CONTROLLER_INDEX],
        "scheduler": [SCHEDULER_INDEX],
        "worker": workers,
        "all": [SCHEDULER_INDEX, *workers],
    }[options.role]


def _why_off(settings: Settings, wanted: Sequence[int]) -> str:
    if not settings.internal_api_server_enabled:
        return "internal API is off: internal_api_server_enabled is false in the settings; nothing to serve"
    included = settings.internal_api_server_include_index_list
    return (
        f"internal API is off: internal_api_server_include_index_list {included} has none of the indexes"
        f" {list(wanted)} that were asked for; nothing to serve"
    )


if __name__ == "__main__":
    sys.exit(main())
