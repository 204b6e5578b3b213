from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lmcache_api.embedded import load as load_module
from lmcache_api.embedded.component import EmbeddedComponent
from lmcache_api.embedded.engine import EmbeddedEngine
from lmcache_api.embedded.keys import ChunkKeys
from lmcache_api.embedded.layout import KVLayout
from lmcache_api.embedded.load import MAX_PROMPT_TOKENS, ConversationLoad
from lmcache_api.embedded.lookup import SchedulerLookup
from lmcache_api.embedded.metrics import EmbeddedMetrics
from lmcache_shared.settings import Settings
from tests.api.embedded.making import settings_of

Call = tuple[Any, ...]


class Recorded(EmbeddedEngine):
    """A real engine that tells what it was asked."""

    calls: list[Call]

    def pin(self, tokens: Sequence[int], lookup_id: str) -> int:
        self.calls.append(("pin", lookup_id, list(tokens)))
        return super().pin(tokens, lookup_id)

    def retrieve(self, tokens: Sequence[int]) -> int:
        hit = super().retrieve(tokens)
        self.calls.append(("retrieve", list(tokens), hit))
        return hit

    def store(self, tokens: Sequence[int], *, known: int = 0) -> None:
        self.calls.append(("store", list(tokens), known))
        super().store(tokens, known=known)

    def unpin(self, lookup_id: str) -> None:
        self.calls.append(("unpin", lookup_id))
        super().unpin(lookup_id)


class Loaded:
    def __init__(self, *, seed: int = 0, workers: int = 1, **given: Any) -> None:
        self.settings: Settings = settings_of(engine_load=10.0, **given)
        self.metrics = EmbeddedMetrics({"model_name": "m"})
        self.engines = []
        for number in range(workers):
            engine = Recorded(
                lambda: self.settings, self.metrics, owner=f"w{number}", worker_id=number, world_size=workers
            )
            engine.calls = []
            self.engines.append(engine)
        keys = ChunkKeys(self.settings, KVLayout.of(self.settings), worker_id=0, world_size=workers)
        self.lookup = SchedulerLookup(lambda: self.settings, dict(enumerate(self.engines)), keys)
        self.load = ConversationLoad(lambda: self.settings, self.metrics, self.lookup, self.engines, seed=seed)

    def calls(self, name: str, worker: int = 0) -> list[Call]:
        return [call[1:] for call in self.engines[worker].calls if call[0] == name]

    def run(self, times: int = 1) -> tuple[str, dict[str, str]]:
        for _ in range(times):
            told = self.load.run_once()
        return told


@pytest.fixture
def loaded() -> Iterator[Callable[..., Loaded]]:
    all_of_them: list[Loaded] = []

    def new(**given: Any) -> Loaded:
        all_of_them.append(Loaded(**given))
        return all_of_them[-1]

    yield new
    for each in all_of_them:
        for engine in each.engines:
            engine.close()


def test_the_same_seed_gives_the_same_conversations(loaded: Callable[..., Loaded]) -> None:
    one, same, small, other = loaded(), loaded(), loaded(cpu_chunks=10), loaded(seed=1)
    for each in (one, same, small, other):
        each.run(5)
    assert one.engines[0].calls == same.engines[0].calls
    assert len(one.calls("store")) == 50
    stored = [tokens for tokens, _ in one.calls("store")]
    assert [tokens for tokens, _ in small.calls("store")] == stored  # whatever the engine keeps
    assert [tokens for tokens, _ in other.calls("store")] != stored


def test_it_sends_as_many_requests_as_are_asked_for(loaded: Callable[..., Loaded]) -> None:
    one = loaded()
    for rate, runs, expected in ((0.0, 5, 0), (10.0, 2, 20), (0.5, 4, 2), (0.0, 3, 0), (2.5, 2, 5)):
        one.settings = replace(one.settings, engine_load=rate)
        before = len(one.calls("store"))
        one.run(runs)
        assert len(one.calls("store")) - before == expected, rate


def test_what_it_did_is_told(loaded: Callable[..., Loaded]) -> None:
    one = loaded()
    message, details = one.run(3)
    assert message == "Sent 10 requests"
    assert details["requests"] == "10"
    assert int(details["hit_tokens"]) > 0
    prompts = one.metrics.registry.get_sample_value("lmcache:num_prompt_tokens_total", {"model_name": "m"})
    assert prompts == sum(len(tokens) for tokens, _ in one.calls("store"))


def test_a_stop_ends_it_between_two_requests(loaded: Callable[..., Loaded]) -> None:
    one = loaded()
    one.load._stopping.set()
    assert one.run()[0] == "Sent 0 requests"


def test_conversations_are_bounded_and_share_their_beginnings(
    loaded: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "END_PROBABILITY", 0.0)
    monkeypatch.setattr(load_module, "CONVERSATIONS", 3)
    one = loaded(cpu_chunks=100)
    one.run(12)
    stored = [tokens for tokens, _ in one.calls("store")]
    longest = max(map(len, stored))
    assert MAX_PROMPT_TOKENS / 2 < longest <= MAX_PROMPT_TOKENS + 320
    assert len(one.load._conversations) == 3
    assert all(len(said) <= MAX_PROMPT_TOKENS + 320 + 256 for said in one.load._conversations.values())
    assert len({tuple(tokens[:256]) for tokens in stored}) <= load_module.SYSTEM_PROMPTS
    lengths = [len(tokens) for tokens in stored]
    assert any(later < MAX_PROMPT_TOKENS / 2 for later in lengths[lengths.index(longest) :])  # others begin


def test_workers_really_hit_and_what_they_hit_is_not_stored_again(loaded: Callable[..., Loaded]) -> None:
    one = loaded(workers=2)
    one.run(10)
    for number in range(2):
        retrieved = one.calls("retrieve", number)
        assert sum(hit for _, hit in retrieved) > 5000
        assert all(hit == len(tokens) for tokens, hit in retrieved)  # all that was looked up
        known = {tuple(tokens): hit for tokens, hit in retrieved}
        assert [hit for _, hit in one.calls("store", number) if hit] == [hit for _, hit in retrieved if hit]
        assert all(tuple(tokens[:hit]) in known for tokens, hit in one.calls("store", number) if hit)
    assert one.lookup.client is not None
    assert set(one.lookup.client.hits(one.calls("store")[-1][0]).values()) != {0}


def test_what_is_looked_up_is_held_and_let_go(loaded: Callable[..., Loaded]) -> None:
    one = loaded()
    one.run(3)
    assert [name for name, _ in one.calls("pin")] == [name for (name,) in one.calls("unpin")]
    assert len({name for name, _ in one.calls("pin")}) == 30
    names = [call[0] for call in one.engines[0].calls]
    assert names.index("pin") < names.index("store") < names.index("unpin")
    assert one.engines[0].gauges()["pinned_memory_objs_count"] == 0


def test_an_engine_that_fails_lets_go_all_the_same(
    loaded: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = loaded()
    one.run(3)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(one.engines[0], "store", fail)
    with pytest.raises(RuntimeError):
        one.run()
    assert len(one.calls("pin")) == len(one.calls("unpin"))


def test_few_known_tokens_are_computed_anew(loaded: Callable[..., Loaded]) -> None:
    every, some, none = loaded(), loaded(min_retrieve_tokens=700), loaded(min_retrieve_tokens=10**6)
    for each in (every, some, none):
        each.run(6)
    asked = [len(tokens) for tokens, _ in every.calls("retrieve")]
    assert min(asked) < 700 <= max(asked)
    assert sorted(len(tokens) for tokens, _ in some.calls("retrieve")) == sorted(n for n in asked if n >= 700)
    assert none.calls("retrieve") == []
    assert {known for _, known in none.calls("store")} == {0}


def test_what_the_model_says_is_stored_when_asked_for(loaded: Callable[..., Loaded]) -> None:
    prompts, whole = loaded(), loaded(save_decode_cache=True)
    for each in (prompts, whole):
        each.run(3)
    for (prompt, _), (both, _) in zip(prompts.calls("store"), whole.calls("store"), strict=True):
        assert both[: len(prompt)] == prompt
        assert 64 <= len(both) - len(prompt) <= 256


def test_without_a_lookup_client_everything_is_computed(loaded: Callable[..., Loaded]) -> None:
    one = loaded()
    one.lookup.close()
    assert one.run(3)[1] == {"requests": "10", "hit_tokens": "0"}
    assert one.calls("retrieve") == []
    assert len(one.calls("store")) == 30


def test_a_scheduler_with_its_workers_sends_and_one_alone_does_not() -> None:
    settings = settings_of(engine_load=20.0)
    workers = [EmbeddedComponent(settings, 1 + number, world_size=2) for number in range(2)]
    scheduler = EmbeddedComponent(settings, world_size=2, workers=workers)
    alone = EmbeddedComponent(settings, world_size=2)
    assert "load-thread" not in [thread["name"] for thread in alone.periodic_threads()]
    (thread,) = [each for each in scheduler._threads if each.name == "load-thread"]
    for _ in range(3):
        assert thread.run_once()[0] == "Sent 20 requests"
    for worker in workers:
        assert worker.engine is not None
        assert worker.engine.gauges()["retrieve_hit_rate"] > 0.9
        worker.stop()
