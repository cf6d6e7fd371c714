"""Calibration: measured files in, efficiencies with fit error and provenance out."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hetkv.costmodel.calibration import llm_inference_bench as accuracy_bench
from hetkv.costmodel.calibration import serving_runs as accuracy_serving
from hetkv.costmodel.calibration import splitwise as accuracy_splitwise
from hetkv.costmodel.calibration.datasets import (
    BatchRow,
    ServingRow,
    Side,
    StepRow,
    read_bench,
    read_serving,
    read_splitwise,
)
from hetkv.costmodel.calibration.errors import Intervals, cross_predict
from hetkv.costmodel.calibration.fit import PRIORS, STEP_NAMES, Array, Fitted, Level, fit, layout
from hetkv.costmodel.calibration.problems import ServingLoops, StaticBatches, StaticSteps
from hetkv.costmodel.catalogue import DTYPE_BYTES, Catalogue
from hetkv.costmodel.efficiency import Constants, Efficiencies, Efficiency, Key
from hetkv.costmodel.models import model_shape
from hetkv.errors import InputError

Progress = Callable[[str], None]


def _split(row: StepRow | BatchRow | ServingRow) -> tuple[int, int]:
    """TP, and the sequences of one instance."""
    if isinstance(row, ServingRow):
        return row.decode.tp, row.concurrency // row.decode.workers
    return row.tp, row.batch


def _entries(
    rows: Sequence[Any],
    ratio: Array,
    constants: Callable[[Any], Constants],
    key: Callable[[Any], Key],
    spans: Intervals,
    provenance: str,
) -> list[Efficiency]:
    """One entry for each key that the rows have; `ratio` is measured over cross-predicted time."""
    groups: dict[Key, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[key(row)].append(index)
    entries = []
    for found, members in groups.items():
        row = rows[members[0]]
        low, high = spans.of(row)
        error = float(np.median(np.abs(1 / ratio[members] - 1)))
        models = tuple(sorted({model_shape(rows[i].model).name for i in members}))
        tps = tuple(sorted({_split(rows[i])[0] for i in members}))
        batch = max(_split(rows[i])[1] for i in members)
        entries.append(
            Efficiency(found, constants(row), low, high, provenance, error, len(members), models, "", tps, batch)
        )
    return entries


def from_splitwise(path: Path, catalogue: Catalogue) -> list[Efficiency]:
    """Entries for the eager engine of Splitwise's measurements."""
    rows = read_splitwise(path).splitwise
    problem = StaticSteps(rows, catalogue)
    found = fit(rows, problem.residuals, problem.layout(), accuracy_splitwise.SCALE)
    predicted = cross_predict(rows, accuracy_splitwise.config, lambda a, b: accuracy_splitwise.predict(a, b, catalogue))
    ratio = (accuracy_splitwise.measured(rows) / predicted)[1]
    spans = Intervals(rows, ratio, lambda r: r.gpu)
    text = f"{path.name}: Splitwise, Llama-2 70B, token and prompt times; error is of the token time, 5 folds"

    def key(row: Any) -> Key:
        return Key(catalogue.gpu(row.gpu).name, "splitwise", "2023", "bf16")

    return _entries(rows, ratio, found.constants, key, spans, text)


def from_bench(path: Path, catalogue: Catalogue) -> list[Efficiency]:
    """Entries for the hardware of LLM-Inference-Bench, each fitted from NVIDIA's constants on."""
    rows = read_bench(path).bench
    nvidia = [row for row in rows if row.gpu.startswith("Nvidia")]
    problem = StaticBatches(nvidia, catalogue)
    base = fit(nvidia, problem.residuals, problem.layout(), accuracy_bench.SCALE)
    predicted = cross_predict(nvidia, accuracy_bench.config, lambda a, b: accuracy_bench.predict(a, b, catalogue))
    ratio = accuracy_bench.measured(nvidia) / predicted
    text = f"{path.name}: LLM-Inference-Bench, whole-batch latency; error over 5 folds"

    def key(row: BatchRow) -> Key:
        return Key(catalogue.gpu(row.gpu).name, row.engine, "2024", "bf16")

    spans = Intervals(nvidia, ratio, lambda r: (r.gpu, r.engine))
    entries = _entries(nvidia, ratio, base.constants, key, spans, text)
    for gpu in sorted({row.gpu for row in rows} - {row.gpu for row in nvidia}):
        own = [row for row in rows if row.gpu == gpu]

        def run(train: Sequence[BatchRow], test: Sequence[BatchRow]) -> Array:
            part = StaticBatches(train, catalogue)
            moved = fit(train, part.residuals, part.own_layout(base, train[0]), 0.2)
            return StaticBatches(test, catalogue).predict(moved.values(test))

        whole = StaticBatches(own, catalogue)
        moved = fit(own, whole.residuals, whole.own_layout(base, own[0]), 0.2)
        ratio = accuracy_bench.measured(own) / cross_predict(own, accuracy_bench.config, run)
        entries += _entries(own, ratio, moved.constants, key, Intervals(own, ratio, lambda r: ""), text)
    return entries


def from_serving(path: Path, catalogue: Catalogue) -> list[Efficiency]:
    """Entries of every (GPU, engine, version, dtype) of the serving data, and of what they have in common."""
    rows = read_serving(path).serving
    problem = ServingLoops(rows, catalogue)
    found = fit(rows, problem.residuals, problem.layout(True))
    predicted = cross_predict(rows, accuracy_serving.config, lambda a, b: accuracy_serving.predict(a, b, catalogue))
    ratio = (accuracy_serving.measured(rows) / predicted)[1]
    spans = Intervals(rows, ratio, accuracy_serving.exact_key)
    text = f"{path.name}: aiconfigurator-core 0.12 serving runs, TPOT; error over 5 folds"

    def exact(row: ServingRow) -> Key:
        return Key(catalogue.gpu(row.gpu).name, row.engine, row.version, row.dtype)

    entries = _entries(rows, ratio, found.constants, exact, spans, text)
    for drop in (("version",), ("gpu", "version")):
        entries += _common(rows, ratio, found, drop, catalogue, text)
    return entries


def _common(
    rows: Sequence[ServingRow],
    ratio: Array,
    found: Fitted,
    drop: tuple[str, ...],
    catalogue: Catalogue,
    text: str,
) -> list[Efficiency]:
    """Entries without the version, or without the GPU: the fitted constants without the offsets of single ones."""
    bare = [replace(row, version="", gpu="" if "gpu" in drop else row.gpu) for row in rows]

    def key(row: ServingRow) -> Key:
        return Key(catalogue.gpu(row.gpu).name if row.gpu else "nvidia", row.engine, "", row.dtype)

    spans = Intervals(bare, ratio, lambda r: (r.gpu, r.engine, r.dtype))
    return _entries(bare, ratio, found.constants, key, spans, f"{text}; common to several {' and '.join(drop)}s")


def ship(data: Path, catalogue: Catalogue, progress: Progress = lambda name: None) -> list[Efficiency]:
    """All entries from the data folder; what was measured last for a GPU and engine also stands for any version.

    Only NVIDIA has entries for a whole vendor: nothing shows that constants go from one GPU to the next elsewhere.
    """
    entries: dict[Key, Efficiency] = {}
    for name, reader in (
        (accuracy_splitwise.FILE, from_splitwise),
        (accuracy_bench.FILE, from_bench),
        (accuracy_serving.FILE, from_serving),
    ):
        progress(name)
        for entry in reader(data / name, catalogue):
            entries[entry.key] = entry
    for key, entry in list(entries.items()):
        if key.engine == "splitwise" or not key.version:
            continue
        entries.setdefault(
            Key(key.gpu, key.engine, "", key.dtype), replace(entry, key=Key(key.gpu, key.engine, "", key.dtype))
        )
    for key, entry in sorted(entries.items(), key=lambda item: (item[0].dtype != "bf16", -item[1].rows)):
        if key.version or key.engine == "splitwise":
            continue
        wider = Key(key.gpu, key.engine)
        entries.setdefault(wider, replace(entry, key=wider))
    for key, entry in sorted(entries.items(), key=lambda item: (item[0].engine != "vllm", str(item[0]))):
        if not key.version and not key.dtype and key.engine != "splitwise":
            entries.setdefault(Key(key.gpu), replace(entry, key=Key(key.gpu)))
    return list(entries.values())


CSV_COLUMNS = ("gpu", "engine", "version", "model", "dtype", "tp", "prompt", "output", "concurrency", "tpot_ms")


def read_csv(path: Path) -> list[ServingRow]:
    """A user's runs: columns `CSV_COLUMNS`, and `ttft_ms` and `dp` where there are any. Errors name line and column."""
    rows = []
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        for name in CSV_COLUMNS:
            if name not in (reader.fieldnames or ()):
                raise InputError(f"{path}: missing column `{name}`; expected {', '.join(CSV_COLUMNS)}")
        for line, row in enumerate(reader, start=2):

            def number(name: str, whole: bool = True, of: dict[str, Any] = row, at: int = line) -> float:
                try:
                    value = float(of[name])
                except (TypeError, ValueError):
                    raise InputError(f"{path}:{at}: `{name}` must be a number, got {of[name]!r}") from None
                if not 0 < value < float("inf") or (whole and value != int(value)):
                    raise InputError(
                        f"{path}:{at}: `{name}` must be positive{' and whole' if whole else ''}, got {value:g}"
                    )
                return value

            if row["dtype"] not in DTYPE_BYTES:
                raise InputError(f"{path}:{line}: unknown dtype {row['dtype']!r}; known are {', '.join(DTYPE_BYTES)}")
            tpot = number("tpot_ms", whole=False) / 1e3
            rows.append(
                ServingRow(
                    id=f"{path.name}:{line}",
                    source="user",
                    gpu=row["gpu"],
                    engine=row["engine"],
                    version=row["version"],
                    model=row["model"],
                    dtype=row["dtype"],
                    prompt=int(number("prompt")),
                    output=int(number("output")),
                    concurrency=int(number("concurrency")),
                    decode=Side(int(number("tp")), int(number("dp")) if row.get("dp") else 1),
                    prefill=None,
                    ttft_s=number("ttft_ms", whole=False) / 1e3 if row.get("ttft_ms") else tpot,
                    tpot_s=tpot,
                )
            )
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


MOVED = ("gemm_bytes", "gemm_flops", "kv_bytes", "layer_s", "step_s", "sequence_s", "prompt_layer_s", "reduce")
MOVED_EXPERTS = ("expert_bytes", "expert_flops")
MANY = 20


def from_rows(rows: Sequence[ServingRow], known: Efficiencies, catalogue: Catalogue, origin: str) -> list[Efficiency]:
    """Move the closest known constants to a user's runs, one entry for each (GPU, engine, version, dtype).

    With few rows the priors decide most of it. The interval spans twice the log residuals, and no less than a factor of
    1.1, or of 1.3 with fewer than `MANY` rows.
    """
    groups: dict[Hashable, list[ServingRow]] = defaultdict(list)
    for row in rows:
        groups[(row.gpu, row.engine, row.version, row.dtype)].append(row)
    entries = []
    for own in groups.values():
        first, gpu = own[0], catalogue.gpu(own[0].gpu)
        base = known.find(gpu.name, gpu.vendor, first.engine, first.version, first.dtype)
        problem = ServingLoops(own, catalogue)
        values = {name: getattr(base.constants, name) for name in STEP_NAMES}
        experts = any(model_shape(row.model).experts for row in own)
        names = MOVED + (MOVED_EXPERTS if experts else ())
        width = 0.6 if base.fallback else 0.2
        priors = {name: PRIORS[name]._replace(start=max(values[name], PRIORS[name].low), width=width) for name in names}
        fixed = {name: value for name, value in values.items() if name not in names}
        plan = layout(names, {"": (Level(lambda r: "", 1e-6),)}, fixed, priors)
        found = fit(own, problem.residuals, plan, 0.15)
        error = problem.residuals(found.values(own))
        spread = max(1.1 if len(own) >= MANY else 1.3, float(np.exp(2 * np.quantile(np.abs(error), 0.9))))
        key = Key(gpu.name, first.engine, first.version, first.dtype)
        median = float(np.median(np.abs(np.expm1(error))))
        models = tuple(sorted({model_shape(row.model).name for row in own}))
        text = f"{origin}: {len(own)} runs, from {base.key}"
        tps, batch = tuple(sorted({_split(row)[0] for row in own})), max(_split(row)[1] for row in own)
        constants = found.constants(first)
        entries.append(Efficiency(key, constants, 1 / spread, spread, text, median, len(own), models, "", tps, batch))
    return entries
