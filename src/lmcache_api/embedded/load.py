"""Made-up conversations that keep an embedded cluster busy, so that there is something to see.

A few system prompts are shared by many conversations, each turn's prompt is what was said before and something new,
long conversations end and others begin: the hits, misses, evictions and latencies are those of the real engines.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

from lmcache_api.embedded.engine import EmbeddedEngine
from lmcache_api.embedded.lookup import SchedulerLookup
from lmcache_api.embedded.metrics import EmbeddedMetrics
from lmcache_api.embedded.periodic_threads import PeriodicThread
from lmcache_shared.settings import Settings

CONVERSATIONS = 48
SYSTEM_PROMPTS = 4
MAX_PROMPT_TOKENS = 4096
"""A conversation that has grown beyond this ends."""

END_PROBABILITY = 0.08
VOCABULARY = 32000


class ConversationLoad(PeriodicThread):
    """Sends `engine_load` requests a second, as the vLLM connector would: look up, retrieve, compute, store.

    Args:
        settings: tells the scheduler's settings of now.
        metrics: the scheduler's.
        lookup: the scheduler's.
        workers: the engines.
        seed: the same seed gives the same conversations.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        metrics: EmbeddedMetrics,
        lookup: SchedulerLookup,
        workers: Sequence[EmbeddedEngine],
        *,
        seed: int = 0,
    ) -> None:
        super().__init__("load-thread", interval=1.0, level="low")
        self._settings = settings
        self._metrics = metrics
        self._lookup = lookup
        self._workers = workers
        self._random = random.Random(seed)  # noqa: S311 - conversations, not secrets
        self._system_prompts = [self._tokens(256, 1024) for _ in range(SYSTEM_PROMPTS)]
        self._conversations: dict[int, list[int]] = {}
        self._numbers = itertools.count()
        self._due = 0.0

    def run_once(self) -> tuple[str, dict[str, str]]:
        self._due += self._settings().engine_load * self.interval
        requests = hits = 0
        while self._due >= 1 and not self.stopping:
            self._due -= 1
            requests += 1
            hits += self._request()
        return f"Sent {requests} requests", {"requests": str(requests), "hit_tokens": str(hits)}

    def _request(self) -> int:
        """One turn of a conversation; the tokens of its prompt that were not computed."""
        slot = self._random.randrange(CONVERSATIONS)
        said = self._conversations.get(slot)
        if said is None or len(said) > MAX_PROMPT_TOKENS or self._random.random() < END_PROBABILITY:
            said = list(self._random.choice(self._system_prompts))
        prompt = said + self._tokens(32, 320)
        request_id = f"load-{next(self._numbers)}"
        client = self._lookup.client
        hit = client.lookup(prompt) if client is not None else 0
        answer = self._tokens(64, 256)
        for worker in self._workers:
            settings = worker.settings
            wanted = hit if hit >= settings.min_retrieve_tokens else 0
            worker.pin(prompt[:wanted], request_id)
            try:
                known = worker.retrieve(prompt[:wanted]) if wanted else 0
                worker.store(prompt + answer if settings.save_decode_cache else prompt, known=known)
            finally:
                worker.unpin(request_id)
        self._conversations[slot] = prompt + answer
        self._metrics.add("num_prompt_tokens", len(prompt))
        return hit

    def _tokens(self, at_least: int, at_most: int) -> list[int]:
        return self._random.choices(range(VOCABULARY), k=self._random.randint(at_least, at_most))
