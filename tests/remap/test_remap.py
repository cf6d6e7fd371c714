"""remap_cpu against the oracle, byte for byte, over random geometry."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetkv.core import core as _core
from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.presets import PRESETS
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.spec import LayerSpec
from hetkv.reference import remap as reference
from hetkv.reference.checksum import payload_checksum
from tests.remap.cases import Side, check, pool, random_bytes, wire

FLOATS = [dtype for dtype in DType if dtype not in (DType.INT8, DType.UINT8)]
KV_PRESETS = [name for name in PRESETS if name not in ("latent", "fp8_ds_mla", "state")]
HEAD_DIMS = [64, 80, 96, 128, 192, 576]
UGLY_DIMS = [1, 7, 24, 40, 100]
BLOCK_SIZES = [1, 3, 16, 17, 64, 128]


@pytest.fixture(autouse=True)
def _default_isa():  # type: ignore[no-untyped-def]
    before = _core.isa()
    yield
    _core.select_isa(before)


def strided(draw: st.DrawFn, dtype: DType, heads: int, channels: int, block_size: int) -> SegmentLayout:
    """Any order of the axes, with gaps, as `KVLayout.from_tensor` may read them from a view."""
    pack = draw(st.sampled_from([p for p in (1, 2, 4, 5, 8, 16, channels) if channels % p == 0]))
    axes = draw(st.permutations(["token", "head", "outer", "inner"]))
    counts = {"token": block_size, "head": heads, "outer": channels // pack, "inner": pack}
    step = dtype.itemsize * draw(st.integers(1, 2))
    strides = {}
    for axis in reversed(axes):
        strides[axis] = step
        step = step * counts[axis] + dtype.itemsize * draw(st.integers(0, 1)) * draw(st.integers(0, 9))
    return SegmentLayout(
        dtype,
        heads,
        channels,
        dtype.itemsize * draw(st.integers(0, 5)),
        step,
        strides["token"],
        strides["head"],
        strides["inner"],
        pack,
        strides["outer"],
    )


@st.composite
def moves(draw: st.DrawFn, convert: bool) -> tuple[Side, Side, int, int, int, list[float] | None]:
    """Source, destination, tokens, heads, channels, multipliers."""
    channels = draw(st.sampled_from(HEAD_DIMS + UGLY_DIMS))
    heads = draw(st.integers(1, 7 if channels < 192 else 2))
    tokens = draw(st.integers(1, 200 if channels < 192 else 40))
    seed = draw(st.integers(0, 2**32))
    from_dtype = draw(st.sampled_from(FLOATS if convert else list(DType)))
    to_dtype = draw(st.sampled_from(FLOATS)) if convert else from_dtype
    wired = draw(st.sampled_from(["", "source", "destination"]))
    sides = []
    for name, dtype in (("source", from_dtype), ("destination", to_dtype)):
        if wired == name:
            sides.append(wire(dtype, tokens, heads, channels, seed))
            continue
        block_size = draw(st.sampled_from(BLOCK_SIZES))
        first_head, first_token = draw(st.integers(0, 2)), draw(st.integers(0, 40))
        local = first_head + heads + draw(st.integers(0, 1))
        preset = draw(st.sampled_from([*KV_PRESETS, "strided"]))
        segment = draw(st.sampled_from(["k", "v"]))
        if preset == "rocm" and segment == "k" and channels * dtype.itemsize % 16:
            segment = "v"
        if preset == "strided":
            layout = strided(draw, dtype, local, channels, block_size)
        else:
            other = draw(st.sampled_from([channels, 16]))
            dims = (channels, other) if segment == "k" else (other, channels)
            if preset == "rocm":
                dims = (channels, channels) if segment == "k" else (16, channels)
            layer = LayerSpec.kv(local, *dims)
            layout = KVLayout.preset(preset, layer, local, block_size, dtype).segments[segment]
        need = -(-(first_token + tokens) // block_size)
        num_blocks = need + draw(st.integers(0, 3))
        shuffle = draw(st.booleans())
        block_ids = list(range(num_blocks))
        if shuffle:
            random.Random(seed).shuffle(block_ids)
        sides.append(pool(layout, block_size, num_blocks, block_ids[:need], seed + len(sides), first_token, first_head))
    multipliers = None
    if convert and (from_dtype == to_dtype or draw(st.booleans())):
        multipliers = draw(st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=heads, max_size=heads))
    return sides[0], sides[1], tokens, heads, channels, multipliers


FAST = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@FAST
@given(moves(convert=False), st.integers(1, 3), st.integers(0, 2**64 - 1))
def test_moves_are_byte_exact(move: tuple[Side, Side, int, int, int, None], threads: int, seed: int) -> None:
    source, destination, tokens, heads, channels, _ = move
    assert check(source, destination, tokens, heads, channels, threads=threads, seed=seed) == 0


@FAST
@given(moves(convert=True), st.integers(1, 3), st.integers(0, 2**64 - 1))
def test_conversions_are_the_oracle_s(
    move: tuple[Side, Side, int, int, int, list[float] | None], threads: int, seed: int
) -> None:
    source, destination, tokens, heads, channels, multipliers = move
    check(source, destination, tokens, heads, channels, multipliers=multipliers, threads=threads, seed=seed)


def segment_pool(
    name: str, segment: str, dtype: DType, heads: int, channels: int, block_size: int, tokens: int, seed: int
) -> Side:
    layout = KVLayout.preset(name, LayerSpec.kv(heads, channels), heads, block_size, dtype).segments[segment]
    need = -(-tokens // block_size)
    block_ids = torch.randperm(need + 2, generator=torch.Generator().manual_seed(seed))[:need].tolist()
    return pool(layout, block_size, need + 2, block_ids, seed)


@pytest.mark.parametrize("segment", ["k", "v"])
@pytest.mark.parametrize("to", KV_PRESETS)
@pytest.mark.parametrize("start", KV_PRESETS)
def test_every_pair_of_presets(start: str, to: str, segment: str) -> None:
    for size, other in ((16, 64), (64, 16), (1, 128), (16, 16)):
        source = segment_pool(start, segment, DType.BFLOAT16, 3, 64, size, 150, 1)
        check(source, segment_pool(to, segment, DType.BFLOAT16, 3, 64, other, 150, 2), 150, 3, 64)
        check(source, segment_pool(to, segment, DType.FLOAT8_E4M3FN, 3, 64, other, 150, 3), 150, 3, 64)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("preset", [*KV_PRESETS, "latent", "state"])
def test_large_moves_on_several_threads(preset: str, threads: int) -> None:
    heads, channels, tokens, dtype, name = 8, 128, 515, DType.BFLOAT16, "v"
    layer = LayerSpec.kv(heads, channels)
    if preset == "latent":
        heads, channels, layer, name = 1, 512, LayerSpec.latent(512, 64), "latent"
    if preset == "state":
        heads, channels, tokens, dtype, layer, name = 9, 65_003, 1, DType.UINT8, LayerSpec.state(9, 65_003), "state"
    block_size = 1 if preset == "state" else 16
    layout = KVLayout.preset(preset, layer, heads, block_size, dtype).segments[name]
    need = -(-tokens // block_size)
    source = pool(layout, block_size, need + 1, list(range(need, 0, -1)), 5)
    payload = wire(dtype, tokens, heads, channels, 6)
    check(source, payload, tokens, heads, channels, threads=threads, seed=9)
    check(payload, source, tokens, heads, channels, threads=threads, seed=9)
    if dtype is not DType.UINT8:
        check(
            source,
            wire(DType.FLOAT8_E4M3FN, tokens, heads, channels, 7),
            tokens,
            heads,
            channels,
            threads=threads,
            seed=9,
        )


@pytest.mark.parametrize("to", FLOATS, ids=lambda d: d.value)
@pytest.mark.parametrize("start", FLOATS, ids=lambda d: d.value)
def test_every_code_converts(start: DType, to: DType) -> None:
    count = 1 << min(16, 8 * start.itemsize)
    source = wire(start, count, 1, 1, 11)
    if start.itemsize < 4:
        codes = torch.arange(count, dtype=torch.int32).to({1: torch.uint8, 2: torch.int16}[start.itemsize])
        source.body[: count * start.itemsize] = codes.view(torch.uint8)
    destination = segment_pool("nhd", "k", to, 1, count, 1, 1, 12)
    for multipliers in ([1.0], [0.37], [2.0**-14], [2.0**-130], [2.0**120]):
        check(source, destination, 1, 1, count, multipliers=multipliers)
    if start is not to:
        check(source, destination, 1, 1, count)


def test_several_jobs_add_up() -> None:
    source = segment_pool("hnd", "k", DType.FLOAT16, 4, 80, 16, 100, 1)
    payloads = [wire(DType.FLOAT8_E5M2, 100, 2, 80, 2), wire(DType.FLOAT8_E5M2, 100, 2, 80, 3)]
    jobs, want, clamped, offset = [], 0, 0, 0
    for first, payload in zip((0, 2), payloads, strict=True):
        part = Side(source.memory, source.dtype, source.layout, 16, source.num_blocks, source.block_ids, 0, first)
        expected = payload.copy()
        clamped += reference.remap(part.oracle(), expected.oracle(), 100, 2, 80)
        want += payload_checksum(expected.body[: 100 * 2 * 80].numpy().tobytes(), 5, offset)
        jobs.append(
            _core.RemapJob(
                part.kernel(100, 80),
                payload.kernel(100, 80),
                tokens=100,
                heads=2,
                channels=80,
                wire="destination",
                wire_offset=offset,
            )
        )
        offset += 100 * 2 * 80
    assert _core.remap(jobs, 5) == (want % 2**64, clamped)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("to_dtype", [DType.BFLOAT16, DType.FLOAT8_E4M3FN], ids=lambda d: d.value)
@pytest.mark.parametrize("preset", ["packed_nhd", "packed_hnd", "nhd_interleaved", "latent"])
def test_segments_that_share_blocks_take_turns(preset: str, to_dtype: DType, threads: int) -> None:
    heads, tokens = (5, 330) if preset != "latent" else (1, 700)
    layer = LayerSpec.latent(512, 64) if preset == "latent" else LayerSpec.kv(heads, 128, 96)
    layout = KVLayout.preset(preset, layer, heads, 16, DType.BFLOAT16)
    need = -(-tokens // 16)
    block_ids = torch.randperm(need + 1, generator=torch.Generator().manual_seed(3))[:need].tolist()
    memory = random_bytes(max(part.extent(16, need + 1) for part in layout.segments.values()), 4)
    jobs, payloads, want, clamped, offset = [], [], 0, 0, 0
    for name, part in layout.segments.items():
        source = Side(memory, part.dtype, part, 16, need + 1, block_ids)
        payload = wire(to_dtype, tokens, heads, part.channels, len(name))
        expected = payload.copy()
        clamped += reference.remap(source.oracle(), expected.oracle(), tokens, heads, part.channels)
        size = tokens * heads * part.channels * to_dtype.itemsize
        want += payload_checksum(expected.body[:size].numpy().tobytes(), 6, offset)
        sides = source.kernel(tokens, part.channels), payload.kernel(tokens, part.channels)
        count = {"tokens": tokens, "heads": heads, "channels": part.channels}
        jobs.append(_core.RemapJob(*sides, **count, wire="destination", wire_offset=offset))
        payloads.append((payload, expected))
        offset += size
    assert _core.remap(jobs, 6, threads) == (want % 2**64, clamped)
    for payload, expected in payloads:
        assert torch.equal(payload.memory, expected.memory)


@pytest.mark.parametrize("isa", _core.available_isas())
def test_checksum_of_any_length(isa: str) -> None:
    _core.select_isa(isa)
    data = bytes(random.Random(0).randbytes(700))
    for length in (*range(140), 511, 512, 700):
        assert _core.checksum(data[:length], 24, 2**63 + 5) == payload_checksum(data[:length], 2**63 + 5, 24)


def test_callers_at_once_and_after_a_fork() -> None:
    """Each of several callers gets its own result; a child process has no pool threads and must not wait for them."""
    source = segment_pool("rocm", "v", DType.BFLOAT16, 8, 128, 16, 512, 1)
    expected = wire(DType.BFLOAT16, 512, 8, 128, 2)
    reference.remap(source.oracle(), expected.oracle(), 512, 8, 128)
    want = payload_checksum(expected.body[: 512 * 8 * 128 * 2].numpy().tobytes(), 1)

    def once(seed: int) -> bool:
        payload = wire(DType.BFLOAT16, 512, 8, 128, 2)
        job = _core.RemapJob(
            source.kernel(512, 128), payload.kernel(512, 128), tokens=512, heads=8, channels=128, wire="destination"
        )
        return _core.remap([job], 1, 2) == (want, 0) and torch.equal(payload.memory, expected.memory)

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(once, range(16)))
    child = os.fork()
    if child == 0:
        os._exit(0 if once(0) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_nothing_to_do_changes_nothing() -> None:
    source, payload = segment_pool("nhd", "k", DType.BFLOAT16, 2, 64, 16, 20, 1), wire(DType.BFLOAT16, 20, 2, 64, 2)
    before = payload.memory.clone()
    for tokens, heads, channels in ((0, 2, 64), (20, 0, 64)):
        job = _core.RemapJob(
            source.kernel(tokens, channels),
            payload.kernel(tokens, channels),
            tokens=tokens,
            heads=heads,
            channels=channels,
        )
        assert _core.remap([job], 1, 2) == (0, 0)
    assert _core.remap([], 1, 2) == (0, 0)
    assert torch.equal(payload.memory, before)


def test_bad_input_is_rejected_by_name() -> None:
    source, payload = segment_pool("nhd", "k", DType.BFLOAT16, 2, 64, 16, 20, 1), wire(DType.BFLOAT16, 20, 2, 64, 2)
    left, right = source.kernel(20, 64), payload.kernel(20, 64)
    good = {"tokens": 20, "heads": 2, "channels": 64}
    with pytest.raises(InputError, match="source: 40 tokens need 3 blocks of 16, got 2"):
        _core.RemapJob(left, right, **{**good, "tokens": 40})
    with pytest.raises(InputError, match="1 multipliers for 2 heads"):
        _core.RemapJob(left, right, **good, multipliers=[1.0])
    with pytest.raises(InputError, match="wire offset 4 is not a multiple of 8"):
        _core.RemapJob(left, right, **good, wire="destination", wire_offset=4)
    with pytest.raises(InputError, match="wire side must be the canonical map"):
        _core.RemapJob(left, right, **good, wire="source")
    with pytest.raises(InputError, match="never converted"):
        _core.RemapJob(left, wire(DType.UINT8, 20, 2, 64, 1).kernel(20, 64), **good)
    bad = Side(source.memory, source.dtype, source.layout, 16, 4, [0, -1]).kernel(20, 64)
    with pytest.raises(InputError, match="a block id is negative"):
        _core.RemapJob(bad, right, **good)
    with pytest.raises(InputError, match="dtype code 12 is not known"):
        _core.SegmentMap.canonical(64, 1, 1, 12)
    with pytest.raises(InputError, match="'mmx' is not available"):
        _core.select_isa("mmx")
