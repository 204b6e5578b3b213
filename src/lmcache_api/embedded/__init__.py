"""A component that needs nothing installed: for a laptop, a test, a demo cluster."""

from lmcache_api.embedded.component import EmbeddedComponent

__all__ = ["EmbeddedComponent"]
