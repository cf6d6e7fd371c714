"""Observations of an engine's steps as a fitting problem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hetkv.costmodel.calibration.fit import Array, Values
from hetkv.costmodel.calibration.logs.observations import Observation, Period, Setup
from hetkv.costmodel.calibration.problems import constants_of, stack
from hetkv.costmodel.catalogue import Catalogue
from hetkv.costmodel.models import model_shape
from hetkv.costmodel.step import Placement, coefficients, count_work, seconds


class EngineSteps:
    """Periods and prompts of one set-up.

    In a period every running sequence gets one token a step, so it holds `output / running` steps. Its prompts take as
    many of them as the chunk demands, and at least one each; these steps hold prompt tokens, the others do not.
    """

    def __init__(self, rows: Sequence[Observation], setup: Setup, catalogue: Catalogue) -> None:
        self.rows = rows
        gpu, shape = catalogue.gpu(setup.gpu), model_shape(setup.model)
        work = count_work(gpu, shape, Placement(setup.tp, 1, setup.dp), setup.dtype, "bf16")
        self.work = stack([work] * len(rows))
        self.period = np.array([isinstance(row, Period) for row in rows])
        self.measured_s = np.array([row.seconds for row in rows])
        self.running = np.array([row.running for row in rows])
        self.context = np.array([row.context for row in rows])
        output = np.array([row.output if isinstance(row, Period) else 1.0 for row in rows])
        tokens = np.array([row.prompt if isinstance(row, Period) else row.tokens for row in rows])
        prompts = np.array([max(row.prompts, 1e-9) if isinstance(row, Period) else 1.0 for row in rows])
        self.steps = np.where(self.period, output / np.maximum(self.running, 1e-9), 1.0)
        wanted = np.maximum(tokens / setup.chunk, prompts)
        self.filled = np.where(self.period, np.minimum(self.steps, wanted), np.ceil(tokens / setup.chunk))
        self.tokens = tokens / np.maximum(self.filled, 1e-9)
        self.pairs = tokens * (tokens / prompts + 1) / 2 / np.maximum(self.filled, 1e-9)

    def predict(self, values: Values) -> Array:
        """Seconds of each period, and from the start of each prompt to its first token."""
        k = coefficients(self.work, constants_of(values))
        zero = 0.0 * self.running
        plain = seconds(k, self.running, self.context, zero, zero)
        mixed = seconds(k, self.running, self.context, self.tokens, self.pairs)
        period = (self.steps - self.filled) * plain + self.filled * mixed
        waited = np.where(self.running > 0, plain / 2, 0.0)
        return np.asarray(np.where(self.period, period, self.filled * mixed + waited + values["accept_s"]))

    def errors(self, values: Values) -> Array:
        """log(measured / predicted) of prompts and of periods, NaN for rows of the other kind; shape (2, rows)."""
        error = np.log(self.measured_s / self.predict(values))
        return np.stack([np.where(self.period, np.nan, error), np.where(self.period, error, np.nan)])
