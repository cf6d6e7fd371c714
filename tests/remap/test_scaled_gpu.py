"""Jobs with scales on the GPU kernels, against the oracle and so the CPU's kernels, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetkv.core import core as _core
from hetkv.kv.dtypes import DType
from hetkv.reference import remap as reference
from tests.remap.cases import Side
from tests.remap.gpu_cases import device_of
from tests.remap.scaled_cases import WIDE, Case, Place, cases, job_of, places, plain, simple, truth_of
from tests.remap.test_remap_gpu import every_backend

CODES = [DType.FLOAT8_E4M3FN, DType.INT8]
FAST = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def check_on(backend: str, cases: list[Case], seed: int = 0, max_blocks: int = 0) -> None:
    """Runs the cases as frames of one launch; compares all memory, the sums and the counts with the oracle's."""
    want = [truth_of(case, seed + number) for number, case in enumerate(cases)]
    device = device_of(backend)
    there = [case.source.to(device) for case in cases]
    got = [case.destination.to(device) for case in cases]
    jobs = [job_of(*at) for at in zip(cases, there, got, strict=True)]
    run = _core.DeviceRemap(backend, 0, jobs, [1] * len(jobs))
    stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
    for _ in range(2):  # the second shows that the first left its slot as it found it
        run.launch(stream, seed, max_blocks)
        assert run.results() == [truth.result for truth in want]
    for case, source, mine, truth in zip(cases, there, got, want, strict=True):
        if case.wired == "destination":
            clear_padding(case, truth.destination)
        assert equal(mine, truth.destination)
        assert equal(source, case.source)


def clear_padding(case: Case, place: Place) -> None:
    """The kernels clear that of a wire's parts."""
    rows = case.tokens * case.heads
    parts = [(place.codes, rows * case.channels * place.codes.dtype.itemsize)]
    if place.scales is not None:
        parts.append((place.scales, rows * place.groups * 4))
    for side, count in parts:
        side.body[count : -(-count // 8) * 8] = 0


def equal(here: Place, there: Place) -> bool:
    pairs = zip(here, there, strict=True)
    return all(a is None or b is None or torch.equal(a.memory.cpu(), b.memory) for a, b in pairs)


@every_backend
@FAST
@given(cases(), st.integers(0, 3), st.integers(0, 2**63))
def test_any_maps_dtypes_and_groups(backend: str, case: Case, max_blocks: int, seed: int) -> None:
    check_on(backend, [case], seed, max_blocks)


@st.composite
def coded(draw: st.DrawFn) -> Case:
    """What the codecs do: wide values packed to codes with scales on the wire, or unpacked from them."""
    heads, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    group = draw(st.sampled_from([8, 16, 24, 32, 64, 72, 80, 128, 256]))
    groups = draw(st.integers(1, 4))
    packs, seed = draw(st.booleans()), draw(st.integers(0, 2**32))
    wide, code = draw(st.sampled_from(WIDE)), draw(st.sampled_from(CODES))
    shape = tokens, heads, groups * group
    pool = draw(places(wide, *shape, 0, False, False, seed))
    payload = draw(places(code, *shape, groups, True, False, seed + 9))
    multipliers = None
    if draw(st.booleans()):
        anything = st.floats(width=32) if draw(st.booleans()) else st.floats(2.0**-10, 2.0**10, width=32)
        multipliers = draw(st.lists(anything, min_size=heads, max_size=heads))
    if not packs:
        return Case(payload, pool, *shape, multipliers, False, "source")
    if draw(st.booleans()):
        tame(pool, draw(st.integers(0, 3)), seed)
    return Case(pool, payload, *shape, multipliers, False, "destination", draw(st.sampled_from([0.0, 7.0])))


def tame(side: Place, odd: int, seed: int) -> None:
    """Finite values of many sizes in place of random bytes, but for a few that are no numbers or infinite."""
    body = side.codes.body
    dtype = side.codes.dtype.torch
    count = len(body) // dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    values *= torch.exp2(torch.randint(-8, 8, (count,), generator=generator).float())
    for _ in range(odd):
        at = int(torch.randint(0, count, (1,), generator=generator))
        values[at] = (float("nan"), float("inf"), float("-inf"))[at % 3]
    body[: count * dtype.itemsize] = values.to(dtype).view(torch.uint8)


@every_backend
@FAST
@given(coded(), st.integers(0, 3), st.integers(0, 2**63))
def test_the_codecs_packs_and_unpacks(backend: str, case: Case, max_blocks: int, seed: int) -> None:
    check_on(backend, [case], seed, max_blocks)


@every_backend
@settings(FAST, max_examples=40)
@given(st.lists(st.one_of(coded(), cases()), min_size=2, max_size=12), st.integers(0, 3))
def test_frames_of_one_launch(backend: str, cases: list[Case], max_blocks: int) -> None:
    """By value and in a table, fast paths and slow ones in one kernel."""
    check_on(backend, cases, 3, max_blocks)


def groups_of(codes: torch.Tensor, src: DType, dst: DType, groups: int, largest: float = 0.0) -> Case:
    return simple(codes, src, dst, None, groups)._replace(largest=largest)


@every_backend
@pytest.mark.parametrize(("dst", "largest"), [(DType.FLOAT8_E4M3FN, 0.0), (DType.INT8, 7.0), (DType.INT8, 0.0)])
@pytest.mark.parametrize("src", [DType.BFLOAT16, DType.FLOAT16], ids=lambda d: d.value)
def test_every_value_of_16_bits(backend: str, src: DType, dst: DType, largest: float) -> None:
    """In groups of values of like size, in groups of any, and next to one infinity or one that is no number."""
    ordered = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    mixed = ordered[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(5))]
    finite = mixed[mixed.view(src.torch).isfinite()][: 63 * 1000].reshape(1, 1000, 63)
    of = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0]).to(src.torch).view(torch.int16)
    for codes in (ordered, mixed):
        check_on(backend, [groups_of(codes.reshape(1, -1, size), src, dst, 1, largest) for size in (32, 64, 128)])
    for extra in of:
        spoiled = torch.cat([finite, extra.expand(1, 1000, 1)], dim=2)
        check_on(backend, [groups_of(spoiled, src, dst, groups, largest) for groups in (1, 2)])


@every_backend
@pytest.mark.parametrize("dst", CODES, ids=lambda d: d.value)
def test_ties_and_bounds(backend: str, dst: DType) -> None:
    """Values halfway between codes, next to those, and around the smallest and largest of float32."""
    largest = 448.0 if dst is DType.FLOAT8_E4M3FN else 127.0
    halves = torch.arange(-127, 127).float() + 0.5 if dst is DType.INT8 else torch.arange(256, dtype=torch.uint8)
    if dst is not DType.INT8:
        codes = halves.to(torch.uint8).view(torch.float8_e4m3fn).float()
        codes = codes[codes.isfinite()].sort().values
        halves = (codes[:-1] + codes[1:]) / 2
    near = torch.cat([halves, halves.nextafter(torch.tensor(1e9)), halves.nextafter(torch.tensor(-1e9))])
    near = near[: len(near) // 31 * 31].reshape(1, -1, 31)
    rows = torch.cat([near, torch.full((1, near.shape[1], 1), largest)], dim=2)
    sizes = [1.0, 2.0**-100, 2.0**100, 2.0**-126 / 448, 2.0**-149, 3.4e38 / largest]
    for size, wide in product(sizes, WIDE):
        values = (rows * torch.tensor(size)).to(wide.torch)
        check_on(backend, [groups_of(reference.bits(values), wide, dst, 1)])


@every_backend
@pytest.mark.parametrize("src", CODES, ids=lambda d: d.value)
@pytest.mark.parametrize("dst", WIDE, ids=lambda d: d.value)
def test_every_code_with_any_scale(backend: str, src: DType, dst: DType) -> None:
    """Scales of a broken peer too, in groups of which the wire has an odd number."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8).expand(1, 9, 256)
    case = simple(codes, src, dst, 1.0, 0)
    assert case.source.scales is not None
    anything = [1.0, 0.37, -2.0, 0.0, float("nan"), float("inf"), 2.0**-140, 3e38, 2.0**-126]
    case.source.scales.oracle().write(reference.bits(torch.tensor(anything).reshape(1, 9, 1)))
    padding = Side(torch.full_like(case.source.scales.memory, 77), DType.FLOAT32, num_blocks=1)
    padding.oracle().write(reference.bits(torch.tensor(anything).reshape(1, 9, 1)))
    for wired, scales in product(["source", "destination", ""], [case.source.scales, padding]):
        source = replace(plain(codes, src))
        check_on(backend, [case._replace(source=Place(source, scales), wired=wired)])


@every_backend
def test_groups_beyond_a_cluster_and_scales_that_heads_share(backend: str) -> None:
    """Of 576 channels, the latents of MLA; and one scale for all heads, which a receiver's pool may want."""
    generator = torch.Generator().manual_seed(3)
    values = reference.bits(torch.randn(3, 21, 576, generator=generator).bfloat16())
    for heads, groups, joint in ((1, 1, False), (3, 1, True), (3, 4, True), (1, 4, True)):
        case = groups_of(values[:heads], DType.BFLOAT16, DType.FLOAT8_E4M3FN, groups)
        check_on(backend, [case._replace(joint=joint)])
