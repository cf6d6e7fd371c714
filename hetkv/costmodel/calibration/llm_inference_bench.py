"""Section of docs/accuracy.md: whole-batch latency of LLM-Inference-Bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hetkv.costmodel.calibration.datasets import BatchRow, read_bench
from hetkv.costmodel.calibration.errors import (
    HEADER,
    Intervals,
    Mask,
    Score,
    cross_predict,
    folds,
    holdouts,
    pick,
    score,
    table,
    verdict,
)
from hetkv.costmodel.calibration.fit import Array, Fitted, fit
from hetkv.costmodel.calibration.problems import StaticBatches
from hetkv.costmodel.calibration.report import section
from hetkv.costmodel.catalogue import Catalogue, load_catalogue
from hetkv.costmodel.efficiency import FALLBACK_HIGH, FALLBACK_LOW, NEW_GPU, NEW_RANGE

FILE = "measured/llm_inference_bench.csv"
SCALE = 0.06
POINTS = (0, 5, 20)
DRAWS = 5


def config(row: BatchRow) -> tuple[object, ...]:
    return row.gpu, row.engine, row.model, row.tp, row.length, row.batch


def predict(train: Sequence[BatchRow], test: Sequence[BatchRow], catalogue: Catalogue, gpu_width: float = 0.1) -> Array:
    """Latency of `test` in seconds, from a fit on `train`."""
    problem = StaticBatches(train, catalogue)
    found = fit(train, problem.residuals, problem.layout(), SCALE)
    return StaticBatches(test, catalogue).predict(found.values(test))


def measured(rows: Sequence[BatchRow]) -> Array:
    return np.array([row.latency_s for row in rows])


def held_out(rows: list[BatchRow], masks: Sequence[Mask], catalogue: Catalogue, widen: float) -> Score:
    """Score of all rows that the masks hold out, each mask with its own fit and interval."""
    columns: list[list[Array]] = []
    for mask in masks:
        train, test = pick(rows, ~mask), pick(rows, mask)
        ratio = measured(train) / cross_predict(train, config, lambda a, b: predict(a, b, catalogue))
        spans = Intervals(train, ratio, lambda r: (r.gpu, r.engine))
        columns.append([predict(train, test, catalogue), measured(test), *spans.factors(test, widen)])
    return score(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def few_points(base: Fitted, other: list[BatchRow], points: int, catalogue: Catalogue) -> Score:
    """Predict `other` from NVIDIA's constants `base` moved by `points` rows of its own, drawn `DRAWS` times.

    The interval is the documented fallback without points; with points it is that of the residuals on them, no narrower
    than a factor of 1.3.
    """
    columns: list[list[Array]] = []
    for draw in range(DRAWS if points else 1):
        order = np.random.default_rng(draw).permutation(len(other))
        own, test = [other[i] for i in order[:points]], StaticBatches([other[i] for i in order[points:]], catalogue)
        low, high = FALLBACK_LOW, FALLBACK_HIGH
        found = base
        if points:
            problem = StaticBatches(own, catalogue)
            found = fit(own, problem.residuals, problem.own_layout(base, own[0]), 0.2)
            spread = float(np.exp(2 * np.abs(problem.residuals(found.values(own))).max()))
            low, high = 1 / max(1.3, spread), max(1.3, spread)
        ones = np.ones(len(test.rows))
        columns.append([test.predict(found.values(test.rows)), test.latency_s, low * ones, high * ones])
    return score(*(np.concatenate(column) for column in zip(*columns, strict=True)))


@section("llm-inference-bench", 120)
def bench(data: Path) -> str:
    """Latency with a GPU or a model held out among NVIDIA, and other vendors with few points."""
    found, catalogue = read_bench(data / FILE), load_catalogue()
    nvidia = [row for row in found.bench if row.gpu.startswith("Nvidia")]
    by_gpu, by_model = holdouts(nvidia, lambda r: r.gpu), holdouts(nvidia, lambda r: r.model)
    cases = [("configuration (5 folds)", folds(nvidia, config), 1.0)]
    cases += [(f"GPU {gpu}", [mask], NEW_GPU) for gpu, mask in by_gpu.items()]
    cases += [("a whole GPU, all three", list(by_gpu.values()), NEW_GPU)]
    cases += [(f"model {model}", [mask], NEW_RANGE) for model, mask in by_model.items()]
    cases += [("a whole model, all three", list(by_model.values()), NEW_RANGE)]
    lines, verdicts = [], []
    for name, masks, widen in cases:
        result = held_out(nvidia, masks, catalogue, widen)
        lines.append([name, *result.cells()])
        if name.startswith(("a whole", "GPU", "model")):
            target = 0.10 if "GPU" in name else 0.20
            verdicts.append(f"- {name}: {verdict(result.median, target)}.")
    others = []
    problem = StaticBatches(nvidia, catalogue)
    base = fit(nvidia, problem.residuals, problem.layout(), SCALE)
    for gpu in sorted({row.gpu for row in found.bench} - {row.gpu for row in nvidia}):
        rows = [row for row in found.bench if row.gpu == gpu]
        for points in POINTS:
            result = few_points(base, rows, points, catalogue)
            others.append([f"{gpu} ({rows[0].engine})", str(points), *result.cells()])
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
            f"Other vendors, predicted from NVIDIA's rows and few of their own ({DRAWS} draws; errors on the rows not "
            "drawn):",
            table(["hardware", "own points", *HEADER], others),
            LIMITS,
        ]
    )


LIMITS = """None of the other vendors follows from NVIDIA's constants by itself: the lines with 0 own points say how far
off such a prediction is, and the interval given then is the documented fallback. MI250 rows may count one of the part's
two dies; MI300X's small models are bound by the host; Intel's part runs far below its peak, and its times at one GPU
hold a start-up that outlasts short runs."""
