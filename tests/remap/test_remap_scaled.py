"""Jobs with scales against the oracle, byte for byte, over random geometry, dtypes and scale layouts."""

from __future__ import annotations

from collections.abc import Iterator

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
from tests.remap.cases import random_bytes
from tests.remap.scaled_cases import WIDE, Case, cases, job_of, simple, truth_of


@pytest.fixture(autouse=True)
def _default_isa() -> Iterator[None]:
    before = _core.isa()
    yield
    _core.select_isa(before)


def check(case: Case, threads: int = 1, seed: int = 0) -> reference.Rescaled:
    want = truth_of(case, seed)
    for isa in _core.available_isas():
        got = case.destination.copy()
        _core.select_isa(isa)
        assert _core.remap([job_of(case, case.source, got)], seed, threads) == want.result, isa
        assert torch.equal(got.codes.memory, want.destination.codes.memory), isa
        if got.scales is not None and want.destination.scales is not None:
            assert torch.equal(got.scales.memory, want.destination.scales.memory), isa
    return want.rescaled


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases(), st.integers(1, 3), st.integers(0, 2**64 - 1))
def test_scaled_jobs_are_the_oracle_s(case: Case, threads: int, seed: int) -> None:
    check(case, threads, seed)


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
