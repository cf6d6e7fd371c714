"""What every method chooses from: one instance of a model on one of the offered GPUs, and what a set of them costs."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import NamedTuple

from hetkv.costmodel import RooflineStepModel, load_catalogue, load_efficiencies, model_shape
from hetkv.errors import InputError
from hetkv.planner.power import limits_of, paid_gpus
from hetkv.planner.problem import GpuOffer, ModelSpec, Problem
from hetkv.planner.result import Instances
from hetkv.planner.sizes import sizes
from hetkv.simulator.deployment import step_model_of


class Candidate(NamedTuple):
    """One instance. `budget` is the engine's `max_num_batched_tokens`; `price` its USD/hour, or GPUs without prices."""

    model: str
    offer: GpuOffer
    tp: int
    pp: int
    budget: int
    steps: RooflineStepModel
    price: float

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def instances(self, role: str, count: int) -> Instances:
        """`count` of them in `role`."""
        usd = None if self.offer.usd_per_gpu_hour is None else self.price
        return Instances(role, self.offer.gpu, self.tp, self.pp, count, self.model, self.budget, None, usd)  # type: ignore[arg-type]


def candidates(problem: Problem, model: ModelSpec) -> list[Candidate]:
    """Every TP and PP of `model` on every offered GPU that its weights leave room on."""
    catalogue, efficiencies = load_catalogue(problem.catalogue), load_efficiencies(problem.calibration)
    shape = model_shape(model.name)
    found = []
    for offer in problem.gpus:
        engine = problem.engine_for(model, offer)
        for place in sizes(model, offer, shape) if offer.cap != 0 else ():
            if place.dp > 1:
                continue  # none of the methods knows them
            try:
                steps = step_model_of(engine, catalogue.gpu(offer.gpu), shape, place, catalogue, efficiencies)
            except InputError:
                continue  # it does not fit
            price = place.gpus * (1.0 if offer.usd_per_gpu_hour is None else problem.usd_per_gpu_hour(offer))
            size = place.tp, place.pp, engine.max_num_batched_tokens
            found.append(Candidate(model.name, offer, *size, steps, price))
    return found


def hired(problem: Problem, instances: Iterable[Instances]) -> dict[str, int]:
    """GPUs of each type that the instances take: instances never share a GPU, and some offers sell whole nodes only."""
    used: dict[str, int] = {}
    for one in instances:
        used[one.gpu] = used.get(one.gpu, 0) + one.count * one.gpus
    return paid_gpus(problem, used)


def hourly(problem: Problem, instances: Iterable[Instances]) -> float:
    """USD/hour of the instances; GPUs where the problem has no prices; infinite where a cap or a limit is exceeded."""
    total, paid = 0.0, hired(problem, instances)
    if not all(limit.keeps(paid) for limit in limits_of(problem)):
        return inf
    for gpu, count in paid.items():
        offer = problem.offer(gpu)
        if offer.cap is not None and count > offer.cap:
            return inf
        total += count * (1.0 if offer.usd_per_gpu_hour is None else problem.usd_per_gpu_hour(offer))
    return total
