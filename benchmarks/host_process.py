"""The process whose costs `in_process.py` measures: a host that imports one server and serves with it in a thread.

    python host_process.py SERVER SOCKET_PREFIX FAMILIES

`SERVER` is one of `MODULES`, `FAMILIES` the file of the metrics that a peer has. Only `sys` and `time` are imported
before the clock starts, so that what a server imports is what it costs; and the requests come from another process, so
that a client's work is not counted. The first line that is written says how the start went; then each line that is read
is a question (`memory`, `modules` or `routes`) and is answered with one line. The end of the input ends the process.
"""

import sys
import time

MODULES = {
    "lmcache-ops": ["lmcache_api", "lmcache_api.embedded", "lmcache_shared.settings"],
    "fastapi": [
        "fastapi_peer",
        "uvicorn.protocols.http.httptools_impl",
        "uvicorn.protocols.websockets.auto",
        "uvicorn.lifespan.on",
    ],
    "fastapi-lean": ["fastapi_peer", "uvicorn.protocols.http.httptools_impl", "uvicorn.lifespan.on", "uvloop"],
}
"""The servers, and what must be imported to serve: also what a server by itself would import only when it starts."""


def main() -> None:
    server, prefix, families = sys.argv[1:]
    rss, pss = memory()
    began, cpu = time.monotonic(), time.process_time()
    import_all(server)
    imported, cpu = time.monotonic(), time.process_time() - cpu
    modules = len(sys.modules)
    if server == "lmcache-ops":
        start_ours(prefix)
    else:
        start_peer(prefix, families, lean=server == "fastapi-lean")
    tell(began, imported, cpu, modules, rss, pss)
    for line in sys.stdin:
        question = line.strip()
        if question == "memory":
            tell(*memory())
        elif question == "modules":
            tell(len(sys.modules))
        elif question == "routes":
            print(*routes(server), flush=True)


def tell(*numbers: float) -> None:
    print(*numbers, flush=True)


def memory() -> "tuple[float, float]":
    """The resident and the proportional memory of this process in KiB; the second is 0 where the kernel has it not."""
    return kibibytes("/proc/self/status", "VmRSS:"), kibibytes("/proc/self/smaps_rollup", "Pss:")


def kibibytes(path: str, name: str) -> float:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(name):
                    return float(line.split()[1])
    except OSError:
        pass
    return 0.0


def import_all(server: str) -> None:
    import importlib

    for name in MODULES[server]:
        importlib.import_module(name)
    if server == "lmcache-ops":
        import pkgutil

        from lmcache_api.app import CATEGORIES

        for category in CATEGORIES:
            package = importlib.import_module(f"lmcache_api.{category}")
            for info in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{info.name}")


def start_ours(prefix: str) -> None:
    from lmcache_api import InternalAPIServer
    from lmcache_api.embedded import EmbeddedComponent
    from lmcache_shared.settings import Settings

    component = EmbeddedComponent(
        Settings(internal_api_server_enabled=True, internal_api_server_socket_path_prefix=prefix)
    )
    component.start()
    api = InternalAPIServer(component)
    api.start()
    if api.failure is not None:
        raise api.failure


def start_peer(prefix: str, families: str, *, lean: bool) -> None:
    from fastapi_peer import Peer

    Peer(prefix, families, lean=lean).start()


def routes(server: str) -> "list[str]":
    """Every route that is served as `METHOD:path`, sorted; `HEAD` beside `GET` does not count."""
    if server != "lmcache-ops":
        from fastapi_peer import ROUTES

        return sorted(f"{method}:{path}" for method, path, _ in ROUTES)
    from lmcache_api import create_app
    from lmcache_api.embedded import EmbeddedComponent
    from lmcache_shared.settings import Settings

    found = create_app(EmbeddedComponent(Settings())).router.routes()
    return sorted(f"{it.method}:{it.resource.canonical}" for it in found if it.resource and it.method != "HEAD")


if __name__ == "__main__":
    main()
