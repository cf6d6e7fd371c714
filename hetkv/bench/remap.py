"""`hetkv bench remap`: how fast layouts and dtypes are converted, as a share of memcpy's speed in the same run.

Every case moves one segment of one layer (at least 16 MiB on its narrower side) between a paged pool with shuffled block
ids and the wire's canonical layout, or between two pools. A memcpy of the source's bytes is timed right before each
remap, on the same buffers and the same number of threads; the buffers rotate so that none is still in the second-level
cache. `gb_s` and `copy_gb_s` both count bytes read plus bytes written; times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hetkv.dtypes import DType
from hetkv.errors import InputError
from hetkv.layout import KVLayout
from hetkv.spec import LayerSpec

if TYPE_CHECKING:
    import torch

    from hetkv import _core

TOKEN_CHANNELS = 1024  # heads x channels of one token
NARROW_BYTES = 16 << 20  # of the narrower side
BUFFERS = 4


class Place(NamedTuple):
    """One side: a preset's segment in a pool, or the canonical layout."""

    layout: str
    segment: str = "k"
    block_size: int = 16
    dtype: str = "bf16"

    def __str__(self) -> str:
        text = self.layout if self.layout in ("canonical", "nhd", "hnd") else f"{self.layout} {self.segment}"
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


TARGETS = {"move": 0.85, "convert": 0.6, "transpose": 0.5, "short": None, "transpose+convert": None}
"""Least ratio by kind: equal dtypes with runs of 256 bytes or more, conversions, layouts that turn axes around. None:
runs below 256 bytes, and both at once, which are reported without a target."""

WIRE = Place("canonical")


def cases() -> Iterator[Case]:
    """All cases, grouped by kind."""
    for pool in (Place("nhd"), Place("hnd"), Place("nhd_interleaved"), Place("packed_nhd"), Place("packed_hnd")):
        for checksum in (True, False) if pool.layout in ("nhd", "hnd") else (True,):
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
    """Memory of one side and the two ways to name it."""

    data: torch.Tensor
    side: _core.RemapSide


def make_side(place: Place, tokens: int, head_dim: int, seed: int) -> Memory:
    """Memory of one side, filled with normal random values, its block ids shuffled."""
    import torch

    from hetkv import _core

    dtype, heads = DType.parse(place.dtype), TOKEN_CHANNELS // head_dim
    generator = torch.Generator().manual_seed(seed)
    if place.layout == "canonical":
        size = tokens * TOKEN_CHANNELS * dtype.itemsize
    else:
        layout = KVLayout.preset(place.layout, LayerSpec.kv(heads, head_dim), heads, place.block_size, dtype)
        segment, num_blocks = layout.segments[place.segment], tokens // place.block_size
        size = segment.block_stride * num_blocks
    values = torch.randn(1 << 20, generator=generator).to(dtype.torch).view(torch.uint8)
    data = values.repeat(-(-size // values.numel()))[:size].clone()
    if place.layout == "canonical":
        return Memory(data, _core.RemapSide(_core.SegmentMap.canonical(data.data_ptr(), tokens, head_dim, dtype.code)))
    blocks = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    return Memory(data, _core.RemapSide(_core.SegmentMap.of(segment, place.block_size, data.data_ptr()), blocks))


def measure(case: Case, threads: int, repeats: int) -> dict[str, Any]:
    """Time one case and the copy beside it; one entry of `results`."""
    import torch

    from hetkv import _core

    sizes = [DType.parse(place.dtype).itemsize for place in (case.source, case.destination)]
    tokens = NARROW_BYTES // (TOKEN_CHANNELS * min(sizes))
    elements = tokens * TOKEN_CHANNELS
    copied = elements * sizes[0]
    wire = "source" if case.source.layout == "canonical" else "destination" if case.destination.layout == "canonical" else ""
    jobs, buffers = [], []
    for i in range(BUFFERS):
        source = make_side(case.source, tokens, case.head_dim, 2 * i)
        destination = make_side(case.destination, tokens, case.head_dim, 2 * i + 1)
        target = destination.data[:copied].numpy() if destination.data.numel() >= copied else torch.zeros_like(
            source.data[:copied]
        ).numpy()
        buffers.append((target, source.data[:copied].numpy(), source, destination))
        heads = TOKEN_CHANNELS // case.head_dim
        jobs.append(
            [
                _core.RemapJob(
                    source.side,
                    destination.side,
                    tokens=tokens,
                    heads=heads,
                    channels=case.head_dim,
                    wire=wire if case.checksum else "",
                )
            ]
        )
    copy_times, times, ratios = [], [], []
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
    moved = elements * sum(sizes)
    gb_s = moved / statistics.median(times) / 1e9
    copy_gb_s = 2 * copied / statistics.median(copy_times) / 1e9
    ratios = [moved / t / (2 * copied / c) for t, c in zip(times, copy_times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "case": case.name,
        "kind": case.kind,
        "checksum": case.checksum and bool(wire),
        "threads": threads,
        "bytes": moved,
        "gb_s": round(gb_s, 2),
        "copy_bytes": 2 * copied,
        "copy_gb_s": round(copy_gb_s, 2),
        "ratio": round(gb_s / copy_gb_s, 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
        "target": TARGETS[case.kind],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv bench remap`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads for both remap and copy (default 1)")
    parser.add_argument("--repeats", type=int, default=40, metavar="N", help="timed repetitions of each case (default 40)")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument("--isa", metavar="NAME", help="instruction set to use: baseline, avx2 or avx512 (default: the widest)")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write the JSON."""
    from rich.console import Console
    from rich.table import Table

    from hetkv import _core
    from hetkv.bench.environment import environment

    if args.threads < 1 or args.repeats < 2:
        raise InputError(f"--threads {args.threads} and --repeats {args.repeats}: at least 1 thread and 2 repetitions")
    if args.isa:
        _core.select_isa(args.isa)
    chosen = [case for case in cases() if not args.only or args.only in case.name]
    if not chosen:
        raise InputError(f"--only {args.only!r}: no case has that in its name")
    console = Console()
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
            row["case"], f"{row['gb_s']:.1f}", f"{row['copy_gb_s']:.1f}", f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", wanted
        )
    console.print(table)
    if args.json:
        report = {
            **environment(),
            "isa": _core.isa(),
            "threads": args.threads,
            "repeats": args.repeats,
            "note": "gb_s and copy_gb_s count bytes read plus bytes written; ratio = gb_s / copy_gb_s, medians of one run",
            "results": results,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0
