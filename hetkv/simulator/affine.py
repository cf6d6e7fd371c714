"""A step model of five constants, to be fitted to one engine on one GPU."""

from __future__ import annotations

from collections.abc import Sequence

from hetkv.costmodel.interface import Estimate, StepModel

NAMES = ("step_s", "sequence_s", "context_token_s", "prompt_token_s", "prompt_step_s")


class AffineStepModel(StepModel):
    """A step costs a constant, and more per decoding sequence, KV token, prompt token, and for having prompts at all.

    Constants are seconds, in the order of `NAMES`. Implements `StepModel`; its interval is the value itself.
    """

    def __init__(self, constants: Sequence[float], kv_capacity_tokens: int, kv_bytes_per_token: float) -> None:
        self.constants = tuple(constants)
        self.step, self.sequence, self.context, self.prompt, self.prompt_step = constants
        self._capacity = kv_capacity_tokens
        self._kv_bytes_per_token = kv_bytes_per_token

    @property
    def kv_capacity_tokens(self) -> int:
        return self._capacity

    @property
    def kv_bytes_per_token(self) -> float:
        return self._kv_bytes_per_token

    def step_seconds(
        self, decode_batch: int, decode_context: float, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> float:
        seconds = self.step + self.sequence * decode_batch + self.context * decode_context
        return seconds + self.prompt * prefill_tokens + self.prompt_step if prefill_tokens else seconds

    def step_estimate(
        self, decode_batch: int, decode_context: float, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> Estimate:
        value = self.step_seconds(decode_batch, decode_context, prefill_tokens, prefill_pairs)
        return Estimate(value, value, value)
