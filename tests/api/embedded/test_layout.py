import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_api.embedded.layout import MAX_BYTES, WIDTHS, KVLayout, PagedKVCache, pattern
from lmcache_shared.errors import ConfigError
from tests.api.embedded.making import settings_of

DTYPES = st.sampled_from(sorted(WIDTHS))


def made(dtype: str = "float16", *, mla: bool = False, blocks: int = 3, chunk: int = 16) -> PagedKVCache:
    settings = settings_of(
        engine_dtype=dtype, engine_use_mla=mla, engine_blocks=blocks, engine_block_size=8, chunk_size=chunk
    )
    return PagedKVCache(KVLayout.of(settings))


def by_definition(bits: bytes) -> float:
    """The value of a bfloat16: 1 bit sign, 8 bits exponent, 7 bits fraction."""
    number = int.from_bytes(bits, "little")
    sign = -1.0 if number >> 15 else 1.0
    exponent, fraction = number >> 7 & 0xFF, number & 0x7F
    if exponent == 0xFF:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(fraction, -133)
    return sign * math.ldexp(0x80 | fraction, exponent - 134)


class Model:
    """The cache slot by slot: layer, plane and slot to the bytes there."""

    def __init__(self, caches: PagedKVCache) -> None:
        self.layout = caches.layout
        self.names = list(caches.layers())
        self.at: dict[tuple[str, int, int], bytes] = {}

    def write(self, position: int, data: bytes) -> None:
        width = self.layout.vector_bytes
        tokens = len(data) // self.layout.token_bytes
        vectors = iter(data[start : start + width] for start in range(0, len(data), width))
        for name in self.names:
            for plane in range(self.layout.planes):
                for token in range(tokens):
                    self.at[name, plane, (position + token) % self.layout.slots] = next(vectors)

    def read(self, name: str, slots: list[int]) -> bytes:
        planes = range(self.layout.planes)
        return b"".join(self.at[name, plane, slot] for plane in planes for slot in slots)


@given(data=st.data(), dtype=DTYPES, mla=st.booleans())
def test_chunks_written_anywhere_are_read_back_slot_by_slot(data: st.DataObject, dtype: str, mla: bool) -> None:
    caches = made(dtype, mla=mla)
    layout, model = caches.layout, Model(caches)
    writes = st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 16)), min_size=1, max_size=4)
    model.write(0, whole := pattern(b"all", layout.slots * layout.token_bytes))
    caches.write(0, whole)
    for number, (position, tokens) in enumerate(data.draw(writes)):
        chunk = pattern(bytes([number]), tokens * layout.token_bytes)
        caches.write(position, chunk)
        model.write(position, chunk)
    slots = data.draw(st.lists(st.integers(0, layout.slots - 1), max_size=40))
    for name in model.names:
        raw = model.read(name, slots)
        told = caches.slot_bytes(name, slots)
        if dtype != "bfloat16":
            assert told == raw
            continue
        assert len(told) == 2 * len(raw)
        for start in range(0, len(raw), 2):
            (wide,) = struct.unpack_from("<f", told, 2 * start)
            expected = by_definition(raw[start : start + 2])
            assert (math.isnan(wide) and math.isnan(expected)) or (
                wide == expected and math.copysign(1, wide) == math.copysign(1, expected)
            )


@pytest.mark.parametrize("slots", [[0], [23], [23, 0], [3, 3, 3], [5, 4, 3], [], list(range(24))])
def test_slots_in_any_order_and_repeated(slots: list[int]) -> None:
    caches = made()
    for name in caches.layers():
        width = caches.layout.vector_bytes
        alone = [caches.slot_bytes(name, [slot]) for slot in slots]
        expected = b"".join(one[plane * width :][:width] for plane in (0, 1) for one in alone)
        assert caches.slot_bytes(name, slots) == expected


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize(("dtype", "width"), [("float16", 2), ("bfloat16", 2), ("float32", 4), ("uint8", 1)])
def test_shapes_and_sizes(dtype: str, width: int, mla: bool) -> None:
    caches = made(dtype, mla=mla)
    layout = caches.layout
    assert [(name, info.dtype, info.device) for name, info in caches.layers().items()] == [
        (f"model.layers.{number}", f"torch.{dtype}", "cpu") for number in range(2)
    ]
    shape = (3, 8, 4) if mla else (2, 3, 8, 2, 4)
    assert {info.shape for info in caches.layers().values()} == {shape}
    assert layout.chunk_shape == ((2, 1, 16, 1, 4) if mla else (2, 2, 16, 2, 4))
    assert layout.token_bytes == 2 * width * (4 if mla else 2 * 2 * 4)
    read_as = 4 if dtype == "bfloat16" else width
    assert len(caches.slot_bytes("model.layers.0", range(24))) == math.prod(shape) * read_as


def test_layers_begin_different_and_alike_in_every_process() -> None:
    first, second = made(), made()
    read = [[caches.slot_bytes(name, range(24)) for name in caches.layers()] for caches in (first, second)]
    assert read[0] == read[1]
    assert read[0][0] != read[0][1]
    with pytest.raises(KeyError):
        first.slot_bytes("model.layers.2", [0])


@given(key=st.binary(max_size=20), other=st.binary(max_size=20), size=st.integers(0, 200_000))
def test_a_pattern_is_its_keys(key: bytes, other: bytes, size: int) -> None:
    data = pattern(key, size)
    assert len(data) == size
    assert data == pattern(key, size)
    assert key == other or size < 16 or data != pattern(other, size)


def test_a_cache_that_is_too_large_is_refused_by_its_settings() -> None:
    fits = settings_of(engine_layers=1, engine_heads=1, engine_head_size=65536, engine_dtype="uint8",
                       engine_blocks=8192, engine_block_size=1)  # fmt: skip
    layout = KVLayout.of(fits)
    assert layout.slots * layout.token_bytes == MAX_BYTES
    with pytest.raises(ConfigError, match=f"engine_layers.*engine_block_size.* at most {MAX_BYTES} are made"):
        KVLayout.of(settings_of(engine_layers=1, engine_heads=1, engine_head_size=65536, engine_dtype="uint8",
                                engine_blocks=8193, engine_block_size=1))  # fmt: skip


def test_a_chunk_must_fit_into_the_slots() -> None:
    assert KVLayout.of(settings_of(engine_blocks=1, engine_block_size=16)).slots == 16
    with pytest.raises(ConfigError, match="15 slots, but a chunk has chunk_size=16 tokens; make more of them"):
        KVLayout.of(settings_of(engine_blocks=1, engine_block_size=15))


def test_mla_has_one_head_whatever_the_settings_say() -> None:
    assert KVLayout.of(settings_of(engine_use_mla=True, engine_heads=7)).heads == 1
