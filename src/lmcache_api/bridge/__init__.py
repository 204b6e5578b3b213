"""A running LMCache behind the seam. Nothing of `lmcache` is imported before a host process has imported it."""
