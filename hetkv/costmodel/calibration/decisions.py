"""Section of docs/accuracy.md: how much worse the configuration that the model picks is than the best one measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np

from hetkv.costmodel.calibration.datasets import ServingRow, read_serving
from hetkv.costmodel.calibration.errors import Mask, cross_predict, table, verdict
from hetkv.costmodel.calibration.fit import Array
from hetkv.costmodel.calibration.report import section
from hetkv.costmodel.calibration.serving_runs import FILE, measured, model_of, predict
from hetkv.costmodel.catalogue import load_catalogue

HEADER = ["limit", "decisions", "median", "mean", "p90", "within 10 %", "pick breaks the limit"]
TPOT_LIMITS_S = (0.010, 0.015, 0.020, 0.030, 0.050)


def one_engine(row: ServingRow) -> tuple[Hashable, ...]:
    """Alternatives that differ in TP, DP, number of workers and concurrency."""
    return model_of(row), row.gpu, row.engine, row.version, row.dtype, row.prompt, row.output


def any_engine(row: ServingRow) -> tuple[Hashable, ...]:
    """Alternatives that differ in engine, version and dtype, too."""
    return model_of(row), row.gpu, row.prompt, row.output


@section("decisions", 140)
def decisions(data: Path) -> str:
    """Regret of choices on one engine, and across engines."""
    rows = read_serving(data / FILE).serving
    parts = [
        "## Decision regret",
        "Groups of measured alternatives: same model, GPU and lengths. Under a limit on TPOT the model picks the "
        "configuration with the highest predicted output tokens per second and GPU; regret is what its measured rate "
        "lacks of the best measured one that keeps the limit. A pick whose measured TPOT breaks the limit by more than "
        "10 % has regret 100 %. The whole group is held out of the fit (5 folds). Groups with fewer than 3 "
        "alternatives, or where nothing keeps the limit, do not count.",
    ]
    for text, key, target in (
        ("Choices of TP, DP, workers and concurrency on one engine", one_engine, 0.10),
        ("Choices of engine, version and dtype, too", any_engine, None),
    ):
        lines, pooled = _lines(rows, key)
        mean = float(np.mean(pooled))
        said = f"{mean:.1%}" if target is None else verdict(mean, target)
        parts += [
            f"{text} ({len({key(row) for row in rows})} groups):",
            table(HEADER, lines),
            f"Mean regret over all limits: {said}.",
        ]
    return "\n\n".join(parts)


def _lines(rows: list[ServingRow], key: Callable[[ServingRow], Hashable]) -> tuple[list[list[str]], list[float]]:
    """A table line for each limit and one for all, and all regrets, with the whole group held out."""
    catalogue = load_catalogue()
    return regrets(rows, cross_predict(rows, key, lambda a, b: predict(a, b, catalogue)), key)


def regrets(
    rows: list[ServingRow], found: Array, key: Callable[[ServingRow], Hashable], among: Mask | None = None
) -> tuple[list[list[str]], list[float]]:
    """A table line for each limit and one for all, and all regrets, of choices by `found` (TTFT and TPOT in seconds)
    in the groups of `key`, `among` some of the rows.
    """
    truth = measured(rows)
    gpus = np.array(
        [sum(side.tp * side.dp * side.workers for side in (r.decode, r.prefill) if side is not None) for r in rows]
    )
    tokens, output = np.array([r.concurrency * r.output for r in rows]), np.array([r.output for r in rows])
    rate = [tokens / (part[0] + output * part[1]) / gpus for part in (truth, found)]
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if among is None or among[index]:
            groups[key(row)].append(index)
    lines, pooled, broken = [], [], 0
    for limit in TPOT_LIMITS_S:
        each, missed = regret(list(groups.values()), rate, truth[1], found[1], limit)
        lines.append([f"TPOT <= {limit * 1e3:.0f} ms", *_cells(each, missed)])
        pooled += each
        broken += missed
    return [*lines, ["all limits", *_cells(pooled, broken)]], pooled


def _cells(regrets: list[float], missed: int) -> list[str]:
    return [
        str(len(regrets)),
        f"{np.median(regrets):.1%}",
        f"{np.mean(regrets):.1%}",
        f"{np.quantile(regrets, 0.9):.1%}",
        f"{np.mean(np.array(regrets) <= 0.1):.0%}",
        f"{missed / len(regrets):.0%}",
    ]


def regret(
    groups: list[list[int]], rate: list[Array], truth: Array, found: Array, limit: float
) -> tuple[list[float], int]:
    """Regret of each decision under a TPOT limit, and how many picks break it. `rate` is (measured, predicted)."""
    regrets: list[float] = []
    missed = 0
    for members in groups:
        index = np.array(members)
        if len(index) < 3 or not (truth[index] <= limit).any():
            continue
        best = rate[0][index[truth[index] <= limit]].max()
        allowed = index[found[index] <= limit]
        if len(allowed) == 0:
            allowed = index[[int(np.argmin(found[index]))]]
        chosen = allowed[int(np.argmax(rate[1][allowed]))]
        if truth[chosen] > 1.1 * limit:
            missed += 1
            regrets.append(1.0)
        else:
            regrets.append(max(0.0, 1 - float(rate[0][chosen] / best)))
    return regrets, missed
