"""`hetkv simulate`: what a deployment does to a given traffic."""

from __future__ import annotations

import argparse
from typing import Any

from hetkv import terminal
from hetkv.cli.traffic import add_traffic, ended, print_latencies, print_slo, rates, traffic_of, write_rows
from hetkv.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--plan", required=True, metavar="FILE", help="the deployment: plan.yaml (docs/simulator.md)")
    parser.add_argument("--model", metavar="NAME", help="in place of the plan's: a name, or the path of a config.json")
    add_traffic(parser)
    parser.add_argument(
        "--interval", action="store_true", help="run twice more, with step times at the ends of their 90 %% interval"
    )
    parser.add_argument("--json", metavar="FILE", help="write the summary")
    parser.add_argument("--csv", metavar="FILE", help="write one row per request")
    parser.add_argument("--plot", metavar="FILE", help="draw latencies, queues and utilisation (.png, .svg, .pdf)")
    parser.add_argument("--report", metavar="FILE", help="write a self-contained HTML report")
    many = parser.add_argument_group("sweeps")
    many.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="V1,V2,... or LOW:HIGH[:STEP] of a traffic option (rate) or a field of the plan (decode.count); "
        "repeat for a grid",
    )
    many.add_argument("--jobs", type=int, default=-1, help="processes (default: one per core)")
    many.add_argument("--backend", choices=("loky", "ray"), default="loky", help="ray: a Ray cluster, through joblib")


def run(args: argparse.Namespace) -> int:
    """Simulate, print a table, write what was asked for."""
    from hetkv.simulator.deployment import load_plan

    terminal.check_outputs({"csv": args.csv})
    if args.jobs == 0:
        raise InputError("--jobs must be 1 or more, or -1 for one per core")
    traffic, slo = traffic_of(args)
    plan = load_plan(args.plan, args.model)
    if args.sweep:
        return _sweep(args, plan, traffic, slo)
    return _one(args, plan, traffic, slo)


def _one(args: argparse.Namespace, plan: Any, traffic: Any, slo: Any) -> int:
    from rich.console import Console

    from hetkv.simulator.output.html import html
    from hetkv.simulator.output.plot import check_format, save
    from hetkv.simulator.run import interval, simulate

    if args.plot:
        check_format(args.plot)
    workload = traffic.build()
    console = Console(stderr=True)
    with console.status(f"simulating {workload.about}") if console.is_terminal else _nothing():
        result = simulate(plan, workload, args.seed, slo, args.plan)
        if args.interval:
            result.summary["interval"] = interval(plan, workload, args.seed, slo, args.plan)
    title = f"{plan.model}, {workload.about}"
    if args.json:
        terminal.write_json(args.json, result.summary)
    if args.csv:
        write_rows(args.csv, result.columns)
    if args.plot:
        save(result, slo, args.plot, title)
    if args.report:
        terminal.write_text(args.report, html(result, plan, slo, title))
    _print(result.summary, slo, args.json)
    return 0


def _sweep(args: argparse.Namespace, plan: Any, traffic: Any, slo: Any) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hetkv.simulator.output.plot import check_format
    from hetkv.simulator.output.sweep_plot import save_sweep
    from hetkv.simulator.sweep import grid, parse_axis, sweep

    for option in ("csv", "report", "interval"):
        if getattr(args, option):
            raise InputError(f"--{option} describes one simulation; with --sweep use --json and --plot")
    if args.plot:
        check_format(args.plot)
    axes = [parse_axis(text) for text in args.sweep]
    points = grid(axes)
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(points))
        summaries = sweep(
            points,
            plan,
            traffic,
            args.seed,
            slo,
            args.plan,
            args.jobs,
            args.backend,
            on_done=lambda done: progress.update(task, completed=done),
        )
    rows = [{"point": p, **s} for p, s in zip(points, summaries, strict=True)]
    if args.json:
        terminal.write_json(args.json, {"sweep": rows})
    if args.plot:
        save_sweep(rows, axes, slo, args.plot)
    _print_sweep(rows, args.json)
    return 0


def _print(summary: dict[str, Any], slo: Any, json_file: str | None) -> None:
    from rich.filesize import decimal

    from hetkv.simulator.output.html import milliseconds

    console = terminal.console(json_file)
    print_latencies(console, summary)
    console.print(
        f"{ended(summary)} in {summary['simulated_seconds']:,.1f} simulated s ({summary['seconds']:.2f} s of computing)"
    )
    use = ", ".join(f"{gpu} {'none' if u is None else f'{u:.0%}'}" for gpu, u in summary["utilisation"].items())
    console.print(f"{rates(summary)}, utilisation {use}")
    kv = summary["kv"]
    if summary["finished"]:
        mean, most = (decimal(round(kv["bytes_per_request"][name])) for name in ("mean", "p99"))
        token = decimal(round(kv["bytes_per_token"]))
        console.print(f"KV ({kv['dtype']}) {token} a token; of a request at its end {mean} on average, p99 {most}")
    print_slo(console, summary, slo)
    if "interval" in summary and summary["finished"]:
        ends = [summary["interval"][end] for end in ("low", "high")]
        spans = (
            f"{name} p{p} {' to '.join(milliseconds(end[key][f'p{p}']) for end in ends)}"
            for name, key in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"))
            for p in (50, 90)
        )
        console.print(f"90 % interval of the step times: {', '.join(spans)}", highlight=False)
    if summary["usd_per_million_output_tokens"] is not None:
        cost = summary["usd_per_million_output_tokens"]
        console.print(f"{cost:,.2f} USD per million output tokens ({summary['price_basis']})")
    for note in summary["notes"]:
        console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)


def _print_sweep(rows: list[dict[str, Any]], json_file: str | None) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    heads = [*rows[0]["point"], *(f"{m} {p} (ms)" for m in ("TTFT", "TPOT") for p in ("p50", "p90"))]
    heads += ["attainment", "goodput/s", "tokens/s"]
    priced = rows[0]["usd_per_million_output_tokens"] is not None
    for head in [*heads, *(["USD/Mtoken"] if priced else [])]:
        table.add_column(head, justify="right")
    for row in rows:
        cells = [str(v) for v in row["point"].values()]
        cells += [_cell(row[key][p]) for key in ("ttft_ms", "tpot_ms") for p in ("p50", "p90")]
        cells += [f"{row['slo_attainment']:.1%}", f"{row['goodput_rps']:.3g}", f"{row['output_tokens_per_s']:,.0f}"]
        if priced:
            cost = row["usd_per_million_output_tokens"]
            cells.append("none" if cost is None else f"{cost:.2f}")
        table.add_row(*cells)
    console = terminal.console(json_file)
    console.print(table)
    for note in dict.fromkeys(note for row in rows for note in row["notes"] if note.startswith("pool ")):
        console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)


def _cell(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()
