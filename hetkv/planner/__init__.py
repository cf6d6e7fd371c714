"""The planner: what to buy for a traffic and its targets, and how to split it into prefill and decode.

`solve` is the way in. Imports the cost model and the simulator; neither torch nor the extension.
"""

from __future__ import annotations

from hetkv.planner.problem import Problem, load_problem, parse_problem
from hetkv.planner.result import Plan
from hetkv.planner.solve import InfeasibleError, solve

__all__ = ["InfeasibleError", "Plan", "Problem", "load_problem", "parse_problem", "solve"]
