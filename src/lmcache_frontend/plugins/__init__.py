"""The files that LMCache starts as runtime plugins.

Nothing else lies here: LMCache starts every file of a folder that it is given. What they do is in
`lmcache_frontend.hosted`.
"""

from pathlib import Path

FILES = tuple(
    Path(__file__).resolve().with_name(name)
    for name in ("scheduler_lmc_frontend_plugin.py", "lmcache_mp_frontend_plugin.py")
)
"""For LMCache's scheduler, and for its multiprocess mode; LMCache goes by the names."""
