"""What nodes say of one name, to put them together by it: a setting, a field of metadata, an environment variable.

They are asked for the caller, as on the page that compares them and with its bounds (`gathering.py`): a variable's
value is shown to admins alone, and what was answered is kept for half a minute.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from aiohttp import web

from lmcache_frontend.app import HEALTH
from lmcache_frontend.pages.gathering import GATHERER, SUBJECTS, NodeKey, whose
from lmcache_frontend.pages.listing import MAX_TITLE

KINDS = {"conf": "a setting", "meta": "a field of /meta", "env": "an environment variable"}

SUGGESTED = (
    "conf:lmcache_instance_id",
    "conf:chunk_size",
    "meta:model_name",
    "meta:world_size",
    "env:HOSTNAME",
    "env:NODE_NAME",
    "env:POD_NAMESPACE",
    "env:CUDA_VISIBLE_DEVICES",
)

WAIT_SECONDS = 2.0
"""For the nodes' answers; who has not answered by then is in a group of its own until the page is renewed."""

NOT_SET = "not set"
NOT_TOLD = "does not tell"
NOT_YET = "not asked yet"


@dataclass(frozen=True)
class Labels:
    """The text of each node, what went wrong, and for whom and when this is so."""

    texts: Mapping[NodeKey, str] = field(default_factory=dict)
    problem: str = ""
    is_refused: bool = False
    revision: Hashable = None


async def labels(request: web.Request, asked: str) -> Labels:
    """Of all nodes: `env:NAME`, `conf:NAME` or `meta:NAME`."""
    kind, _, name = asked.partition(":")
    if kind not in KINDS or not name:
        ways = ", ".join(f"{kind}:NAME for {what}" for kind, what in KINDS.items())
        return Labels(problem=f"Write which label: {ways}.")
    nodes = list(request.app[HEALTH].all())
    gathered = await request.app[GATHERER].gather(request, SUBJECTS[kind], nodes, WAIT_SECONDS)
    texts = {(health.proxy, health.node.name): NOT_YET for health in nodes}
    refused = 0
    for health, told in gathered.told:
        text = told.values.get(name, NOT_SET) if told.kind == "ok" else NOT_TOLD
        texts[health.proxy, health.node.name] = text[:MAX_TITLE] or "empty"
        refused += told.kind == "refused"
    problem = f"{refused} of {len(nodes)} nodes refuse to tell you" if refused else ""
    if gathered.skipped:
        problem += f"{'; ' if problem else ''}{gathered.skipped} more nodes than can be asked for one page"
    return Labels(texts, problem and problem + ".", refused > 0, (whose(request), hash(tuple(texts.values()))))
