"""`hetkv bench remap`: how fast layouts and dtypes are converted, as a share of memcpy's speed in the same run.

Every case moves 16 MiB (counted on its narrower side) of one layer between a paged pool with shuffled block ids and the
wire's canonical layout, or between two pools: one segment, or K and V together where they share blocks. A memcpy of the
source's bytes is timed right before each remap, on the same number of threads; the buffers rotate so that none is still
in the second-level cache. `gb_s` and `copy_gb_s` both count bytes read plus bytes written; times are medians.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from hetkv.bench.remap_cases import Case, cases, extent, make_jobs, make_memory, rates
from hetkv.errors import InputError

NARROW_BYTES = 16 << 20  # of the narrower side
BUFFERS = 4

TARGETS = {"move": 0.85, "convert": 0.6, "transpose": 0.5, "short": None, "codec": None, "transpose+convert": None}
"""Least ratio by kind: equal dtypes with runs of 256 bytes or more, conversions, layouts that turn axes around. None:
runs below 256 bytes, codes with scales, and both of the first two at once, which are reported without a target."""


def measure(case: Case, threads: int, repeats: int) -> dict[str, Any]:
    """Time one case and the copy that it is compared with; one entry of `results`."""
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
