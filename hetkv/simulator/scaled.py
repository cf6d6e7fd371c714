"""A step model at one end of its 90 % interval, or slower by a factor."""

from __future__ import annotations

from typing import Any

import numpy as np

from hetkv.costmodel.interface import Estimate, StepModel
from hetkv.costmodel.request_bytes import RequestBytes

LOW, HIGH = "low", "high"


class ScaledStepModel(StepModel):
    """`model` with all step times multiplied by `end`, or so that a typical step is at that end of its interval.

    Errors of a cost model are mostly common to all steps of a kind (an efficiency that is off), so there is one
    factor for steps that decode only and one for steps with prompt tokens.
    """

    def __init__(self, model: StepModel, end: str | float) -> None:
        self.model = model
        self.decode_factor = self.prompt_factor = end if isinstance(end, float) else 1.0
        if isinstance(end, str):
            decode, prompt = model.step_estimate(32, 32 * 1024.0), model.step_estimate(0, 0.0, 1024, 1024 * 1025 / 2)
            self.decode_factor = getattr(decode, end) / decode.value
            self.prompt_factor = getattr(prompt, end) / prompt.value
        self.stages = model.stages
        self.kv_element_bytes = model.kv_element_bytes

    def step_seconds(
        self, decode_batch: int, decode_context: float, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> float:
        factor = self.prompt_factor if prefill_tokens else self.decode_factor
        return factor * self.model.step_seconds(decode_batch, decode_context, prefill_tokens, prefill_pairs)

    def step_share(self, decode_batch: Any, prefill_tokens: Any) -> Any:
        return self.model.step_share(decode_batch, prefill_tokens)

    @property
    def kv_capacity_tokens(self) -> int:
        return self.model.kv_capacity_tokens

    @property
    def kv_bytes_per_token(self) -> float:
        return self.model.kv_bytes_per_token

    @property
    def kv(self) -> RequestBytes:
        return self.model.kv

    def step_seconds_of(self, batch: Any, context: Any, prompt: Any, pairs: Any) -> Any:
        """`step_seconds` of arrays of one shape, where `model` has it."""
        of: Any = self.model
        factor = np.where(np.asarray(prompt) > 0, self.prompt_factor, self.decode_factor)
        return factor * of.step_seconds_of(batch, context, prompt, pairs)

    def step_estimate(
        self, decode_batch: int, decode_context: float, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> Estimate:
        return self.model.step_estimate(decode_batch, decode_context, prefill_tokens, prefill_pairs)
