"""`hetkv calibrate`: constants of the cost model from measurements, and the report on how well they predict."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hetkv import terminal
from hetkv.errors import InputError

SECTIONS = (
    "hetkv.costmodel.calibration.splitwise",
    "hetkv.costmodel.calibration.llm_inference_bench",
    "hetkv.costmodel.calibration.serving_runs",
    "hetkv.simulator.validation.accuracy",
)
"""Modules that register sections of docs/accuracy.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv calibrate`."""
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with measured/ and traces/, see docs/cost-model.md"
    )
    parser.add_argument("--fit", action="store_true", help="fit the shipped constants again; needs --data")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="fit your own serving runs, see docs/cost-model.md")
    parser.add_argument(
        "--bench",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="fit links from the JSON of `hetkv bench`",
    )
    parser.add_argument("--catalogue", type=Path, action="append", default=[], metavar="FILE", help="own GPU figures")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the fitted values as a calibration file")
    parser.add_argument("--report", type=Path, metavar="FILE", help="measure the accuracy and write FILE; needs --data")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="SECTION",
        help="make this section of the report again, keep the rest",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was printed, for machines")


def run(args: argparse.Namespace) -> int:
    """Run the parts that were asked for; with none, say which there are."""
    if not (args.fit or args.csv or args.bench or args.report):
        raise InputError("nothing to do: give --fit, --csv FILE, --bench FILE or --report FILE")
    if args.out and not (args.fit or args.csv or args.bench):
        raise InputError("--out needs --fit, --csv FILE or --bench FILE")
    for option in ("fit", "report"):
        if getattr(args, option) and args.data is None:
            raise InputError(f"--{option} needs --data DIR, the folder of measurements (docs/cost-model.md, Data)")
    terminal.check_outputs({"out": args.out})
    found: dict[str, Any] = {}
    if args.fit or args.csv or args.bench:
        found = _calibrate(args)
    if args.report:
        _report(args)
        found["report"] = str(args.report)
    if args.json:
        terminal.write_json(args.json, found)
    return 0


def _data(args: argparse.Namespace) -> Path:
    data: Path = args.data
    if not (data / "measured").is_dir():
        raise InputError(f"--data {data}: no measurements, it has no folder `measured`")
    return data


def _calibrate(args: argparse.Namespace) -> dict[str, Any]:
    from hetkv.costmodel.calibration.calibrate import ship
    from hetkv.costmodel.calibration.link_constants import LinkFit, dump_links, from_bench_json
    from hetkv.costmodel.calibration.own_runs import from_rows
    from hetkv.costmodel.calibration.runs_csv import read_csv
    from hetkv.costmodel.calibration_file import dump_efficiencies, load_efficiencies
    from hetkv.costmodel.catalogue import load_catalogue
    from hetkv.costmodel.efficiency import Efficiency

    catalogue = load_catalogue(args.catalogue)
    entries: list[Efficiency] = []
    links: list[LinkFit] = []
    if args.fit:
        entries += ship(_data(args), catalogue, _say)
    if args.csv:
        entries += from_rows(read_csv(args.csv), load_efficiencies(), catalogue, args.csv.name)
    if args.bench:
        links = from_bench_json(args.bench)
    document = json.loads(dump_efficiencies(entries, "made by hetkv calibrate"))
    if links:
        document["links"] = dump_links(links)
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _print(entries, links, args.json)
    return {"efficiencies": document["efficiencies"], "links": document.get("links", [])}


def _print(entries: list[Any], links: list[Any], json_file: Path | None) -> None:
    from rich.table import Table

    console = terminal.console(json_file)
    if entries:
        table = Table()
        table.add_column("GPU/engine/version/dtype", no_wrap=True)
        for name in ("rows", "median error", "decode, 90 %", "prompts, 90 %"):
            table.add_column(name)
        for entry in sorted(entries, key=lambda e: str(e.key)):
            error = "" if entry.median_error is None else f"{entry.median_error:.1%}"
            decode, prefill = (f"x{low:.2f} to x{high:.2f}" for low, high in entry.spans[:2])
            table.add_row(str(entry.key), str(entry.rows), error, decode, prefill)
        console.print(table)
        for entry in entries:
            if entry.bounded:
                text = f"{entry.key}: at a bound, not set by the data: {', '.join(entry.bounded)}"
                console.print(text, highlight=False)
    if links:
        table = Table("path", "rows", "GB/s", "latency us", "median error")
        for fit in links:
            bandwidth, latency = f"{fit.bytes_per_second / 1e9:.2f}", f"{fit.latency_s * 1e6:.1f}"
            table.add_row(fit.name, str(fit.rows), bandwidth, latency, f"{fit.median_error:.1%}")
        console.print(table)


def _report(args: argparse.Namespace) -> None:
    from hetkv.costmodel.calibration.report import render

    data = _data(args)
    for name in SECTIONS:
        if find_spec(name) is not None:
            import_module(name)
    present = args.report.read_text(encoding="utf-8") if args.report.is_file() else ""
    args.report.write_text(render(data, _say, args.only, present), encoding="utf-8")
    terminal.console(args.json).print(f"wrote {args.report}")


def _say(name: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(f"[dim]{name} ...[/dim]")
