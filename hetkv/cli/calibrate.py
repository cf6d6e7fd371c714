"""`hetkv calibrate`: constants of the cost model from measurements, and the report on how well they predict."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from hetkv import terminal
from hetkv.errors import InputError

SECTIONS = (
    "hetkv.costmodel.calibration.splitwise",
    "hetkv.costmodel.calibration.llm_inference_bench",
    "hetkv.costmodel.calibration.serving_runs",
    "hetkv.costmodel.calibration.new_setups",
    "hetkv.costmodel.calibration.decisions",
    "hetkv.costmodel.calibration.field",
    "hetkv.costmodel.calibration.reality",
)
"""Modules that register sections of docs/accuracy.md."""
SIMULATOR = ("hetkv.simulator.validation.accuracy",)
"""Of docs/simulator-accuracy.md."""
SIMULATOR_HEAD = """# Accuracy of the simulator

This file is made by `hetkv calibrate --report docs/simulator-accuracy.md --data DIR --simulator` and holds no figure
that was typed in; [cost-model.md](cost-model.md) says where to get the data. How well single steps are predicted is in
[accuracy.md](accuracy.md).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv calibrate`."""
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with measured/ and traces/, see docs/cost-model.md"
    )
    parser.add_argument("--fit", action="store_true", help="fit the shipped constants again; needs --data")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="fit your own serving runs, see docs/cost-model.md")
    parser.add_argument(
        "--log",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="fit a request log, /metrics scrapes (repeat, by time), an engine's log, or results of "
        "`vllm bench serve`; needs --gpu and --model",
    )
    parser.add_argument("--gpu", metavar="NAME", help="--log: the GPU that the engine ran on")
    parser.add_argument("--model", metavar="NAME", help="--log: the model, by name or as config.json")
    parser.add_argument("--engine", default="vllm", metavar="NAME", help="--log: the engine (default vllm)")
    parser.add_argument("--engine-version", default="", metavar="VERSION", help="--log: the engine's version")
    parser.add_argument("--dtype", default="bf16", metavar="DTYPE", help="--log: dtype of the weights (default bf16)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="--log: tensor parallel size (default 1)")
    parser.add_argument("--dp", type=int, default=1, metavar="N", help="--log: attention replicas (default 1)")
    parser.add_argument(
        "--chunk", type=int, default=8192, metavar="N", help="--log: max_num_batched_tokens (default 8192)"
    )
    parser.add_argument(
        "--until", type=float, metavar="SECONDS", help="--log: use only what a request log knew after SECONDS"
    )
    parser.add_argument(
        "--bench",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="fit links from the JSON of `hetkv bench`, and steps from that of `bench/reality.py`",
    )
    parser.add_argument("--catalogue", type=Path, action="append", default=[], metavar="FILE", help="own GPU figures")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the fitted values as a calibration file")
    parser.add_argument("--report", type=Path, metavar="FILE", help="measure the accuracy and write FILE; needs --data")
    parser.add_argument(
        "--simulator", action="store_true", help="--report: the simulator's accuracy in place of the cost model's"
    )
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
    fits = args.fit or args.csv or args.log or args.bench
    if not (fits or args.report):
        raise InputError("nothing to do: give --fit, --csv FILE, --log FILE, --bench FILE or --report FILE")
    if args.out and not fits:
        raise InputError("--out needs --fit, --csv FILE, --log FILE or --bench FILE")
    for option in ("gpu", "model"):
        if args.log and not getattr(args, option):
            raise InputError(f"--log needs --{option} NAME: the file does not say it")
    for option in ("fit", "report"):
        if getattr(args, option) and args.data is None:
            raise InputError(f"--{option} needs --data DIR, the folder of measurements (docs/cost-model.md, Data)")
    terminal.check_outputs({"out": args.out})
    found: dict[str, Any] = {}
    with _stored_fits(args):
        if fits:
            found = _calibrate(args)
        if args.report:
            _report(args)
            found["report"] = str(args.report)
    if args.json:
        terminal.write_json(args.json, found)
    return 0


@contextmanager
def _stored_fits(args: argparse.Namespace) -> Iterator[None]:
    """Fits of the public data are looked up in the shipped ones; `--fit` makes them again and writes both."""
    from hetkv.costmodel.calibration.fit_store import FitStore, shipped_fits, stored

    store = shipped_fits() if args.report and not args.fit else FitStore()
    with stored(store):
        yield
    if args.fit and args.out:
        args.out.with_name("fits.json").write_text(store.dump(), encoding="utf-8")


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
    from hetkv.costmodel.calibration.step_constants import from_steps_json
    from hetkv.costmodel.calibration_file import dump_efficiencies, load_efficiencies
    from hetkv.costmodel.catalogue import load_catalogue
    from hetkv.costmodel.efficiency import Efficiency
    from hetkv.costmodel.measured_steps import StepFit

    catalogue = load_catalogue(args.catalogue)
    entries: list[Efficiency] = []
    links: list[LinkFit] = []
    if args.fit:
        entries += ship(_data(args), catalogue, _say)
    if args.csv:
        entries += from_rows(read_csv(args.csv), load_efficiencies(), catalogue, args.csv.name)
    if args.log:
        entries += _from_log(args, catalogue)
    steps: list[StepFit] = []
    if args.bench:
        links, steps = from_bench_json(args.bench), from_steps_json(args.bench)
    document = json.loads(dump_efficiencies(entries, "made by hetkv calibrate"))
    if links:
        document["links"] = dump_links(links)
    if steps:
        document["steps"] = msgspec.to_builtins(steps)
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _print(entries, links, steps, args.json)
    return {name: document.get(name, []) for name in ("efficiencies", "links", "steps")}


def _from_log(args: argparse.Namespace, catalogue: Any) -> list[Any]:
    from hetkv.costmodel.calibration.logs import Setup, read
    from hetkv.costmodel.calibration.own_runs import from_log, from_rows
    from hetkv.costmodel.calibration_file import load_efficiencies
    from hetkv.costmodel.catalogue import DTYPE_BYTES

    for name in ("tp", "dp", "chunk"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.dtype not in DTYPE_BYTES:
        raise InputError(f"--dtype: unknown dtype {args.dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    gpu = catalogue.gpu(args.gpu).name
    setup = Setup(gpu, args.model, args.engine, args.engine_version, args.dtype, args.tp, args.dp, args.chunk)
    rows, seen = read(args.log, setup, args.until)
    origin = ", ".join(path.name for path in args.log)
    if rows and seen:
        raise InputError(
            "--log: results of `vllm bench serve` and logs are fitted in different ways: one kind at a time"
        )
    known = load_efficiencies()
    return from_rows(rows, known, catalogue, origin) if rows else from_log(seen, setup, known, catalogue, origin)


def _print(entries: list[Any], links: list[Any], steps: list[Any], json_file: Path | None) -> None:
    from rich.table import Table

    console = terminal.console(json_file)
    if entries:
        table = Table()
        table.add_column("GPU/engine/version/dtype")
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
    if steps:
        table = Table("steps", "rows", "ms at least", "median error", "90 %")
        for step in steps:
            span = f"x{step.low:.2f} to x{step.high:.2f}"
            table.add_row(step.name, str(step.rows), f"{1e3 * step.step_s:.3f}", f"{step.median_error:.1%}", span)
        console.print(table)


def _report(args: argparse.Namespace) -> None:
    from hetkv.costmodel.calibration.report import render

    data = _data(args)
    names = SIMULATOR if args.simulator else SECTIONS
    for name in names:
        import_module(name)
    head = f"{SIMULATOR_HEAD}\n{_made()}\n" if args.simulator else ""
    present = args.report.read_text(encoding="utf-8") if args.report.is_file() else ""
    args.report.write_text(render(data, names, _say, args.only, present, head), encoding="utf-8")
    terminal.console(args.json).print(f"wrote {args.report}")


def _made() -> str:
    """Where the figures of a page that depend on machine and code are from."""
    from hetkv.bench.environment import environment

    about = environment()
    return f"Made at commit {about['commit']}, {about['time'][:10]}, {about['cpus']} CPUs ({about['device']})."


def _say(name: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(f"[dim]{name} ...[/dim]")
