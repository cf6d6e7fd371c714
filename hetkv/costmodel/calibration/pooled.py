"""What several GPUs have in common: the prior for a GPU that was not measured, with the spread between GPUs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetkv.costmodel.calibration.datasets import BatchRow
from hetkv.costmodel.calibration.fit import STEP_NAMES, Array, Prior, Values, fit
from hetkv.costmodel.calibration.problems import BATCH_NAMES, BATCH_PRIORS, StaticBatches
from hetkv.costmodel.catalogue import Catalogue
from hetkv.costmodel.efficiency import Constants

NAMES = (*BATCH_NAMES, "accept_s")
SCALE = 0.1
LEAST_WIDTH = 0.3


@dataclass(frozen=True)
class Hardware:
    """One hardware under one engine, with the constants of its own fit, the offsets of single TP degrees left out."""

    name: str
    engine: str
    vendor: str
    rows: Sequence[BatchRow]
    constants: Mapping[str, float]


def hardware(rows: Sequence[BatchRow], catalogue: Catalogue) -> list[Hardware]:
    """Each (GPU, engine) of the rows with its own fit from generic priors; of two engines of a GPU vLLM alone."""
    groups: dict[tuple[str, str], list[BatchRow]] = defaultdict(list)
    for row in rows:
        groups[(row.gpu, row.engine)].append(row)
    found = []
    for (gpu, engine), own in sorted(groups.items()):
        if engine != "vllm" and (gpu, "vllm") in groups:
            continue
        fitted = fit(own, StaticBatches(own, catalogue).residuals, StaticBatches.own_layout(), SCALE)
        anywhere = replace(own[0], tp=0)
        constants = {name: fitted.value(name, anywhere) for name in NAMES}
        found.append(Hardware(gpu, engine, catalogue.gpu(gpu).vendor, own, constants))
    return found


def pool(parts: Iterable[Hardware]) -> dict[str, Prior]:
    """The geometric mean of each constant, over the GPUs of each vendor and then over vendors, as a prior.

    Its width is the standard deviation between GPUs, and no less than `LEAST_WIDTH`: few GPUs were measured.
    """
    by_vendor: dict[str, list[Hardware]] = defaultdict(list)
    for part in parts:
        by_vendor[part.vendor].append(part)
    priors = {}
    for name in NAMES:
        logs = [np.log([part.constants[name] for part in own]) for own in by_vendor.values()]
        centre = float(np.mean([np.mean(values) for values in logs]))
        width = float(np.sqrt(np.mean([np.mean((values - centre) ** 2) for values in logs])))
        known = BATCH_PRIORS.get(name) or StaticBatches.own_layout().priors[name]
        start = min(max(float(np.exp(centre)), known.low), known.high)
        priors[name] = known._replace(start=start, width=max(min(LEAST_WIDTH, known.width), width))
    return priors


def values_of(priors: Mapping[str, Prior], count: int) -> Values:
    """The centres of `priors` for `count` rows."""
    every = StaticBatches.own_layout(priors).priors
    return {name: np.full(count, prior.start) for name, prior in every.items()}


def constants_of(priors: Mapping[str, Prior]) -> Constants:
    """The centres of `priors` as constants of the step."""
    every = StaticBatches.own_layout(priors).priors
    return Constants(**{name: every[name].start for name in STEP_NAMES})


def unseen(part: Hardware, others: Sequence[Hardware], catalogue: Catalogue) -> Array:
    """log(measured / predicted) of a hardware's rows from what `others` have in common."""
    problem = StaticBatches(part.rows, catalogue)
    return -problem.residuals(values_of(pool(others), len(part.rows)))


def size(errors: Sequence[Array]) -> float:
    """Root mean square over GPUs of the median log error."""
    return float(np.sqrt(np.mean([float(np.median(each)) ** 2 for each in errors])))


def vendor_errors(parts: Sequence[Hardware], catalogue: Catalogue) -> dict[str, Array]:
    """Errors of each hardware from the other hardware of its vendor, where there is some."""
    found = {}
    for part in parts:
        others = [other for other in parts if other.vendor == part.vendor and other is not part]
        if others:
            found[part.name] = unseen(part, others, catalogue)
    return found


def stranger_errors(parts: Sequence[Hardware], catalogue: Catalogue) -> dict[str, Array]:
    """Errors of each hardware from the hardware of all other vendors."""
    return {
        part.name: unseen(part, [other for other in parts if other.vendor != part.vendor], catalogue) for part in parts
    }
