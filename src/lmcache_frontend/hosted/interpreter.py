"""Which Python runs a plugin: the one that the frontend is installed for, whichever LMCache has started it with.

LMCache takes the whole first line of a plugin as one program's name, finds none, and takes the `python` of its PATH.
Any Python 3 may load this module before the right one runs: the standard library only, and no recent syntax.
"""

import importlib.util
import os
import re
import shutil
import signal
import sys
from types import FrameType

import lmcache_shared  # noqa: F401 - found where this package was found, before the path changes

PARENT = "LMCACHE_FRONTEND_PLUGIN_PARENT"
"""Set once another Python has been started in this process: the pid of the process that started the first one."""

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The folder of this package: an environment's site-packages, or `src` of a checkout."""

OLDEST = (3, 10)
NEEDED = ("aiohttp", "aiohttp_jinja2", "jinja2", "msgspec", "multidict", "uvloop", "yaml", "yarl")
START_FAILED = 2
"""As `lmcache_shared.errors` has it, which needs a Python that is right."""


def run(plugin: str) -> int:
    """Run the plugin, the file that was started, here or in the Python that this package belongs to; its exit code."""
    parent = os.environ.pop(PARENT, "")
    if parent and not re.match(r"[0-9]{1,10}\Z", parent):
        return _fail(f"{PARENT}: expected the pid of a process, found {parent[:80]!a}; unset it")
    problem = _problem()
    if not parent and (problem or not _belongs_here()):
        python = python_of(ROOT)
        if python:
            environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
            environ[PARENT] = str(os.getppid())
            try:
                os.execve(python, [python, plugin], environ)  # noqa: S606 - no shell is wanted
            except OSError as error:
                problem = (
                    problem or f"{python} is the Python that it is installed for, and cannot be run: {error.strerror}"
                )
    if problem:
        return _fail(
            f"{sys.executable} cannot run the frontend in {ROOT}: {problem};"
            " set LMCACHE_FRONTEND_PYTHON to the Python that it is installed for"
        )
    signal.signal(signal.SIGTERM, _end)  # until the event loop takes care of it
    from lmcache_frontend.hosted.plugin import main

    return main(int(parent) if parent else os.getppid())


def python_of(root: str) -> str:
    """The Python whose packages lie in `root`, "" if there is none."""
    lib, name = os.path.split(root)
    version = os.path.basename(lib)
    if name in ("site-packages", "dist-packages") and re.match(r"python3(\.\d+)?$", version):
        places = [os.path.join(os.path.dirname(os.path.dirname(lib)), "bin", version), version]
    else:
        places = [os.path.join(lib, ".venv", "bin", "python")]
    return next((python for python in map(shutil.which, places) if python), "")


def _belongs_here() -> bool:
    """Whether the packages in `ROOT` are this Python's."""
    version = os.path.basename(os.path.dirname(ROOT))
    if re.match(r"python3\.\d+$", version) and version != "python{}.{}".format(*sys.version_info):
        return False
    return os.path.realpath(ROOT) in map(os.path.realpath, sys.path)


def _problem() -> str:
    """Why this Python cannot run the frontend, "" if it can."""
    if sys.version_info < OLDEST:
        return "it needs Python {}.{} or newer".format(*OLDEST)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"it has no {', '.join(missing)}" if missing else ""


def _fail(problem: str) -> int:
    print(f"lmcache-frontend: {problem}", file=sys.stderr)
    return START_FAILED


def _end(number: int, frame: "FrameType | None") -> None:
    os._exit(0)
