"""Step times of one engine as they were measured where it runs: `MeasuredSteps`, which `hetkv calibrate --bench` fits.

A step's time is a piecewise line in the number of its tokens, and more for each decoding sequence, each KV token these
read, each pair of a prompt, and for having prompts at all; and all of it the more, the more other instances of the
machine are busy. There is no GPU in it: it holds for the model, the engine and the machine that were measured, and for
no other.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from hetkv.costmodel.calibration_file import parse_document
from hetkv.costmodel.interface import Estimate, StepModel
from hetkv.costmodel.textfile import read_utf8
from hetkv.errors import InputError

NODES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
"""Tokens of a step at which its line may bend."""


class StepFit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds by what they are for. `token_s` are those of a token between a node and the next one."""

    name: str
    step_s: float
    token_s: tuple[float, ...]
    sequence_s: float
    context_s: float
    pair_s: float
    prompt_s: float
    crowding: float = 0.0
    """See `StepModel`: instances share cores, memory and the server's process with each other."""
    kv_bytes_per_token: float
    rows: int
    median_error: float
    low: float
    """5 % of the measured steps took less than this times the predicted time, and as many more than `high` times."""
    high: float
    provenance: str

    def __post_init__(self) -> None:
        if len(self.token_s) != len(NODES):
            raise ValueError(f"`token_s` needs {len(NODES)} values, got {len(self.token_s)}")


class StepWork(NamedTuple):
    """What steps do: floats, or arrays of one length."""

    batch: Any
    context: Any
    prompt: Any
    pairs: Any


def terms(work: StepWork) -> NDArray[np.float64]:
    """What the constants are multiplied with, `[steps, constants]`: step, tokens, sequence, context, pair, prompt."""
    tokens = np.asarray(work.batch + work.prompt, np.float64)
    edges = np.array([0.0, *NODES[1:], np.inf])
    pieces = np.clip(tokens[:, None] - edges[:-1], 0.0, edges[1:] - edges[:-1])
    rest = (work.batch, work.context, work.pairs, np.asarray(work.prompt) > 0)
    return np.column_stack((np.ones_like(tokens), pieces, *(np.asarray(each, np.float64) for each in rest)))


class MeasuredSteps(StepModel):
    """Implements `StepModel`. Where there is no memory model, a plan has to say how many tokens of KV there are."""

    def __init__(self, fit: StepFit, kv_tokens: int) -> None:
        self.fit, self._tokens, self.crowding = fit, kv_tokens, fit.crowding
        edges = (0.0, *NODES[1:])
        self._lines = []
        value = fit.step_s
        for number, (start, slope) in enumerate(zip(edges, fit.token_s, strict=True)):
            self._lines.append((start, value, slope))
            if number + 1 < len(edges):
                value += slope * (edges[number + 1] - start)

    @property
    def kv_capacity_tokens(self) -> int:
        return self._tokens

    @property
    def kv_bytes_per_token(self) -> float:
        return self.fit.kv_bytes_per_token

    def step_seconds(
        self, decode_batch: int, decode_context: float, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> float:
        fit, tokens = self.fit, decode_batch + prefill_tokens
        for start, value, slope in reversed(self._lines):
            if tokens >= start:
                seconds = value + slope * (tokens - start)
                break
        seconds += fit.sequence_s * decode_batch + fit.context_s * decode_context
        return seconds + fit.pair_s * prefill_pairs + fit.prompt_s if prefill_tokens else seconds

    def step_estimate(
        self, decode_batch: int, decode_context: float, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> Estimate:
        value = self.step_seconds(decode_batch, decode_context, prefill_tokens, prefill_pairs)
        return Estimate(value, value * self.fit.low, value * self.fit.high)


def load_steps(paths: Iterable[str | Path]) -> dict[str, StepFit]:
    """The steps that `hetkv calibrate --bench` fitted, by name, later files last. `InputError` names file and entry."""
    found = {}
    for path in paths:
        for index, raw in enumerate(parse_document(read_utf8(path), str(path)).get("steps", [])):
            try:
                fit = msgspec.convert(raw, StepFit)
            except msgspec.ValidationError as error:
                raise InputError(f"{path}: steps[{index}]: {error}") from None
            found[fit.name] = fit
    return found
