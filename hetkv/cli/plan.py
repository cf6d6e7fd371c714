"""`hetkv plan`: what to buy for a traffic and its targets, and how to split it into prefill and decode."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hetkv import terminal
from hetkv.errors import InputError

FLAGS: dict[str, Any] = {
    "model": None, "gpu": [], "price_basis": "on_demand", "prices_as_of": None, "rate": None, "prompt_tokens": "1024",
    "output_tokens": "256", "ttft": None, "tpot": None, "percentile": 99.0, "budget": None, "spare": 0,
}  # fmt: skip
"""Options of a problem without a file, with their defaults. They do not go with --problem."""

LAUNCHERS = ("vllm", "sglang", "kubernetes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from hetkv.simulator.traffic.lengths import GRAMMAR

    parser.add_argument(
        "--problem",
        "--scenario",
        metavar="FILE",
        help="models, traffic, GPUs and prices: problem.yaml (docs/planner.md)",
    )
    flags = parser.add_argument_group("a problem of one class, without a file")
    flags.add_argument("--model", help="a model of the catalogue, or the path of a config.json")
    flags.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="NAME:PRICE[:CAP]",
        help="a GPU type with its USD per GPU and hour, and how many there are; repeat for more",
    )
    flags.add_argument("--price-basis", choices=("on_demand", "reserved", "rental_model"), help="default on_demand")
    flags.add_argument("--prices-as-of", metavar="DATE", help="when the prices held; required with --gpu")
    flags.add_argument("--rate", type=float, metavar="R", help="requests per second")
    flags.add_argument("--prompt-tokens", metavar="DIST", help=f"{GRAMMAR} (default 1024)")
    flags.add_argument("--output-tokens", metavar="DIST", help="the same (default 256)")
    flags.add_argument("--ttft", type=float, metavar="MS", help="time to first token, ms")
    flags.add_argument("--tpot", type=float, metavar="MS", help="time per output token, ms")
    flags.add_argument("--percentile", type=float, metavar="P", help="of both targets (default 99)")
    flags.add_argument(
        "--budget", type=float, metavar="USD", help="per hour: most goodput for it, --rate is then the mix"
    )
    flags.add_argument("--spare", type=int, choices=(0, 1), help="1: N+1, one instance of each may be down")
    parser.add_argument(
        "--roles", choices=("any", "disaggregated", "aggregated"), help="restrict the search to one kind"
    )
    parser.add_argument(
        "--confidence",
        action="append",
        default=[],
        metavar="GPU=Q",
        help="step times that this GPU keeps with probability Q (0.5: the centre); all=Q for every one; repeat",
    )
    parser.add_argument(
        "--allow-unstartable",
        action="store_true",
        help="also offer instances that the engine or hetkv's connector cannot start, marked",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="of the simulations; the same seed gives the same plan on one kind of CPU",
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan and all that was worked out, for machines")
    parser.add_argument("--out", metavar="FILE", help="write the deployment as plan.yaml for simulate and demo")
    parser.add_argument("--report", metavar="FILE", help="write a self-contained HTML report")
    parser.add_argument(
        "--launch",
        choices=(*LAUNCHERS, "all", "none"),
        default="vllm",
        help="print what starts the deployment (default: vllm)",
    )
    many = parser.add_argument_group("many plans")
    many.add_argument(
        "--plot", metavar="FILE", help="draw cost against rate and tokens/s per GPU against tokens/s per user"
    )
    many.add_argument("--rates", metavar="X,X,...", help="multiples of the rates to draw (default 0.25 to 4)")
    many.add_argument("--targets", metavar="X,X,...", help="multiples of the TPOT limits to draw (default 0.6 to 2.5)")
    many.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="PREFILL:DECODE",
        help="draw a fleet that prefills on one GPU type and decodes on another; repeat for more",
    )
    many.add_argument("--trace", metavar="FILE", help="plan again for each period of a trace (formats: hetkv simulate)")
    many.add_argument("--period", type=float, metavar="S", help="seconds of a period (default: a twelfth of the trace)")
    many.add_argument("--trace-plot", metavar="FILE", help="draw traffic, GPUs and their ratio over the trace")
    many.add_argument("--jobs", type=int, default=-1, help="processes (default: one per core)")
    many.add_argument("--backend", choices=("loky", "ray"), default="loky", help="ray: a Ray cluster, through joblib")


def problem_of(args: argparse.Namespace) -> Any:
    """The problem that the options describe."""
    import msgspec

    from hetkv.planner.problem import check_date, check_problem, load_problem, parse_problem

    if args.problem is None and args.model is None:
        raise InputError("give either --problem FILE or --model with --gpu, --rate, --ttft and --tpot")
    given = [name for name in FLAGS if getattr(args, name) not in (None, [])]
    if args.problem is not None:
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{options}: not with --problem {args.problem}, which says that itself")
        problem = load_problem(args.problem)
    else:
        for name, default in FLAGS.items():
            if name not in given:
                setattr(args, name, default)
        for option in ("gpu", "rate", "ttft", "tpot", "prices_as_of"):
            if getattr(args, option) in (None, [], ""):
                raise InputError(f"missing --{option.replace('_', '-')}")
        check_date(args.prices_as_of, "--prices-as-of")
        traffic = {
            "name": "traffic",
            "rate": args.rate,
            "prompt_tokens": args.prompt_tokens,
            "output_tokens": args.output_tokens,
            "ttft_ms": args.ttft,
            "tpot_ms": args.tpot,
            "ttft_percentile": args.percentile,
            "tpot_percentile": args.percentile,
        }
        goal = {"goal": "goodput", "budget_usd_per_hour": args.budget} if args.budget is not None else {"goal": "cost"}
        problem = parse_problem(
            {
                "models": [{"name": args.model}],
                "classes": [traffic],
                "gpus": [_offer(text, args.price_basis, args.prices_as_of) for text in args.gpu],
                "objective": goal,
                "spare_instances": args.spare,
            },
            "options",
        )
    for text in args.confidence:
        problem = _confident(problem, text)
    if args.allow_unstartable:
        problem = msgspec.structs.replace(problem, allow_unstartable=True)
    if args.roles is not None:
        problem = msgspec.structs.replace(problem, roles=args.roles)
    if args.seed is not None:
        problem = check_problem(msgspec.structs.replace(problem, seed=args.seed), "--seed")
    return problem


def _confident(problem: Any, text: str) -> Any:
    """`problem` with the confidence that `text` (GPU=Q) gives one GPU type, or every one."""
    import msgspec

    from hetkv.costmodel import load_catalogue

    name, _, value = text.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise InputError(f"--confidence {text!r}: expected GPU=Q with Q between 0 and 1, such as MI325X=0.9")
    catalogue = load_catalogue(problem.catalogue)
    chosen = None if name == "all" else catalogue.gpu(name).name
    offers = [
        msgspec.structs.replace(offer, engine={**offer.engine, "confidence": share})
        if chosen in (None, catalogue.gpu(offer.gpu).name)
        else offer
        for offer in problem.gpus
    ]
    if offers == problem.gpus:
        raise InputError(f"--confidence {text!r}: {chosen} is not among the GPUs of the problem")
    return msgspec.structs.replace(problem, gpus=offers)


def _offer(text: str, basis: str, as_of: str) -> dict[str, Any]:
    name, *rest = text.split(":")
    try:
        price = float(rest[0])
        cap = int(rest[1]) if len(rest) == 2 else None
    except (ValueError, IndexError):
        raise InputError(f"--gpu {text!r}: expected NAME:PRICE or NAME:PRICE:CAP, such as H100:2.5:64") from None
    if len(rest) > 2:
        raise InputError(f"--gpu {text!r}: expected NAME:PRICE or NAME:PRICE:CAP, such as H100:2.5:64")
    return {"gpu": name, "usd_per_gpu_hour": price, "basis": basis, "as_of": as_of, "cap": cap}


def run(args: argparse.Namespace) -> int:
    """Solve, print, write what was asked for."""
    from rich.console import Console

    from hetkv.planner.frontier import SCALES, TARGETS, frontier, split_fleet
    from hetkv.planner.output import terminal as show
    from hetkv.planner.output.html import html
    from hetkv.planner.replay import replan, rows_of
    from hetkv.planner.solve import solve
    from hetkv.simulator.output.plot import check_format

    terminal.check_outputs({"out": args.out, "trace-plot": args.trace_plot})
    for name in ("plot", "trace_plot"):
        if getattr(args, name):
            check_format(getattr(args, name))
    for option, needed in (("period", "trace"), ("trace_plot", "trace")):
        if getattr(args, option) and not args.trace:
            raise InputError(f"--{option.replace('_', '-')} belongs to --{needed}")
    for option in ("rates", "targets", "split"):
        if getattr(args, option) and not (args.plot or args.report):
            raise InputError(f"--{option} belongs to --plot or --report")
    if args.jobs < 1 and args.jobs != -1:
        raise InputError("--jobs must be 1 or more, or -1 for one per core")
    scales, targets = _numbers(args.rates, "rates", SCALES), _numbers(args.targets, "targets", TARGETS)
    splits = [_pair(text) for text in args.split]
    problem = problem_of(args)
    for pair in splits:
        split_fleet(problem, *pair)  # what is wrong with it is said before the search begins
    if args.trace:
        rows_of(problem, args.trace, args.period)
    console = terminal.console(args.json)
    errors = Console(stderr=True)
    with errors.status("planning") if errors.is_terminal else _nothing():
        plan = solve(problem)
    show.show(console, problem, plan)
    found = replanned = None
    if args.plot or (args.report and problem.prices):
        with _bar(errors, "planning other rates and targets") as on_done:
            found = frontier(problem, scales, targets, splits, args.jobs, args.backend, on_done)
        show.show_frontier(console, found)
    if args.trace:
        with _bar(errors, "planning for each period") as on_done:
            replanned = replan(problem, args.trace, args.period, args.jobs, args.backend, on_done)
        show.show_replan(console, replanned)
    nodes = {o.gpu: o.gpus_per_node for o in problem.gpus if o.gpus_per_node}
    _launch(console, plan, args.launch, nodes)
    if args.out:
        _write_plans(plan, args.out)
    if args.json:
        terminal.write_json(args.json, _facts(problem, plan, found, replanned))
    _draw(args, problem, found, replanned)
    if args.report:
        Path(args.report).write_text(html(problem, plan, found, replanned, nodes), encoding="utf-8")
    return 0


def _pair(text: str) -> tuple[str, str]:
    prefill, colon, decode = text.partition(":")
    if not (prefill and colon and decode):
        raise InputError(f"--split {text!r}: expected PREFILL:DECODE, such as H100-SXM:MI300X")
    return prefill, decode


def _numbers(text: str | None, option: str, default: tuple[float, ...]) -> tuple[float, ...]:
    if text is None:
        return default
    try:
        found = tuple(float(x) for x in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < x < 1e6 for x in found):
        raise InputError(f"--{option} {text!r}: expected numbers greater than 0 with commas between them")
    return found


def _facts(problem: Any, plan: Any, found: Any, replanned: Any) -> dict[str, Any]:
    """What was printed and drawn, as plain data."""
    import msgspec

    from hetkv.planner.output.explain import kv_sizes, link_use, phase_values, reasons, worth

    facts: dict[str, Any] = plan.as_json()
    facts["problem"] = msgspec.to_builtins(problem)
    facts["worth"] = worth(problem, plan)
    facts["reasons"] = reasons(problem, plan)
    facts["phase_values"] = msgspec.to_builtins(phase_values(problem, plan))
    facts["kv"] = msgspec.to_builtins(kv_sizes(problem))
    facts["link"] = msgspec.to_builtins(link_use(problem, plan))
    facts["frontier"] = msgspec.to_builtins(found)
    facts["trace"] = msgspec.to_builtins(replanned)
    return facts


def _draw(args: argparse.Namespace, problem: Any, found: Any, replanned: Any) -> None:
    from hetkv.planner.output import replay_plot
    from hetkv.planner.output.plot import save, save_frontier

    names = ", ".join(m.name for m in problem.models)
    if args.plot:
        save_frontier(found, args.plot, names)
    if args.trace_plot:
        save(replay_plot.draw(replanned), args.trace_plot, f"{names}, {Path(args.trace).name}")


def _launch(console: Any, plan: Any, which: str, nodes: dict[str, int]) -> None:
    from hetkv.planner.output.kubernetes import kubernetes_yaml
    from hetkv.planner.output.launch import sglang_lines, vllm_lines

    makers = {"vllm": vllm_lines, "sglang": sglang_lines, "kubernetes": kubernetes_yaml}
    for name in LAUNCHERS if which == "all" else [which]:
        for model, deployment in plan.deployments.items() if name in makers else ():
            console.print(f"[bold]To start {model} with {name}[/]")
            console.print(makers[name](deployment, nodes), highlight=False, markup=False, soft_wrap=True)


def _write_plans(plan: Any, path: str) -> None:
    """One file, or one for each model: `plan.yaml` becomes `plan.MODEL.yaml`."""
    from hetkv.simulator.deployment import dump_plan

    for model, deployment in plan.deployments.items():
        file = Path(path)
        if len(plan.deployments) > 1:
            file = file.with_name(f"{file.stem}.{Path(model).name}{file.suffix}")
        file.write_text(dump_plan(deployment), encoding="utf-8")


@contextmanager
def _bar(console: Any, text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; gives the function to report to."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()
