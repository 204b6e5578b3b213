"""The frontend inside an LMCache deployment: what the files of `lmcache_frontend.plugins` do once they run."""
