import hashlib
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_api.embedded.keys import KEY_BYTES, ChunkKeys
from lmcache_api.embedded.layout import KVLayout
from tests.api.embedded.making import CHUNK, settings_of

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
TOKENS = st.lists(INT64, max_size=6 * CHUNK)


def keys_of(tokens: Any, *, worker_id: int = 0, world_size: int = 1, **given: Any) -> list[bytes]:
    settings = settings_of(**given)
    maker = ChunkKeys(settings, KVLayout.of(settings), worker_id=worker_id, world_size=world_size)
    return [chunk.key for chunk in maker.of(tokens)]


@given(tokens=st.lists(INT64, min_size=1, max_size=6 * CHUNK), data=st.data(), partial=st.booleans())
def test_a_changed_token_changes_its_chunk_and_all_after_it_and_none_before(
    tokens: list[int], data: st.DataObject, partial: bool
) -> None:
    where = data.draw(st.integers(0, len(tokens) - 1))
    changed = tokens.copy()
    changed[where] = data.draw(INT64.filter(lambda token: token != tokens[where]))
    before, after = (keys_of(some, save_unfull_chunk=partial) for some in (tokens, changed))
    assert len(before) == len(after)
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        assert (one == other) == (number < where // CHUNK)
    assert len(set(before + after)) == len(before) + len(after) - min(len(before), where // CHUNK)


@given(tokens=TOKENS, more=TOKENS)
def test_a_longer_request_begins_with_the_keys_of_its_prefix(tokens: list[int], more: list[int]) -> None:
    whole = keys_of(tokens + more)
    assert whole[: len(tokens) // CHUNK] == keys_of(tokens)


@given(tokens=TOKENS)
def test_chunks_cover_the_tokens_and_partial_ones_only_when_kept(tokens: list[int]) -> None:
    for partial in (False, True):
        settings = settings_of(save_unfull_chunk=partial)
        chunks = list(ChunkKeys(settings, KVLayout.of(settings), worker_id=0, world_size=1).of(tokens))
        kept = len(tokens) if partial else len(tokens) // CHUNK * CHUNK
        edges = [*range(0, kept, CHUNK), kept]
        assert [(chunk.start, chunk.end) for chunk in chunks] == list(itertools.pairwise(edges))
        assert all(len(chunk.key) == KEY_BYTES for chunk in chunks)


def test_a_partial_chunk_is_another_one_than_the_full_and_the_shorter() -> None:
    keys = {keys_of(range(count), save_unfull_chunk=True)[0] for count in range(1, CHUNK + 1)}
    assert len(keys) == CHUNK
    assert keys_of([0] * 3, save_unfull_chunk=True) != keys_of([0] * 4, save_unfull_chunk=True)


@pytest.mark.parametrize(
    "other",
    [
        {"engine_hash_salt": "salt"},
        {"engine_model_name": "another"},
        {"worker_id": 1, "world_size": 2},
        {"world_size": 2},
        {"engine_layers": 3},
        {"engine_heads": 4},
        {"engine_head_size": 8},
        {"engine_use_mla": True},
        {"engine_dtype": "bfloat16"},
        {"pre_caching_hash_algorithm": "sha256"},
    ],
    ids=str,
)
def test_caches_that_differ_share_no_key(other: dict[str, Any]) -> None:
    tokens = range(4 * CHUNK)
    assert not set(keys_of(tokens)) & set(keys_of(tokens, **other))


def test_workers_of_one_deployment_share_no_key() -> None:
    all_keys = [key for worker in range(4) for key in keys_of(range(64), worker_id=worker, world_size=4)]
    assert len(set(all_keys)) == len(all_keys)


def test_what_is_beside_the_chunk_does_not_change_it() -> None:
    assert keys_of(range(64)) == keys_of(range(64), engine_blocks=9, max_local_cpu_size=1.0)
    assert keys_of(range(64)) == keys_of(range(64), pre_caching_hash_algorithm="blake2b")


@given(start=INT64, count=st.integers(0, 5 * CHUNK))
def test_a_range_a_list_and_a_tuple_are_alike(start: int, count: int) -> None:
    start = min(start, (1 << 63) - count)
    tokens = range(start, start + count)
    assert keys_of(tokens) == keys_of(list(tokens)) == keys_of(tuple(tokens))


def test_tokens_have_64_bits_and_a_sign() -> None:
    ends = [-(1 << 63), (1 << 63) - 1, -1, 0]
    assert len({keys_of([token] * CHUNK)[0] for token in ends}) == len(ends)
    for beyond in (1 << 63, -(1 << 63) - 1):
        with pytest.raises(OverflowError):
            keys_of([beyond] * CHUNK)


@pytest.mark.parametrize("algorithm", ["blake2b", "sha256"])
def test_the_chain_is_the_algorithms(algorithm: str) -> None:
    """Each key is the hash of the one before it and the tokens, eight bytes each."""

    def digest(data: bytes) -> bytes:
        if algorithm == "sha256":
            return hashlib.sha256(data).digest()[:KEY_BYTES]
        return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()

    first, second = keys_of(range(2 * CHUNK), pre_caching_hash_algorithm=algorithm)
    assert second == digest(first + b"".join(n.to_bytes(8, "little") for n in range(CHUNK, 2 * CHUNK)))
