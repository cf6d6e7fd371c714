"""An operator's own runs: the closest known constants moved to them, with intervals that narrow as runs are added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from hetkv.costmodel.calibration.datasets import ServingRow
from hetkv.costmodel.calibration.entries import split
from hetkv.costmodel.calibration.fit import PRIORS, STEP_NAMES, Array, Fitted, Level, Prior, Values, fit, layout
from hetkv.costmodel.calibration.problems import ServingLoops
from hetkv.costmodel.calibration.spans import Spread, posterior
from hetkv.costmodel.catalogue import Catalogue
from hetkv.costmodel.efficiency import Efficiencies, Efficiency, Key, Spans
from hetkv.costmodel.models import model_shape

MOVED = ("gemm_bytes", "gemm_flops", "kv_bytes", "layer_s", "step_s", "sequence_s", "prompt_layer_s", "reduce")
MOVED_EXPERTS = ("expert_bytes", "expert_flops")
FIRST_TOKEN = ("prompt_s", "burst", "accept_s")
ROUNDS = 10
"""At most so many fits without a part of the rows give the errors of rows that a fit did not see."""
STEP, FIRST = Spread(0.15), Spread(0.4)
"""Errors of TPOT and of TTFT on runs left out of the fit to the same set-up: the larger ones of docs/accuracy.md."""
TTFT_WEIGHT = 0.3
"""A TTFT also holds the load generator's own queueing: it moves the constants by this share of what a TPOT does."""


def plan_of(
    base: Mapping[str, float], experts: bool, new_gpu: bool
) -> tuple[tuple[str, ...], dict[str, Prior], dict[str, float]]:
    """Names to fit, their priors around `base`, and what stays fixed. A GPU without measurements moves farther."""
    names = (*MOVED, *(MOVED_EXPERTS if experts else ()), *FIRST_TOKEN)
    width = 0.6 if new_gpu else 0.3
    priors = {}
    for name in names:
        known = PRIORS[name]
        start = min(max(base.get(name, known.start), known.low), known.high)
        priors[name] = known._replace(start=start, width=1.0 if name in FIRST_TOKEN else width)
    fixed = {name: value for name, value in base.items() if name not in names}
    return names, priors, fixed


def move(rows: Sequence[ServingRow], base: Mapping[str, float], new_gpu: bool, catalogue: Catalogue) -> Fitted:
    """`base` moved to `rows`: TPOT and, with less weight, TTFT."""
    problem = ServingLoops(rows, catalogue)
    experts = any(model_shape(row.model).experts for row in rows)
    names, priors, fixed = plan_of(base, experts, new_gpu)
    plan = layout(names, {"": (Level(lambda row: "", 1e-6),)}, fixed, priors)

    def residuals(values: Values) -> Array:
        loop = problem.predict(values)
        tpot, ttft = np.log(loop.tpot_s / problem.tpot_s), np.log(loop.ttft_s / problem.ttft_s)
        return np.concatenate([tpot, TTFT_WEIGHT * np.where(problem.has_ttft, ttft, 0.0)])

    return fit(rows, residuals, plan, 0.1)


def errors_left_out(
    rows: Sequence[ServingRow], base: Mapping[str, float], new_gpu: bool, catalogue: Catalogue
) -> Array:
    """log(measured / predicted) of TTFT and TPOT of each row from a fit without it; shape (2, rows)."""
    errors = np.zeros((2, len(rows)))
    rounds = min(ROUNDS, len(rows))
    part = np.random.default_rng(0).permutation(len(rows)) % rounds
    for index in range(rounds):
        kept = [row for row, own in zip(rows, part, strict=True) if own != index]
        test = [row for row, own in zip(rows, part, strict=True) if own == index]
        found = move(kept, base, new_gpu, catalogue) if kept else None
        problem = ServingLoops(test, catalogue)
        values = found.values(test) if found else whole(base, len(test))
        loop = problem.predict(values)
        errors[0, part == index] = np.log(problem.ttft_s / loop.ttft_s)
        errors[1, part == index] = np.log(problem.tpot_s / loop.tpot_s)
    return errors


def whole(base: Mapping[str, float], count: int) -> Values:
    """`base` for each of `count` rows, what it lacks from the priors."""
    return {name: np.full(count, base.get(name, prior.start)) for name, prior in PRIORS.items()}


def spans_of(rows: Sequence[ServingRow], errors: Array) -> Spans:
    """Intervals from errors of rows left out: TPOT, TTFT of runs without a queue, and all TTFT."""
    timed = np.array([row.ttft_s > 0 for row in rows])
    alone = timed & np.array([row.concurrency <= 2 * row.decode.workers for row in rows])
    return Spans(
        decode=posterior(errors[1], STEP),
        prefill=posterior(errors[0][alone], FIRST),
        queue=posterior(errors[0][timed], FIRST),
    )


def from_rows(rows: Sequence[ServingRow], known: Efficiencies, catalogue: Catalogue, origin: str) -> list[Efficiency]:
    """Move the closest known constants to an operator's runs, one entry for each (GPU, engine, version, dtype).

    With few rows the priors decide most of it, and the interval is mostly the prior's; both give way as rows are added.
    """
    groups: dict[Hashable, list[ServingRow]] = defaultdict(list)
    for row in rows:
        groups[(row.gpu, row.engine, row.version, row.dtype)].append(row)
    entries = []
    for own in groups.values():
        first, gpu = own[0], catalogue.gpu(own[0].gpu)
        base = known.find(gpu.name, gpu.vendor, first.engine, first.version, first.dtype)
        start = {name: getattr(base.constants_at(first.decode.tp), name) for name in STEP_NAMES}
        new_gpu = base.key.gpu != gpu.name
        errors = errors_left_out(own, start, new_gpu, catalogue)
        found = move(own, start, new_gpu, catalogue)
        entries.append(
            Efficiency(
                key=Key(gpu.name, first.engine, first.version, first.dtype),
                constants=found.constants(first),
                spans=spans_of(own, errors),
                provenance=f"{origin}: {len(own)} runs, from {base.key}",
                median_error=float(np.median(np.abs(np.expm1(-errors[1])))),
                rows=len(own),
                models=tuple(sorted({model_shape(row.model).name for row in own})),
                tps=tuple(sorted({split(row)[0] for row in own})),
                max_batch=max(split(row)[1] for row in own),
                bounded=found.bounded(first),
            )
        )
    return entries
