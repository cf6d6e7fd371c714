"""Small random planning problems, and their best plans by trying all of them in the simulator."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from hetkv.costmodel import model_shape, step_model
from hetkv.planner.calibrator import Calibrator, Key
from hetkv.planner.columns import Column, Columns, build_columns
from hetkv.planner.effort import Effort
from hetkv.planner.neighbours import one_budget
from hetkv.planner.problem import Problem, parse_problem
from hetkv.planner.slo_checker import SloChecker
from hetkv.planner.solve import solve
from hetkv.planner.trials import NEAR, Trials

MOST = 6
SAFETY = 0.8
"""Share of the rate that a pool must carry by the relaxed formulas to be simulated; they are bounds at 1."""
GPUS = {"H100-SXM": 2.5, "A100-80-SXM": 1.4, "L40S": 0.9, "MI300X": 2.2, "A10G": 0.6, "H200-SXM": 3.2}
MODELS = ("Llama-3.1-8B", "Llama-2-13B", "Qwen3-8B", "Mistral-7B")


def random_problem(seed: int) -> Problem:
    """One or two classes with tight targets, one to three GPU types, a link that binds in a third of the cases."""
    random = np.random.default_rng([2026, seed])
    model = str(random.choice(MODELS))
    names = [str(n) for n in random.choice(list(GPUS), int(random.integers(1, 4)), replace=False)]
    names = [n for n in names if not (n == "A10G" and model == "Llama-2-13B")] or ["A100-80-SXM"]
    percentile = float(random.choice([90, 95, 99], p=[0.2, 0.2, 0.6]))
    gpu = step_model(names[0], model, 2 if names[0] == "A10G" else 1)
    classes = []
    for i in range(int(random.integers(1, 3))):
        prompt, output = int(random.integers(200, 3000)), int(random.integers(16, 200))
        prompt = min(prompt, (model_shape(model).max_positions or 1_000_000) // 4)  # engines reject what is longer
        alone = gpu.step_seconds(0, 0, min(2 * prompt, 8192), 2.0 * prompt * prompt)
        step = gpu.step_seconds(1, prompt)
        classes.append(
            {
                "name": f"class-{i}",
                "rate": 1.0,
                "prompt_tokens": f"lognormal:{prompt}:{random.choice([0.2, 0.5])}",
                "output_tokens": f"uniform:{max(2, output // 2)}:{2 * output}",
                "ttft_ms": round(1e3 * alone * float(random.uniform(2, 6)), 1),
                "tpot_ms": round(1e3 * step * float(random.uniform(1.5, 3)), 1),
                "ttft_percentile": percentile,
                "tpot_percentile": percentile,
            }
        )
    load = float(random.uniform(0.3, 2.0))
    prompts = [float(str(c["prompt_tokens"]).split(":")[1]) for c in classes]
    seconds = np.mean([gpu.step_seconds(0, 0, int(p), p * p / 2) for p in prompts])
    for c in classes:
        c["rate"] = round(load / float(seconds) / len(classes), 2)
    gb_s = 25.0
    if random.random() < 0.34:  # a port takes about as long as the prompt
        gb_s = round(
            float(np.mean(prompts)) * gpu.kv_bytes_per_token / float(seconds) / 1e9 * random.uniform(0.7, 2), 2
        )
    return parse_problem(
        {
            "models": [{"name": model, "tp": [1, 2], "pp": [1]}],
            "classes": classes,
            "gpus": [
                {
                    "gpu": n,
                    "usd_per_gpu_hour": round(GPUS[n] * float(random.uniform(0.7, 1.4)), 2),
                    "basis": "on_demand",
                    "as_of": "2026-05",
                }
                for n in names
            ],
            "link": {"gb_s": gb_s},
        },
        f"seed {seed}",
    )


def best_by_force(problem: Problem, below: float) -> tuple[float | None, int]:
    """The least cost below `below` of any plan of at most `MOST` instances that the simulator accepts, and simulations.

    Plans are simulated in the order of their cost. Passed over are only those that cannot do: a prefill pool that is
    late with no decoding behind it, and a pool whose instances together compute less than the traffic asks even at
    the best batch.
    """
    found = build_columns(problem, every=True)
    checker = SloChecker(problem, problem.models[0])
    calibrator = Calibrator(problem, found.columns, {problem.models[0].name: checker})
    trials = Trials(problem, found, calibrator.checkers, calibrator, Effort(calibrator.checkers, 10**9))
    late: dict[tuple[tuple[Key, int], ...], bool] = {}
    for _, counts in plans(found, problem, below):
        first = {k: n for k, n in counts.items() if k[1] == "prefill"}
        name = tuple(sorted(first.items()))
        if first and name not in late:
            late[name] = checker(calibrator.instances(first), 1.0, prompts_only=True).used("prefill") > NEAR
        if first and late[name]:
            continue
        candidate = trials.simulate(counts, 1.0)
        if candidate.meets and trials.judge(candidate, 0).holds:
            return candidate.cost, checker.simulations
    return None, checker.simulations


def plans(found: Columns, problem: Problem, below: float) -> Iterator[tuple[float, dict[Key, int]]]:
    """All plans of at most `MOST` instances by cost: prefill and decode columns mixed at will, or aggregated ones."""
    rate = sum(c.rate for c in problem.classes)
    by_role = {r: [c for c in found.columns if c.role == r] for r in ("prefill", "decode", "aggregated")}
    every = []
    for pool in multisets([c for c in by_role["aggregated"] if c.price < below], MOST):
        price = sum(n * c.price for c, n in pool.items())
        counts = {c.key: n for c, n in pool.items()}
        if price < below and one_budget(counts) and enough(pool, rate):
            every.append((price, counts))
    pools = {r: [p for p in multisets(by_role[r], MOST - 1) if enough(p, rate)] for r in ("prefill", "decode")}
    for first in pools["prefill"]:
        cost = sum(n * c.price for c, n in first.items())
        for later in pools["decode"]:
            both = {**first, **later}
            total = cost + sum(n * c.price for c, n in later.items())
            if sum(both.values()) <= MOST and total < below:
                every.append((total, {c.key: n for c, n in both.items()}))
    order = [(cost, i) for i, (cost, _) in enumerate(every) if cost < below - 1e-9]
    heapq.heapify(order)
    while order:
        cost, i = heapq.heappop(order)
        yield cost, every[i][1]


def enough(counts: dict[Column, int], rate: float) -> bool:
    """Whether the instances could compute the traffic at their best batch, queueing aside."""
    return sum(n * c.relaxed for c, n in counts.items()) >= SAFETY * rate


def multisets(columns: list[Column], most: int) -> Iterator[dict[Column, int]]:
    """Every choice of 1 to `most` columns, repetition allowed, as counts."""

    def more(start: int, left: int) -> Iterator[dict[Column, int]]:
        for i in range(start, len(columns)):
            for n in range(1, left + 1):
                yield {columns[i]: n}
                for rest in more(i + 1, left - n):
                    yield {columns[i]: n, **rest}

    yield from more(0, most)


def compare(seed: int) -> dict[str, Any]:
    """The planner and brute force on one random problem: costs, their ratio, and seconds."""
    problem = random_problem(seed)
    begin = time.perf_counter()
    try:
        plan = solve(problem, alternatives=False)
    except ValueError as error:
        plan, why = None, str(error)
    middle = time.perf_counter()
    row: dict[str, Any] = {"seed": seed, "planner_seconds": round(middle - begin, 2)}
    ours = plan.cost_per_hour if plan is not None and plan.meets else None
    least = max(c.usd_per_gpu_hour or 0.0 for c in problem.gpus) * 2 * MOST if ours is None else ours
    best, simulations = best_by_force(problem, least)
    if best is None and ours is not None:
        best = ours
    row |= {
        "cost": ours,
        "optimum": best,
        "ratio": None if ours is None or best is None else round(ours / best, 4),
        "meets": None if plan is None else plan.meets,
        "instances": 0 if plan is None else sum(i.count for i in plan.instances),
        "link_binds": problem.link.gb_s != 25.0,
        "classes": len(problem.classes),
        "simulations": simulations,
        "force_seconds": round(time.perf_counter() - middle, 2),
    }
    if plan is None:
        row["why"] = why
    else:
        row["plan"] = [f"{i.count} {i.role} {i.gpu} tp{i.tp} {i.budget}" for i in plan.instances]
    return row
