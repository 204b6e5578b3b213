"""The version that a heartbeat reports: that of the nodes."""

from __future__ import annotations

from lmcache_frontend.telemetry.health.board import HealthBoard

TOTAL_SECONDS = 4.0
"""Within these every node has been checked once, or the heartbeat goes without those that have not."""


async def first_version(health: HealthBoard) -> str | None:
    """The version of the first node, in the registry's order, that is up and tells one."""
    await health.settled(TOTAL_SECONDS)
    return next((entry.version for entry in health.all() if entry.answers and entry.version), None)
