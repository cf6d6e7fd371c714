"""What the instances of one line of a plan have in common while they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from hetkv.costmodel import RequestBytes, StepModel
from hetkv.simulator.pages import Pages
from hetkv.simulator.series import Series
from hetkv.simulator.stepline import StepLine

AGGREGATED, PREFILL, DECODE = "aggregated", "prefill", "decode"


@dataclass
class Pool:
    """`count` equal instances of `gpus` GPUs each. Lengths are tokens.

    `kv_blocks` of `block_size` tokens in all layers fit in what the weights leave; a request has `most_tokens` of KV
    at most (None: what fits). `weight` is an instance's share of the requests under the discipline `weighted`.
    `skip_ahead` False runs every decode step as an event of its own: the same results, slowly (the tests compare both).
    """

    name: str
    role: str
    gpu: str
    gpus: int
    count: int
    model: StepModel
    layers: int
    kv_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    chunked_prefill: bool = True
    prefix_caching: bool = False
    first_token_at: str = PREFILL
    most_tokens: int | None = None
    weight: float = 1.0
    skip_ahead: bool = True
    waiting: Series = field(default_factory=Series)
    running: Series = field(default_factory=Series)
    busy: Series = field(default_factory=Series)
    down: Series = field(default_factory=Series)
    prefill_tokens: int = 0  # prompt tokens computed, recomputed ones too
    prefill_outputs: int = 0  # output tokens that the end of a prefill gave
    decode_tokens: int = 0  # output tokens of decode steps
    _lines: dict[int, StepLine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stages = self.model.stages
        self.skip_ahead = self.skip_ahead and not self.model.crowding  # who else is busy may change with each step
        self._keep(self.model.kv)
        tokens = min(self.max_num_batched_tokens, 2048)
        self.seconds_per_prompt_token = self.model.step_seconds(0, 0.0, tokens, tokens * (tokens + 1) / 2) / tokens

    def _keep(self, kv: RequestBytes) -> None:
        self.pages = Pages.of_request(kv, self.block_size)
        self.block_pages = self.pages.block  # that a sequence takes in one step at most
        self.kv_pages = self.kv_blocks * self.block_pages
        fits = self.pages.longest(self.kv_pages, self.max_num_batched_tokens if self.chunked_prefill else inf)
        self.longest = fits if self.most_tokens is None else min(fits, self.most_tokens)

    def expect_prefixes(self) -> None:
        """The traffic has prefixes to reuse: with a prefix cache, layers with a window then keep every token."""
        if self.prefix_caching:
            self._keep(self.model.kv.merged())

    def line(self, batch: int) -> StepLine:
        """Step times of a decode batch of `batch` sequences, built once."""
        line = self._lines.get(batch)
        if line is None:
            reach = self.kv_blocks * self.block_size * (8 if self.prefix_caching else 1)
            if self.pages.sliding:
                reach = min(batch * self.longest, reach * self.pages.block // max(self.pages.full, 1))
            line = self._lines[batch] = StepLine(self.model, batch, reach)
        return line
