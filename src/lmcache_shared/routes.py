"""Endpoints that are found by themselves.

A module whose file ends in `_api.py` (in the frontend also `_page.py`) and that exports `router =
web.RouteTableDef()` is served at the next start. It lies in a package of ours, in a folder that the
configuration names, or in an installed package that declares an entry point. Each can be added or removed alone.
A module that keeps state also exports `setup(app)`, which gives the application what its handlers need and, by
`cleanup_ctx`, takes it back.
Nothing is half served: a module that cannot be imported, exports no router, or claims a route that
another module has, stops the start, and the error names both modules.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from lmcache_shared.errors import RouteError

_VARIABLE = re.compile(r"\{[^{}:]+(:[^{}]*(?:\{[^{}]*\}[^{}]*)*)?\}")


@dataclass(frozen=True)
class RouteModule:
    """A module with routes: where it came from, for people, its table of routes, and its `setup(app)` if it has one."""

    origin: str
    router: web.RouteTableDef
    setup: Callable[[web.Application], None] | None = None


def from_packages(packages: Iterable[str], suffix: str) -> Iterator[RouteModule]:
    """The modules directly in each package whose names end in `suffix` (such as `_api`), by name.

    Raises:
        RouteError: a module cannot be imported or exports no router.
    """
    for package in packages:
        paths = importlib.import_module(package).__path__
        for name in sorted(info.name for info in pkgutil.iter_modules(paths) if info.name.endswith(suffix)):
            origin = f"{package}.{name}"
            try:
                module = importlib.import_module(origin)
            except (Exception, SystemExit) as error:
                raise _import_failed(origin, error) from error
            yield _route_module(origin, module)


def from_folders(folders: Iterable[str | Path], suffix: str) -> Iterator[RouteModule]:
    """The files `*<suffix>.py` of each folder, by name; each is read anew at every call.

    Raises:
        RouteError: a folder is missing, or a file cannot be imported or exports no router.
    """
    for folder in map(Path, folders):
        try:
            files = sorted(folder.glob(f"*{suffix}.py")) if folder.is_dir() else None
        except OSError as error:
            raise RouteError(f"route folder {folder}: cannot be read: {error.strerror}") from None
        if files is None:
            raise RouteError(f"route folder {folder}: is no folder; make it or take it out of the settings")
        for file in files:
            origin = str(file)
            digest = hashlib.blake2s(str(file.resolve()).encode(), digest_size=8).hexdigest()
            spec = importlib.util.spec_from_file_location(f"_route_folder_{digest}_{file.stem}", file)
            if spec is None or spec.loader is None:
                raise RouteError(f"{origin}: Python cannot import this file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up by name
            try:
                spec.loader.exec_module(module)
                found = _route_module(origin, module)
            except (Exception, SystemExit) as error:
                sys.modules.pop(spec.name, None)
                if isinstance(error, RouteError):
                    raise
                raise _import_failed(origin, error) from error
            yield found


def from_entry_points(group: str) -> Iterator[RouteModule]:
    """The modules that installed packages declare under the entry point `group`, by name.

    Raises:
        RouteError: one cannot be imported or exports no router.
    """
    for point in sorted(importlib.metadata.entry_points(group=group), key=lambda point: point.name):
        package = point.dist.name if point.dist else "?"
        origin = f"{point.value} (entry point {point.name!r} of {package})"
        try:
            module = point.load()
        except (Exception, SystemExit) as error:
            raise _import_failed(origin, error) from error
        yield _route_module(origin, module)


def add_routes(app: web.Application, modules: Iterable[RouteModule]) -> None:
    """Serve every module's routes and call its `setup`.

    Raises:
        RouteError: two modules claim one route, or a route is malformed; both names are in the text.
    """
    owners: dict[tuple[str, str], str] = {}
    for module in modules:
        for definition in module.router:
            if isinstance(definition, web.RouteDef):
                _claim(owners, definition, module.origin)
            try:
                definition.register(app.router)
            except (ValueError, RuntimeError) as error:
                raise RouteError(f"{module.origin}: cannot serve {definition}: {error}") from error
        if module.setup is not None:
            try:
                module.setup(app)
            except Exception as error:
                raise RouteError(f"{module.origin}: its setup(app) failed: {type(error).__name__}: {error}") from error


def _claim(owners: dict[tuple[str, str], str], route: web.RouteDef, origin: str) -> None:
    path = _VARIABLE.sub(lambda found: "{" + (found[1] or "") + "}", route.path)
    methods = {"GET", "HEAD"} if route.method == "GET" and route.kwargs.get("allow_head", True) else {route.method}
    for (taken_method, taken_path), owner in owners.items():
        if taken_path == path and (taken_method in methods or "*" in methods | {taken_method}):
            raise RouteError(f"{origin}: {route.method} {route.path} is already served by {owner}")
    owners.update({(method, path): origin for method in methods})


def _route_module(origin: str, module: object) -> RouteModule:
    router = getattr(module, "router", None)
    if not isinstance(router, web.RouteTableDef):
        raise RouteError(f"{origin}: exports no router; write `router = web.RouteTableDef()` at its top level")
    return RouteModule(origin, router, getattr(module, "setup", None))


def _import_failed(origin: str, error: BaseException) -> RouteError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f" ({last.filename}, line {last.lineno})"
    text = " ".join(str(error).split())
    return RouteError(f"{origin}: cannot be imported: {type(error).__name__}: {text}{where}")
