"""`hetkv plan`: what to buy for a traffic and its targets, and how to split it into prefill and decode."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hetkv.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from hetkv.simulator.lengths import GRAMMAR

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
    flags.add_argument("--price-basis", choices=("on_demand", "reserved", "rental_model"), default="on_demand")
    flags.add_argument("--prices-as-of", default="", metavar="DATE", help="when the prices held; required with --gpu")
    flags.add_argument("--rate", type=float, metavar="R", help="requests per second")
    flags.add_argument("--prompt-tokens", default="1024", metavar="DIST", help=GRAMMAR)
    flags.add_argument("--output-tokens", default="256", metavar="DIST", help="the same")
    flags.add_argument("--ttft", type=float, metavar="MS", help="time to first token, ms")
    flags.add_argument("--tpot", type=float, metavar="MS", help="time per output token, ms")
    flags.add_argument("--percentile", type=float, default=99.0, metavar="P", help="of both targets (default 99)")
    flags.add_argument(
        "--budget", type=float, metavar="USD", help="per hour: most goodput for it, --rate is then the mix"
    )
    flags.add_argument("--roles", choices=("any", "disaggregated", "aggregated"), default="any")
    flags.add_argument("--spare", type=int, choices=(0, 1), default=0, help="1: N+1, one instance of each may be down")
    parser.add_argument("--seed", type=int, help="of the simulations; the same seed gives the same plan")
    parser.add_argument("--json", metavar="FILE", help="write the plan and all that is known about it")


def problem_of(args: argparse.Namespace) -> Any:
    """The problem that the options describe."""
    import msgspec

    from hetkv.planner.problem import check_problem, load_problem, parse_problem

    if (args.problem is None) == (args.model is None):
        raise InputError("give either --problem FILE or --model with --gpu, --rate, --ttft and --tpot")
    if args.problem is not None:
        problem = load_problem(args.problem)
    else:
        for option in ("gpu", "rate", "ttft", "tpot", "prices_as_of"):
            if not getattr(args, option):
                raise InputError(f"missing --{option.replace('_', '-')}")
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
                "roles": args.roles,
                "spare_instances": args.spare,
            },
            "options",
        )
    if args.seed is not None:
        problem = check_problem(msgspec.structs.replace(problem, seed=args.seed), "--seed")
    return problem


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
    """Plan, print the plan, write what was asked for."""
    from rich.console import Console

    from hetkv.planner import solve

    problem = problem_of(args)
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("planning"):
            plan = solve(problem)
    else:
        plan = solve(problem)
    if args.json:
        Path(args.json).write_text(json.dumps(plan.as_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for item in plan.instances:
        price = "" if item.usd_per_hour is None else f", {item.count * item.usd_per_hour:.2f} USD/h"
        print(f"{item.count} x {item.role} on {item.gpu}, tp {item.tp}, pp {item.pp}{price}")
    cost = "" if plan.cost_per_hour is None else f"{plan.cost_per_hour:.2f} USD/h, "
    print(f"{cost}{plan.rate:.4g} requests/s; targets {'hold' if plan.meets else 'do not hold'} in the simulator")
    return 0
