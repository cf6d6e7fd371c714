"""The cases of `hetkv bench remap`, with their memory, their jobs and their rates, on a CPU or a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from hetkv.control.codec import INT4_LARGEST
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.spec import LayerSpec

if TYPE_CHECKING:
    import torch

    import hetkv._core as _core

TOKEN_CHANNELS = 1024  # heads x channels of one token


class Place(NamedTuple):
    """One side: segments of a preset (`k`, `v`, or `kv` for both) in a pool, or the canonical layout."""

    layout: str
    segments: str = "k"
    block_size: int = 16
    dtype: str = "bf16"
    group: int = 0
    """Channels that share a scale, on the wire; 0: none do."""

    def __str__(self) -> str:
        text = f"{self.layout} {self.segments}" if self.layout == "rocm" else self.layout
        if self.layout != "canonical":
            return f"{text} {self.block_size}"
        return f"{text} with a scale for {self.group}" if self.group else text


class Case(NamedTuple):
    """One measurement: where from, where to, and which part of the target table it falls under."""

    kind: str
    source: Place
    destination: Place
    head_dim: int = 128
    checksum: bool = True

    @property
    def name(self) -> str:
        """Both sides, the dtypes, and what else differs from the usual case."""
        dtypes = self.source.dtype
        if self.destination.dtype != dtypes:
            dtypes += f" -> {self.destination.dtype}"
        extra = "" if self.head_dim == 128 else f", head dim {self.head_dim}"
        return f"{self.source} -> {self.destination}, {dtypes}{extra}" + ("" if self.checksum else ", no checksum")

    @property
    def wire(self) -> Literal["", "source", "destination"]:
        """The side whose bytes are summed."""
        if not self.checksum:
            return ""
        if self.source.layout == WIRE.layout:
            return "source"
        return "destination" if self.destination.layout == WIRE.layout else ""


WIRE = Place("canonical")
CODED = {"fp8": Place("canonical", dtype="fp8", group=128), "int4": Place("canonical", dtype="int8", group=32)}
"""What the codecs have on the wire; of `int4` a stream packs two codes in a byte later."""
SHARED = [Place(layout, "kv") for layout in ("nhd_interleaved", "packed_nhd", "packed_hnd")]


def cases() -> Iterator[Case]:
    """All cases, grouped by kind."""
    for pool in (Place("nhd"), Place("hnd"), *SHARED):
        for checksum in (True, False):
            yield Case("move", pool, WIRE, checksum=checksum)
            yield Case("move", WIRE, pool, checksum=checksum)
    yield Case("move", Place("nhd"), Place("nhd", block_size=64))
    yield Case("move", Place("nhd"), Place("hnd", block_size=64))
    yield Case("short", Place("nhd"), WIRE, head_dim=64)
    yield Case("short", WIRE, Place("nhd"), head_dim=64)
    for segment in ("k", "v"):
        for size in (16, 64):
            for checksum in (True, False):
                yield Case("transpose", Place("rocm", segment, size), WIRE, checksum=checksum)
                yield Case("transpose", WIRE, Place("rocm", segment, size), checksum=checksum)
        yield Case("transpose", Place("nhd"), Place("rocm", segment, 64))
    for start, to in (
        ("bf16", "fp16"), ("fp16", "bf16"), ("bf16", "fp8"), ("fp8", "bf16"), ("fp16", "fp8"), ("fp8", "fp16"),
        ("fp32", "bf16"), ("bf16", "fp32"), ("fp8", "fp8_e4m3fnuz"), ("fp8_e4m3fnuz", "fp8"),
    ):  # fmt: skip
        # The wire holds the narrower dtype, the sender's on a tie (docs/wire-format.md).
        narrows = DType.parse(to).itemsize < DType.parse(start).itemsize
        for checksum in (True, False):
            if narrows:
                yield Case("convert", Place("nhd", dtype=start), Place("canonical", dtype=to), checksum=checksum)
            else:
                yield Case("convert", Place("canonical", dtype=start), Place("nhd", dtype=to), checksum=checksum)
    for wire in CODED.values():
        for pool in (Place("nhd"), Place("hnd", dtype="fp16"), Place("rocm", "v", 64)):
            yield Case("codec", pool, wire)
            yield Case("codec", wire, pool)
    yield Case("transpose+convert", Place("canonical", dtype="fp8"), Place("rocm", "k", 64, "bf16"))
    yield Case("transpose+convert", Place("canonical", dtype="fp8"), Place("rocm", "v", 64, "bf16"))


class Memory(NamedTuple):
    """Memory of one side, and for each segment the way to name it, its offset in the payload and that of its scales."""

    data: torch.Tensor
    sides: list[tuple[_core.RemapSide, int, int]]


def make_memory(place: Place, segments: str, tokens: int, head_dim: int, seed: int, device: str = "cpu") -> Memory:
    """Memory of one side on `device`, filled with normal random values, its block ids shuffled."""
    import torch

    from hetkv.core import core as _core

    dtype, heads = DType.parse(place.dtype), TOKEN_CHANNELS // head_dim
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-tokens // place.block_size)
    rows = tokens if place.layout == "canonical" else num_blocks * place.block_size
    one = rows * TOKEN_CHANNELS * dtype.itemsize
    values = torch.randn(1 << 20, generator=generator).to(dtype.torch).view(torch.uint8).to(device)
    data = values.repeat(-(-one * len(segments) // values.numel()))[: one * len(segments)].clone()
    sides: list[tuple[_core.RemapSide, int, int]] = []
    if place.layout == "canonical":
        scales = torch.ones(scale_bytes(place, rows * len(segments)) // 4, device=device).view(torch.uint8)
        data, base = torch.cat([data, scales]), len(data)
        for i in range(len(segments)):
            map_ = _core.SegmentMap.canonical(data.data_ptr() + i * one, tokens, head_dim, dtype.code)
            if not place.group:
                sides.append((_core.RemapSide(map_), i * one, 0))
                continue
            at = base + i * scale_bytes(place, rows)
            groups = _core.SegmentMap.canonical(
                data.data_ptr() + at, tokens, head_dim // place.group, DType.FLOAT32.code
            )
            side = _core.RemapSide(map_, scales=groups, channels_per_scale=place.group)
            sides.append((side, i * one, at))
        return Memory(data, sides)
    layout = KVLayout.preset(place.layout, LayerSpec.kv(heads, head_dim), heads, place.block_size, dtype)
    blocks = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    for name in segments:
        map_ = _core.SegmentMap.of(layout.segments[name], place.block_size, data.data_ptr())
        sides.append((_core.RemapSide(map_, blocks), 0, 0))
    return Memory(data, sides)


def scale_bytes(place: Place, rows: int) -> int:
    """Of the scales of so many tokens."""
    return rows * TOKEN_CHANNELS // place.group * 4 if place.group else 0


class Extent(NamedTuple):
    """How much a case moves."""

    segments: str
    tokens: int
    elements: int
    copied: int
    """Bytes of the source: what the copy that it is compared with copies."""
    moved: int
    """Bytes read plus bytes written."""


def extent(case: Case, narrow_bytes: int) -> Extent:
    """The extent of a case with that many bytes on its narrower side."""
    places = (case.source, case.destination)
    sizes = [DType.parse(place.dtype).itemsize for place in places]
    segments = next(place.segments for place in places[::-1] if place.layout != WIRE.layout)
    tokens = narrow_bytes // (TOKEN_CHANNELS * min(sizes) * len(segments))
    elements = tokens * TOKEN_CHANNELS * len(segments)
    scales = [scale_bytes(place, tokens * len(segments)) for place in places]
    return Extent(segments, tokens, elements, elements * sizes[0] + scales[0], elements * sum(sizes) + sum(scales))


def make_jobs(case: Case, source: Memory, destination: Memory, tokens: int) -> list[_core.RemapJob]:
    """The jobs of a case, one a segment, between memory of `make_memory`."""
    from hetkv.core import core as _core

    wire = case.wire
    return [
        _core.RemapJob(
            start,
            to,
            tokens=tokens,
            heads=TOKEN_CHANNELS // case.head_dim,
            channels=case.head_dim,
            wire=wire,
            wire_offset=max(start_offset, to_offset) if wire else 0,
            wire_scale_offset=max(start_scales, to_scales),
            largest=INT4_LARGEST if case.destination.dtype == "int8" else 0.0,
        )
        for (start, start_offset, start_scales), (to, to_offset, to_scales) in zip(
            source.sides, destination.sides, strict=True
        )
    ]


class Rates(NamedTuple):
    """Medians of a case and of its copies, in GB/s of bytes read plus written, and their ratio."""

    gb_s: float
    copy_gb_s: float
    ratio: float
    quartiles: list[float]
    """Lower and upper, of the ratios of each pair of times."""


def rates(size: Extent, times: list[float], copy_times: list[float]) -> Rates:
    """Times in seconds of one remap and of the copy timed before it."""
    gb_s = size.moved / statistics.median(times) / 1e9
    copy_gb_s = 2 * size.copied / statistics.median(copy_times) / 1e9
    ratios = [size.moved / t / (2 * size.copied / c) for t, c in zip(times, copy_times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Rates(gb_s, copy_gb_s, round(gb_s / copy_gb_s, 3), [round(low, 3), round(high, 3)])
