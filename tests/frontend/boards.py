"""What a frontend's board says once every node has been checked."""

from lmcache_frontend.pytest_plugin import RunningFrontend
from lmcache_frontend.telemetry.health.board import NodeHealth


async def settled(frontend: RunningFrontend) -> list[NodeHealth]:
    assert await frontend.server.cluster.health.settled(10)
    return frontend.server.cluster.health.all()
