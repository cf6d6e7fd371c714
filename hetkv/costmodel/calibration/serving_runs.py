"""Sections of docs/accuracy.md: TTFT and TPOT of real serving runs on Hopper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hetkv.costmodel.calibration.datasets import ServingRow, read_serving
from hetkv.costmodel.calibration.errors import (
    HEADER,
    Intervals,
    Mask,
    cross_predict,
    folds,
    holdouts,
    judged,
    pick,
    spans_left_out,
    table,
    verdict,
)
from hetkv.costmodel.calibration.fit import Array, Fitted, fit
from hetkv.costmodel.calibration.problems import ServingLoops, shape_name
from hetkv.costmodel.calibration.report import section
from hetkv.costmodel.calibration.spans import between_groups
from hetkv.costmodel.catalogue import Catalogue, load_catalogue
from hetkv.costmodel.efficiency import Spans
from hetkv.costmodel.models import model_shape

FILE = "measured/disaggregated_hopper.csv"


def model_of(row: ServingRow) -> str:
    return shape_name(row.model)


def config(row: ServingRow) -> tuple[object, ...]:
    """What makes two rows repeats of each other."""
    split = row.decode, row.prefill
    return row.gpu, row.engine, row.version, model_of(row), row.dtype, split, row.prompt, row.output, row.concurrency


def fit_steps(rows: Sequence[ServingRow], catalogue: Catalogue, models: bool = True) -> Fitted:
    """The constants of the step from TPOT; `models`: each model of a set-up has its own."""
    problem = ServingLoops(rows, catalogue)
    experts = any(model_shape(row.model).experts for row in rows)
    return fit(rows, problem.residuals, problem.layout(experts, models), max_evaluations=20)


def predict(
    train: Sequence[ServingRow], test: Sequence[ServingRow], catalogue: Catalogue, models: bool = True
) -> Array:
    """TTFT and TPOT of `test` in seconds, from a fit on `train`; shape (2, rows)."""
    problem = ServingLoops(train, catalogue)
    steps = fit_steps(train, catalogue, models)
    held = steps.values(train)
    first = fit(train, problem.first_token_residuals(held), problem.first_token_layout(), 0.3)
    values, own = steps.values(test), first.values(test)
    values.update(burst=own["burst"], accept_s=own["accept_s"])
    loop = ServingLoops(test, catalogue).predict(values)
    return np.stack([loop.ttft_s, loop.tpot_s])


def intervals(rows: Sequence[ServingRow], ratios: Array, widen: float) -> Callable[[ServingRow], Spans]:
    """Intervals by (GPU, engine, version, dtype) from measured over predicted TTFT and TPOT of rows left out.

    Runs with at most two requests in flight on each worker hardly queue: their TTFT gives the interval of a prompt.
    """
    decode, queue = (Intervals(rows, ratio, exact_key) for ratio in (ratios[1], ratios[0]))
    alone = np.array([row.concurrency <= 2 * (row.prefill or row.decode).workers for row in rows])
    prefill = Intervals(pick(rows, alone), ratios[0][alone], exact_key)

    def spans(row: ServingRow) -> Spans:
        return Spans(decode.of(row), prefill.of(row), queue.of(row)).widened(widen)

    return spans


def measured(rows: Sequence[ServingRow]) -> Array:
    return np.array([[row.ttft_s for row in rows], [row.tpot_s for row in rows]])


def exact_key(row: ServingRow) -> tuple[object, ...]:
    return row.gpu, row.engine, row.version, row.dtype


class Judged:
    """Errors of TTFT and TPOT of every row, left out in folds, with the factors of their intervals."""

    def __init__(self, rows: list[ServingRow], errors: Array, factors: Sequence[tuple[Array, Array]]) -> None:
        self.rows, self.errors, self.factors = rows, errors, factors

    def lines(self, name: str, mask: Mask | None = None) -> list[list[str]]:
        """A table line for TPOT and one for TTFT."""
        tpot, ttft = (judged(self.errors[i], *self.factors[i], mask).cells() for i in (1, 0))
        return [[name, "TPOT", *tpot], ["", "TTFT", *ttft]]

    def by(self, key: Callable[[ServingRow], str], rows: Mask) -> list[list[str]]:
        """Table lines for each value of `key` among `rows`."""
        lines = []
        for name, mask in holdouts(self.rows, key).items():
            if (mask & rows).any():
                lines += self.lines(name, mask & rows)
        return lines

    def median(self, mask: Mask) -> float:
        return float(np.median(np.abs(np.expm1(-self.errors[1][mask]))))


def by_configuration(rows: list[ServingRow], catalogue: Catalogue) -> Judged:
    """Configurations left out, in the folds whose errors the shipped entries have."""
    errors = np.log(measured(rows) / cross_predict(rows, config, lambda a, b: predict(a, b, catalogue)))
    masks = folds(rows, config, seed=1)
    return Judged(rows, errors, [spans_left_out(rows, each, masks, exact_key) for each in errors])


def by_model(rows: list[ServingRow], catalogue: Catalogue) -> Judged:
    """Whole models left out; the interval is the spread between the models of the other folds."""
    errors = np.log(measured(rows) / cross_predict(rows, model_of, lambda a, b: predict(a, b, catalogue, models=False)))
    models = holdouts(rows, model_of)
    factors = []
    for each in errors:
        low, high = np.ones(len(rows)), np.ones(len(rows))
        for mask in folds(rows, model_of, seed=1):
            others = [each[model] for model in models.values() if not (model & mask).any()]
            low[mask], high[mask] = between_groups(others)
        factors.append((low, high))
    return Judged(rows, errors, factors)


def is_dense(row: ServingRow) -> bool:
    return not model_shape(row.model).experts


@section("serving-hopper", 130)
def serving(data: Path) -> str:
    """TPOT and TTFT with configurations and models held out."""
    found, catalogue = read_serving(data / FILE), load_catalogue()
    rows = found.serving
    every = np.full(len(rows), True)
    dense = np.array([is_dense(r) and r.engine != "sglang" and not r.disaggregated for r in rows])
    known, new = by_configuration(rows, catalogue), by_model(rows, catalogue)
    lines = known.lines("configuration (5 folds)", dense)
    lines += new.lines("a whole model", dense) + new.by(lambda r: f"model {model_of(r)}", dense)
    rest = known.lines("all rows")
    rest += known.by(lambda r: "dense" if is_dense(r) else "experts", every)
    rest += known.by(lambda r: f"engine {r.engine}", every)
    rest += known.by(lambda r: "disaggregated" if r.disaggregated else "aggregated", every)
    rest += known.by(lambda r: f"model {model_of(r)}", every)
    rest += new.lines("a whole model left out, all rows")
    detail = known.by(lambda r: f"{model_of(r)} {r.gpu[:4]} {r.engine} {r.version} {r.dtype}", dense)
    taken = ", ".join(f"{n} by `{rule}`" for rule, n in sorted(found.excluded.items()))
    return "\n\n".join(
        [
            "## Serving runs on H100 and H200: TTFT and TPOT",
            f"{len(rows)} rows kept ({taken} left out). Each is a closed loop of requests under one engine; TPOT alone "
            "is fitted, TTFT gets two constants of its own afterwards (the load generator's first burst, and the time "
            "outside the engine's steps). All rows are fitted together.",
            f"Dense models under TensorRT-LLM and vLLM, aggregated ({int(dense.sum())} rows):",
            table(["held out", "time", *HEADER], lines),
            f"- configuration: TPOT {verdict(known.median(dense), 0.12)}.\n"
            f"- a whole model left out: TPOT {verdict(new.median(dense), 0.20)}.",
            "The same rows by model, GPU, engine, version and dtype, configurations held out:",
            table(["rows", "time", *HEADER], detail),
            "All rows, also models with experts, SGLang and disaggregated runs, configurations held out:",
            table(["rows", "time", *HEADER], rest),
            LIMITS,
        ]
    )


LIMITS = """What the lines say:
- The worst dense rows are vLLM 0.12 with fp8 Llama-3.1-8B on H200: at TP 4 and 8 they take less time for a
  long prompt than its products at peak and its all-reduces would, as if part of it were cached. No constant of this
  model explains them.
- TTFT also holds the client's and the load generator's own queueing.
- DeepSeek on H100 disaggregated has decode batches and worker counts that do not fit its concurrency."""
