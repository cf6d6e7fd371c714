"""From a problem to a plan."""

from __future__ import annotations

from hetkv.errors import InputError
from hetkv.planner.problem import Problem
from hetkv.planner.result import Plan


class InfeasibleError(InputError):
    """No deployment of the offered GPUs meets the targets. The text names the tightest constraint."""


def solve(problem: Problem) -> Plan:
    """The best plan for `problem` (see `Objective`)."""
    raise NotImplementedError
