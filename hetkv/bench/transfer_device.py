"""`hetkv bench transfer --device`: pool to pool between two GPUs, in one run with NIXL and one contiguous UCX put.

Two processes, NHD 16 to HND 64 by default, in three ways: straight into the other GPU's memory; through host memory
that both GPUs map, compared with a pinned device-to-host copy; and packed, then sent over a socket.
Every round runs all of them and UCX's own put; NIXL runs once, after them. GB/s: 10^9 payload bytes a second, each
counted once; a figure is the median over all requests. See docs/measuring.md.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable
from typing import Any

from hetkv.bench import peers as others
from hetkv.bench import ucx
from hetkv.bench.pair import Pair, Shape, check_device
from hetkv.errors import HetkvError, InputError
from hetkv.transport.config import TransferConfig

MIB = 1 << 20
TARGETS = {"gb_s": 250.0, "ratio_nixl": 25.0, "ratio_nixl_5mib": 1.0, "ratio_pinned_copy": 0.6}
"""At 80 layers of 16 MiB and blocks of 32 KiB; the last for the path through host memory."""
NIXL_LAYERS = 16
NIXL_RUNS: dict[str, dict[str, float]] = {
    "32 KiB": {"block_kib": 32, "threads": 0},
    "32 KiB, 8 threads": {"block_kib": 32, "threads": 8},
    "5 MiB": {"block_kib": 5120, "threads": 0},
}
WAYS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "auto": ({}, {}),
    "store": ({"copy_engine": False}, {}),
    "host-staged": ({"window": "host"}, {}),
    "stream": ({"direct": False}, {}),
}
"""Settings and environment of each way."""


def devices(text: str) -> tuple[str, str]:
    """`cuda:0,cuda:1`, or `cpu` for one of them."""
    names = text.split(",")
    if len(names) != 2 or not all(name == "cpu" or name.startswith("cuda:") for name in names):
        raise InputError(f"--device {text}: give the sender's and the receiver's, for example cuda:0,cuda:1")
    return names[0], names[1]


def run(args: argparse.Namespace, tokens: int, block_size: int) -> int:
    """Measure, print, write the JSON."""
    from hetkv import terminal
    from hetkv.bench.environment import environment

    console = terminal.console(args.json)
    shape = Shape(args.layers, tokens, ("nhd", block_size), ("hnd", 64), devices=devices(args.device))
    for name in shape.devices:
        check_device(name)
    settings = {name: getattr(args, name) for name in ("slot_bytes", "window_bytes", "max_blocks", "staging_slots")}
    settings = {name: value for name, value in settings.items() if value is not None}
    layer_bytes = shape.payload_bytes // shape.layers
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack, console.status("starting") as status:
        pairs: dict[str, Pair] = {}
        for way, (config, outside) in WAYS.items():
            try:
                pairs[way] = stack.enter_context(Pair(shape, TransferConfig(**{**settings, **config}), outside))
                pairs[way].send()
            except HetkvError as error:
                pairs.pop(way, None)
                found[way] = {"error": str(error)}
        seconds: dict[str, list[float]] = {way: [] for way in pairs}
        calls: list[float] = []
        contiguous: list[float] = []
        for turn in range(args.rounds):
            for way, pair in pairs.items():
                status.update(f"round {turn + 1} of {args.rounds}: {way}")
                sent = [pair.send() for _ in range(args.reps)]
                seconds[way] += [one.seconds for one in sent]
                calls += [call for one in sent for call in one.send_layer_s]
            if "cpu" not in shape.devices:
                with contextlib.suppress(HetkvError):
                    contiguous.append(ucx.put_gb_s(layer_bytes, 200, cuda=True))
        status.update("checking what arrived, and the rest")
        for way, pair in pairs.items():
            rates = [shape.payload_bytes / at / 1e9 for at in seconds[way]]
            found[way] = {
                "path": pair.path(),
                "gb_s": round(statistics.median(rates), 2),
                "gb_s_spread": [round(min(rates), 2), round(max(rates), 2)],
                "requests": len(rates),
                "verified_bytes": pair.verify(),
                "idle_cpu_percent": [round(100 * share, 3) for share in pair.idle_cpu(2.0)],
            }
    copy = attempt(pinned_copy_gb_s) if "cuda:0" in shape.devices else {}
    nixl = nixl_rates(args, console.print) if "cpu" not in shape.devices and "nixl" in args.peers else {}
    report = {
        **environment(),
        "shape": {"layers": shape.layers, "layer_mib": args.layer_mib, "block_kib": args.block_kib,
                  "source": f"nhd:{block_size}", "destination": "hnd:64", "devices": list(shape.devices)},
        "settings": settings,
        "hetkv": found,
        "send_layer_us": round(1e6 * statistics.median(calls), 2) if calls else None,
        "ucx_contiguous_gb_s": round(statistics.median(contiguous), 2) if contiguous else None,
        "pinned_copy": copy,
        "nixl": nixl,
        "targets": TARGETS,
        **ratios(found, copy, nixl, contiguous),
    }  # fmt: skip
    show(console, report)
    if args.json:
        terminal.write_json(args.json, report)
    return 0


def ratios(
    found: dict[str, Any], copy: dict[str, Any], nixl: dict[str, Any], contiguous: list[float]
) -> dict[str, float]:
    """hetkv over each of the others, where both were measured."""
    out: dict[str, float] = {}
    best = found.get("auto", {}).get("gb_s")
    small = [run["gb_s"] for name, run in nixl.items() if name.startswith("32") and "gb_s" in run]
    if best and small:
        out["ratio_nixl"] = round(best / max(small), 2)
    if best and "gb_s" in nixl.get("5 MiB", {}):
        out["ratio_nixl_5mib"] = round(best / nixl["5 MiB"]["gb_s"], 3)
    if best and contiguous:
        out["ratio_ucx_contiguous"] = round(best / statistics.median(contiguous), 3)
    staged = found.get("host-staged", {}).get("gb_s")
    if staged and "gb_s" in copy:
        out["ratio_pinned_copy"] = round(staged / copy["gb_s"], 3)
    return out


def nixl_rates(args: argparse.Namespace, say: Callable[..., None]) -> dict[str, Any]:
    """Each of `NIXL_RUNS`: the fastest of READ and WRITE, all layers at once and in turn."""
    python = others.parse_pythons(args.peer_python)["nixl"]
    if why := others.absent("nixl", python):
        return {"absent": {"error": why}}
    out = {}
    for name, options in NIXL_RUNS.items():
        say(f"NIXL, {name}")
        out[name] = others.measure(
            "nixl", python, layers=min(args.layers, NIXL_LAYERS), layer_mib=args.layer_mib,
            block_kib=options["block_kib"], reps=20, device=True, threads=int(options["threads"]),
        )  # fmt: skip
    return out


def pinned_copy_gb_s() -> dict[str, Any]:
    """The copy engine's rate into pinned host memory: 16 MiB after 16 MiB of 1 GiB, median of 20 passes."""
    import torch

    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda:0")
    target = torch.zeros(1 << 30, dtype=torch.uint8, pin_memory=True)
    rates = []
    for _ in range(21):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for start in range(0, 1 << 30, 16 * MIB):
            target[start : start + 16 * MIB].copy_(source[start : start + 16 * MIB], non_blocking=True)
        end.record()
        end.synchronize()
        rates.append((1 << 30) / begin.elapsed_time(end) / 1e6)
    return {"gb_s": round(statistics.median(rates[1:]), 2)}


def attempt(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result, or the error in its place."""
    try:
        return what()
    except (HetkvError, RuntimeError) as error:
        return {"error": str(error).splitlines()[0]}


def show(console: Any, report: dict[str, Any]) -> None:
    """The table for people."""
    from rich.table import Table

    table = Table("what", "GB/s", "spread", "path", "at rest", box=None)
    for way, row in report["hetkv"].items():
        if "error" in row:
            table.add_row(f"hetkv, {way}", "", row["error"])
            continue
        low, high = row["gb_s_spread"]
        rest = f"{max(row['idle_cpu_percent']):.3f} %"
        table.add_row(f"hetkv, {way}", f"{row['gb_s']:.1f}", f"{low:.1f}-{high:.1f}", row["path"], rest)
    if report["ucx_contiguous_gb_s"]:
        table.add_row("UCX put, contiguous layer", f"{report['ucx_contiguous_gb_s']:.1f}")
    if "gb_s" in report["pinned_copy"]:
        table.add_row("pinned device-to-host copy", f"{report['pinned_copy']['gb_s']:.1f}")
    for name, row in report["nixl"].items():
        table.add_row(f"NIXL, {name}", f"{row['gb_s']:.2f}" if "gb_s" in row else "", row.get("error", ""))
    console.print(table)
    for name, target in TARGETS.items():
        value = report["hetkv"].get("auto", {}).get("gb_s") if name == "gb_s" else report.get(name)
        if value is not None:
            console.print(f"{name}: {value} (target {target})", highlight=False)
