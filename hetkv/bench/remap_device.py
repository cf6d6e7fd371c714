"""`hetkv bench remap --device cuda:0`: the GPU kernels, as a share of a device-to-device copy's speed in the same run.

The cases are those of the CPU (`hetkv/bench/remap_cases.py`). One sample is a pass over buffers that together are
larger than the second-level cache. Its launches are queued back to back after work that keeps the GPU busy while they
are queued, and timed by events; then the same pass runs as copies of the source's bytes. Times are medians of one
launch; bytes count those read and those written.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from hetkv.bench.remap_cases import WIRE, Case, Place, cases, extent, make_jobs, make_memory, rates
from hetkv.errors import InputError

if TYPE_CHECKING:
    import torch

TARGETS = {"move": 0.85, "convert": 0.8, "transpose": 0.7, "short": None, "codec": None, "transpose+convert": None}
"""Least ratio by kind; None: reported without a target."""

L2_MULTIPLE = 3  # bytes of the rotated buffers, in second-level caches


def device_cases() -> Iterator[Case]:
    """The cases of the CPU, and the whole of a ROCm layer in one launch."""
    yield from cases()
    for checksum in (True, False):
        yield Case("transpose", Place("rocm", "kv"), WIRE, checksum=checksum)
        yield Case("transpose", WIRE, Place("rocm", "kv"), checksum=checksum)


def measure(case: Case, device: torch.device, mib: int, repeats: int, l2_bytes: int) -> dict[str, Any]:
    """Time one case and the copy that it is compared with; one entry of `results`."""
    import torch

    from hetkv.core import core as _core

    size = extent(case, mib << 20)
    remaps, copies, kept = [], [], []
    for i in range(max(2, -(-L2_MULTIPLE * l2_bytes // size.moved))):
        source = make_memory(case.source, size.segments, size.tokens, case.head_dim, 2 * i, str(device))
        destination = make_memory(case.destination, size.segments, size.tokens, case.head_dim, 2 * i + 1, str(device))
        jobs = make_jobs(case, source, destination, size.tokens)
        remaps.append(_core.DeviceRemap("cuda", device.index, jobs))
        target = destination.data
        if target.numel() < size.copied:
            target = torch.empty(size.copied, dtype=torch.uint8, device=device)
        copies.append((target[: size.copied], source.data[: size.copied]))
        kept.append((source, destination))
    stream = torch.cuda.current_stream(device).cuda_stream
    busy = torch.empty(1 << 30, dtype=torch.uint8, device=device)

    def timed(launch: Callable[[int], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        busy.zero_()
        begin.record()
        for i in range(len(remaps)):
            launch(i)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / len(remaps) / 1000

    times, copy_times = [], []
    for i in range(repeats + 3):
        copy = timed(lambda i: copies[i][0].copy_(copies[i][1]))
        remap = timed(lambda i: remaps[i].launch(stream, 1))
        if i >= 3:
            copy_times.append(copy)
            times.append(remap)
    found = rates(size, times, copy_times)
    return {
        "case": case.name,
        "kind": case.kind,
        "checksum": bool(case.wire),
        "mib": mib,
        "bytes": size.moved,
        "microseconds": round(1e6 * statistics.median(times), 2),
        "gb_s": round(found.gb_s, 1),
        "copy_bytes": 2 * size.copied,
        "copy_gb_s": round(found.copy_gb_s, 1),
        "ratio": found.ratio,
        "ratio_quartiles": found.quartiles,
        "target": TARGETS[case.kind],
    }


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write the JSON."""
    import torch
    from rich.table import Table

    from hetkv import terminal
    from hetkv.bench.environment import environment
    from hetkv.core import core as _core
    from hetkv.transport.backends import backends

    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise InputError(f"--device {args.device!r} is not a device's name, such as cpu or cuda:0") from None
    backend = backends()["cuda"]
    if device.type != "cuda" or not backend.devices:
        raise InputError(f"--device {args.device}: no such device: {backend.why or 'only cpu and cuda are measured'}")
    device = torch.device("cuda", device.index or 0)
    if args.repeats < 2 or min(args.mib) < 1:
        raise InputError(f"--repeats {args.repeats} and --mib {args.mib}: at least 2 repetitions of 1 MiB")
    chosen = [case for case in device_cases() if not args.only or args.only in case.name]
    if not chosen:
        raise InputError(f"--only {args.only!r}: no case has that in its name")
    torch.cuda.set_device(device)
    facts = _core.device_info("cuda", device.index)
    console = terminal.console(args.json)
    results = []
    for mib in args.mib:
        for case in chosen:
            results.append(measure(case, device, mib, args.repeats, facts["l2_bytes"]))
    table = Table("case", "MiB", "us", "GB/s", "copy GB/s", "ratio", "target")
    for row in results:
        wanted = "" if row["target"] is None else f"{row['target']:.2f}"
        table.add_row(
            row["case"],
            str(row["mib"]),
            f"{row['microseconds']:.1f}",
            f"{row['gb_s']:.0f}",
            f"{row['copy_gb_s']:.0f}",
            f"{row['ratio']:.2f}",
            wanted,
        )
    console.print(table)
    if args.json:
        report = {
            **environment(),
            "device": facts["name"],
            "gpu": {name: value for name, value in facts.items() if name != "capabilities"},
            "repeats": args.repeats,
            "note": "gb_s and copy_gb_s count bytes read plus written; ratio = gb_s / copy_gb_s; medians of one run",
            "results": results,
        }
        terminal.write_json(args.json, report)
    return 0
