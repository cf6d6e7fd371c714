"""Small plans: cheaper counts in the order of their cost, until the simulator accepts one.

Queueing formulas are roughest for one to six instances, and there are few enough plans to ask the simulator.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from hetkv.planner.calibrator import Counts, Key, rate_of
from hetkv.planner.columns import Column
from hetkv.planner.trials import NEAR, Candidate, Trials

LARGEST = 8
"""Instances of a role, at most: beyond that the program's plan stands."""

BURSTS = 1.05
"""Share of a TPOT that a decode pool may use after the strongest prefill pool and still be tried after the plan's
own: KV arrives in other bursts there."""

VECTORS = 20_000
"""Count vectors of a role that are listed, cheapest first."""


def cheaper(trials: Trials, model: str, best: Candidate, most: float) -> Candidate:
    """The cheapest plan below `most` USD/hour that meets this model's targets, `best` if none was found.

    The other models' instances stay. Pairs of a prefill and a decode pool, and aggregated pools, are tried in the order
    of their cost; each pool is simulated once, and the plan if both hold. A pool below one that failed is not tried:
    fewer instances serve less.
    """
    rest = {k: n for k, n in best.counts.items() if k[0] != model}
    fixed = trials.price(rest)
    failed: dict[str, list[dict[Key, int]]] = {"prefill": [], "decode": [], "aggregated": []}
    passed: dict[str, set[tuple[tuple[Key, int], ...]]] = {"prefill": set(), "decode": set(), "aggregated": set()}
    ahead = strongest(trials, model)

    def holds(role: str, counts: dict[Key, int]) -> bool:
        name = tuple(sorted(counts.items()))
        if name in passed[role]:
            return True
        if any(all(n <= bad.get(k, 0) for k, n in counts.items()) for bad in failed[role]):
            return False
        plan = {**ahead, **counts} if role == "decode" else counts
        good = trials.calibrator.role(model, plan, role, 1.0).used(role) <= (BURSTS if role == "decode" else NEAR)
        if good:
            passed[role].add(name)
        else:
            failed[role].append(counts)
        return good

    for cost, parts in _by_cost(trials, model, most - fixed):
        if fixed + cost >= most - 1e-9:
            break
        if trials.effort.spent:
            break
        whole = {k: n for part in parts.values() for k, n in part.items()}
        plan = {**rest, **whole}
        if not trials.allowed(plan) or trials.is_barred(plan, 1.0):
            continue
        if not all(holds(role, part) for role, part in parts.items()):
            continue
        candidate = trials.simulate(plan, 1.0)
        if candidate.verdicts[model].meets:
            return candidate
    return best


def strongest(trials: Trials, model: str) -> dict[Key, int]:
    """A prefill pool that is never the bottleneck: twice the rate, of the column that carries most."""
    mine = [c for c in trials.found.columns if (c.model, c.role) == (model, "prefill")]
    if not mine:
        return {}
    column = max(mine, key=lambda c: float(c.rates[0]))
    count = 1
    while rate_of(column, count) < 2 * trials.calibrator.rate(model) and count < 2 * LARGEST:
        count += 1
    return {column.key: count}


def _by_cost(trials: Trials, model: str, most: float) -> Iterator[tuple[float, dict[str, dict[Key, int]]]]:
    """(USD/hour, role to counts) of the plans for a model that cost less than `most`, cheapest first."""
    lists = {}
    for role in ("prefill", "decode", "aggregated"):
        columns = [c for c in trials.found.columns if (c.model, c.role) == (model, role)]
        lists[role] = vectors(columns, trials, trials.calibrator.rate(model), most)
    both = [(cost, {"aggregated": counts}) for cost, counts in lists["aggregated"] if one_budget(counts)]
    first, later = lists["prefill"], lists["decode"]
    heap = [(first[i][0] + later[0][0], i, 0) for i in range(len(first))] if later else []
    heapq.heapify(heap)
    at = 0
    while heap or at < len(both):
        if not heap or (at < len(both) and both[at][0] <= heap[0][0]):
            yield both[at]
            at += 1
            continue
        cost, i, j = heapq.heappop(heap)
        if j + 1 < len(later):
            heapq.heappush(heap, (first[i][0] + later[j + 1][0], i, j + 1))
        yield cost, {"prefill": first[i][1], "decode": later[j][1]}


def vectors(columns: Sequence[Column], trials: Trials, rate: float, most: float) -> list[tuple[float, dict[Key, int]]]:
    """Counts of up to `LARGEST` instances that carry `rate` with queueing relaxed and cost less than `most`, sorted."""
    columns = sorted(columns, key=lambda c: c.price)
    corrected = {c.key: c for c in trials.calibrator.corrected()}
    if LARGEST * max((corrected[c.key].relaxed for c in columns), default=0.0) < rate:
        return []  # a large deployment: none of the thousands of vectors would do
    found: list[tuple[float, dict[Key, int]]] = []
    todo: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())]
    serial = 0
    while todo and len(found) < VECTORS and serial < 20 * VECTORS:
        cost, _, chosen = heapq.heappop(todo)
        counts: dict[Key, int] = {}
        for i in chosen:
            counts[columns[i].key] = counts.get(columns[i].key, 0) + 1
        if chosen and _enough(counts, corrected, rate):
            found.append((trials.price(counts), counts))
        if len(chosen) == LARGEST:
            continue
        for i in range(chosen[-1] if chosen else 0, len(columns)):
            serial += 1
            if cost + columns[i].price < most:
                heapq.heappush(todo, (cost + columns[i].price, serial, (*chosen, i)))
    return sorted(found, key=lambda f: f[0])


def one_budget(counts: Counts) -> bool:
    """Whether no two columns differ in their prompt budget alone: instances of one size have one setting."""
    return len({k[:-1] for k in counts}) == len(counts)


def _enough(counts: Counts, corrected: dict[Key, Column], rate: float) -> bool:
    return sum(n * corrected[k].relaxed for k, n in counts.items()) >= rate
