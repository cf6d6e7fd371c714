"""Integer programs whose relaxation is nearly their answer, solved in parts; the answer is HiGHS's own, sooner.

The reduced costs of the linear relaxation, whose value is `z`, bound every other solution from below: one that uses
variable `j` costs at least `z + reduced[j]`. So first a program of the variables with less than a `window` is solved.
If its answer is within the window, no variable that was left out is in a better one; else the window is widened to that
answer. Variables that only slack limits (`shared` rows) join are solved separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack
from scipy.sparse.csgraph import connected_components

Array = NDArray[np.float64]

WINDOW = 5e-5
"""Of the relaxation's value: how far above it the first program looks."""

ROUNDING = 1e-6
"""Of a value: what HiGHS's tolerances may shift it by. Variables this near to the window stay in."""

SLACK = 0.01
"""Of a shared limit: what the relaxation leaves of it where the parts that it joins are tried separately."""

OPTIMAL, INFEASIBLE = 0, 2
"""Of the status of `scipy.optimize`. 1: time ran out; 4: nodes did, or it has no name."""

LARGEST = 1e300
"""A bound where a limit ended the search: `inf` says that there is no solution."""


class Piece(NamedTuple):
    """Whole variable `x` that is 0 or at least `first`; then the binary `y`, if any, is 1."""

    x: int
    y: int | None
    first: int


@dataclass(frozen=True)
class Program:
    """Least `cost @ v` with `low <= v <= high` and `least <= matrix @ v <= most`; `whole[j]` 1: `v[j]` is an integer.

    `shared` are rows that may be left out and looked at afterwards: limits that join otherwise separate variables.
    """

    cost: Array
    whole: NDArray[np.int64]
    low: Array
    high: Array
    matrix: csr_array
    least: Array
    most: Array
    pieces: Sequence[Piece] = ()
    shared: Sequence[int] = ()

    def fixed(self, values: dict[int, float]) -> Program:
        """The program with some variables at a value."""
        low, high = self.low.copy(), self.high.copy()
        for index, value in values.items():
            low[index] = high[index] = value
        return replace(self, low=low, high=high)

    def part(self, keep: NDArray[np.bool_], rows: NDArray[np.bool_]) -> Program:
        """Of some variables and rows; the other variables are at their lower bounds. Without pieces."""
        taken = self.matrix[:, ~keep] @ self.low[~keep]
        matrix = self.matrix[:, keep]
        rows = rows & (np.diff(matrix.indptr) > 0)
        return Program(
            self.cost[keep],
            self.whole[keep],
            self.low[keep],
            self.high[keep],
            matrix[rows],
            (self.least - taken)[rows],
            (self.most - taken)[rows],
        )


class Answer(NamedTuple):
    """`v` of the least value; `bound` is what no solution goes below. `v` None: not one was found (`bound` `inf`: there
    is none)."""

    v: Array | None
    value: float
    bound: float


NONE = Answer(None, inf, inf)


@dataclass(frozen=True)
class Relaxed:
    """The linear relaxation: its value, its solution, and what each variable costs in addition to that, at least."""

    value: float
    v: Array
    extra: Array


def minimise(program: Program, options: dict[str, Any], best: float = inf) -> Answer:
    """The least solution of `program`, `NONE` where there is none below `best`. `options` are those of `milp`."""
    relaxed = _relax(program)
    if relaxed is None:
        return solved(program, options)  # infeasible, unbounded or hard: HiGHS says which
    if relaxed.value >= best:
        return NONE
    separate = _separately(program, relaxed, options)
    return separate if separate is not None else _within(program, relaxed, options, best)


def solved(program: Program, options: dict[str, Any]) -> Answer:
    """All of it by HiGHS."""
    if not program.cost.size:  # which HiGHS has no word for: a part whose variables are all at their lower bounds
        return Answer(program.low, 0.0, 0.0)
    result = milp(
        program.cost,
        integrality=program.whole,
        bounds=Bounds(program.low, program.high),
        constraints=LinearConstraint(program.matrix, program.least, program.most),
        options=options,
    )
    bound = -inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
    if result.x is None:
        return NONE if result.status == INFEASIBLE else Answer(None, inf, min(bound, LARGEST))
    value = float(result.fun)
    return Answer(result.x, value, value if result.status == OPTIMAL and not isfinite(bound) else bound)


def _relax(program: Program) -> Relaxed | None:
    """The linear relaxation, None where it has no optimum."""
    equal = program.least == program.most
    upper, lower = (program.most < inf) & ~equal, (program.least > -inf) & ~equal
    result = linprog(
        program.cost,
        A_ub=vstack([program.matrix[upper], -program.matrix[lower]]),
        b_ub=np.concatenate([program.most[upper], -program.least[lower]]),
        A_eq=program.matrix[equal],
        b_eq=program.most[equal],
        bounds=np.column_stack([program.low, program.high]),
        method="highs",
    )
    if result.status != 0:
        return None
    reduced = np.maximum(result.lower.marginals, 0.0)
    extra = reduced.copy()
    for x, y, first in program.pieces:
        extra[x] = first * reduced[x]
        if y is not None:
            extra[x] += reduced[y]
            extra[y] = extra[x]
    return Relaxed(float(result.fun), result.x, extra)


def _within(program: Program, relaxed: Relaxed, options: dict[str, Any], best: float) -> Answer:
    """The least solution by the variables that it may have."""
    near = ROUNDING * abs(relaxed.value)
    window = WINDOW * abs(relaxed.value)
    free = program.high > program.low
    every = np.ones(len(program.least), dtype=bool)
    while True:
        keep = free & ((relaxed.extra <= window + near) | (program.whole == 0))
        part = program.part(keep, every)
        answer = solved(part, options)
        constant = float(program.cost[~keep] @ program.low[~keep])
        found = Answer(None, inf, answer.bound + constant)
        if answer.v is not None:
            v = program.low.copy()
            v[keep] = answer.v
            found = Answer(v, answer.value + constant, answer.bound + constant)
        elif answer.bound < inf:
            return found  # a limit ended it
        if not (free & ~keep).any() or min(found.value, best) <= relaxed.value + window + near:
            return found
        window = min(found.value, best) - relaxed.value


def _separately(program: Program, relaxed: Relaxed, options: dict[str, Any]) -> Answer | None:
    """The parts that only slack shared limits join, each by itself; None where there is one part, or where the
    parts together exceed a limit: then their sum is no more than a bound."""
    used = program.matrix @ relaxed.v
    slack = np.zeros(len(used), dtype=bool)
    for row in program.shared:
        slack[row] = used[row] <= program.most[row] * (1 - SLACK)
    free = program.high > program.low
    rows = program.matrix[~slack][:, free]
    count, label = connected_components(abs(rows.T) @ abs(rows), directed=False)
    if count < 2:
        return None
    v, bound = program.low.copy(), float(program.cost @ np.where(free, 0.0, program.low))
    of = np.full(len(free), -1)
    of[free] = label
    for part in range(count):
        mine = of == part
        other = program.fixed({int(j): float(program.low[j]) for j in np.flatnonzero(free & ~mine)})
        own = replace(other, least=np.where(slack, -inf, other.least), most=np.where(slack, inf, other.most))
        alone = _only(own, mine)
        relaxation = _relax(alone)
        if relaxation is None:
            return None
        answer = _within(alone, relaxation, options, inf)
        if answer.v is None:
            return None
        v[mine] = answer.v
        bound += answer.bound
    used = program.matrix @ v
    room = ROUNDING * np.maximum(np.abs(np.where(np.isfinite(program.most), program.most, 0.0)), 1.0)
    if (used[slack] > (program.most + room)[slack]).any():
        return None
    return Answer(v, float(program.cost @ v), bound)


def _only(program: Program, mine: NDArray[np.bool_]) -> Program:
    """`program.part` with the pieces of those variables."""
    at = np.cumsum(mine) - 1
    pieces = [Piece(int(at[p.x]), None if p.y is None else int(at[p.y]), p.first) for p in program.pieces if mine[p.x]]
    return replace(program.part(mine, np.ones(len(program.least), dtype=bool)), pieces=pieces)
