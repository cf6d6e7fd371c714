"""Columns that no best plan needs. docs/planner.md proves each rule; nothing else is dropped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hetkv.planner.columns import Column
from hetkv.planner.power import limits_of
from hetkv.planner.problem import Problem
from hetkv.planner.queueing import COUNTS


def prune(columns: Sequence[Column], problem: Problem) -> list[Column]:
    """The columns that are left, in order. Of equals the first stays."""
    kept: list[Column] = []
    for column in columns:
        if any(dominates(other, column, problem) for other in kept):
            continue
        kept = [other for other in kept if not dominates(column, other, problem)]
        kept.append(column)
    return kept


def dominates(a: Column, b: Column, problem: Problem) -> bool:
    """Whether any number of `b` can be replaced by `a` at no more cost, no more GPUs, and no less capacity."""
    if (a.model, a.role) != (b.model, b.role) or a.key == b.key:
        return False
    if _one_for_one(a, b, problem):
        return True
    return a.role == "decode" and _split(a, b)


def _one_for_one(a: Column, b: Column, problem: Problem) -> bool:
    """Rule 1: one `a` for one `b`, on the same GPU type, or on another one that is sold singly and without a cap."""
    if a.gpu == b.gpu:
        if a.gpus > b.gpus:
            return False
    else:
        offer = problem.offer(a.gpu)
        if offer.cap is not None or offer.rent == "node" or problem.offer(b.gpu).rent == "node" or problem.pair_limits:
            return False
        if a.price > b.price:
            return False
        if any(limit.each[a.gpu] * a.gpus > limit.each[b.gpu] * b.gpus for limit in limits_of(problem)):
            return False
    return bool((a.rates >= b.rates).all())


def _split(a: Column, b: Column) -> bool:
    """Rule 2, decode only: one `b` for several smaller `a` on the same GPUs. No TTFT percentile is at stake there."""
    if a.gpu != b.gpu or b.gpus % a.gpus:
        return False
    parts = b.gpus // a.gpus
    sizes = np.array(COUNTS)
    at = np.searchsorted(sizes, sizes * parts, side="right") - 1
    return bool((parts * a.rates[at] >= b.rates).all())
