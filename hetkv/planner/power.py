"""Power and carbon of a plan, from the figures that the user gives for each GPU type, and limits on both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hetkv.planner.problem import GpuOffer, Problem


class Limit(NamedTuple):
    """At most `most` of `unit`, of which one paid GPU of each type takes `each`."""

    name: str
    unit: str
    each: dict[str, float]
    most: float

    def taken(self, paid: Mapping[str, int]) -> float:
        """What `paid` GPUs of each type take."""
        return sum(n * self.each[gpu] for gpu, n in paid.items())

    def keeps(self, paid: Mapping[str, int]) -> bool:
        """Whether they stay within it."""
        return self.taken(paid) <= self.most * (1 + 1e-9)


def kilowatts(offer: GpuOffer) -> float | None:
    """Of one GPU; None without its figure."""
    return None if offer.watts_per_gpu is None else offer.watts_per_gpu / 1e3


def co2_kg_per_hour(offer: GpuOffer) -> float | None:
    """Of one GPU; None without its figures."""
    if offer.watts_per_gpu is None or offer.co2_g_per_kwh is None:
        return None
    return offer.watts_per_gpu / 1e3 * offer.co2_g_per_kwh / 1e3


FIGURES = {"power": ("kW", kilowatts), "carbon": ("kg CO2/hour", co2_kg_per_hour)}


def limits_of(problem: Problem) -> list[Limit]:
    """The limits that the problem sets; its figures were checked."""
    bounds = {"power": problem.limits.kw, "carbon": problem.limits.co2_kg_per_hour}
    found = []
    for name, (unit, of) in FIGURES.items():
        most = bounds[name]
        if most is not None:
            found.append(Limit(name, unit, {o.gpu: of(o) or 0.0 for o in problem.gpus}, most))
    return found


def total(problem: Problem, paid: Mapping[str, int], name: str) -> float | None:
    """Power (kW) or carbon (kg CO2/hour) of a plan's GPUs; None where a GPU of it has no figure."""
    each = {gpu: FIGURES[name][1](problem.offer(gpu)) for gpu in paid}
    if not each or any(x is None for x in each.values()):
        return None
    return sum(n * (each[gpu] or 0.0) for gpu, n in paid.items())


def paid_gpus(problem: Problem, gpus: Mapping[str, int]) -> dict[str, int]:
    """GPUs that are rented for `gpus` of each type: whole nodes where the offer is by node."""
    found = {}
    for name, n in gpus.items():
        offer = problem.offer(name)
        size = (offer.gpus_per_node or 1) if offer.rent == "node" else 1
        found[name] = -(-n // size) * size
    return found
