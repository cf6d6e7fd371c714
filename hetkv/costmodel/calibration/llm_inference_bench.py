"""Section of docs/accuracy.md: whole-batch latency of LLM-Inference-Bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hetkv.costmodel.calibration import pooled
from hetkv.costmodel.calibration.datasets import BatchRow, read_bench
from hetkv.costmodel.calibration.errors import (
    HEADER,
    Score,
    cross_predict,
    errors_of,
    folds,
    holdouts,
    judged,
    pick,
    score,
    spans_left_out,
    table,
    verdict,
)
from hetkv.costmodel.calibration.fit import Array, Fitted, Prior, fit
from hetkv.costmodel.calibration.problems import StaticBatches
from hetkv.costmodel.calibration.report import section
from hetkv.costmodel.calibration.spans import Spread, between_groups, conformal, posterior
from hetkv.costmodel.catalogue import Catalogue, load_catalogue

FILE = "measured/llm_inference_bench.csv"
SCALE, OWN_SCALE = 0.06, 0.1
POINTS = (5, 20)
DRAWS = 5
OWN_SPREAD = Spread(0.3)
"""Of rows left out of a fit to few: the whole latency holds prompts, tokens and start-up, so wider than TPOT's."""


def config(row: BatchRow) -> tuple[object, ...]:
    return row.gpu, row.engine, row.model, row.tp, row.length, row.batch


def fit_nvidia(rows: Sequence[BatchRow], catalogue: Catalogue) -> Fitted:
    """NVIDIA's GPUs and engines together."""
    problem = StaticBatches(rows, catalogue)
    return fit(rows, problem.residuals, problem.layout(), SCALE)


def fit_own(rows: Sequence[BatchRow], priors: Mapping[str, Prior], catalogue: Catalogue) -> Fitted:
    """One hardware by itself, from the priors of other hardware."""
    problem = StaticBatches(rows, catalogue)
    return fit(rows, problem.residuals, problem.own_layout(priors), OWN_SCALE)


def predict(train: Sequence[BatchRow], test: Sequence[BatchRow], catalogue: Catalogue) -> Array:
    """Latency of `test` in seconds, from a fit on `train`."""
    return StaticBatches(test, catalogue).predict(fit_nvidia(train, catalogue).values(test))


def own_errors(rows: Sequence[BatchRow], priors: Mapping[str, Prior], catalogue: Catalogue) -> Array:
    """log(measured / predicted) of one hardware's rows, each from a fit without its fold."""

    def run(train: Sequence[BatchRow], test: Sequence[BatchRow]) -> Array:
        return StaticBatches(test, catalogue).predict(fit_own(train, priors, catalogue).values(test))

    return np.asarray(np.log(measured(rows) / cross_predict(rows, config, run)))


def measured(rows: Sequence[BatchRow]) -> Array:
    return np.array([row.latency_s for row in rows])


def nvidia_lines(rows: list[BatchRow], catalogue: Catalogue) -> tuple[list[list[str]], list[str]]:
    """Table lines and verdicts of NVIDIA's rows: configurations, GPUs and models held out."""

    def run(train: Sequence[BatchRow], test: Sequence[BatchRow]) -> Array:
        return np.asarray(np.log(measured(test) / predict(train, test, catalogue)))

    lines, verdicts = [], []
    masks = folds(rows, config)
    errors = errors_of(rows, masks, run)
    spans = spans_left_out(rows, errors, masks, lambda r: (r.gpu, r.engine))
    lines.append(["configuration (5 folds)", *judged(errors, *spans).cells()])
    for what, target, of in (("GPU", 0.10, lambda r: r.gpu), ("model", 0.20, lambda r: r.model)):
        groups = holdouts(rows, of)
        errors = errors_of(rows, list(groups.values()), run)
        low, high = spans_left_out(rows, errors, list(groups.values()), None)
        for name, mask in [*groups.items(), (f"a whole {what}, all three", None)]:
            result = judged(errors, low, high, mask)
            label = f"{what} {name}" if mask is not None else name
            lines.append([label, *result.cells()])
            verdicts.append(f"- {label}: {verdict(result.median, target)}.")
    return lines, verdicts


def few_points(rows: list[BatchRow], priors: Mapping[str, Prior], points: int, catalogue: Catalogue) -> Score:
    """Predict `rows` from `priors` moved by `points` of them, drawn `DRAWS` times, with posterior intervals."""
    columns: list[list[Array]] = []
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(rows))
        own, test = [rows[i] for i in order[:points]], StaticBatches([rows[i] for i in order[points:]], catalogue)
        low, high = posterior(left_out(own, priors, catalogue), OWN_SPREAD)
        ones = np.ones(len(test.rows))
        found = test.predict(fit_own(own, priors, catalogue).values(test.rows))
        columns.append([found, test.latency_s, low * ones, high * ones])
    return score(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def left_out(rows: Sequence[BatchRow], priors: Mapping[str, Prior], catalogue: Catalogue) -> Array:
    """log(measured / predicted) of each row from a fit of the others, in at most ten rounds."""
    errors = np.zeros(len(rows))
    part = np.arange(len(rows)) % min(10, len(rows))
    for index in range(part.max() + 1):
        kept, test = pick(list(rows), part != index), StaticBatches(pick(list(rows), part == index), catalogue)
        errors[part == index] = -test.residuals(fit_own(kept, priors, catalogue).values(test.rows))
    return errors


def others(parts: Sequence[pooled.Hardware], catalogue: Catalogue) -> list[list[str]]:
    """Table lines of the hardware that is not NVIDIA's: all its rows in folds, no rows, and few rows."""
    lines = []
    for part in parts:
        if part.vendor == "nvidia":
            continue
        rows, rest = list(part.rows), [other for other in parts if other is not part]
        priors = pooled.pool(rest)
        errors = own_errors(rows, priors, catalogue)
        low, high = conformal(errors)
        ones = np.ones(len(rows))
        whole = score(measured(rows) / np.exp(errors), measured(rows), low * ones, high * ones)
        name = f"{part.name} ({part.engine})"
        lines.append([name, "configuration (5 folds)", *whole.cells()])
        strangers = [other for other in parts if other.vendor != part.vendor]
        span = between_groups(list(pooled.stranger_errors(strangers, catalogue).values()))
        found = measured(rows) / np.exp(pooled.unseen(part, strangers, catalogue))
        lines.append(
            ["", "0 points, other vendors", *score(found, measured(rows), span.low * ones, span.high * ones).cells()]
        )
        for points in POINTS:
            lines.append(["", f"{points} points", *few_points(rows, priors, points, catalogue).cells()])
    return lines


@section("llm-inference-bench", 120)
def bench(data: Path) -> str:
    """Latency with a GPU or a model held out among NVIDIA, and other vendors with few points."""
    found, catalogue = read_bench(data / FILE), load_catalogue()
    nvidia = [row for row in found.bench if row.gpu.startswith("Nvidia")]
    lines, verdicts = nvidia_lines(nvidia, catalogue)
    taken = ", ".join(f"{n} by `{rule}`" for rule, n in sorted(found.excluded.items()))
    return "\n\n".join(
        [
            "## LLM-Inference-Bench: latency of a whole batch",
            f"{len(found.bench)} rows kept, {len(nvidia)} of them NVIDIA ({taken} left out). The one number is prompt "
            "plus all tokens; it cannot separate TTFT from TPOT, and batches that exceed the KV cache run in turns.",
            "NVIDIA (A100 is the 40 GB part), vLLM and TensorRT-LLM:",
            table(["held out", *HEADER], lines),
            "Medians against the targets:",
            "\n".join(verdicts),
            "Other vendors. With 0 points: what the GPUs of all other vendors have in common, with the spread between "
            f"them. With 5 and 20: what all other hardware has in common moved by these points ({DRAWS} draws; errors "
            "on the rows not drawn):",
            table(["hardware", "fitted to", *HEADER], others(pooled.hardware(found.bench, catalogue), catalogue)),
            LIMITS,
        ]
    )


LIMITS = """What the lines say:
- Decode products of few rows run far below the peak on MI300X (`few_rows_flops`), its attention reads KV once for every
  query head of a group (`kv_group`), and more slowly when sequences x heads exceed 512 (`kv_unsplit`). These three
  terms are the growth of its decode time with the batch.
- No vendor's constants follow from another's: the lines with 0 points say how far off such a prediction is. MI250
  rows may count one of the part's two dies; Intel's times at one GPU hold a start-up that outlasts short runs."""
