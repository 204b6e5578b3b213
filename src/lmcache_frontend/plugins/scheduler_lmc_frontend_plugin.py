#!/usr/bin/env python3
"""A runtime plugin of LMCache: the frontend for the nodes of the deployment whose scheduler starts this file.

Any Python may start it: it goes on with the one that the frontend is installed for. docs/plugins.md tells how to use
it. The other plugin has the same code: each file must work by itself, also as a symlink or as a copy.
"""

import os
import shutil
import sys

PARENT = "LMCACHE_FRONTEND_PLUGIN_PARENT"


def main() -> int:
    wanted = os.environ.get("LMCACHE_FRONTEND_PYTHON")
    if wanted and PARENT not in os.environ:
        python = shutil.which(wanted)
        if python is None:
            return fail(f"LMCACHE_FRONTEND_PYTHON={wanted}: there is no such program")
        os.environ[PARENT] = str(os.getppid())
        os.environ.pop("PYTHONHOME", None)
        try:
            os.execv(python, [python, os.path.abspath(__file__)])  # noqa: S606 - no shell is wanted
        except OSError as error:
            return fail(f"LMCACHE_FRONTEND_PYTHON={wanted}: cannot be run: {error.strerror}")
    places = (os.path.abspath(__file__), os.path.realpath(__file__))
    if sys.path[0] in map(os.path.dirname, places):
        del sys.path[0]  # other plugins may lie there, whatever their names are
    before = list(sys.path)
    for root in (os.path.dirname(os.path.dirname(os.path.dirname(place))) for place in places):
        if os.path.isfile(os.path.join(root, "lmcache_frontend", "hosted", "interpreter.py")):
            sys.path.insert(0, root)
            break
    try:
        from lmcache_frontend.hosted import interpreter
    except ImportError:
        return fail(f"{sys.executable} has no lmcache-ops; set LMCACHE_FRONTEND_PYTHON to the Python that has it")
    sys.path[:] = before
    return interpreter.run(places[0])


def fail(problem: str) -> int:
    print(f"lmcache-frontend: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
