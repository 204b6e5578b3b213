"""A component that needs nothing installed: for a laptop, a test, a demo cluster."""

from lmcache_api.embedded.component import EmbeddedComponent
from lmcache_api.embedded.controller_component import EmbeddedControllerComponent

__all__ = ["EmbeddedComponent", "EmbeddedControllerComponent"]
