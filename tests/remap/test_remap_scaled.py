"""Jobs with scales against the oracle, byte for byte, over random geometry, dtypes and scale layouts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetkv.core import core as _core
from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.scale import SCALED, ScaleLayout
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.spec import LayerSpec
from hetkv.kv.view import strided_view
from hetkv.reference import remap as reference
from hetkv.reference.checksum import payload_checksum
from tests.remap.cases import Side, pool, random_bytes, wire

WIDE = [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16]
LAYOUTS = ["nhd", "hnd", "packed_hnd", "rocm"]
F32 = DType.FLOAT32.code


@pytest.fixture(autouse=True)
def _default_isa() -> Iterator[None]:
    before = _core.isa()
    yield
    _core.select_isa(before)


class Place(NamedTuple):
    """Codes of one side, and their scales (with channels that are groups) where it has some."""

    codes: Side
    scales: Side | None

    def copy(self) -> Place:
        return Place(self.codes.copy(), self.scales.copy() if self.scales else None)

    def kernel(self, tokens: int, channels: int) -> _core.RemapSide:
        if self.scales is None:
            return self.codes.kernel(tokens, channels)
        side, scales = self.codes, self.scales
        groups = self.groups
        if side.layout is None:
            codes = _core.SegmentMap.canonical(side.body.data_ptr(), tokens, channels, side.dtype.code)
            place = _core.SegmentMap.canonical(scales.body.data_ptr(), tokens, groups, F32)
            return _core.RemapSide(codes, scales=place, channels_per_scale=channels // groups)
        codes = _core.SegmentMap.of(side.layout, side.block_size, side.body.data_ptr())
        place = _core.SegmentMap.of(scales.layout, side.block_size, scales.body.data_ptr())
        return _core.RemapSide(
            codes, list(side.block_ids), side.first_token, side.first_head, place, channels // groups
        )

    @property
    def groups(self) -> int:
        assert self.scales is not None
        return self.scales.num_blocks if self.scales.layout is None else self.scales.layout.channels


def sensible(side: Side, count: int, seed: int) -> None:
    """Positive scales between 2^-6 and 2^6 in place of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(side.body) // 4) * 4
    values = torch.exp2(torch.rand(size // 4, generator=generator) * 12 - 6)
    side.body[:size] = values.view(torch.uint8)


@st.composite
def places(
    draw: st.DrawFn,
    dtype: DType,
    tokens: int,
    heads: int,
    channels: int,
    groups: int,
    wired: bool,
    shared: bool,
    seed: int,
) -> Place:
    if wired:
        codes = wire(dtype, tokens, heads, channels, seed)
        if not groups:
            return Place(codes, None)
        scales = wire(DType.FLOAT32, tokens, heads, groups, seed + 1)
        sensible(scales, groups, seed)
        return Place(codes, Side(scales.memory, DType.FLOAT32, num_blocks=groups))
    block_size = draw(st.sampled_from([1, 3, 16, 64]))
    first_head, first_token = (0 if shared else draw(st.integers(0, 2))), draw(st.integers(0, 40))
    local = first_head + heads
    name = draw(st.sampled_from(LAYOUTS))
    segment = "v" if name == "rocm" and channels * dtype.itemsize % 16 else draw(st.sampled_from(["k", "v"]))
    layer = LayerSpec.kv(local, channels if segment == "k" else 16, channels)
    layout = KVLayout.preset(name, layer, local, block_size, dtype).segments[segment]
    need = -(-(first_token + tokens) // block_size)
    block_ids = random.Random(seed).sample(range(need + 2), need)
    codes = pool(layout, block_size, need + 2, block_ids, seed, first_token, first_head)
    if not groups:
        return Place(codes, None)
    per = "token" if shared else "token_head"
    scale = ScaleLayout.dense(local, groups, block_size, per, channels // groups if groups > 1 else 0)
    scaled = msgspec.structs.replace(layout, scale=scale).scales
    scales = pool(scaled, block_size, need + 2, block_ids, seed + 1, first_token, first_head)
    sensible(scales, groups, seed)
    return Place(codes, scales)


class Case(NamedTuple):
    source: Place
    destination: Place
    tokens: int
    heads: int
    channels: int
    multipliers: list[float] | None
    joint: bool
    wired: str
    largest: float = 0.0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Codes with scales to values, values to codes with scales, or one kind of both to the other."""
    heads, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 90))
    channels = draw(st.sampled_from([16, 64, 80, 128, 48, 20]))
    seed = draw(st.integers(0, 2**32))
    kind = draw(st.sampled_from(["apply", "quantise", "requantise"]))
    divisors = [g for g in (1, 1, 2, 4) if channels % g == 0]
    src_groups = 0 if kind == "quantise" else draw(st.sampled_from(divisors))
    dst_groups = 0 if kind == "apply" else draw(st.sampled_from(divisors))
    src = draw(st.sampled_from(SCALED if src_groups else [*WIDE, *SCALED[:4]]))
    dst = draw(st.sampled_from(SCALED if dst_groups else [*WIDE, *SCALED[:4]]))
    wired = draw(st.sampled_from(["", "source", "destination"]))
    joint = bool(dst_groups) and draw(st.booleans())
    source = draw(places(src, tokens, heads, channels, src_groups, wired == "source", False, seed))
    shared = joint and wired != "destination"
    destination = draw(places(dst, tokens, heads, channels, dst_groups, wired == "destination", shared, seed + 9))
    multipliers = None
    if draw(st.booleans()):
        multipliers = draw(st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=heads, max_size=heads))
    largest = draw(st.sampled_from([0.0, 0.0, 7.0, 100.0])) if dst_groups else 0.0
    return Case(source, destination, tokens, heads, channels, multipliers, joint, wired, largest)


def read(side: Side, case: Case, channels: int) -> torch.Tensor:
    return side.oracle().read(case.tokens, case.heads, channels)


def run(case: Case, isa: str, threads: int, seed: int) -> tuple[Place, tuple[int, int], int]:
    """The kernel's memory and result, and where the wire's scales begin in the payload."""
    got = case.destination.copy()
    wire_side = {"": None, "source": case.source, "destination": got}[case.wired]
    offset = 0
    if wire_side is not None:
        offset = -(-case.tokens * case.heads * case.channels * wire_side.codes.dtype.itemsize // 8) * 8 + 16
    _core.select_isa(isa)
    job = _core.RemapJob(
        case.source.kernel(case.tokens, case.channels),
        got.kernel(case.tokens, case.channels),
        tokens=case.tokens,
        heads=case.heads,
        channels=case.channels,
        multipliers=case.multipliers or (),
        wire=case.wired,
        wire_offset=16 if case.wired else 0,
        joint=case.joint,
        wire_scale_offset=offset,
        largest=case.largest,
    )
    return got, _core.remap([job], seed, threads), offset


def check(case: Case, threads: int = 1, seed: int = 0) -> reference.Rescaled:
    source, want = case.source, case.destination.copy()
    scales = None
    if source.scales is not None:
        scales = read(source.scales, case, source.groups).view(torch.float32)
    truth = reference.rescale(
        read(source.codes, case, case.channels),
        source.codes.dtype,
        want.codes.dtype,
        scales=scales,
        multipliers=case.multipliers,
        groups=want.groups if want.scales is not None else 0,
        joint=case.joint,
        largest=case.largest,
    )
    want.codes.oracle().write(truth.codes)
    if want.scales is not None and truth.scales is not None:
        want.scales.oracle().write(reference.bits(truth.scales.contiguous()))
    for isa in _core.available_isas():
        got, result, offset = run(case, isa, threads, seed)
        assert torch.equal(got.codes.memory, want.codes.memory), isa
        if want.scales is not None and got.scales is not None:
            assert torch.equal(got.scales.memory, want.scales.memory), isa
        assert result == (checksum(case, want, offset, seed), truth.saturated), isa
    return truth


def checksum(case: Case, want: Place, offset: int, seed: int) -> int:
    if not case.wired:
        return 0
    place = case.source if case.wired == "source" else want
    rows = case.tokens * case.heads
    codes = place.codes.body[: rows * case.channels * place.codes.dtype.itemsize]
    total = payload_checksum(codes.numpy().tobytes(), seed, 16)
    if place.scales is not None:
        total += payload_checksum(place.scales.body[: rows * place.groups * 4].numpy().tobytes(), seed, offset)
    return total % 2**64


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases(), st.integers(1, 3), st.integers(0, 2**64 - 1))
def test_scaled_jobs_are_the_oracle_s(case: Case, threads: int, seed: int) -> None:
    check(case, threads, seed)


def plain(codes: torch.Tensor, dtype: DType) -> Side:
    """A wire side that holds `codes` `[heads, tokens, channels]`."""
    heads, tokens, channels = codes.shape
    side = wire(dtype, tokens, heads, channels, 1)
    side.oracle().write(codes)
    return side


def simple(codes: torch.Tensor, src: DType, dst: DType, scale: float | None, groups: int) -> Case:
    """One head's codes, all with one scale, to a canonical destination."""
    heads, tokens, channels = codes.shape
    scales = None
    if scale is not None:
        side = plain(reference.bits(torch.full((heads, tokens, 1), scale)), DType.FLOAT32)
        scales = Side(side.memory, DType.FLOAT32, num_blocks=1)
    found = None
    if groups:
        found = Side(wire(DType.FLOAT32, tokens, heads, groups, 5).memory, DType.FLOAT32, num_blocks=groups)
    destination = Place(wire(dst, tokens, heads, channels, 3), found)
    return Case(Place(plain(codes, src), scales), destination, tokens, heads, channels, None, False, "destination")


def half_a_unit(value: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Half a unit in the last place of `dtype` at `value`, float64."""
    if dtype is DType.INT8:
        return torch.full_like(value, 0.5)
    info = torch.finfo(dtype.torch)
    eps = 0.25 if "e5m2" in dtype.value else info.eps  # PyTorch's own is that of e4m3fnuz for e5m2fnuz
    _, exponent = torch.frexp(value.abs().clamp(min=info.smallest_normal))
    return torch.exp2(exponent.double() - 1) * eps / 2


@pytest.mark.parametrize("dst", [*WIDE, *SCALED], ids=lambda d: d.value)
@pytest.mark.parametrize("src", SCALED, ids=lambda d: d.value)
def test_every_code_with_a_scale_is_within_half_a_unit(src: DType, dst: DType) -> None:
    """All 256 codes in two rows, to a dtype with a new scale of its own or to values; NaN stays NaN (0 in int8)."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    if src is DType.INT8:
        codes[128] = -127
    finite = codes.view(src.torch).float().isfinite()
    if dst in SCALED:
        codes = torch.where(finite, codes, torch.zeros_like(codes))  # an infinity would take the scale for itself
    for scale in (1.0, 0.37, 2.0**-9):
        case = simple(codes.reshape(1, 1, 256), src, dst, scale, 1 if dst in SCALED else 0)
        truth = check(case)
        assert truth.saturated == (
            0 if dst in SCALED else int((~finite & ~codes.view(src.torch).float().isnan()).sum())
        )
        element = codes.view(src.torch).double() * float(torch.tensor(scale))
        new = truth.scales.double().flatten() if truth.scales is not None else torch.ones(1, dtype=torch.float64)
        got = truth.codes.flatten().view(dst.torch).double()
        inside = element.isfinite()
        bound = half_a_unit(element / new, dst) * (1 + 2**-20) + (element / new).abs() * 2**-22
        assert bool(((got - element / new).abs() <= bound)[inside].all())
        assert bool(got[element.isnan()].isnan().all())


def test_values_that_have_no_scale() -> None:
    """Zeros, the smallest and largest float32, infinity and NaN: codes and scales are finite and nothing traps."""
    rows = torch.tensor(
        [
            [0.0, -0.0, 0.0, 0.0],
            [1e-45, -1e-45, 0.0, 1e-44],
            [3.4e38, -3.4e38, 1.0, 0.0],
            [float("inf"), 1.0, -1.0, 0.0],
            [float("nan"), 1.0, -2.0, 0.0],
            [float("nan")] * 4,
        ]
    )
    codes = reference.bits(rows).reshape(1, 6, 4)
    for dst in SCALED:
        truth = check(simple(codes, DType.FLOAT32, dst, None, 1))
        assert truth.scales is not None
        assert bool((truth.scales > 0).all() and truth.scales.isfinite().all())
        assert truth.saturated == (6 if dst is DType.INT8 else 1)
        values = truth.codes.view(dst.torch).double() * truth.scales.double()
        assert values[0, 0].tolist() == [0.0] * 4
        assert bool((values[0, 2, :2].abs() > 3.3e38).all())


def test_scales_from_a_broken_peer_do_no_more_than_spoil_the_values() -> None:
    """Scales on the wire may be anything: NaN, infinite, negative, zero."""
    codes = torch.arange(84, dtype=torch.int8).reshape(1, 4, 21)
    for dst, groups in ((DType.BFLOAT16, 0), (DType.INT8, 1), (DType.FLOAT8_E5M2, 1)):
        case = simple(codes, DType.FLOAT8_E4M3FN, dst, 1.0, groups)
        assert case.source.scales is not None
        bad = torch.tensor([float("nan"), float("inf"), -2.0, 0.0]).reshape(1, 4, 1)
        case.source.scales.oracle().write(reference.bits(bad))
        check(case)


def test_bad_scales_are_rejected_by_name() -> None:
    layer = LayerSpec.kv(2, 64)
    layout: SegmentLayout = KVLayout.preset("nhd", layer, 2, 16, DType.INT8).segments["k"]
    memory = random_bytes(layout.extent(16, 2), 1)
    codes = _core.SegmentMap.of(layout, 16, memory.data_ptr())
    values = _core.RemapSide(_core.SegmentMap.canonical(memory.data_ptr(), 20, 64, DType.BFLOAT16.code))
    good = {"tokens": 20, "heads": 2, "channels": 64}

    def side(scales: _core.SegmentMap, per: int) -> _core.RemapSide:
        return _core.RemapSide(codes, [0, 1], scales=scales, channels_per_scale=per)

    placed = msgspec.structs.replace(layout, scale=ScaleLayout.dense(2, 1, 16)).scales
    scales = _core.SegmentMap.of(placed, 16, memory.data_ptr())
    _core.RemapJob(side(scales, 64), values, **good)
    with pytest.raises(InputError, match="64 channels with a scale for each 48"):
        _core.RemapJob(side(scales, 48), values, **good)
    with pytest.raises(InputError, match="scales are float32, in blocks as large as their side's"):
        _core.RemapJob(side(_core.SegmentMap.of(placed, 8, memory.data_ptr()), 64), values, **good)
    opaque = _core.RemapSide(_core.SegmentMap.canonical(memory.data_ptr(), 20, 64, DType.UINT8.code))
    with pytest.raises(InputError, match="uint8 has no scales"):
        _core.RemapJob(side(scales, 64), opaque, **good)


def test_rows_of_different_packs_stay_inside_both() -> None:
    """Packs of 4 and of 9 channels under a scale for each 12: no run but of one channel fits both."""
    source = SegmentLayout(DType.INT8, 1, 36, 0, 512, 4, 0, 1, 4, outer_stride=48)
    target = SegmentLayout(DType.FLOAT32, 1, 36, 0, 4096, 36, 0, 4, 9, outer_stride=256)
    codes = torch.arange(512).to(torch.int8)
    scales, out = torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(1024)
    paged = strided_view(source, codes, 1, 1)
    wired = paged.flatten().contiguous()  # the same codes with no packs
    for memory, layout in ((codes, source), (wired, msgspec.structs.replace(source, pack=36, outer_stride=0))):
        job = _core.RemapJob(
            _core.RemapSide(_core.SegmentMap.of(layout, 1, memory.data_ptr()), [0], 0, 0,
                            _core.SegmentMap.of(SegmentLayout(DType.FLOAT32, 1, 3, 0, 12, 12, 0, 4, 3), 1,
                                                scales.data_ptr()), 12),
            _core.RemapSide(_core.SegmentMap.of(target, 1, out.data_ptr()), [0]),
            tokens=1, heads=1, channels=36,
        )  # fmt: skip
        out.zero_()
        _core.remap([job])
        expected = wired.float() * scales.repeat_interleave(12)
        assert torch.equal(strided_view(target, out, 1, 1).flatten(), expected.flatten())
