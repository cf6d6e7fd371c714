"""The shipped entries: the measured data sets in, efficiencies with errors, intervals and provenance out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hetkv.costmodel.calibration import llm_inference_bench as batches
from hetkv.costmodel.calibration import pooled, serving_runs, splitwise
from hetkv.costmodel.calibration.datasets import BatchRow, ServingRow, StepRow, read_bench, read_serving, read_splitwise
from hetkv.costmodel.calibration.entries import entries
from hetkv.costmodel.calibration.errors import Intervals, cross_predict
from hetkv.costmodel.calibration.fit import Array, Fitted, fit
from hetkv.costmodel.calibration.problems import StaticSteps
from hetkv.costmodel.calibration.spans import between_groups
from hetkv.costmodel.catalogue import Catalogue
from hetkv.costmodel.efficiency import NEW_GPU, NEW_RANGE, Efficiency, Key, Spans
from hetkv.costmodel.models import model_shape

Progress = Callable[[str], None]
BATCH_VERSION = "2024"
"""LLM-Inference-Bench does not record engine versions; it was published in 2024."""


def from_splitwise(path: Path, catalogue: Catalogue) -> list[Efficiency]:
    """Entries for the eager engine of Splitwise's measurements."""
    rows = read_splitwise(path).splitwise
    problem = StaticSteps(rows, catalogue)
    found = fit(rows, problem.residuals, problem.layout(), splitwise.SCALE)
    predicted = cross_predict(rows, splitwise.config, lambda a, b: splitwise.predict(a, b, catalogue))
    prompt, token = splitwise.measured(rows) / predicted
    by_gpu = [Intervals(rows, ratio, lambda r: r.gpu) for ratio in (token, prompt)]

    def spans(row: StepRow) -> Spans:
        return Spans(by_gpu[0].of(row), by_gpu[1].of(row), by_gpu[1].of(row))

    def key(row: StepRow) -> Key:
        return Key(catalogue.gpu(row.gpu).name, "splitwise", "2023", "bf16")

    text = f"{path.name}: Splitwise, Llama-2 70B, token and prompt times; error is of the token time, 5 folds"
    return entries(rows, np.log(token), found, key, spans, text)


def from_batches(path: Path, catalogue: Catalogue) -> list[Efficiency]:
    """Entries for the hardware of LLM-Inference-Bench, and what GPUs of one vendor and of all have in common."""
    rows = read_bench(path).bench
    parts = pooled.hardware(rows, catalogue)
    nvidia = [row for row in rows if catalogue.gpu(row.gpu).vendor == "nvidia"]
    base = batches.fit_nvidia(nvidia, catalogue)
    predicted = cross_predict(nvidia, batches.config, lambda a, b: batches.predict(a, b, catalogue))
    text = f"{path.name}: LLM-Inference-Bench, latency of whole batches (prompt and token time not separated)"
    found = _batch_entries(nvidia, np.log(batches.measured(nvidia) / predicted), base, catalogue, text)
    for part in parts:
        if part.vendor == "nvidia":
            continue
        priors = pooled.pool(other for other in parts if other is not part)
        own = list(part.rows)
        errors = batches.own_errors(own, priors, catalogue)
        found += _batch_entries(own, errors, batches.fit_own(own, priors, catalogue), catalogue, text)
    return found + _common_batches(parts, catalogue, text)


def _batch_entries(
    rows: Sequence[BatchRow], errors: Array, fitted: Fitted, catalogue: Catalogue, text: str
) -> list[Efficiency]:
    by_engine = Intervals(rows, np.exp(errors), lambda r: (r.gpu, r.engine))

    def spans(row: BatchRow) -> Spans:
        span = by_engine.of(row)
        return Spans(span, span.widened(NEW_RANGE), span.widened(NEW_RANGE))

    def key(row: BatchRow) -> Key:
        return Key(catalogue.gpu(row.gpu).name, row.engine, BATCH_VERSION, "bf16")

    return entries(rows, errors, fitted, key, spans, f"{text}; error over 5 folds")


def _common_batches(parts: Sequence[pooled.Hardware], catalogue: Catalogue, text: str) -> list[Efficiency]:
    """An entry for every vendor whose GPUs predict each other better than other vendors' do, and one for any GPU."""
    kin, strangers = pooled.vendor_errors(parts, catalogue), pooled.stranger_errors(parts, catalogue)
    found = []
    sets: list[tuple[str, list[pooled.Hardware], list[Array]]] = [("", list(parts), list(strangers.values()))]
    trusted = 0
    for vendor in sorted({part.vendor for part in parts}):
        own = [part for part in parts if part.vendor == vendor]
        among = [kin[part.name] for part in own if part.name in kin]
        if among and pooled.size(among) < pooled.size([strangers[part.name] for part in own]):
            sets.append((vendor, own, among))
            trusted += len(own)
    for vendor, own, errors in sets:
        span = between_groups(errors, trusted if vendor else 0)
        names = ", ".join(part.name for part in own)
        spans = Spans(span, span.widened(NEW_RANGE), span.widened(NEW_RANGE))
        median = float(np.median([abs(np.expm1(-np.median(each))) for each in errors]))
        count = sum(len(part.rows) for part in own)
        common = pooled.constants_of(pooled.pool(own))
        found.append(Efficiency(Key(vendor), common, spans, f"{text}; common to {names}", median, count))
    return found


def from_serving(path: Path, catalogue: Catalogue) -> list[Efficiency]:
    """Entries of every (GPU, engine, version, dtype) of the serving data, and of what they have in common."""
    rows = read_serving(path).serving
    of_models, in_common = (serving_runs.fit_steps(rows, catalogue, models) for models in (True, False))
    measured = serving_runs.measured(rows)
    by_config = cross_predict(rows, serving_runs.config, lambda a, b: serving_runs.predict(a, b, catalogue))
    by_model = cross_predict(rows, serving_runs.model_of, lambda a, b: serving_runs.predict(a, b, catalogue, False))
    text = f"{path.name}: aiconfigurator-core 0.12 serving runs, TPOT; error over 5 folds"
    every = []
    for gpu, version, model, common, widen in (
        (True, True, True, "", 1.0),
        (True, True, False, "; common to several models", 1.0),
        (True, False, False, "; common to several models and versions", 1.0),
        (False, False, False, "; common to several models, GPUs and versions", NEW_GPU),
    ):
        bare = [
            replace(r, gpu=r.gpu if gpu else "", version=r.version if version else "", model=r.model if model else "")
            for r in rows
        ]

        def key(row: ServingRow) -> Key:
            name = catalogue.gpu(row.gpu).name if row.gpu else "nvidia"
            return Key(name, row.engine, row.version, row.dtype, model_shape(row.model).name if row.model else "")

        ratios = measured / (by_config if model else by_model)
        spans = serving_runs.intervals(bare, ratios, widen)
        found = of_models if model else in_common
        own = entries(rows, np.log(ratios[1]), found, key, spans, text + common, bare)
        every += [replace(entry, any_model=not model) for entry in own]
    return every


def ship(data: Path, catalogue: Catalogue, progress: Progress = lambda name: None) -> list[Efficiency]:
    """All entries from the data folder; what was measured last for a GPU and engine also stands for any version."""
    found: dict[Key, Efficiency] = {}
    for name, reader in (
        (splitwise.FILE, from_splitwise),
        (batches.FILE, from_batches),
        (serving_runs.FILE, from_serving),
    ):
        progress(name)
        for entry in reader(data / name, catalogue):
            found[entry.key] = entry
    for key, entry in list(found.items()):
        if key.version and key.engine != "splitwise":  # a model's own entry, too: its key keeps the model
            wider = replace(key, version="")
            found.setdefault(wider, replace(entry, key=wider))
    for key, entry in sorted(found.items(), key=lambda item: (item[0].dtype != "bf16", -item[1].rows)):
        if key.engine and not (key.version or key.model) and key.engine != "splitwise":
            wider = Key(key.gpu, key.engine)
            found.setdefault(wider, replace(entry, key=wider))
    for key, entry in sorted(found.items(), key=lambda item: (item[0].engine != "vllm", str(item[0]))):
        if key.engine and not (key.version or key.dtype or key.model) and key.engine != "splitwise":
            found.setdefault(Key(key.gpu), replace(entry, key=Key(key.gpu)))
    return list(found.values())
