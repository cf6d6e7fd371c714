"""Jobs with scales: random ones, and what the oracle makes of them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import msgspec
import torch
from hypothesis import strategies as st

from hetkv.core import core as _core
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.scale import SCALED, ScaleLayout
from hetkv.kv.spec import LayerSpec
from hetkv.reference import remap as reference
from hetkv.reference.checksum import payload_checksum
from tests.remap.cases import Side, pool, wire

WIDE = [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16]
LAYOUTS = ["nhd", "hnd", "packed_hnd", "rocm"]
F32 = DType.FLOAT32.code


class Place(NamedTuple):
    """Codes of one side, and their scales (with channels that are groups) where it has some."""

    codes: Side
    scales: Side | None

    def copy(self) -> Place:
        return Place(self.codes.copy(), self.scales.copy() if self.scales else None)

    def to(self, device: torch.device) -> Place:
        """A copy there."""
        moved = [at and replace(at, memory=at.memory.clone().to(device)) for at in self]
        return Place(moved[0] or self.codes, moved[1])

    def kernel(self, tokens: int, channels: int) -> _core.RemapSide:
        if self.scales is None:
            return self.codes.kernel(tokens, channels, channels)  # as the engine has it
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


def job_of(case: Case, source: Place, destination: Place) -> _core.RemapJob:
    """The case in that memory."""
    return _core.RemapJob(
        source.kernel(case.tokens, case.channels),
        destination.kernel(case.tokens, case.channels),
        tokens=case.tokens,
        heads=case.heads,
        channels=case.channels,
        multipliers=case.multipliers or (),
        wire=case.wired,
        wire_offset=16 if case.wired else 0,
        joint=case.joint,
        wire_scale_offset=scale_offset(case),
        largest=case.largest,
    )


def scale_offset(case: Case) -> int:
    """Where the wire's scales begin in the payload."""
    if not case.wired:
        return 0
    codes = (case.source if case.wired == "source" else case.destination).codes
    return -(-case.tokens * case.heads * case.channels * codes.dtype.itemsize // 8) * 8 + 16


class Truth(NamedTuple):
    """What a job must write and report."""

    destination: Place
    result: tuple[int, int]
    rescaled: reference.Rescaled


def truth_of(case: Case, seed: int = 0) -> Truth:
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
    return Truth(want, (checksum(case, want, seed), truth.saturated), truth)


def checksum(case: Case, want: Place, seed: int) -> int:
    if not case.wired:
        return 0
    place = case.source if case.wired == "source" else want
    rows = case.tokens * case.heads
    codes = place.codes.body[: rows * case.channels * place.codes.dtype.itemsize]
    total = payload_checksum(codes.numpy().tobytes(), seed, 16)
    if place.scales is not None:
        total += payload_checksum(
            place.scales.body[: rows * place.groups * 4].numpy().tobytes(), seed, scale_offset(case)
        )
    return total % 2**64


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
