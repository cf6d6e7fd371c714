"""Section of docs/accuracy.md: prompt and token time of Splitwise's Llama-2 70B."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hetkv.costmodel.calibration.datasets import StepRow, read_splitwise
from hetkv.costmodel.calibration.errors import (
    HEADER,
    Intervals,
    Mask,
    Score,
    errors_of,
    folds,
    holdouts,
    judged,
    spans_left_out,
    table,
    verdict,
)
from hetkv.costmodel.calibration.fit import Array, fit
from hetkv.costmodel.calibration.problems import StaticSteps
from hetkv.costmodel.calibration.report import section
from hetkv.costmodel.catalogue import Catalogue, load_catalogue
from hetkv.costmodel.efficiency import NEW_RANGE

FILE = "measured/splitwise_llama2_70b.csv"
SCALE = 0.05


def config(row: StepRow) -> tuple[object, ...]:
    """What makes two rows repeats of each other."""
    return row.gpu, row.tp, row.prompt, row.batch, row.output


def predict(train: Sequence[StepRow], test: Sequence[StepRow], catalogue: Catalogue) -> Array:
    """Prompt and token seconds of `test`, from a fit on `train`; shape (2, rows)."""
    problem = StaticSteps(train, catalogue)
    found = fit(train, problem.residuals, problem.layout(), SCALE)
    return np.stack(StaticSteps(test, catalogue).predict(found.values(test)))


def measured(rows: Sequence[StepRow]) -> Array:
    return np.array([[row.prompt_s for row in rows], [row.token_s for row in rows]])


def scores(rows: list[StepRow], masks: list[Mask], whole: bool, catalogue: Catalogue) -> tuple[Score, Score]:
    """Prompt and token score over all rows that the masks hold out, each mask with its own fit.

    The interval is that of the other masks' rows; where only one is held out, that of configurations left out, widened.
    """

    def run(train: Sequence[StepRow], test: Sequence[StepRow]) -> Array:
        return np.asarray(np.log(measured(test) / predict(train, test, catalogue)))

    errors, key = errors_of(rows, masks, run), (lambda r: r.gpu)
    if len(masks) > 1:
        spans = [spans_left_out(rows, each, masks, None if whole else key) for each in errors]
    else:
        known = errors_of(rows, folds(rows, config), run)
        spans = [Intervals(rows, np.exp(each), key).factors(rows, NEW_RANGE) for each in known]
    prompt, token = (judged(each, *span) for each, span in zip(errors, spans, strict=True))
    return prompt, token


def largest(rows: list[StepRow]) -> Mask:
    """The largest batch that was measured at each (GPU, TP)."""
    top: dict[tuple[str, int], int] = {}
    for row in rows:
        top[(row.gpu, row.tp)] = max(top.get((row.gpu, row.tp), 0), row.batch)
    return np.array([row.batch == top[(row.gpu, row.tp)] for row in rows])


@section("splitwise", 110)
def splitwise(data: Path) -> str:
    """Token and prompt time by configuration, TP, GPU and batch held out."""
    found, catalogue = read_splitwise(data / FILE), load_catalogue()
    rows = found.splitwise

    by_tp, by_gpu = holdouts(rows, lambda r: r.tp), holdouts(rows, lambda r: r.gpu)
    cases: list[tuple[str, list[Mask], bool]] = [("configuration (5 folds)", folds(rows, config), False)]
    cases += [("a whole TP, all three", list(by_tp.values()), True), ("a whole GPU, both", list(by_gpu.values()), True)]
    cases += [(f"TP {tp}", [mask], True) for tp, mask in by_tp.items()]
    cases += [("largest batch of each GPU and TP", [largest(rows)], False)]
    lines, verdicts = [], []
    for name, masks, whole in cases:
        prompt, token = scores(rows, masks, whole, catalogue)
        lines.append([name, "token", *token.cells()])
        lines.append(["", "prompt", *prompt.cells()])
        if name in ("configuration (5 folds)", "a whole TP, all three", "a whole GPU, both") or "largest" in name:
            verdicts.append(f"- {name}: token {verdict(token.median, 0.05)}; prompt {verdict(prompt.median, 0.12)}.")
    return "\n\n".join(
        [
            "## Splitwise: prompt and token time of Llama-2 70B",
            f"{len(rows)} configurations ({found.excluded['splitwise-repeat']} repeats averaged away), A100-80 and "
            "H100-80 at TP 2, 4 and 8. What the first column names is left out of the fit and then predicted.",
            table(["held out", "time", *HEADER], lines),
            "Medians against the targets:",
            "\n".join(verdicts),
            limits(rows),
        ]
    )


def jump(rows: list[StepRow], small: int, large: int) -> str:
    """The range of what the token time gains from batch `small` to `large`, in ms, where the file goes up to 64."""
    far = {(r.gpu, r.tp) for r in rows if r.batch == 64}
    token = {(r.gpu, r.tp, r.batch): r.token_s for r in rows if (r.gpu, r.tp) in far and r.prompt == 512}
    gains = [
        (token[gpu, tp, large] - token[gpu, tp, small]) * 1e3
        for gpu, tp, batch in token
        if batch == large and (gpu, tp, small) in token
    ]
    return f"{min(gains):.0f} to {max(gains):.0f} ms"


def limits(rows: list[StepRow]) -> str:
    """What the lines leave open, and why."""
    return f"""Where it fails, and why:
- TP 2 is the only split whose token time the memory bandwidth sets; at TP 4 and 8 the host's launches hide it (TP 8 is
  no faster than TP 4). Without TP 2 nothing in the data says what share of the bandwidth this engine reaches.
- From batch 32 to 64 the token time gains {jump(rows, 32, 64)}, from 16 to 32 only {jump(rows, 16, 32)}. No smaller
  batch shows that jump at the same TP, so no fit without it can have it.
- A GPU held out needs its host's speed: the catalogue's `host_speed` is an estimate from the CPU generations alone."""
