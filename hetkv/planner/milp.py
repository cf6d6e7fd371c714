"""The integer program: how many instances of each column, with capacities that grow with the pool.

For column j and pool-size range k, `x[j,k]` instances (whole) and `y[j,k]` (binary: the pool is in this range) with
`first[k] y <= x <= last[k] y`; each of them carries `rate[j,k]`. HiGHS solves it, through `scipy.optimize` (exact.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import ceil, floor, inf
from typing import Any

import numpy as np
from scipy.sparse import coo_array, csr_array

from hetkv.errors import UndecidedError
from hetkv.planner.columns import PORT_LOAD, Column
from hetkv.planner.exact import NONE, Answer, Piece, Program, minimise, solved
from hetkv.planner.power import limits_of
from hetkv.planner.problem import Problem
from hetkv.planner.queueing import COUNTS

MERGE = 0.003
"""Pool-size ranges whose rates differ by less are one range, at the lower rate."""

LARGEST = 1_000_000

NODES = 200_000
"""Of HiGHS's search tree, at most: the same work on every machine. Where more were needed, `Solution.gap` is above 0,
or `UndecidedError` is raised."""

SAFETY_SECONDS = 600.0
"""An outer limit by the clock, with the same effect."""


@dataclass(frozen=True)
class Cut:
    """Simulated: `counts` instances of these columns of one model and role miss a target, and so do fewer of each."""

    model: str
    role: str
    counts: Mapping[tuple[Any, ...], int]


@dataclass
class Solution:
    """`counts` instances of each column used, by its key. `value` is USD/hour, or the scale; `bound` HiGHS's bound."""

    counts: dict[tuple[Any, ...], int]
    value: float
    bound: float
    gap: float
    scale: float


@dataclass
class _Rows:
    """A sparse matrix of rows with bounds, built entry by entry."""

    entries: list[tuple[int, int, float]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)

    def add(self, terms: Mapping[int, float], low: float, high: float, shared: bool = False) -> None:
        """`shared`: a limit that joins pools which have nothing else to do with each other."""
        row = len(self.low)
        self.entries += [(row, column, value) for column, value in terms.items() if value]
        self.low.append(low)
        self.high.append(high)
        if shared:
            self.shared.append(row)

    def matrix(self, width: int) -> csr_array:
        rows, columns, values = zip(*self.entries, strict=True)
        return coo_array((values, (rows, columns)), shape=(len(self.low), width)).tocsr()


@dataclass
class _Variables:
    cost: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)

    def add(self, high: float, whole: bool = True, cost: float = 0.0) -> int:
        self.cost.append(cost)
        self.high.append(high)
        self.whole.append(int(whole))
        return len(self.cost) - 1


def ranges(column: Column, relaxed: bool) -> list[tuple[int, int, float]]:
    """(first, last, rate) of the pool sizes at which one instance carries `rate`; sizes that carry nothing left out."""
    if relaxed:
        return [(1, LARGEST, column.relaxed)] if column.relaxed > 0 else []
    found: list[tuple[int, int, float]] = []
    for i, (count, rate) in enumerate(zip(COUNTS, column.rates.tolist(), strict=True)):
        last = COUNTS[i + 1] - 1 if i + 1 < len(COUNTS) else LARGEST
        if found and rate <= found[-1][2] * (1 + MERGE):
            found[-1] = (found[-1][0], last, found[-1][2])
        elif rate > 0:
            found.append((count, last, rate))
    return found


def optimise(
    problem: Problem,
    columns: Sequence[Column],
    rates: Mapping[str, float],
    kv_bytes: Mapping[str, float],
    *,
    relaxed: bool = False,
    cuts: Sequence[Cut] = (),
) -> Solution | None:
    """The best counts, None where there are none. `rates` are requests/s of each model, `kv_bytes` of one request.

    With the goals `goodput` and `split`, `value` is the largest multiple of `rates`. `UndecidedError` where `NODES`
    or `SAFETY_SECONDS` end before either is known.
    """
    return _Milp(problem, columns, rates, kv_bytes, relaxed, cuts).solve()


WAYS = 4
"""Programs, at most, into which one is cut by whether each model is disaggregated: a mixture makes weak relaxations."""


class _Milp:
    def __init__(
        self,
        problem: Problem,
        columns: Sequence[Column],
        rates: Mapping[str, float],
        kv_bytes: Mapping[str, float],
        relaxed: bool,
        cuts: Sequence[Cut],
    ) -> None:
        self.problem, self.columns, self.rates, self.relaxed = problem, columns, rates, relaxed
        self.variables, self.rows = _Variables(), _Rows()
        self.for_cost = problem.objective.goal == "cost"
        self.x: dict[tuple[Any, ...], dict[int, float]] = {}  # column -> its x variables, each with its rate
        self.y: dict[tuple[Any, ...], list[int]] = {}
        self.split: dict[str, int] = {}  # model -> 1 where it is disaggregated
        self.pieces: list[Piece] = []
        self.scale = self.variables.add(1.0 if self.for_cost else inf, whole=False, cost=0.0 if self.for_cost else -1.0)
        if self.for_cost:
            self.rows.add({self.scale: 1.0}, 1.0, 1.0)
        for column in columns:
            self._column(column)
        for model in rates:
            self._model(model, kv_bytes[model])
        self._gpus()
        for cut in cuts:
            self._cut(cut)

    def _allowed(self, column: Column) -> int:
        """More instances than this nobody may have."""
        offer = self.problem.offer(column.gpu)
        most = LARGEST if offer.cap is None else offer.cap // column.gpus
        budget = self.problem.objective.budget_usd_per_hour
        if budget is not None:
            most = min(most, floor(budget / column.price))
        return most

    def _useful(self, column: Column, rate: float) -> int:
        """More instances than this, at this rate each, never help."""
        if not self.for_cost:
            return LARGEST
        return ceil(self.rates[column.model] / rate) + 1 + self.problem.spare_instances

    def _column(self, column: Column) -> None:
        pieces = ranges(column, self.relaxed)
        alone = column.role == "aggregated" or self.problem.spare_instances or self.problem.pair_limits
        xs: dict[int, float] = {}
        ys = []
        price = column.price if self.for_cost and self.problem.offer(column.gpu).rent == "gpu" else 0.0
        allowed, enough = self._allowed(column), False
        for first, last, rate in pieces:
            useful = self._useful(column, rate)
            if first > allowed or (enough and first > useful):
                break
            enough = enough or last >= useful
            # The least pool that carries so much each may be larger than what would do if smaller ones did, too.
            last = min(last, allowed, max(useful, first))
            x = self.variables.add(last, cost=price)
            xs[x] = rate
            self.pieces.append(Piece(x, None, 1))
            if len(pieces) > 1 or first > 1 or alone:
                y = self.variables.add(1)
                ys.append(y)
                self.pieces[-1] = Piece(x, y, first)
                self.rows.add({x: 1.0, y: -last}, -inf, 0.0)
                self.rows.add({x: 1.0, y: -first}, 0.0, inf)
        if len(ys) > 1:
            self.rows.add(dict.fromkeys(ys, 1.0), -inf, 1.0)
        self.x[column.key], self.y[column.key] = xs, ys

    def _capacity(self, model: str, role: str) -> dict[int, float]:
        """Requests/s of a role, less what one spare instance may carry."""
        terms: dict[int, float] = {}
        mine = [c for c in self.columns if (c.model, c.role) == (model, role)]
        for column in mine:
            terms.update(self.x[column.key])
        if self.problem.spare_instances and mine:
            lost = self.variables.add(inf, whole=False)
            terms[lost] = -1.0
            for column in mine:
                for y, loss in zip(self.y[column.key], losses(column, self.relaxed), strict=False):
                    self.rows.add({lost: 1.0, y: -loss}, 0.0, inf)
        return terms

    def _model(self, model: str, kv_bytes: float) -> None:
        """Every request is served: by prefill and decode instances, or by aggregated ones."""
        rate = self.rates[model]
        separate, both = (
            [c for c in self.columns if c.model == model and (c.role == "aggregated") is x] for x in (False, True)
        )
        split = self.split[model] = self.variables.add(1.0 if separate else 0.0)
        if not both:
            self.rows.add({split: 1.0}, 1.0, 1.0)
        most = rate if self.for_cost else self._largest(model)
        for role in ("prefill", "decode"):
            terms = self._capacity(model, role)
            if self.for_cost:
                self.rows.add({**terms, split: -rate}, 0.0, inf)
            else:
                self.rows.add({**terms, self.scale: -rate, split: -most}, -most, inf)
        if both:
            terms = self._capacity(model, "aggregated")
            if self.for_cost:
                self.rows.add({**terms, split: rate}, rate, inf)
            else:
                self.rows.add({**terms, self.scale: -rate, split: most}, 0.0, inf)
            chosen = [y for c in both for y in self.y[c.key]]
            self.rows.add({**dict.fromkeys(chosen, 1.0), split: len(chosen)}, -inf, len(chosen))
            for size in {c.key[:-1] for c in both}:  # instances of one size have one setting
                same_size = [y for c in both if c.key[:-1] == size for y in self.y[c.key]]
                self.rows.add(dict.fromkeys(same_size, 1.0), -inf, 1.0)
        fabric = self.problem.link.fabric_gb_s
        if fabric is not None and separate:
            carried = PORT_LOAD * fabric * 1e9 / kv_bytes
            if self.for_cost:
                self.rows.add({split: rate}, -inf, carried)
            else:
                self.rows.add({self.scale: rate, split: most}, -inf, carried + most)
        self._pairs(model, kv_bytes, most)

    def _largest(self, model: str) -> float:
        """A rate that no plan exceeds."""
        best: dict[str, float] = defaultdict(float)
        for column in self.columns:
            if column.model == model:
                top = max((r for _, _, r in ranges(column, self.relaxed)), default=0.0)
                best[column.role] += top * self._allowed(column)
        return max(best.values(), default=0.0) + 1.0

    def _pairs(self, model: str, kv_bytes: float, most: float) -> None:
        """KV between two GPU types is at most what either side carries: one of the two stays below the limit."""
        for pair in self.problem.pair_limits:
            carried = PORT_LOAD * pair.gb_s * 1e9 / kv_bytes
            sides = []
            for role, gpu in (("prefill", pair.prefill), ("decode", pair.decode)):
                terms: dict[int, float] = {}
                for c in self.columns:
                    if (c.model, c.role, c.gpu) == (model, role, gpu):
                        terms.update(self.x[c.key])
                sides.append(terms)
            if not all(sides):
                continue
            choice = self.variables.add(1)  # 1: the prefill side is the small one
            large = max(most, 1.0) * 4 + max(t * self.variables.high[x] for s in sides for x, t in s.items())
            self.rows.add({**sides[0], choice: large}, -inf, carried + large)
            self.rows.add({**sides[1], choice: -large}, -inf, carried)

    def _gpus(self) -> None:
        """Caps, whole nodes, the budget, power and carbon."""
        spent: dict[int, float] = {}
        paid: dict[str, dict[int, float]] = {}
        for offer in self.problem.gpus:
            used = {x: float(c.gpus) for c in self.columns if c.gpu == offer.gpu for x in self.x[c.key]}
            if not used:
                continue
            if offer.cap is not None:
                self.rows.add(used, -inf, offer.cap, shared=True)
            price = self.problem.usd_per_gpu_hour(offer)
            if offer.rent == "node":
                size = offer.gpus_per_node or 1
                nodes = self.variables.add(LARGEST, cost=price * size if self.for_cost else 0.0)
                self.rows.add({**used, nodes: -size}, -inf, 0.0)
                paid[offer.gpu] = {nodes: float(size)}
            else:
                paid[offer.gpu] = used
            spent.update({x: price * n for x, n in paid[offer.gpu].items()})
        for limit in limits_of(self.problem):
            terms = {x: limit.each[gpu] * n for gpu, own in paid.items() for x, n in own.items()}
            self.rows.add(terms, -inf, limit.most, shared=True)
        budget = self.problem.objective.budget_usd_per_hour
        if budget is not None:
            self.rows.add(spent, -inf, budget, shared=True)

    def _cut(self, cut: Cut) -> None:
        """At least one column of the role has more instances than when it failed, or the role is not used."""
        some: dict[int, float] = {}
        for column in self.columns:
            if (column.model, column.role) != (cut.model, cut.role):
                continue
            more = self.variables.add(1)
            enough = cut.counts.get(column.key, 0) + 1
            self.rows.add({**dict.fromkeys(self.x[column.key], 1.0), more: -enough}, 0.0, inf)
            some[more] = 1.0
        if some:  # or the model is served the other way
            split, other = self.split[cut.model], cut.role == "aggregated"
            self.rows.add({**some, split: 1.0 if other else -1.0}, 1.0 if other else 0.0, inf)

    def solve(self) -> Solution | None:
        width = len(self.variables.cost)
        if not any(self.x.values()):
            return None
        program = Program(
            np.array(self.variables.cost),
            np.array(self.variables.whole),
            np.zeros(width),
            np.array(self.variables.high),
            self.rows.matrix(width),
            np.array(self.rows.low),
            np.array(self.rows.high),
            self.pieces,
            self.rows.shared,
        )
        found = self._best(program)
        if found.v is None:
            if found.bound == inf:
                return None
            raise UndecidedError(
                f"the integer program: HiGHS found no counts within {NODES:,} nodes and {SAFETY_SECONDS:g} s, "
                "nor that there are none"
            )
        v = found.v
        # Instances of the way that was not chosen are free in a node that is paid for: leave them out.
        counts = {
            key: round(sum(v[x] for x in xs))
            for key, xs in self.x.items()
            if (key[1] == "aggregated") == (v[self.split[key[0]]] < 0.5)
        }
        sign = 1.0 if self.for_cost else -1.0
        return Solution(
            counts={key: n for key, n in counts.items() if n},
            value=sign * found.value,
            bound=sign * found.bound,
            gap=max(found.value - found.bound, 0.0) / max(abs(found.value), 1e-9),
            scale=float(v[self.scale]),
        )

    def _best(self, program: Program) -> Answer:
        """The least solution of all ways to serve the models, each by itself; `NONE` where there is none."""
        options = {"mip_rel_gap": 0.0, "node_limit": NODES, "time_limit": SAFETY_SECONDS}
        if not self.for_cost:
            return solved(program, options)
        program = program.fixed({self.scale: 1.0})
        ways = [program]
        both = [m for m in self.rates if len({c.role == "aggregated" for c in self.columns if c.model == m}) == 2]
        if both and 2 ** len(both) <= WAYS:
            ways = [
                program.fixed(self._way(dict(zip(both, way, strict=True))))
                for way in product((1.0, 0.0), repeat=len(both))
            ]
        best, bound = NONE, inf
        for way in ways:
            found = minimise(way, options, best.value)
            bound = min(bound, found.bound)
            if found.value < best.value:
                best = found
        return Answer(best.v, best.value, min(bound, best.value))

    def _way(self, split: Mapping[str, float]) -> dict[int, float]:
        """What is fixed where each of these models is disaggregated (1) or not (0)."""
        fixed = {self.split[model]: value for model, value in split.items()}
        for (model, role, *_), xs, ys in ((key, xs, self.y[key]) for key, xs in self.x.items()):
            if model in split and (role == "aggregated") == (split[model] > 0):
                fixed.update(dict.fromkeys((*xs, *ys), 0.0))
        return fixed


def losses(column: Column, relaxed: bool) -> list[float]:
    """For each range: the most requests/s that a pool of a size in it loses with one instance."""
    found, before = [], 0.0
    for first, _, rate in ranges(column, relaxed):
        found.append(max(rate, rate * first - before * (first - 1)))
        before = rate
    return found
