"""Section of docs/accuracy.md: a set-up that was not measured, with none, 5 and 20 runs of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from hetkv.costmodel.calibration.datasets import ServingRow, read_serving
from hetkv.costmodel.calibration.errors import HEADER, Score, folds, pick, score, table
from hetkv.costmodel.calibration.fit import PRIORS, Array
from hetkv.costmodel.calibration.own_runs import Start, loops_alone, spans_of
from hetkv.costmodel.calibration.problems import ServingLoops
from hetkv.costmodel.calibration.report import section
from hetkv.costmodel.calibration.serving_runs import FILE, by_model, fit_steps, model_of
from hetkv.costmodel.catalogue import Catalogue, load_catalogue
from hetkv.costmodel.efficiency import Span, Spans
from hetkv.costmodel.models import model_shape

POINTS = (5, 20)
ENOUGH = 30
TARGETS = {"TPOT": 2.0, "TTFT": 3.0}


def set_up(row: ServingRow) -> tuple[Hashable, ...]:
    return model_of(row), row.gpu, row.engine, row.version, row.dtype, row.disaggregated


@section("new-setups", 135)
def new_setups(data: Path) -> str:
    """Errors and intervals before and after an operator's own runs."""
    rows, catalogue = read_serving(data / FILE).serving, load_catalogue()
    none = by_model(rows, catalogue)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[set_up(row)].append(index)
    large = [members for members in groups.values() if len(members) >= ENOUGH]
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[np.concatenate(large)] = True
    lines = none.lines("0", chosen)
    said = []
    for points in POINTS:
        scores = _after(rows, large, points, catalogue)
        for time, result in zip(("TPOT", "TTFT"), scores, strict=True):
            lines.append([str(points) if time == "TPOT" else "", time, *result.cells()])
            if points == POINTS[-1]:
                met = 0.85 <= result.coverage <= 0.95 and result.width <= TARGETS[time]
                found = f"{result.coverage:.1%} inside, median width {result.width:.2f}"
                target = f"target 85 to 95 % and at most {TARGETS[time]:.1f}: {'met' if met else 'not met'}"
                said.append(f"- {time} with {points} runs: {found}; {target}.")
    return "\n\n".join(
        [
            "## A set-up that was not measured: 0, 5 and 20 runs of its own",
            f"{len(large)} set-ups (model, GPU, engine, version, dtype) of {ENOUGH} rows or more: {int(chosen.sum())} "
            "rows. With 0 runs the constants come from all other models, and the interval is the spread between models "
            "that were each left out. With 5 and 20 runs, drawn once, `hetkv calibrate` moves these constants; errors "
            "and coverage are of the rows that were not drawn.",
            table(["own runs", "time", *HEADER], lines),
            "\n".join(said),
        ]
    )


def _after(
    rows: list[ServingRow], groups: Sequence[list[int]], points: int, catalogue: Catalogue
) -> tuple[Score, Score]:
    """TPOT and TTFT over all set-ups, each from `points` rows of its own."""
    columns: list[list[list[Array]]] = [[], []]

    def build(some: Sequence[ServingRow]) -> ServingLoops:
        return ServingLoops(some, catalogue)

    masks = folds(rows, model_of, seed=1)
    for members in groups:
        first = rows[members[0]]
        fitted = fit_steps(pick(rows, ~next(mask for mask in masks if mask[members[0]])), catalogue, models=False)
        start = Start(
            {name: fitted.value(name, first) for name in PRIORS}, False, bool(model_shape(first.model).experts)
        )
        order = np.random.default_rng(0).permutation(len(members))
        own, test = ([rows[members[i]] for i in part] for part in (order[:points], order[points:]))
        one = Span(1.0, 1.0)
        spans = spans_of(start.errors_left_out(own, build), loops_alone(own), Spans(one, one, one))
        errors = build(test).errors(start.fit(own, build).values(test))
        for index, span in ((1, spans.decode), (0, spans.queue)):
            ones = np.ones(len(test))
            columns[1 - index].append([np.exp(-errors[index]), ones, span.low * ones, span.high * ones])
    tpot, ttft = (score(*(np.concatenate(part) for part in zip(*each, strict=True))) for each in columns)
    return tpot, ttft
