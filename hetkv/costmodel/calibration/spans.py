"""Intervals of measured over predicted time: a prior's for no rows, conformal quantiles for many, a mixture between.

With `n` errors of rows that their prediction did not see, a new row's error is taken from a mixture: the prior with
weight `a` and the `n` errors with weight 1 each, over `a + n`. That is the predictive distribution of a Dirichlet
process with the prior as its base. No shape is assumed for the errors that were seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from hetkv.costmodel.calibration.fit import Array
from hetkv.costmodel.efficiency import Span

MANY = 40
"""Rows from which on the quantiles of the rows themselves are used."""
SHARE = 0.9
POINTS = 200
"""Points that stand for the prior."""


class Spread(NamedTuple):
    """What is known of log errors before a row of the set-up is seen: their standard deviation, worth `rows` rows."""

    deviation: float
    rows: float = 4.0


def conformal(errors: Array) -> Span:
    """Factors that hold 90 % of new rows of the same kind: with `n` rows the (n + 1)/n-fold tail."""
    tail = max(0.0, 1 - 0.95 * (1 + 1 / len(errors)))
    low, high = np.quantile(errors, [tail, 1 - tail])
    return Span(min(0.99, float(np.exp(low))), max(1.01, float(np.exp(high))))


def posterior(errors: Array, prior: Spread) -> Span:
    """The shortest interval that holds 90 % of a new row's error, widened to hold 1.

    `errors` are log(measured / predicted) of rows left out of their fit. A long tail on one side, as queues have it,
    does not widen the other side.
    """
    if len(errors) >= MANY:
        return conformal(errors)
    prior_points = prior.deviation * norm.ppf((np.arange(POINTS) + 0.5) / POINTS)
    points = np.concatenate([errors, prior_points])
    weights = np.concatenate([np.ones(len(errors)), np.full(POINTS, prior.rows / POINTS)])
    order = np.argsort(points)
    points, weights = points[order], weights[order]
    mass = np.cumsum(weights)
    last = np.searchsorted(mass, mass - weights + SHARE * mass[-1] - 1e-9)
    first = np.nonzero(last < len(points))[0]
    best = first[int(np.argmin(points[last[first]] - points[first]))]
    low, high = points[best], points[last[best]]
    return Span(min(0.99, float(np.exp(low))), max(1.01, float(np.exp(high))))


def between_groups(errors: Sequence[Array], freedom: int = 0) -> Span:
    """The central 90 % of errors in a group that was not measured, from those of groups that were each left out.

    Normal errors: each group's median from a normal around zero, its rows around it. `freedom`: number of groups that
    the tails come from, where that is more than those of `errors`. Few groups give wide tails.
    """
    medians = np.array([float(np.median(each)) for each in errors])
    within = float(np.mean([float(np.subtract(*np.quantile(each, [0.75, 0.25]))) / 1.349 for each in errors]))
    variance = float(np.mean(np.square(medians))) * (1 + 1 / len(medians)) + within**2
    half = float(student.ppf(0.95, max(freedom, len(medians)))) * float(np.sqrt(variance))
    return Span(min(0.99, float(np.exp(-half))), max(1.01, float(np.exp(half))))
