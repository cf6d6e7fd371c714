"""Section of docs/accuracy.md: this model, its prior, and the package aiconfigurator-core on the same serving runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from hetkv.costmodel.calibration.datasets import ServingRow, read_bench, read_serving
from hetkv.costmodel.calibration.decisions import HEADER as REGRET
from hetkv.costmodel.calibration.decisions import one_engine, regrets
from hetkv.costmodel.calibration.errors import HEADER, Mask, cross_predict, judged, table
from hetkv.costmodel.calibration.fit import Array
from hetkv.costmodel.calibration.pooled import hardware, pool, stranger_errors, values_of
from hetkv.costmodel.calibration.problems import ServingLoops
from hetkv.costmodel.calibration.report import section
from hetkv.costmodel.calibration.serving_runs import FILE, by_configuration, by_model, measured, predict
from hetkv.costmodel.calibration.spans import between_groups
from hetkv.costmodel.catalogue import Catalogue, load_catalogue

BENCH = "measured/llm_inference_bench.csv"
VENDOR = "nvidia"


@dataclass(frozen=True)
class Method:
    """Seconds that it predicts for each row, NaN where it has no answer; shape (2, rows): TTFT, TPOT.

    `factors` of the interval of each, where it has one; `choosing` is what it predicts for decisions: the alternatives
    are held out together there.
    """

    name: str
    seconds: Array
    choosing: Array
    factors: Sequence[tuple[Array, Array]] | None = None

    @property
    def answers(self) -> Mask:
        return np.asarray(~np.isnan(self.seconds[1]))

    def lines(self, truth: Array, rows: Mask) -> list[list[str]]:
        """A table line for TPOT and one for TTFT over `rows`."""
        found = []
        for time, index in (("TPOT", 1), ("TTFT", 0)):
            with np.errstate(divide="ignore"):
                errors = np.log(truth[index] / self.seconds[index])
            known = rows & np.isfinite(errors)
            ones = np.ones(len(known))
            low, high = self.factors[index] if self.factors else (ones, ones)
            cells = judged(errors, low, high, known).cells()
            found.append(
                [self.name if index else "", time, *(cells if self.factors else [*cells[:-2], "none", "none"])]
            )
        return found


def prior(rows: Sequence[ServingRow], bench: Path, catalogue: Catalogue) -> Method:
    """What a GPU has of which, and of whose vendor, nothing was measured, with the spread between vendors."""
    parts = hardware(read_bench(bench).bench, catalogue)
    others = [part for part in parts if part.vendor != VENDOR]
    loop = ServingLoops(rows, catalogue).predict(values_of(pool(others), len(rows)))
    seconds = np.stack([loop.ttft_s, loop.tpot_s])
    low, high = between_groups(list(stranger_errors(others, catalogue).values()))
    factors = (np.full(len(rows), low), np.full(len(rows), high))
    return Method("hetkv, nothing of the vendor measured", seconds, seconds, [factors, factors])


def shipped_answers() -> dict[str, Any]:
    """What `bench/aiconfigurator.py` wrote."""
    entry = resources.files("hetkv.costmodel") / "data" / "aiconfigurator.json"
    found: dict[str, Any] = json.loads(entry.read_text(encoding="utf-8"))
    return found


def packages(rows: Sequence[ServingRow], answers: dict[str, Any]) -> list[Method]:
    """The package's answers, a method for each budget of prompt tokens in a step."""
    found = []
    for budget in answers["budgets"]:
        seconds = np.full((2, len(rows)), np.nan)
        for index, row in enumerate(rows):
            answer = answers["ttft_tpot_ms"].get(row.id)
            if isinstance(answer, dict):
                seconds[:, index] = np.array(answer[budget]) / 1e3
        tokens = "a prompt" if budget == "prompt" else f"{int(budget):,} tokens"
        name = f"aiconfigurator-core {answers['version']}, {tokens} a step"
        found.append(Method(name, seconds, seconds))
    return found


@section("field", 150)
def field(data: Path) -> str:
    """Errors, intervals, answers and regret side by side."""
    every, catalogue, answers = read_serving(data / FILE).serving, load_catalogue(), shipped_answers()
    together = np.array([not row.disaggregated for row in every])
    truth = measured(every)
    known, new = by_configuration(every, catalogue), by_model(every, catalogue)
    choosing = cross_predict(every, one_engine, lambda a, b: predict(a, b, catalogue))
    own = Method("hetkv, configuration held out", truth / np.exp(known.errors), choosing, known.factors)
    strange = Method("hetkv, model held out", truth / np.exp(new.errors), truth / np.exp(new.errors), new.factors)
    tools = packages(every, answers)
    methods = [own, strange, prior(every, data / BENCH, catalogue), *tools]
    both = together & tools[0].answers
    lines = [line for method in methods for line in method.lines(truth, both)]
    rest = [line for method in methods[:3] for line in method.lines(truth, together & ~both)]
    regret = []
    for method in methods:
        cells = regrets(every, method.choosing, one_engine, both)[0][-1]
        regret.append([method.name, *cells[1:]])
    return "\n\n".join(
        [
            "## Against the field",
            f"The {int(together.sum())} runs of the section above with prefill and decode on the same workers. The "
            f"package aiconfigurator-core has measured kernels in place of fitted constants, and no intervals; its "
            "tables are of newer engines than the runs, as it serves no others "
            f"({', '.join(f'{key} {version}' for key, version in answers['tables'].items())}). The runs are samples of "
            "that same package, so its authors had them. It was asked as `bench/aiconfigurator.py` says, with two "
            "budgets of prompt tokens in a step, as that is not recorded.",
            f"Answers: hetkv {int(together.sum())} of {int(together.sum())}, the package {int(both.sum())}. "
            f"{_why(answers)} Of the {_others(data, catalogue)} runs of LLM-Inference-Bench on AMD, Intel and Gaudi "
            "(above) it has tables for none.",
            f"On the {int(both.sum())} runs that both answer:",
            table(["method", "time", *HEADER], lines),
            _nearest(methods, truth, both),
            "On the others:",
            table(["method", "time", *HEADER], rest),
            "Regret of choices of TP, DP and concurrency on one engine, as in the section before, among the runs that "
            "both answer, all limits together. For hetkv's first line the whole group is held out of the fit:",
            table(["method", *REGRET[1:]], regret),
        ]
    )


def _nearest(methods: Sequence[Method], truth: Array, rows: Mask) -> str:
    """How far each is from the runs in the middle, nearest first."""
    medians = []
    for method in methods:
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = np.abs(method.seconds[1] / truth[1] - 1)[rows]
        medians.append((float(np.median(errors)), method.name))
    return (
        "Nearest in TPOT, by the median: " + "; ".join(f"{name} ({error:.1%})" for error, name in sorted(medians)) + "."
    )


def _why(answers: dict[str, Any]) -> str:
    """What the package says of the runs that it does not answer."""
    said = Counter(answer for answer in answers["ttft_tpot_ms"].values() if isinstance(answer, str))
    return " ".join(f"{count} end with `{text}`." for text, count in said.most_common())


def _others(data: Path, catalogue: Catalogue) -> int:
    return sum(catalogue.gpu(row.gpu).vendor != VENDOR for row in read_bench(data / BENCH).bench)
