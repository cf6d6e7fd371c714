"""A plan on the terminal: the deployment, why it won, and what else there was."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from hetkv.planner.frontier import Frontier, Point
from hetkv.planner.output.explain import (
    aggregated,
    figure,
    kv_sizes,
    others,
    own_option,
    phase_values,
    reasons,
    worse_by,
    worth,
)
from hetkv.planner.problem import Problem
from hetkv.planner.replay import Period, Replan
from hetkv.planner.result import ClassLatency, Option, Plan, gpus, split
from hetkv.simulator.output.html import milliseconds


def show(console: Console, problem: Problem, plan: Plan) -> None:
    """Print the plan, its reasons and its rivals."""
    _deployment(console, plan)
    _targets(console, plan)
    console.print("[bold]Why[/]")
    for text in [*worth(problem, plan).values(), *reasons(problem, plan)]:
        console.print(f"  {text}", highlight=False, soft_wrap=True)
    for kv in kv_sizes(problem):
        each = ", ".join(f"{decimal(round(size))} ({name})" for name, size in kv.bytes_per_request.items())
        token = decimal(round(kv.bytes_per_token))
        console.print(
            f"  KV of {kv.model} ({kv.dtype}): {token} a token; of a request at its end {each}", soft_wrap=True
        )
    console.print()
    _values(console, problem, plan)
    _others(console, plan)
    console.print(
        f"columns {plan.columns_seconds:.2f} s, solver {plan.solve_seconds:.2f} s, checks {plan.verify_seconds:.1f} s "
        f"in {plan.iterations} iteration{'s' * (plan.iterations != 1)}",
        style="dim",
        highlight=False,
    )
    for note in plan.notes:
        console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    return table


def _deployment(console: Console, plan: Plan) -> None:
    priced = plan.cost_per_hour is not None
    head = f"{plan.rate:,.4g} requests/s on {gpus(plan.instances)} GPUs"
    head += f" for {plan.cost_per_hour:,.2f} USD/hour" if plan.cost_per_hour is not None else ""
    head += f", {plan.kw:,.3g} kW" if plan.kw is not None else ""
    head += f", {plan.co2_kg_per_hour:,.3g} kg CO2/hour" if plan.co2_kg_per_hour is not None else ""
    several = len({i.model for i in plan.instances}) > 1
    columns = [
        "role",
        "GPU",
        "TP",
        "PP",
        "DP",
        "instances",
        "GPUs",
        *(["USD/hour"] if priced else []),
        *(["model"] * several),
    ]
    table = _table(head, *columns, left=2)
    for one in plan.instances:
        cells = [one.role, one.gpu, str(one.tp), str(one.pp), str(one.dp), str(one.count), str(one.count * one.gpus)]
        if priced:
            cells.append(f"{one.count * (one.usd_per_hour or 0.0):,.2f}")
        table.add_row(*cells, *([one.model] * several))
    console.print(table)
    console.print()


def _targets(console: Console, plan: Plan) -> None:
    table = _table("Targets", "class", "", "limit", "predicted", "simulated", left=2)
    for name, said in plan.simulated.items():
        for kind, row in _latencies(said, plan.predicted.get(name)):
            late = row[1] is not None and row[1] > row[0]
            cells = [
                milliseconds(row[0]),
                milliseconds(row[2]),
                f"[{'red' if late else 'green'}]{milliseconds(row[1])}[/]",
            ]
            table.add_row(name, kind, *cells)
    console.print(table)
    console.print()


Row = tuple[float, float | None, float | None]


def _latencies(said: ClassLatency, predicted: ClassLatency | None) -> list[tuple[str, Row]]:
    """What, and (limit, simulated, predicted)."""
    return [
        (
            f"TTFT p{said.ttft_percentile:g}",
            (said.ttft_limit_ms, said.ttft_ms, predicted.ttft_ms if predicted else None),
        ),
        (
            f"TPOT p{said.tpot_percentile:g}",
            (said.tpot_limit_ms, said.tpot_ms, predicted.tpot_ms if predicted else None),
        ),
    ]


def _values(console: Console, problem: Problem, plan: Plan) -> None:
    unit = "USD/hour" if problem.prices else "GPU"
    several = len(problem.models) > 1
    columns = ["role", "GPU", "best size", "requests/s each", f"per {unit}", ""]
    table = _table(f"What each GPU is worth (large pools, requests/s per {unit})", *columns, left=2)
    for value in phase_values(problem, plan):
        shape = f"TP{value.tp}" + f" PP{value.pp}" * (value.pp > 1) + f" DP{value.dp}" * (value.dp > 1)
        cells = [f"{value.rate:.3g}", f"{value.rate_per_usd:.3g}", "[green]chosen[/]" if value.chosen else ""]
        table.add_row(f"{value.model} {value.role}" if several else value.role, value.gpu, shape, *cells)
    console.print(table)
    console.print()


def _others(console: Console, plan: Plan) -> None:
    table = _table("Alternatives", "plan", "", "instances", figure_head(plan), "against this", left=3)
    for option in [own_option(plan), *others(plan)]:
        table.add_row(
            option.name, verdict(option), option_split(option), option_figure(plan, option), against(plan, option)
        )
    console.print(table)
    console.print()


def figure_head(plan: Plan) -> str:
    """What the goal counts."""
    return "USD/hour" if plan.goal == "cost" else "requests/s"


def verdict(option: Option) -> str:
    """Whether the option meets the targets."""
    return "meets" if option.feasible else "misses" if option.instances else "none"


def option_split(option: Option) -> str:
    """The option's instances, or why there are none."""
    return split(option.instances) if option.instances else option.why or "no plan"


def option_figure(plan: Plan, option: Option) -> str:
    """The option's figure without its unit."""
    return figure(plan, option).split(" ")[0] if option.instances else ""


def against(plan: Plan, option: Option) -> str:
    """How much worse or better than the plan, where it meets the targets."""
    more = worse_by(plan, option) if option.instances else None
    if more is None or option.name == "this plan":
        return ""
    return f"{more if plan.goal == 'cost' else -more:+.0%}"


def pd_ratio(plan: Plan) -> str:
    """Prefill to decode GPUs, as `4:2`."""
    count = {role: gpus(i for i in plan.instances if i.role == role) for role in ("prefill", "decode")}
    return "none" if aggregated(plan.instances) else f"{count['prefill']}:{count['decode']}"


def show_frontier(console: Console, found: Frontier) -> None:
    """Print the points of a frontier."""
    fleets = list(dict.fromkeys(p.fleet for p in found.rates))
    table = _table("Cost against rate (USD/hour)", "requests/s", *fleets, left=0)
    for rate in sorted({p.rate for p in found.rates}):
        own = {p.fleet: p for p in found.rates if p.rate == rate}
        table.add_row(f"{rate:,.4g}", *(_cost(own.get(name)) for name in fleets))
    console.print(table)
    _say_cut(console, found.rates)
    console.print()


def _cost(point: Point | None) -> str:
    if point is None:
        return "none"
    cost = "none" if point.cost_per_hour is None else f"{point.cost_per_hour:,.2f}"
    return cost + mark(point)


CUT = "* a limit ended the search early: a better plan may exist"


def mark(row: Point | Period) -> str:
    """What follows the figure of a plan that was cut short; `CUT` says what it means."""
    return " *" if row.cut else ""


def _say_cut(console: Console, rows: Sequence[Point | Period]) -> None:
    for text in dict.fromkeys(row.cut for row in rows if row.cut):
        console.print(f"{CUT} ({text})", highlight=False, soft_wrap=True)


def show_replan(console: Console, found: Replan) -> None:
    """Print a trace's periods."""
    table = _table(
        f"Over {found.trace}",
        "minutes",
        "requests/s",
        "prompt",
        "output",
        "P:D GPUs",
        "GPUs",
        "USD/hour",
        "own requests",
    )
    for w in found.periods:
        ratio = "" if w.why else "none" if w.ratio is None else f"{w.prefill_gpus}:{w.decode_gpus}"
        cost = ("" if w.cost_per_hour is None else f"{w.cost_per_hour:,.2f}") + mark(w)
        table.add_row(
            f"{w.start_s / 60:.0f} to {w.end_s / 60:.0f}",
            f"{w.rate:.3g}",
            f"{w.prompt_mean:,.0f}",
            f"{w.output_mean:,.0f}",
            ratio,
            str(w.gpus or ""),
            cost,
            replayed(w) or w.why,
        )
    console.print(table)
    _say_cut(console, found.periods)
    if found.cost is not None and found.peak_cost is not None:
        console.print(
            f"{found.cost:,.2f} USD replanned for each period, {found.peak_cost:,.2f} USD with the costliest plan kept",
            highlight=False,
        )
    console.print()


def replayed(period: Period) -> str:
    """What the replay of a period's own requests said, and what their bursts cost."""
    text = {None: "", True: "meet", False: "miss"}[period.replay_meets]
    poisson = period.poisson_cost_per_hour
    if poisson is not None and period.cost_per_hour is not None and period.cost_per_hour > poisson:
        text += f", with {poisson:,.2f} they miss"
    return text
