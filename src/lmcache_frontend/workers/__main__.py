"""What the main process starts: one worker."""

import sys

from lmcache_frontend.workers.worker import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
