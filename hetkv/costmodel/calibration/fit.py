"""Fitting of the step time's constants to measured times.

Every constant is `start * exp(common + offsets)`: one offset for each level that the rows are grouped by (engine,
dtype, GPU...), each drawn to zero by a normal prior of the level's width. A group that was never measured has offset
zero, so what is predicted for it is what the other groups have in common. The loss is Cauchy's: single rows that no
physics explains do not bend the constants.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hetkv.costmodel.calibration.fit_store import active_store, digest
from hetkv.costmodel.collectives import SWITCH_BYTES
from hetkv.costmodel.efficiency import Constants

Array = NDArray[np.float64]
Values = dict[str, Array]


class Prior(NamedTuple):
    """Start value, bounds, and the log-width of the constant's own prior."""

    start: float
    low: float
    high: float
    width: float


PRIORS: dict[str, Prior] = {
    "gemm_bytes": Prior(0.80, 0.2, 1.0, 0.15),
    "gemm_flops": Prior(0.60, 0.05, 1.0, 0.4),
    "expert_bytes": Prior(0.60, 0.05, 1.0, 0.4),
    "expert_flops": Prior(0.35, 0.02, 1.0, 0.5),
    "few_rows_flops": Prior(1.0, 0.005, 1.0, 1.5),
    "kv_bytes": Prior(0.60, 0.02, 1.0, 0.3),
    "kv_group": Prior(0.0, 0.0, 1.2, 1.0),
    "kv_unsplit": Prior(1.0, 1.0, 10.0, 0.7),
    "attention_flops": Prior(0.40, 0.02, 1.0, 0.5),
    "layer_s": Prior(40e-6, 1e-6, 500e-6, 0.5),
    "sequence_layer_s": Prior(1e-7, 1e-9, 3e-5, 1.0),
    "host_layer_s": Prior(1e-5, 1e-7, 3e-3, 1.0),
    "step_s": Prior(500e-6, 1e-5, 50e-3, 1.0),
    "sequence_s": Prior(15e-6, 1e-7, 2e-3, 0.7),
    "prompt_s": Prior(1e-3, 1e-5, 100e-3, 1.0),
    "prompt_layer_s": Prior(500e-6, 1e-5, 3e-3, 0.3),
    "reduce": Prior(0.60, 0.1, 8.0, 0.5),
    "reduce_latency": Prior(1.0, 0.5, 20.0, 0.3),
    "reduce_large": Prior(1.0, 0.5, 5.0, 0.3),
    "reduce_switch_bytes": Prior(SWITCH_BYTES, 1.0, 1e12, 1.0),
    "front_token_s": Prior(100e-6, 1e-6, 1e-3, 1.0),
    "front_request_s": Prior(10e-3, 1e-4, 0.2, 1.0),
    "interleave": Prior(0.90, 0.4, 1.1, 0.1),
    "burst": Prior(0.05, 0.001, 0.5, 0.7),
    "accept_s": Prior(30e-3, 1e-3, 2.0, 1.0),
    "answer": Prior(1.0, 0.3, 10.0, 0.5),
}
"""Of the step constants, and of the closed loop around them (`hetkv.costmodel.serving`)."""

STEP_NAMES = tuple(item.name for item in fields(Constants))


class Level(NamedTuple):
    """A grouping of rows and the log-width of the offsets between its groups."""

    key: Callable[[Any], Hashable]
    width: float


@dataclass(frozen=True)
class Layout:
    """Which constants are fitted, which are fixed, and which levels each has. `levels[""]` holds for the others."""

    names: tuple[str, ...]
    levels: dict[str, tuple[Level, ...]]
    fixed: dict[str, float]
    priors: dict[str, Prior]

    def of(self, name: str) -> tuple[Level, ...]:
        common = Level(lambda row: "", self.priors[name].width)
        return (common, *self.levels.get(name, self.levels.get("", ())))


def layout(
    names: Sequence[str],
    levels: Mapping[str, tuple[Level, ...]],
    fixed: dict[str, float] | None = None,
    priors: dict[str, Prior] | None = None,
) -> Layout:
    """A layout over `PRIORS`, some of them replaced."""
    return Layout(tuple(names), dict(levels), dict(fixed or {}), {**PRIORS, **(priors or {})})


@dataclass(frozen=True)
class Fitted:
    """Offsets by (constant, level, group). `values` gives the constants of any row, measured or not."""

    layout: Layout
    offsets: dict[tuple[str, int, Hashable], float]

    def value(self, name: str, row: Any) -> float:
        if name in self.layout.fixed:
            return self.layout.fixed[name]
        prior = self.layout.priors[name]
        if name not in self.layout.names:
            return prior.start
        shift = sum(
            self.offsets.get((name, depth, level.key(row)), 0.0) for depth, level in enumerate(self.layout.of(name))
        )
        return float(np.clip(prior.start * np.exp(shift), prior.low, prior.high))

    def values(self, rows: Sequence[Any]) -> Values:
        return {name: np.array([self.value(name, row) for row in rows]) for name in self.layout.priors}

    def constants(self, row: Any) -> Constants:
        return Constants(**{name: self.value(name, row) for name in STEP_NAMES})

    def bounded(self, row: Any) -> tuple[str, ...]:
        """Fitted constants of the step that stopped at a bound of their prior: the data did not set them."""
        found = []
        for name in self.layout.names:
            value, prior = self.value(name, row), self.layout.priors[name]
            inside = prior.low * 1.001 < prior.start < prior.high / 1.001
            if name in STEP_NAMES and inside and not prior.low * 1.001 < value < prior.high / 1.001:
                found.append(name)
        return tuple(found)


STEP = 1e-4


def _robust(error: Array) -> Array:
    return np.asarray(np.sqrt(2 * np.log1p(error * error / 2)))


def fit(
    rows: Sequence[Any],
    residuals: Callable[[Values], Array],
    plan: Layout,
    scale: float = 0.08,
    max_evaluations: int = 60,
) -> Fitted:
    """Fit `plan` to `rows`. `residuals` maps constants (one array element a row) to log(predicted / measured).

    It may return several residuals a row, the first ones of all rows first; a row's residuals depend on its own
    constants only. `scale` is the relative error beyond which a row counts as an outlier.
    """
    columns: list[tuple[str, int, Hashable, float]] = []
    parts: dict[str, list[tuple[int, NDArray[np.int64]]]] = {name: [] for name in plan.names}
    for name in plan.names:
        for depth, level in enumerate(plan.of(name)):
            keys = [level.key(row) for row in rows]
            groups = sorted(set(keys), key=str)
            index = {group: position for position, group in enumerate(groups)}
            parts[name].append((len(columns), np.array([index[key] for key in keys])))
            columns += [(name, depth, group, level.width) for group in groups]
    width = np.array([column[3] for column in columns])
    store = active_store()
    key = digest(rows, plan.names, plan.priors, plan.fixed, columns, scale) if store is not None else ""
    if store is not None and key in store.fits:
        shifts = store.fits[key]
        return Fitted(plan, {column[:3]: shift for column, shift in zip(columns, shifts, strict=True)})
    if store is not None and store.sealed:
        raise LookupError(f"no stored fit {key} for {len(rows)} rows: the data or the layout changed, fit again")
    constant = {
        name: np.full(len(rows), plan.fixed.get(name, prior.start))
        for name, prior in plan.priors.items()
        if name not in plan.names
    }

    def values(x: Array) -> Values:
        found = dict(constant)
        for name in plan.names:
            prior = plan.priors[name]
            shift = sum(x[start + index] for start, index in parts[name])
            found[name] = np.clip(prior.start * np.exp(shift), prior.low, prior.high)
        return found

    def errors(found: Values) -> Array:
        return residuals(found) / scale

    def objective(x: Array) -> Array:
        return np.concatenate([_robust(errors(values(x))), x / width])

    def jacobian(x: Array) -> Array:
        found = values(x)
        start_error = errors(found)
        repeats = len(start_error) // len(rows)
        robust = _robust(start_error)
        weight = np.ones_like(start_error)
        bent = np.abs(start_error) > 1e-6
        weight[bent] = start_error[bent] / (1 + start_error[bent] ** 2 / 2) / robust[bent]
        matrix = np.zeros((len(start_error) + len(columns), len(columns)))
        lines = np.arange(len(start_error))
        for name in plan.names:
            prior = plan.priors[name]
            nudged = np.clip(found[name] * (1 + STEP), prior.low, prior.high)
            slope = (errors({**found, name: nudged}) - start_error) / STEP * weight
            for start, index in parts[name]:
                matrix[lines, start + np.tile(index, repeats)] = slope
        matrix[len(start_error) :] = np.diag(1 / width)
        return matrix

    solution = least_squares(objective, np.zeros(len(columns)), jac=jacobian, max_nfev=max_evaluations)
    shifts = [round(float(shift), 6) for shift in solution.x]
    if store is not None:
        store.fits[key] = shifts
    return Fitted(plan, {column[:3]: shift for column, shift in zip(columns, shifts, strict=True)})
