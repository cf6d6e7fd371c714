"""What `hetkv simulate` and `hetkv loadtest` share: options that say who arrives when, and the printed figures."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from hetkv.errors import InputError

if TYPE_CHECKING:
    from hetkv.simulator.metrics import Slo
    from hetkv.simulator.traffic.sources import Traffic


def add_traffic(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from hetkv.simulator.traffic.lengths import GRAMMAR

    traffic = parser.add_argument_group("traffic (one of --trace, --rate and --clients)")
    traffic.add_argument(
        "--trace",
        metavar="FILE",
        help="Azure, BurstGPT, Mooncake or Qwen-Bailian as published, gzipped or not, or a CSV",
    )
    traffic.add_argument("--speedup", type=float, default=1.0, help="play the trace this many times as fast")
    traffic.add_argument("--rate", type=float, metavar="R", help="synthetic arrivals per second")
    traffic.add_argument(
        "--clients", type=int, metavar="N", help="a closed loop: each waits for its answer before it asks again"
    )
    traffic.add_argument(
        "--think", type=float, default=0.0, metavar="S", help="clients: mean of the exponential pause before a request"
    )
    traffic.add_argument("--arrivals", choices=("poisson", "gamma", "constant"), default="poisson")
    traffic.add_argument(
        "--cv", type=float, default=2.0, help="gamma: coefficient of variation of the gaps (default 2)"
    )
    traffic.add_argument("--prompt-tokens", default="1024", metavar="DIST", help=f"{GRAMMAR} (default 1024)")
    traffic.add_argument("--output-tokens", default="256", metavar="DIST", help="the same (default 256)")
    traffic.add_argument(
        "--requests", type=int, metavar="N", help="stop after N arrivals (default 10000 without --trace)"
    )
    traffic.add_argument("--duration", type=float, metavar="S", help="stop arrivals after S seconds")
    parser.add_argument("--slo-ttft-ms", type=float, default=math.inf, metavar="MS")
    parser.add_argument("--slo-tpot-ms", type=float, default=math.inf, metavar="MS")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same result")


def traffic_of(args: argparse.Namespace) -> tuple[Traffic, Slo]:
    """What the options say. Raises `InputError`."""
    from hetkv.simulator.metrics import Slo
    from hetkv.simulator.traffic.sources import Traffic

    for name in ("slo_ttft_ms", "slo_tpot_ms"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be greater than 0, got {getattr(args, name)}")
    if args.seed < 0:
        raise InputError(f"--seed must be 0 or more, got {args.seed}")
    traffic = Traffic(
        trace=args.trace,
        speedup=args.speedup,
        rate=args.rate,
        clients=args.clients,
        think_s=args.think,
        arrivals=args.arrivals,
        cv=args.cv,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        requests=args.requests,
        duration=args.duration,
    )
    return traffic, Slo(args.slo_ttft_ms, args.slo_tpot_ms)


def print_latencies(console: Any, summary: dict[str, Any]) -> None:
    """The percentiles that there are, in the order of the simulator's metrics."""
    from rich.table import Table

    from hetkv.simulator.metrics import METRICS
    from hetkv.simulator.output.html import milliseconds

    table = Table(title=summary["workload"], title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("", "p50", "p90", "p99", "mean"):
        table.add_column(column, justify="left" if not column else "right")
    for metric in METRICS:
        spread = summary.get(metric.key)
        if isinstance(spread, dict) and spread.get("mean") is not None:
            table.add_row(
                f"{metric.symbol}  [dim]{metric.definition.split(':')[0]}", *map(milliseconds, spread.values())
            )
    if table.rows:
        console.print(table)


def ended(summary: dict[str, Any]) -> str:
    """How many requests ended how."""
    lost = "".join(f", {summary[k]:,} {k}" for k in ("rejected", "failed") if summary[k])
    return f"{summary['finished']:,} of {summary['requests']:,} requests finished{lost}"


def rates(summary: dict[str, Any]) -> str:
    """Requests and tokens a second."""
    return f"{summary['throughput_rps']:,.3g} requests/s, {summary['output_tokens_per_s']:,.0f} output tokens/s"


def print_slo(console: Any, summary: dict[str, Any], slo: Slo) -> None:
    """Where limits were given."""
    if any(v is not None for v in slo.as_json().values()):
        ends = summary.get("interval", {})
        span = " to ".join(f"{ends[end]['slo_attainment']:.1%}" for end in ("high", "low") if ends)
        interval = f" ({span} over the interval of the step times)" if ends else ""
        attained, goodput = f"{summary['slo_attainment']:.1%}", f"{summary['goodput_rps']:,.3g} requests/s"
        console.print(f"SLO attainment {attained}{interval}, goodput {goodput}")


def write_rows(path: str, columns: Any) -> None:
    """One line per request; an unknown time is an empty field."""
    import csv

    from hetkv.simulator.request import STATUS_NAMES

    names = [name for name in columns if name != "status"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "status"])
        for *values, status in zip(*(columns[n].tolist() for n in names), columns["status"].tolist(), strict=True):
            writer.writerow(["" if v != v else v for v in values] + [STATUS_NAMES[status]])
