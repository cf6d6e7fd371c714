"""Mélange's integer program: every slice of the traffic goes to one GPU type, each type serves whole requests.

Griggs et al., "Mélange: Cost Efficient Large Language Model Serving by Exploiting GPU Heterogeneity" (arXiv
2404.14527): requests fall into buckets by prompt and output length, each bucket is cut into slices, and a slice of
rate r on a GPU type takes r / MaxTput of one GPU's capacity, where MaxTput is the highest throughput with requests of
that size whose mean TPOT is within its limit. The program buys the cheapest GPUs whose capacities hold the slices:

    min sum_j c_j B_j   with   sum_j A_ij = 1,   sum_i A_ij r_i / MaxTput_ij <= B_j,   A binary, B whole.

Slices of one bucket are equal, so that `A` counts them here. MaxTput, which the paper profiles, is read from the step
model. TTFT and percentiles are not part of the method. Every TP and PP of a GPU is a type of its own, which is kinder
than the paper.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetkv.planner.baselines.candidates import Candidate, candidates
from hetkv.planner.problem import ModelSpec, Problem, WorkloadClass
from hetkv.planner.result import Instances
from hetkv.planner.traffic import samples

EDGES = (1, 25, 100, 250, 500, 1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 128_000)
"""Bounds of the buckets, in tokens, for prompts and outputs."""

SLICES = 8
"""Slices of a bucket."""

SECONDS = 20.0
"""Time limit of the solver for one model."""


class Bucket(NamedTuple):
    """Requests of one class and about one size: mean lengths, and requests/s at the problem's rates."""

    spec: WorkloadClass
    prompt: float
    output: float
    rate: float


class Melange:
    """The profile of a problem; calling it solves the program for a multiple of the problem's rates."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.profiles: list[tuple[ModelSpec, list[Bucket], list[Candidate], NDArray[np.float64]]] = []
        for model in problem.models:
            engine = problem.engine_for(model)
            found = buckets(problem.classes_of(model.name))
            types = candidates(problem, model)
            rates = np.array([[max_rate(c, b, engine.max_num_seqs) for c in types] for b in found])
            self.profiles.append((model, found, types, rates))

    def __call__(self, scale: float = 1.0) -> list[Instances] | None:
        """The instances for `scale` times the rates; None where a bucket's TPOT can be met on no type."""
        chosen: list[Instances] = []
        for model, found, types, rates in self.profiles:
            if not types or not (rates > 0).any(axis=1).all():
                return None
            counts = solve(model, found, types, rates, scale)
            if counts is None:
                return None
            chosen += [c.instances("aggregated", n) for c, n in zip(types, counts, strict=True) if n]
        return chosen


def buckets(classes: list[WorkloadClass]) -> list[Bucket]:
    """The classes' sampled requests by size; a bucket stands for its mean size."""
    found = []
    for sample in samples(classes):
        prompts, outputs = sample.prompts, sample.others
        places = np.digitize(prompts, EDGES) * len(EDGES) + np.digitize(outputs, EDGES)
        for place in np.unique(places):
            here = places == place
            rate = sample.spec.rate * float(here.mean())
            found.append(Bucket(sample.spec, float(prompts[here].mean()), float(outputs[here].mean()), rate))
    return found


def max_rate(candidate: Candidate, bucket: Bucket, places: int) -> float:
    """Requests/s of one instance with requests of the bucket's size, mean TPOT within the limit; 0 where it cannot be.

    With `b` requests in flight each output token takes one step, and a prompt is computed every `output / b` steps.
    """
    steps, prompt, output = candidate.steps, bucket.prompt, bucket.output
    each = max(output - 1, 1.0)
    alone = steps.step_seconds(0, 0.0, round(prompt), prompt * (prompt + 1) / 2)
    room = min(places, int(steps.kv_room / steps.kv.bytes(prompt + output)))
    best = 0.0
    for batch in sorted({round(b) for b in np.geomspace(1, max(room, 1), 60)}):
        tpot = steps.step_seconds(batch, batch * (prompt + output / 2)) + batch * alone / each
        if batch <= room and 1e3 * tpot <= bucket.spec.tpot_ms:
            best = max(best, batch / (each * tpot))
    return best


def solve(
    model: ModelSpec, found: list[Bucket], types: list[Candidate], rates: NDArray[np.float64], scale: float
) -> list[int] | None:
    """How many instances of each type; None where the caps leave too few."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    slices, kinds = len(found), len(types)
    size = slices * kinds + kinds  # A by bucket and type, then B
    loads = np.divide(scale / SLICES, rates, out=np.zeros_like(rates), where=rates > 0)
    loads *= np.array([[b.rate] for b in found])
    each, within = lil_matrix((slices, size)), lil_matrix((kinds, size))
    for i in range(slices):
        each[i, i * kinds : (i + 1) * kinds] = 1
        for j in range(kinds):
            within[j, i * kinds + j] = loads[i, j]
    for j in range(kinds):
        within[j, slices * kinds + j] = -1
    offers = {c.offer.gpu: c.offer for c in types}
    caps = lil_matrix((len(offers), size))
    for row, gpu in enumerate(offers):
        for j, c in enumerate(types):
            caps[row, slices * kinds + j] = c.gpus if c.offer.gpu == gpu else 0
    limits = [np.inf if o.cap is None else float(o.cap) for o in offers.values()]
    answer = milp(
        np.concatenate([np.zeros(slices * kinds), [c.price for c in types]]),
        constraints=[
            LinearConstraint(each.tocsr(), SLICES, SLICES),
            LinearConstraint(within.tocsr(), -np.inf, 0),
            LinearConstraint(caps.tocsr(), -np.inf, limits),
        ],
        integrality=np.ones(size),
        bounds=Bounds(0, np.concatenate([np.where(rates > 0, SLICES, 0).ravel(), np.full(kinds, np.inf)])),
        options={"time_limit": SECONDS},
    )
    if answer.x is None:
        return None
    return [round(x) for x in answer.x[slices * kinds :]]
