"""`hetkv bench traffic`: what engines move in a step, pool to pool between two processes: many requests, small ones,
layer by layer; every byte compared. In the same run the link's ceiling (UCX's put of one contiguous buffer, NVLink or
memory) and NIXL with its defaults and with its best settings.

GB/s: 10^9 payload bytes a second, each counted once, at the median repetition, from the first call that hands layers
over until the receiver's caller knows every request complete. See docs/measuring.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hetkv.bench import peers as others
from hetkv.bench import ucx
from hetkv.bench.traffic_cases import CPU, DEVICE, KINDS, Case, rivals
from hetkv.bench.traffic_pair import LAYOUTS, measure
from hetkv.errors import HetkvError, InputError

MIB = 1 << 20
NIXL_LAYERS = 4
"""Layers that NIXL moves in one repetition: a request of the default settings takes seconds."""
NIXL_SETTINGS: dict[str, dict[str, str]] = {"default": {}, "SGL": {"NIXL_UCX_SGL_ENABLE": "true"}}
NIXL_THREADS = (0, 4, 8)
LEAST_NIXL = 64 << 10
"""Bytes of the smallest layer that NIXL is measured with."""
SETTINGS = ("slot_bytes", "window_bytes", "bundle_frames", "staging_slots", "max_slots_per_link", "spin_us")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv bench traffic`."""
    from hetkv.transport.config import TransferConfig

    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw GB/s over the payload of a layer")
    parser.add_argument(
        "--device", nargs="?", const="cuda:0,cuda:1", metavar="FROM,TO",
        help="between pools on these devices (default cuda:0,cuda:1); without it between two processes' host memory",
    )  # fmt: skip
    parser.add_argument("--case", action="append", default=[], metavar="TEXT", help="only cases whose name has TEXT")
    parser.add_argument("--kind", action="append", default=[], choices=KINDS, help="only rows of this kind; repeatable")
    parser.add_argument("--reps", type=int, metavar="N", help="repetitions of each row (default: the case's)")
    parser.add_argument("--peers", default="nixl", metavar="NAMES", help="nixl, or none")
    parser.add_argument("--peers-only", action="store_true", help="the ceiling and the peers, without hetkv")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="NAME=PYTHON",
        help="interpreter that has this peer installed",
    )  # fmt: skip
    for name in SETTINGS:
        default = getattr(TransferConfig(), name)
        text = f"hetkv's setting of that name (default {'by the pool' if default is None else default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)


def cases(args: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """What is asked for, with the kinds of rows. Raises `InputError` where there is nothing."""
    if args.reps is not None and args.reps < 1:
        raise InputError(f"--reps {args.reps}: at least 1")
    found = []
    for case in DEVICE if args.device else CPU:
        if args.case and not any(text in case.name for text in args.case):
            continue
        case = case if args.reps is None else case._replace(reps=args.reps)
        kinds = [kind for kind in case.kinds if not args.kind or kind in args.kind]
        found += [(case, kinds)] if kinds else []
    if not found:
        raise InputError(f"no case is named {args.case} with kind {args.kind or list(KINDS)}")
    return found


def run(args: argparse.Namespace) -> int:
    """Measure, print, write the JSON, draw."""
    from hetkv import terminal
    from hetkv.bench.environment import environment
    from hetkv.bench.pair import check_device
    from hetkv.bench.transfer_device import devices

    rows, console = cases(args), terminal.console(args.json)
    terminal.check_outputs({"json": args.json, "plot": args.plot})
    where = devices(args.device) if args.device else ("cpu", "cpu")
    for name in where:
        check_device(name)
    peers = others.parse_peers(args.peers)
    pythons = others.parse_pythons(args.peer_python)
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    report: dict[str, Any] = {
        **environment(), "devices": list(where), "from": ":".join(map(str, LAYOUTS[0])),
        "to": ":".join(map(str, LAYOUTS[1])), "settings": settings, "kinds": KINDS, "results": [], "ceiling": {},
        "nixl": [],
    }  # fmt: skip

    def save() -> None:
        if args.json and str(args.json) != "-":
            terminal.write_json(args.json, report)

    with console.status("starting") as status:
        for case, kinds in rows if not args.peers_only else ():
            status.update(case.name)
            try:
                report["results"] += measure(case, kinds, where, settings)
            except HetkvError as error:
                report["results"].append({"name": case.name, "kind": "", "error": str(error)})
            save()
        if args.peers != "none":
            status.update("the link's ceiling")
            report["ceiling"] = ceiling(sorted({case.layer_bytes for case, _ in rows}), "cuda:1" in where)
            save()
        shapes = {(case.layer_bytes, case.heads): case for case, _ in rows if case.heads}
        for case in [case for case in shapes.values() if case.layer_bytes >= LEAST_NIXL] if "nixl" in peers else ():
            status.update(f"NIXL, {case.name}")
            why = others.absent("nixl", pythons["nixl"])
            report["nixl"].append({"error": why} if why else nixl(case, pythons["nixl"], "cuda:1" in where))
            save()
    show(console, report)
    if args.json:
        terminal.write_json(args.json, report)
    if args.plot:
        plot(report, args.plot)
    return 0


def ceiling(sizes: list[int], cuda: bool) -> dict[str, float | str]:
    """GB/s of UCX's put of one contiguous buffer, by its bytes."""
    found: dict[str, float | str] = {}
    for size in sizes:
        try:
            found[str(size)] = round(ucx.put_gb_s(size, 200 if cuda else 32, cuda=cuda), 2)
        except HetkvError as error:
            found[str(size)] = str(error)
    return found


def nixl(case: Case, python: str, device: bool) -> dict[str, Any]:
    """NIXL at one shape, block by block of 16 tokens of K and of V: every setting, and the best of them."""
    runs = {
        f"{name}, {threads} threads": others.measure(
            "nixl", python, layers=min(case.layers, NIXL_LAYERS), layer_mib=case.layer_bytes / MIB,
            block_kib=case.block_kib, reps=5, device=device, threads=threads, environment=environment,
        )
        for name, environment in NIXL_SETTINGS.items() for threads in NIXL_THREADS
    }  # fmt: skip
    measured = {name: found["gb_s"] for name, found in runs.items() if "gb_s" in found}
    best = max(measured, key=measured.__getitem__, default=None)
    defaults = [value for name, value in measured.items() if name.startswith("default")]
    return {
        "layer_bytes": case.layer_bytes, "block_kib": case.block_kib, "runs": runs, "best": best,
        "gb_s": measured[best] if best else None, "default_gb_s": max(defaults, default=None),
    }  # fmt: skip


def show(console: Any, report: dict[str, Any]) -> None:
    """The table for people."""
    from rich.table import Table

    heads = ("case", "kind", "layer KiB", "GB/s", "visible us", "acked us", "call us", "frames", "wrong", "x NIXL")
    table = Table(*heads, box=None)
    best = rivals(report)
    for row in report["results"]:
        if "error" in row:
            table.add_row(row["name"], row["kind"], "", row["error"])
            continue
        rival = best.get((row["name"], row["dtype"]))
        table.add_row(
            row["name"], row["kind"], f"{row['layer_bytes'] / 1024:g}", f"{row['gb_s']:.2f}",
            f"{row['visible_us']:,.0f}", f"{row['acked_us']:,.0f}", f"{row['call_us']:.1f}",
            f"{row['frames_per_bundle']:.0f}", str(row["wrong_bytes"]), f"{row['gb_s'] / rival:.1f}" if rival else "",
        )  # fmt: skip
    console.print(table)
    for row in report["results"]:
        if "last_call_us" in row:
            share, last = row["mean_of_ends_over_last"], row["last_call_us"]
            console.print(
                f"{row['name']}: mean of ends {share:.2f} of the last, which ended {last:,.0f} us after its call"
            )
    for size, value in report["ceiling"].items():
        console.print(f"UCX put of {int(size) / 1024:g} KiB: {value} GB/s")
    for row in report["nixl"]:
        if "error" in row:
            console.print(f"NIXL: {row['error']}")
            continue
        what = f"NIXL, layers of {row['layer_bytes'] / 1024:g} KiB in blocks of {row['block_kib']:g} KiB"
        console.print(f"{what}: {row['gb_s']} GB/s ({row['best']}); defaults {row['default_gb_s']}")


def plot(report: dict[str, Any], file: Path) -> None:
    """GB/s over the payload of a layer: one line a system, the ceiling as a line."""
    from hetkv.bench.traffic_plot import draw

    draw(report, file)
