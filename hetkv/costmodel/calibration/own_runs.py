"""An operator's own measurements: the closest known constants moved to them, with intervals that narrow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from hetkv.costmodel.calibration.datasets import ServingRow
from hetkv.costmodel.calibration.engine_steps import EngineSteps
from hetkv.costmodel.calibration.entries import split
from hetkv.costmodel.calibration.fit import PRIORS, STEP_NAMES, Array, Fitted, Values, fit, layout
from hetkv.costmodel.calibration.logs.observations import Observation, Period, Setup
from hetkv.costmodel.calibration.problems import ServingLoops, shape_name
from hetkv.costmodel.calibration.spans import Spread, posterior
from hetkv.costmodel.catalogue import Catalogue
from hetkv.costmodel.efficiency import Efficiencies, Efficiency, Key, Span, Spans
from hetkv.costmodel.models import model_shape

MOVED = ("gemm_bytes", "gemm_flops", "kv_bytes", "layer_s", "step_s", "sequence_s", "prompt_layer_s", "reduce")
MOVED_EXPERTS = ("expert_bytes", "expert_flops")
MOVED_OTHERS = ("few_rows_flops", "kv_group")
"""Moved too where the GPU itself was not measured: they differ between vendors' kernels."""
FIRST_TOKEN = ("prompt_s", "burst", "accept_s")
ROUNDS = 10
"""At most so many fits without a part of the rows give the errors of rows that a fit did not see."""
STEP, FIRST = Spread(0.15), Spread(0.4)
"""Errors of TPOT and of TTFT on runs left out of the fit to the same set-up: the larger ones of docs/accuracy.md."""
TTFT_WEIGHT = 0.3
"""A TTFT also holds the load generator's own queueing: it moves the constants by this share of what a TPOT does."""


class Problem(Protocol):
    """Measured rows with a prediction for each."""

    def errors(self, values: Values) -> Array:
        """log(measured / predicted) of first tokens and of tokens, NaN where a row has none; shape (2, rows)."""
        ...


Build = Callable[[Sequence[Any]], Problem]


@dataclass(frozen=True)
class Start:
    """Where the fit starts: the known constants, and what may move how far."""

    constants: Mapping[str, float]
    new_gpu: bool
    experts: bool

    def fit(self, rows: Sequence[Any], build: Build) -> Fitted:
        """The constants moved to `rows`: by times of tokens and, with less weight, of first tokens."""
        names = (
            *MOVED,
            *(MOVED_EXPERTS if self.experts else ()),
            *(MOVED_OTHERS if self.new_gpu else ()),
            *FIRST_TOKEN,
        )
        priors = {}
        for name in names:
            known = PRIORS[name]
            start = min(max(self.constants.get(name, known.start), known.low), known.high)
            width = 1.0 if name in FIRST_TOKEN or name == "few_rows_flops" else 0.6 if self.new_gpu else 0.3
            if name == "kv_group":
                start = max(start, 0.01)
            priors[name] = known._replace(start=start, width=width)
        fixed = {name: value for name, value in self.constants.items() if name not in names}
        plan = layout(names, {"": ()}, fixed, priors)
        problem = build(rows)

        def residuals(values: Values) -> Array:
            first, token = problem.errors(values)
            error = np.concatenate([-token, -TTFT_WEIGHT * first])
            return np.where(np.isnan(error), 0.0, error)

        return fit(rows, residuals, plan, 0.1)

    def values(self, count: int) -> Values:
        """The known constants for each of `count` rows, what they lack from the priors."""
        return {name: np.full(count, self.constants.get(name, prior.start)) for name, prior in PRIORS.items()}

    def errors_left_out(self, rows: Sequence[Any], build: Build) -> Array:
        """Errors of each row from a fit without it; shape (2, rows)."""
        errors = np.zeros((2, len(rows)))
        part = np.random.default_rng(0).permutation(len(rows)) % min(ROUNDS, len(rows))
        for index in range(int(part.max()) + 1):
            kept = [row for row, own in zip(rows, part, strict=True) if own != index]
            test = [row for row, own in zip(rows, part, strict=True) if own == index]
            values = self.fit(kept, build).values(test) if kept else self.values(len(test))
            errors[:, part == index] = build(test).errors(values)
        return errors


def start_of(known: Efficiency, gpu: str, tp: int, models: Sequence[str]) -> Start:
    constants = known.constants_at(tp)
    experts = any(model_shape(model).experts for model in models)
    return Start({name: getattr(constants, name) for name in STEP_NAMES}, known.key.gpu != gpu, experts)


def spans_of(errors: Array, alone: Array, known: Spans) -> Spans:
    """Intervals of tokens, of first tokens that did not wait (`alone`), and of all first tokens.

    Where nothing of a kind was measured the known interval stays.
    """
    first, token = errors
    timed = ~np.isnan(first)
    return Spans(
        decode=_span(token[~np.isnan(token)], STEP, known.decode),
        prefill=_span(first[timed & alone], FIRST, known.prefill),
        queue=_span(first[timed], FIRST, known.queue),
    )


def _span(errors: Array, prior: Spread, known: Span) -> Span:
    return posterior(errors, prior) if len(errors) else known


def from_rows(rows: Sequence[ServingRow], known: Efficiencies, catalogue: Catalogue, origin: str) -> list[Efficiency]:
    """Entries from closed loops, one for each (GPU, engine, version, dtype, model), and one for other models there.

    With few rows the priors decide most of it, and the interval is mostly the prior's; both give way as rows are added.
    """
    groups: dict[tuple[str, ...], list[ServingRow]] = defaultdict(list)
    for row in rows:
        groups[(row.gpu, row.engine, row.version, row.dtype, shape_name(row.model))].append(row)

    def build(some: Sequence[ServingRow]) -> ServingLoops:
        return ServingLoops(some, catalogue)

    found: dict[Key, Efficiency] = {}
    for own in sorted(groups.values(), key=len):
        first, gpu = own[0], catalogue.gpu(own[0].gpu)
        shape = model_shape(first.model)
        base = known.find(gpu.name, gpu.vendor, first.engine, first.version, first.dtype, shape.name)
        start = start_of(base, gpu.name, first.decode.tp, [first.model])
        errors, moved = start.errors_left_out(own, build), start.fit(own, build)
        entry = Efficiency(
            key=Key(gpu.name, first.engine, first.version, first.dtype, shape.name),
            constants=moved.constants(first),
            spans=spans_of(errors, loops_alone(own), base.spans),
            provenance=f"{origin}: {len(own)} runs, from {base.key}",
            median_error=float(np.median(np.abs(np.expm1(-errors[1])))),
            rows=len(own),
            models=(shape.name,),
            tps=tuple(sorted({split(row)[0] for row in own})),
            max_batch=max(split(row)[1] for row in own),
            bounded=moved.bounded(first),
        )
        found.update({each.key: each for each in with_other_models(entry)})
    return list(found.values())


def with_other_models(entry: Efficiency) -> list[Efficiency]:
    """The entry of a model, and the same for other models of its set-up: they are named, with a wider interval."""
    return [entry, replace(entry, key=replace(entry.key, model=""))]


def loops_alone(rows: Sequence[ServingRow]) -> Array:
    """Closed loops with at most two requests in flight on each worker: they hardly queue."""
    return np.array([row.concurrency <= 2 * (row.prefill or row.decode).workers for row in rows])


def from_log(
    rows: Sequence[Observation], setup: Setup, known: Efficiencies, catalogue: Catalogue, origin: str
) -> list[Efficiency]:
    """Entries from periods and prompts of one set-up. Its prompts did not wait: the interval of queues stays."""
    gpu, shape = catalogue.gpu(setup.gpu), model_shape(setup.model)
    base = known.find(gpu.name, gpu.vendor, setup.engine, setup.version, setup.dtype, shape.name)
    start = start_of(base, gpu.name, setup.tp, [setup.model])

    def build(some: Sequence[Observation]) -> EngineSteps:
        return EngineSteps(some, setup, catalogue)

    errors, found = start.errors_left_out(rows, build), start.fit(rows, build)
    periods = [row for row in rows if isinstance(row, Period)]
    decode, prefill, _ = spans_of(errors, np.full(len(rows), True), base.spans)
    measured = errors[1] if periods else errors[0]
    entry = Efficiency(
        key=Key(gpu.name, setup.engine, setup.version, setup.dtype, shape.name),
        constants=found.constants(rows[0]),
        spans=Spans(decode, prefill, base.spans.queue),
        provenance=f"{origin}: {len(periods)} periods, {len(rows) - len(periods)} prompts, from {base.key}",
        median_error=float(np.nanmedian(np.abs(np.expm1(-measured)))),
        rows=len(rows),
        models=(shape.name,),
        tps=(setup.tp,),
        max_batch=max(1, int(np.ceil(max(row.running for row in rows)))),
        bounded=found.bounded(rows[0]),
    )
    return with_other_models(entry)
