"""DistServe's placement search: the best parallelism of each phase by simulation, then as many as the rate needs.

Zhong et al., "DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model Serving",
OSDI 2024 (arXiv 2401.09670), Algorithm 1 (high node-affinity): for each phase on its own, every (TP, PP) that fits is
simulated, the highest rate that attains the phase's target is found by bisection, and the parallelism with the most
goodput per GPU is replicated until the rate is met. KV transfer is taken to be free.

A cluster there is of one GPU type. `mixed` is our extension, kinder than the paper: each phase takes the GPU type with
the most goodput per dollar.
"""

from __future__ import annotations

from copy import copy
from math import ceil
from typing import Literal

import numpy as np

from hetkv.costmodel import StepModel
from hetkv.planner.baselines.candidates import Candidate, candidates, hourly
from hetkv.planner.problem import ModelSpec, Problem, WorkloadClass
from hetkv.planner.result import Instances
from hetkv.planner.slo_checker import run
from hetkv.planner.traffic import Mix
from hetkv.simulator.deployment import Plan as Deployment
from hetkv.simulator.deployment import PoolPlan
from hetkv.simulator.request import FINISHED
from hetkv.simulator.scaled import ScaledStepModel

Phase = Literal["prefill", "decode"]
REQUESTS = 1000
"""In one simulation; the paper's simulator takes hundreds."""

RESOLUTION = 0.02
"""Bisection ends where the bracket is this much of the rate."""


class OnlyDecode(ScaledStepModel):
    """Step times of an instance that is given its KV: prompts take no time."""

    def __init__(self, steps: StepModel) -> None:
        super().__init__(steps, "value")
        self.stages = 1  # no prompt passes through them

    def step_seconds(
        self, decode_batch: int, decode_context: float, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> float:
        return self.model.step_seconds(decode_batch, decode_context) if decode_batch else 1e-9


class DistServe:
    """The search for a problem; calling it sizes the deployment for a multiple of the problem's rates."""

    def __init__(self, problem: Problem, mixed: bool = False) -> None:
        self.problem, self.mixed = problem, mixed
        self.goodputs: dict[str, dict[Phase, list[tuple[Candidate, float]]]] = {}
        for model in problem.models:
            found = candidates(problem, model)
            self.goodputs[model.name] = {
                phase: [(c, rate) for c in found if (rate := goodput(problem, model, c, phase)) > 0]
                for phase in ("prefill", "decode")
            }

    def __call__(self, scale: float = 1.0) -> list[Instances] | None:
        """The instances for `scale` times the rates; None where no GPU type can."""
        chosen: list[Instances] = []
        for phases in self.goodputs.values():
            options = [self._sized(phases, gpus, scale) for gpus in self._types()]
            fits = [o for o in options if o is not None and hourly(self.problem, [*chosen, *o]) < float("inf")]
            if not fits:
                return None
            chosen += min(fits, key=lambda o: hourly(self.problem, o))
        return chosen

    def also_mixed(self) -> DistServe:
        """The same simulations, with a GPU type of its own for each phase."""
        other = copy(self)
        other.mixed = True
        return other

    def _types(self) -> list[set[str]]:
        names = [offer.gpu for offer in self.problem.gpus]
        return [set(names)] if self.mixed else [{name} for name in names]

    def _sized(
        self, phases: dict[Phase, list[tuple[Candidate, float]]], gpus: set[str], scale: float
    ) -> list[Instances] | None:
        found = []
        for phase, goodputs in phases.items():
            own = [(c, rate) for c, rate in goodputs if c.offer.gpu in gpus]
            if not own:
                return None
            best, rate = max(own, key=lambda pair: pair[1] / (pair[0].price if self.mixed else pair[0].gpus))
            found.append(best.instances(phase, ceil(scale / rate - 1e-9)))
        return found


def goodput(problem: Problem, model: ModelSpec, candidate: Candidate, phase: Phase) -> float:
    """The largest multiple of the model's rates at which one instance alone attains every class's target of `phase`."""
    classes = problem.classes_of(model.name)
    low, high = 0.0, 1 / _busy(classes, candidate, phase)
    if not attains(problem, model, candidate, phase, classes, high / 1000):
        return 0.0
    while high - low > RESOLUTION * high:
        middle = (low + high) / 2
        if attains(problem, model, candidate, phase, classes, middle):
            low = middle
        else:
            high = middle
    return low


def _busy(classes: list[WorkloadClass], candidate: Candidate, phase: Phase) -> float:
    """A lower bound on the share of an instance that the rates keep busy: no larger multiple can be served."""
    mix = Mix(classes, count=REQUESTS)
    drawn = list(mix.requests(0))
    steps = candidate.steps
    if phase == "prefill":
        tokens = sum(r.prompt for r in drawn) / len(drawn)
        best = min(steps.step_seconds(0, 0.0, 2**i) / 2**i for i in range(4, 15))
        return float(mix.rate * tokens * best)
    outputs = max(sum(r.output - 1 for r in drawn) / len(drawn), 1e-9)
    best = min(steps.step_seconds(2**i, 0.0) / 2**i for i in range(11))
    return float(mix.rate * outputs * best)


def attains(
    problem: Problem, model: ModelSpec, candidate: Candidate, phase: Phase, classes: list[WorkloadClass], scale: float
) -> bool:
    """Whether one instance attains the targets of `phase` at `scale` times the rates, simulated alone."""
    mix = Mix(classes, scale, REQUESTS, single_token=phase == "prefill")
    pool = PoolPlan("aggregated", candidate.offer.gpu, phase, candidate.tp, candidate.pp)
    plan = Deployment(model.name, [pool], problem.engine_for(model), catalogue=problem.catalogue)
    steps = candidate.steps if phase == "prefill" else OnlyDecode(candidate.steps)
    columns, _ = run(plan, mix, problem.seed, models=lambda pool, engine: steps)
    # A decode instance is late from the moment it has the KV: prompts take no time here, so that is the arrival.
    waited, took = columns["first_token"] - columns["arrival"], columns["last_token"] - columns["arrival"]
    times = waited if phase == "prefill" else took / np.maximum(columns["output"] - 1, 1)
    done = columns["status"] == FINISHED
    kinds = mix.kinds(problem.seed)
    for index, spec in enumerate(classes):
        limit, percentile = (
            (spec.ttft_ms, spec.ttft_percentile) if phase == "prefill" else (spec.tpot_ms, spec.tpot_percentile)
        )
        own = kinds == index
        if own.any() and (done & (1e3 * times <= limit))[own].mean() < percentile / 100:
            return False
    return True
