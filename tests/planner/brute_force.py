"""Small random planning problems, and their best plans by trying all of them in the simulator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import yaml

from hetkv.costmodel import model_shape, step_model
from hetkv.planner.attainment import mean_of
from hetkv.planner.calibrator import Calibrator, Counts, Key
from hetkv.planner.columns import Column, build_columns
from hetkv.planner.effort import Effort
from hetkv.planner.neighbours import one_budget, strongest
from hetkv.planner.problem import Problem, dump_problem, parse_problem
from hetkv.planner.result import Plan
from hetkv.planner.slo_checker import SloChecker
from hetkv.planner.solve import solve
from hetkv.planner.trials import NEAR, Trials

MOST = 6
OTHERS = 8
MARGIN = 0.1
"""A plan that misses a target by more is too slow, and so is one with fewer instances of the same columns."""

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


@dataclass
class Force:
    """Tries every plan of at most `MOST` instances. `checker` may have simulated some of them before. `cores` processes
    simulate at once what does not depend on each other.

    Left out are only those that cannot do: pools whose instances together compute less than the traffic asks even at
    the best batch; prefill pools that are late with no decoding after them; decode pools that are far too slow after
    the strongest prefill, or whose first tokens are after more of it than any plan has; and all that have the columns
    of a plan that is too slow by more than `MARGIN`, and no more of any.
    """

    problem: Problem
    checker: SloChecker
    cores: int = 1
    simulated: int = 0

    def __post_init__(self) -> None:
        self.elsewhere = 0  # simulations in other processes
        self.model = self.problem.models[0].name
        self.found = build_columns(self.problem, every=True)
        checkers = {self.model: self.checker}
        self.calibrator = Calibrator(self.problem, self.found.columns, checkers)
        self.trials = Trials(self.problem, self.found, checkers, self.calibrator, Effort(checkers, 10**9))
        self.rate = sum(c.rate for c in self.problem.classes)

    def best(self, below: float) -> float | None:
        """The least cost of a plan below `below` that the simulator accepts, as it accepts the planner's, if any."""
        before = self.checker.simulations
        try:
            near = self._near(self._aggregated(below) + self._disaggregated(below), self._used, NEAR)
            for counts in near:
                candidate = self.trials.simulate(counts, 1.0)
                if candidate.meets and self.trials.judge(candidate, 0).holds:
                    return candidate.cost
            return None
        finally:
            self.simulated = self.checker.simulations - before + self.elsewhere

    def _used(self, counts: Counts) -> float:
        return self.calibrator.verdict(self.model, counts, 1.0).used()

    def _aggregated(self, below: float) -> list[Counts]:
        return [p for p in self._pools("aggregated", MOST, below) if one_budget(p)]

    def _disaggregated(self, below: float) -> list[Counts]:
        first = self._near(self._pools("prefill", MOST - 1, below), self._prompts_used, NEAR)
        later = self._near(self._pools("decode", MOST - 1, below), self._tokens_used, 1 + MARGIN)
        later = self._near(later, self._first_tokens_used, NEAR + MARGIN)
        pairs = [{**p, **d} for p in first for d in later if sum(p.values()) + sum(d.values()) <= MOST]
        return [p for p in pairs if self.trials.price(p) < below - 1e-9]

    def _prompts_used(self, counts: Counts) -> float:
        return self.checker(self.calibrator.instances(counts), 1.0, prompts_only=True).used("prefill")

    def _first_tokens_used(self, counts: Counts) -> float:
        ahead = {k: max(n, MOST) for k, n in strongest(self.trials, self.model).items()}
        return self.calibrator.role(self.model, {**ahead, **counts}, "decode", 1.0).used("prefill")

    def _tokens_used(self, counts: Counts) -> float:
        return self.calibrator.role(self.model, {**strongest(self.trials, self.model), **counts}, "decode", 1.0).used(
            "decode"
        )

    def _pools(self, role: str, most: int, below: float) -> list[Counts]:
        """Pools of a role that cost less and could compute the traffic at their best batch."""
        columns = [c for c in self.found.columns if c.role == role and c.price < below]
        pools = (p for p in multisets(columns, most, below - 1e-9) if enough(p, self.rate))
        return [{c.key: n for c, n in pool.items()} for pool in pools]

    def _near(self, pools: list[Counts], used: Callable[[Counts], float], limit: float) -> list[Counts]:
        """Those that use no more than `limit` of a target, cheapest first. The largest are asked first: what is far too
        slow rules out whatever has less of the same columns.
        """
        hopeless: dict[frozenset[Key], list[Counts]] = {}
        near = []
        for _, tier in groupby(sorted(pools, key=_size, reverse=True), key=_size):
            left = [p for p in tier if not any(_covers(bad, p) for bad in hopeless.get(frozenset(p), ()))]
            for counts, share in zip(left, self._ask(used, left), strict=True):
                if share > limit + MARGIN:
                    hopeless.setdefault(frozenset(counts), []).append(counts)
                elif share <= limit:
                    near.append(counts)
        return sorted(near, key=self.trials.price)

    def _ask(self, used: Callable[[Counts], float], pools: list[Counts]) -> list[float]:
        """`used` of each: pools of one size rule out none of each other."""
        if self.cores == 1 or len(pools) == 1:
            return [used(p) for p in pools]
        from joblib import Parallel, delayed

        self.elsewhere += len(pools)
        text = dump_problem(self.problem)
        return list(Parallel(n_jobs=self.cores)(delayed(_answer)(text, used.__name__, p) for p in pools))


def _size(counts: Counts) -> int:
    return sum(counts.values())


def _covers(bad: Counts, counts: Counts) -> bool:
    return all(n <= bad[k] for k, n in counts.items())


@lru_cache(maxsize=1)
def _force_of(text: str) -> Force:
    problem = parse_problem(yaml.safe_load(text), "brute force")
    return Force(problem, SloChecker(problem, problem.models[0]))


def _answer(text: str, name: str, counts: Counts) -> float:
    """In another process: `Force.name` of `counts` for the problem whose text is `text`."""
    return float(getattr(_force_of(text), name)(counts))


def enough(counts: dict[Column, int], rate: float) -> bool:
    """Whether the instances could compute the traffic at their best batch, queueing aside."""
    return sum(n * c.relaxed for c, n in counts.items()) >= SAFETY * rate


def multisets(columns: list[Column], most: int, below: float) -> Iterator[dict[Column, int]]:
    """Every choice of 1 to `most` columns that costs less than `below`, repetition allowed, as counts."""

    def more(start: int, left: int, money: float) -> Iterator[dict[Column, int]]:
        for i in range(start, len(columns)):
            for n in range(1, left + 1):
                if n * columns[i].price >= money:
                    break
                yield {columns[i]: n}
                for rest in more(i + 1, left - n, money - n * columns[i].price):
                    yield {columns[i]: n, **rest}

    yield from more(0, most, below)


def on_other_seeds(problem: Problem, checker: SloChecker, plan: Plan) -> dict[str, Any]:
    """The plan under `OTHERS` seeds that neither chose nor judged it: by how much it misses a target, on the whole and
    with the seed that is worst, and with how many of them it misses one at all.
    """
    verdicts = [checker(plan.instances, plan.scale, seed=problem.seed + 5_000_000 + i) for i in range(OTHERS)]
    together = [mean_of([v.latency[c.name] for v in verdicts]) for c in problem.classes]
    return {
        "misses_by": round(max(max(x.used for x in together) - 1, 0.0), 4),
        "worst_seed_misses_by": round(max(max(v.used() for v in verdicts) - 1, 0.0), 4),
        "seeds_that_miss": sum(v.used() > 1 for v in verdicts),
    }


def compare(seed: int, cores: int = 1) -> dict[str, Any]:
    """The planner and brute force, on `cores` processes, on one random problem: costs, their ratio, seconds, and the
    plan on other seeds."""
    problem = random_problem(seed)
    checker = SloChecker(problem, problem.models[0])
    begin = time.perf_counter()
    try:
        plan = solve(problem, alternatives=False, checkers={problem.models[0].name: checker})
    except ValueError as error:
        plan, why = None, str(error)
    middle = time.perf_counter()
    row: dict[str, Any] = {"seed": seed, "planner_seconds": round(middle - begin, 2)}
    ours = plan.cost_per_hour if plan is not None and plan.meets else None
    least = max(c.usd_per_gpu_hour or 0.0 for c in problem.gpus) * 2 * MOST if ours is None else ours
    force = Force(problem, checker, cores)
    best = force.best(least)
    if best is None and ours is not None:
        best = ours
    after = time.perf_counter()
    row |= {
        "cost": ours,
        "optimum": best,
        "ratio": None if ours is None or best is None else round(ours / best, 4),
        "meets": None if plan is None else plan.meets,
        "instances": 0 if plan is None else sum(i.count for i in plan.instances),
        "link_binds": problem.link.gb_s != 25.0,
        "classes": len(problem.classes),
        "simulations": force.simulated,
        "force_seconds": round(after - middle, 2),
    }
    if plan is None:
        return row | {"why": why}
    if plan.meets:
        row |= on_other_seeds(problem, checker, plan)
    return row | {"plan": [f"{i.count} {i.role} {i.gpu} tp{i.tp} {i.budget}" for i in plan.instances]}
