"""What the simulator asks of a cost model. Times are seconds, sizes bytes, lengths tokens."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from hetkv.costmodel.request_bytes import RequestBytes


class Estimate(NamedTuple):
    """A prediction with its central 90 % interval: `low <= value <= high`, all in the unit of `value`."""

    value: float
    low: float
    high: float


class StepModel(Protocol):
    """Step times of one instance: a model on some GPUs under one engine. `hetkv.costmodel.step_model` makes one.

    One engine step runs `decode_batch` sequences by one token each and `prefill_tokens` prompt tokens, together
    (chunked prefill) or alone. `decode_context` is the sum over the decode batch of the tokens in each KV cache.
    `prefill_pairs`
    is the number of (query, key) pairs that causal attention visits for the prompt tokens: a chunk of `n` tokens after
    `p` cached ones has `n*p + n*(n+1)/2`.

    The time of a step is its latency: from its start until its tokens are out. With pipeline `stages` the next step may
    start earlier, after `step_share` of it.

    A class that derives from this one has the defaults below: one stage, and layers that keep the KV of every token.
    """

    stages: int = 1
    """Pipeline stages: so many steps may be in flight at once."""
    kv_element_bytes: float = 2.0
    """Bytes of one KV element, scales included."""
    crowding: float = 0.0
    """By what share a step takes longer for each other instance of the machine that is busy meanwhile."""

    def step_seconds(
        self, decode_batch: int, decode_context: float, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> float:
        """Central prediction of one step. Called millions of times by the simulator: plain floats, no allocation."""
        ...

    def step_estimate(
        self, decode_batch: int, decode_context: float, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> Estimate:
        """The same with its 90 % interval."""
        ...

    def step_share(self, decode_batch: Any, prefill_tokens: Any) -> Any:
        """The share of a step's time after which the next step may start; floats or arrays of one shape."""
        return 1.0

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of KV cache, in all layers, that the instance's memory holds besides weights and activations."""
        ...

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV cache per token, all layers, all ranks of one replica."""
        ...

    @property
    def kv(self) -> RequestBytes:
        """What one request keeps."""
        return RequestBytes(self.kv_bytes_per_token)

    @property
    def kv_room(self) -> float:
        """Bytes of memory for the KV and the states of all requests."""
        return self.kv_capacity_tokens * self.kv_bytes_per_token
