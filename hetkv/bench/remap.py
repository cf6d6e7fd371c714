"""`hetkv bench remap`: how fast layouts and dtypes are converted, as a share of memcpy's speed in the same run.

Every case moves 16 MiB (counted on its narrower side) of one layer between a paged pool with shuffled block ids and the
wire's canonical layout, or between two pools: one segment, or K and V together where they share blocks. A memcpy of the
source's bytes is timed right before each remap, on the same number of threads; the buffers rotate so that none is still
in the second-level cache. `gb_s` and `copy_gb_s` both count bytes read plus bytes written; times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.spec import LayerSpec

if TYPE_CHECKING:
    import torch

    import hetkv._core as _core

TOKEN_CHANNELS = 1024  # heads x channels of one token
NARROW_BYTES = 16 << 20  # of the narrower side
BUFFERS = 4


class Place(NamedTuple):
    """One side: segments of a preset (`k`, `v`, or `kv` for both) in a pool, or the canonical layout."""

    layout: str
    segments: str = "k"
    block_size: int = 16
    dtype: str = "bf16"

    def __str__(self) -> str:
        text = f"{self.layout} {self.segments}" if self.layout == "rocm" else self.layout
        return text if self.layout == "canonical" else f"{text} {self.block_size}"


class Case(NamedTuple):
    """One measurement: where from, where to, and which part of the target table it falls under."""

    kind: str
    source: Place
    destination: Place
    head_dim: int = 128
    checksum: bool = True

    @property
    def name(self) -> str:
        """Both sides, the dtypes, and what else is unlike the usual case."""
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


TARGETS = {"move": 0.85, "convert": 0.6, "transpose": 0.5, "short": None, "transpose+convert": None}
"""Least ratio by kind: equal dtypes with runs of 256 bytes or more, conversions, layouts that turn axes around. None:
runs below 256 bytes, and both at once, which are reported without a target."""

WIRE = Place("canonical")
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
    yield Case("transpose+convert", Place("canonical", dtype="fp8"), Place("rocm", "k", 64, "bf16"))
    yield Case("transpose+convert", Place("canonical", dtype="fp8"), Place("rocm", "v", 64, "bf16"))


class Memory(NamedTuple):
    """Memory of one side, and for each segment the way to name it and its offset in the payload."""

    data: torch.Tensor
    sides: list[tuple[_core.RemapSide, int]]


def make_memory(place: Place, segments: str, tokens: int, head_dim: int, seed: int, device: str = "cpu") -> Memory:
    """Memory of one side on `device`, filled with normal random values, its block ids shuffled."""
    import torch

    from hetkv.core import core as _core

    dtype, heads = DType.parse(place.dtype), TOKEN_CHANNELS // head_dim
    generator = torch.Generator().manual_seed(seed)
    one = tokens * TOKEN_CHANNELS * dtype.itemsize
    values = torch.randn(1 << 20, generator=generator).to(dtype.torch).view(torch.uint8).to(device)
    data = values.repeat(-(-one * len(segments) // values.numel()))[: one * len(segments)].clone()
    sides = []
    if place.layout == "canonical":
        for i in range(len(segments)):
            map_ = _core.SegmentMap.canonical(data.data_ptr() + i * one, tokens, head_dim, dtype.code)
            sides.append((_core.RemapSide(map_), i * one))
        return Memory(data, sides)
    layout = KVLayout.preset(place.layout, LayerSpec.kv(heads, head_dim), heads, place.block_size, dtype)
    blocks = torch.randperm(tokens // place.block_size, generator=generator).to(torch.int32)
    for name in segments:
        map_ = _core.SegmentMap.of(layout.segments[name], place.block_size, data.data_ptr())
        sides.append((_core.RemapSide(map_, blocks), 0))
    return Memory(data, sides)


class Extent(NamedTuple):
    """How much a case moves."""

    segments: str
    tokens: int
    elements: int
    copied: int
    """Bytes of the source: what the copy beside it copies."""
    moved: int
    """Bytes read plus bytes written."""


def extent(case: Case, narrow_bytes: int) -> Extent:
    """The extent of a case with that many bytes on its narrower side."""
    places = (case.source, case.destination)
    sizes = [DType.parse(place.dtype).itemsize for place in places]
    segments = next(place.segments for place in places[::-1] if place.layout != WIRE.layout)
    tokens = narrow_bytes // (TOKEN_CHANNELS * min(sizes) * len(segments))
    elements = tokens * TOKEN_CHANNELS * len(segments)
    return Extent(segments, tokens, elements, elements * sizes[0], elements * sum(sizes))


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
        )
        for (start, start_offset), (to, to_offset) in zip(source.sides, destination.sides, strict=True)
    ]


class Rates(NamedTuple):
    """Medians of a case and of the copies beside it, in GB/s of bytes read plus written, and their ratio."""

    gb_s: float
    copy_gb_s: float
    ratio: float
    quartiles: list[float]
    """Lower and upper, of the ratios of each pair of times."""


def rates(size: Extent, times: list[float], copy_times: list[float]) -> Rates:
    """Times in seconds of one remap and of the copy timed beside it."""
    gb_s = size.moved / statistics.median(times) / 1e9
    copy_gb_s = 2 * size.copied / statistics.median(copy_times) / 1e9
    ratios = [size.moved / t / (2 * size.copied / c) for t, c in zip(times, copy_times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Rates(gb_s, copy_gb_s, round(gb_s / copy_gb_s, 3), [round(low, 3), round(high, 3)])


def measure(case: Case, threads: int, repeats: int) -> dict[str, Any]:
    """Time one case and the copy beside it; one entry of `results`."""
    import torch

    from hetkv.core import core as _core

    size = extent(case, NARROW_BYTES)
    jobs, buffers = [], []
    for i in range(BUFFERS):
        source = make_memory(case.source, size.segments, size.tokens, case.head_dim, 2 * i)
        destination = make_memory(case.destination, size.segments, size.tokens, case.head_dim, 2 * i + 1)
        room = destination.data
        if room.numel() < size.copied:
            room = torch.zeros(size.copied, dtype=torch.uint8)
        buffers.append((room[: size.copied].numpy(), source.data[: size.copied].numpy(), source, destination))
        jobs.append(make_jobs(case, source, destination, size.tokens))
    copy_times, times = [], []
    for i in range(repeats + BUFFERS):
        target, start, _, _ = buffers[i % BUFFERS]
        began = time.perf_counter()
        _core.copy(target, start, threads)
        between = time.perf_counter()
        _core.remap(jobs[(i + BUFFERS // 2) % BUFFERS], 1, threads)
        ended = time.perf_counter()
        if i >= BUFFERS:  # the first round touches the pages
            copy_times.append(between - began)
            times.append(ended - between)
    found = rates(size, times, copy_times)
    return {
        "case": case.name,
        "kind": case.kind,
        "checksum": bool(case.wire),
        "threads": threads,
        "bytes": size.moved,
        "gb_s": round(found.gb_s, 2),
        "copy_bytes": 2 * size.copied,
        "copy_gb_s": round(found.copy_gb_s, 2),
        "ratio": found.ratio,
        "ratio_quartiles": found.quartiles,
        "target": TARGETS[case.kind],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv bench remap`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads for both remap and copy (default 1)"
    )
    parser.add_argument(
        "--repeats", type=int, default=40, metavar="N", help="timed repetitions of each case (default 40)"
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu (default), or a GPU such as cuda:0, against its own copy"
    )
    parser.add_argument(
        "--mib", type=int, nargs="+", default=[16, 64], metavar="N", help="on a GPU: MiB to move (default 16 and 64)"
    )
    parser.add_argument("--only", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument(
        "--isa", metavar="NAME", help="instruction set to use: baseline, avx2 or avx512 (default: the widest)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write the JSON."""
    from rich.table import Table

    from hetkv import terminal
    from hetkv.bench.environment import environment
    from hetkv.core import core as _core

    if args.device != "cpu":
        from hetkv.bench import remap_device

        return remap_device.run(args)
    if args.threads < 1 or args.repeats < 2:
        raise InputError(f"--threads {args.threads} and --repeats {args.repeats}: at least 1 thread and 2 repetitions")
    if args.isa:
        _core.select_isa(args.isa)
    chosen = [case for case in cases() if not args.only or args.only in case.name]
    if not chosen:
        raise InputError(f"--only {args.only!r}: no case has that in its name")
    console = terminal.console(args.json)
    results = []
    with console.status("measuring") as status:
        for case in chosen:
            status.update(case.name)
            results.append(measure(case, args.threads, args.repeats))
    table = Table("case", "GB/s", "memcpy GB/s", "ratio", "quartiles", "target")
    for row in results:
        low, high = row["ratio_quartiles"]
        wanted = "" if row["target"] is None else f"{row['target']:.2f}"
        table.add_row(
            row["case"],
            f"{row['gb_s']:.1f}",
            f"{row['copy_gb_s']:.1f}",
            f"{row['ratio']:.2f}",
            f"{low:.2f} to {high:.2f}",
            wanted,
        )
    console.print(table)
    if args.json:
        report = {
            **environment(),
            "isa": _core.isa(),
            "threads": args.threads,
            "repeats": args.repeats,
            "note": "gb_s and copy_gb_s count bytes read plus written; ratio = gb_s / copy_gb_s; medians of one run",
            "results": results,
        }
        terminal.write_json(args.json, report)
    return 0
