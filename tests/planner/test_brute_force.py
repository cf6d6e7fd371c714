"""Brute force gives one answer, on however many processes."""

from __future__ import annotations

from hetkv.planner.problem import Problem
from hetkv.planner.slo_checker import SloChecker
from tests.planner.brute_force import Force
from tests.planner.cases import small


def one_type() -> Problem:
    return small(gpus=[{"gpu": "MI300X", "usd_per_gpu_hour": 2.0, "basis": "on_demand", "as_of": "2026-05"}])


def test_several_processes_find_what_one_finds() -> None:
    problem = one_type()
    one, two = (Force(problem, SloChecker(problem, problem.models[0]), cores) for cores in (1, 2))
    alone, together = one.best(4.5), two.best(4.5)
    assert alone is not None
    assert alone == together
    assert two.elsewhere > 0
    assert two.simulated >= one.simulated
