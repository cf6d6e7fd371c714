"""How predictions are judged: errors, interval coverage, splits, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetkv.costmodel.calibration.fit import Array
from hetkv.costmodel.calibration.spans import between_groups, conformal
from hetkv.costmodel.efficiency import Span

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """Errors of `n` predictions relative to the measurement; coverage and median width of their 90 % intervals.

    The width is the interval's high end over its low end.
    """

    n: int
    bias: float
    median: float
    mean: float
    p90: float
    coverage: float
    width: float

    def cells(self) -> list[str]:
        return [
            str(self.n),
            f"{self.bias:+.1%}",
            f"{self.median:.1%}",
            f"{self.mean:.1%}",
            f"{self.p90:.1%}",
            f"{self.coverage:.0%}",
            f"{self.width:.2f}",
        ]


HEADER = ["rows", "bias", "median error", "mean", "p90", "in 90 % interval", "width"]


def score(predicted: Array, measured: Array, low: Array, high: Array) -> Score:
    """`low` and `high` are the interval's factors: it spans `predicted * low` to `predicted * high`."""
    relative = predicted / measured - 1
    inside = (measured >= predicted * low) & (measured <= predicted * high)
    error = np.abs(relative)
    return Score(
        len(measured),
        float(np.mean(relative)),
        float(np.median(error)),
        float(np.mean(error)),
        float(np.quantile(error, 0.9)),
        float(np.mean(inside)),
        float(np.median(high / low)),
    )


class Intervals:
    """Factors of measured over predicted time that hold 90 % of the rows, by group where that has enough rows."""

    ENOUGH = 30

    def __init__(self, rows: Sequence[Any], ratio: Array, group: Callable[[Any], Hashable]) -> None:
        self.group = group
        self.common = conformal(np.log(ratio))
        members: dict[Hashable, list[float]] = {}
        for row, value in zip(rows, ratio, strict=True):
            members.setdefault(group(row), []).append(float(value))
        self.own = {key: conformal(np.log(np.array(v))) for key, v in members.items() if len(v) >= self.ENOUGH}

    def of(self, row: Any) -> Span:
        return self.own.get(self.group(row), self.common)

    def factors(self, rows: Sequence[Any], widen: float = 1.0) -> tuple[Array, Array]:
        spans = [self.of(row) for row in rows]
        return np.array([s[0] for s in spans]) / widen, np.array([s[1] for s in spans]) * widen


def folds(rows: Sequence[Any], key: Callable[[Any], Hashable], count: int = 5, seed: int = 0) -> list[Mask]:
    """Masks of held-out rows: every row is held out once, and rows of one key always together."""
    groups = sorted({key(row) for row in rows}, key=str)
    order = np.random.default_rng(seed).permutation(len(groups)) % count
    fold = dict(zip(groups, order, strict=True))
    of_row = np.array([fold[key(row)] for row in rows])
    return [of_row == k for k in range(count)]


def cross_predict(
    rows: Sequence[Any], key: Callable[[Any], Hashable], run: Callable[[Sequence[Any], Sequence[Any]], Array]
) -> Array:
    """Predict every row from a fit without its fold. `run(train, test)` returns one column for each test row."""
    columns: Array | None = None
    for mask in folds(rows, key, seed=1):
        found = run(pick(rows, ~mask), pick(rows, mask))
        if columns is None:
            columns = np.zeros((*found.shape[:-1], len(rows)))
        columns[..., mask] = found
    assert columns is not None
    return columns


def holdouts(rows: Sequence[Any], key: Callable[[Any], Hashable]) -> dict[str, Mask]:
    """One mask for each value of `key`: all its rows are held out."""
    values = np.array([str(key(row)) for row in rows])
    return {value: values == value for value in sorted(set(values))}


def errors_of(
    rows: Sequence[Any], masks: Sequence[Mask], run: Callable[[Sequence[Any], Sequence[Any]], Array]
) -> Array:
    """log(measured / predicted) of the rows that the masks hold out, each mask with its own fit, else NaN.

    `run(train, test)` returns the errors of `test` from a fit on `train`; its last axis is the rows.
    """
    columns: Array | None = None
    for mask in masks:
        found = run(pick(rows, ~mask), pick(rows, mask))
        if columns is None:
            columns = np.full((*found.shape[:-1], len(rows)), np.nan)
        columns[..., mask] = found
    assert columns is not None
    return columns


def spans_left_out(
    rows: Sequence[Any], errors: Array, masks: Sequence[Mask], key: Callable[[Any], Hashable] | None
) -> tuple[Array, Array]:
    """Factors for each row, from the errors of the rows that its own mask does not hold out.

    With `key` by group where that has rows enough. Without, the masks hold out whole groups (a GPU, a model), and the
    interval has the spread between them.
    """
    low, high = np.ones(len(rows)), np.ones(len(rows))
    for mask in masks:
        if key is None:
            span = between_groups([errors[other] for other in masks if other is not mask])
            low[mask], high[mask] = span
        else:
            kept = ~mask & ~np.isnan(errors)
            spans = Intervals(pick(rows, kept), np.exp(errors[kept]), key)
            low[mask], high[mask] = spans.factors(pick(rows, mask))
    return low, high


def judged(errors: Array, low: Array, high: Array, rows: Mask | None = None) -> Score:
    """The score of rows with these errors (log of measured over predicted) and interval factors; NaN is left out."""
    kept = ~np.isnan(errors) if rows is None else rows & ~np.isnan(errors)
    return score(np.exp(-errors[kept]), np.ones(int(kept.sum())), low[kept], high[kept])


def pick(rows: Sequence[Any], mask: Mask) -> list[Any]:
    """The rows where `mask` holds."""
    return [row for row, chosen in zip(rows, mask, strict=True) if chosen]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others numbers."""
    head = "| " + " | ".join(header) + " |"
    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(header) - 1)) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(line) + " |" for line in lines)])


def verdict(found: float, target: float) -> str:
    """Whether an error reaches a target, with both numbers."""
    return f"{found:.1%}, target {target:.0%}: {'met' if found <= target else 'not met'}"
