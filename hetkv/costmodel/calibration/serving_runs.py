"""Sections of docs/accuracy.md: TTFT and TPOT of real serving runs on Hopper, and the decisions that rest on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hetkv.costmodel.calibration.datasets import ServingRow, read_serving
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
from hetkv.costmodel.calibration.problems import ServingLoops
from hetkv.costmodel.calibration.report import section
from hetkv.costmodel.catalogue import Catalogue, load_catalogue
from hetkv.costmodel.efficiency import NEW_RANGE, Spans
from hetkv.costmodel.models import model_shape

FILE = "measured/disaggregated_hopper.csv"
TPOT_LIMITS_S = (0.010, 0.015, 0.020, 0.030, 0.050)


def model_of(row: ServingRow) -> str:
    """DeepSeek-R1 and V3 are one shape, as are the names of Llama-3.1-8B."""
    name = model_shape(row.model).name
    return "DeepSeek-V3" if name == "DeepSeek-R1" else name


def config(row: ServingRow) -> tuple[object, ...]:
    """What makes two rows repeats of each other."""
    split = row.decode, row.prefill
    return row.gpu, row.engine, row.version, model_of(row), row.dtype, split, row.prompt, row.output, row.concurrency


def fit_steps(rows: Sequence[ServingRow], catalogue: Catalogue) -> Fitted:
    """The constants of the step from TPOT."""
    problem = ServingLoops(rows, catalogue)
    return fit(rows, problem.residuals, problem.layout(any(model_shape(row.model).experts for row in rows)))


def predict(train: Sequence[ServingRow], test: Sequence[ServingRow], catalogue: Catalogue) -> Array:
    """TTFT and TPOT of `test` in seconds, from a fit on `train`; shape (2, rows)."""
    problem = ServingLoops(train, catalogue)
    steps = fit_steps(train, catalogue)
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


def held_out(
    rows: list[ServingRow], masks: Sequence[Mask], catalogue: Catalogue, widen: float = 1.0
) -> tuple[list[list[Array]], list[ServingRow]]:
    """`[predicted, measured, low, high]` of TTFT and of TPOT for all rows that the masks hold out, and those rows."""
    parts: list[list[list[Array]]] = [[], []]
    order: list[ServingRow] = []
    for mask in masks:
        train, test = pick(rows, ~mask), pick(rows, mask)
        found, truth = predict(train, test, catalogue), measured(test)
        ratios = measured(train) / cross_predict(train, config, lambda a, b: predict(a, b, catalogue))
        for i in (0, 1):
            spans = Intervals(train, ratios[i], exact_key)
            parts[i].append([found[i], truth[i], *spans.factors(test, widen)])
        order += test
    return [[np.concatenate(c) for c in zip(*part, strict=True)] for part in parts], order


def lines_of(name: str, parts: list[list[Array]]) -> tuple[list[list[str]], Score]:
    """Two table lines (TPOT, TTFT) and the TPOT score."""
    ttft, tpot = score(*parts[0]), score(*parts[1])
    return [[name, "TPOT", *tpot.cells()], ["", "TTFT", *ttft.cells()]], tpot


def by(parts: list[list[Array]], rows: list[ServingRow], key: Callable[[ServingRow], str]) -> list[list[str]]:
    """Table lines for each value of `key` among predicted rows."""
    lines: list[list[str]] = []
    for name, mask in holdouts(rows, key).items():
        lines += lines_of(name, [[column[mask] for column in part] for part in parts])[0]
    return lines


def is_dense(row: ServingRow) -> bool:
    return not model_shape(row.model).experts


@section("serving-hopper", 130)
def serving(data: Path) -> str:
    """TPOT and TTFT with configurations and models held out."""
    found, catalogue = read_serving(data / FILE), load_catalogue()
    dense = [r for r in found.serving if is_dense(r) and r.engine != "sglang" and not r.disaggregated]
    parts, rows = held_out(dense, folds(dense, config), catalogue)
    lines, total = lines_of("configuration (5 folds)", parts)
    verdicts = [f"- configuration: TPOT {verdict(total.median, 0.12)}."]
    detail = by(parts, rows, lambda r: f"{model_of(r)} {r.gpu[:4]} {r.engine} {r.version} {r.dtype}")
    masks = holdouts(dense, model_of)
    joined: list[tuple[list[list[Array]], list[ServingRow]]] = []
    for name, mask in masks.items():
        parts, rows = held_out(dense, [mask], catalogue, NEW_RANGE)
        joined.append((parts, rows))
        more, one = lines_of(f"model {name}", parts)
        lines += more
        verdicts.append(f"- model {name} left out: TPOT {verdict(one.median, 0.20)}.")
    parts = [[np.concatenate([j[0][i][c] for j in joined]) for c in range(4)] for i in (0, 1)]
    more, one = lines_of("a whole dense model, all three", parts)
    lines += more
    verdicts.append(f"- a whole dense model left out, all three: TPOT {verdict(one.median, 0.20)}.")
    every = found.serving
    parts, rows = held_out(every, folds(every, config), catalogue)
    rest, _ = lines_of("all rows", parts)
    rest += by(parts, rows, lambda r: "dense" if is_dense(r) else "experts")
    rest += by(parts, rows, lambda r: f"engine {r.engine}")
    rest += by(parts, rows, lambda r: "disaggregated" if r.disaggregated else "aggregated")
    rest += by(parts, rows, lambda r: f"model {model_of(r)}")
    taken = ", ".join(f"{n} by `{rule}`" for rule, n in sorted(found.excluded.items()))
    return "\n\n".join(
        [
            "## Serving runs on H100 and H200: TTFT and TPOT",
            f"{len(every)} rows kept ({taken} left out). Each is a closed loop of requests under one engine; TPOT "
            "alone is fitted, TTFT gets two constants of its own afterwards (the load generator's first burst, and the "
            "time outside the engine's steps).",
            f"Dense models, TensorRT-LLM and vLLM pooled ({len(dense)} rows):",
            table(["held out", "time", *HEADER], lines),
            "Medians against the targets:",
            "\n".join(verdicts),
            "The same folds by model, GPU, engine, version and dtype:",
            table(["rows", "time", *HEADER], detail),
            "All rows, also models with experts, SGLang and disaggregated runs, configurations held out in 5 folds:",
            table(["rows", "time", *HEADER], rest),
            LIMITS,
        ]
    )


@section("decisions", 140)
def decisions(data: Path) -> str:
    """How much worse the configuration that the model picks is than the best one measured."""
    rows, catalogue = read_serving(data / FILE).serving, load_catalogue()

    def alternatives(row: ServingRow) -> tuple[object, ...]:
        return model_of(row), row.gpu, row.prompt, row.output

    found = cross_predict(rows, alternatives, lambda a, b: predict(a, b, catalogue))
    truth = measured(rows)
    gpus = np.array(
        [sum(side.tp * side.dp * side.workers for side in (r.decode, r.prefill) if side is not None) for r in rows]
    )
    tokens = np.array([r.concurrency * r.output for r in rows])
    output = np.array([r.output for r in rows])
    rate = [tokens / (part[0] + output * part[1]) / gpus for part in (truth, found)]
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[alternatives(row)].append(index)
    lines = []
    pooled: list[float] = []
    for limit in TPOT_LIMITS_S:
        regrets, missed = regret(list(groups.values()), rate, truth[1], found[1], limit)
        pooled += regrets
        lines.append(
            [
                f"TPOT <= {limit * 1e3:.0f} ms",
                str(len(regrets)),
                f"{np.median(regrets):.1%}",
                f"{np.quantile(regrets, 0.9):.1%}",
                f"{np.mean(np.array(regrets) <= 0.1):.0%}",
                f"{missed / len(regrets):.0%}",
            ]
        )
    header = ["limit", "decisions", "median regret", "p90 regret", "within 10 %", "pick breaks the limit"]
    return "\n\n".join(
        [
            "## Decision regret",
            f"{len(groups)} groups of measured alternatives (same model, GPU and lengths; they differ in engine, "
            "version, dtype, TP, DP, aggregated or not, and concurrency). Under a limit on TPOT the model picks the "
            "configuration with the highest predicted output tokens per second and GPU; regret is what its measured "
            "rate lacks of the best measured one that keeps the limit. A pick whose measured TPOT breaks the limit by "
            "more than 10 % has regret 100 %. The whole group is held out of the fit (5 folds). Groups with fewer than "
            "3 alternatives, or where nothing keeps the limit, are no decisions.",
            table(header, lines),
            f"Median over all limits: {verdict(float(np.median(pooled)), 0.10)}.",
        ]
    )


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


LIMITS = """What the lines say:
- The worst dense rows are vLLM 0.12 with fp8 Llama-3.1-8B on H200: at TP 4 and 8 they take less time for a
  long prompt than its products at peak and its all-reduces would, as if part of it were cached. No constant of this
  model explains them.
- TTFT holds the client's and the load generator's own queueing. It is given with its bias, and is no target.
- DeepSeek on H100 disaggregated has decode batches and worker counts that do not fit its concurrency."""
