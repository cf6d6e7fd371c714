"""How an instance counts KV memory: pages of some tokens in some layers."""

from __future__ import annotations

from math import ceil, gcd
from typing import NamedTuple

from hetkv.costmodel import RequestBytes

NEVER = 2**31
"""Tokens of no request: a model of windows alone keeps as much of a longer one."""


class Pages(NamedTuple):
    """A page holds `block_size` tokens in as many layers as divide those of both kinds.

    A block of tokens takes `full` pages for the layers that keep every token, and `sliding` for those that keep the
    last `sliding_tokens` ones; a request has `state` pages in addition.
    """

    block_size: int
    full: int = 1
    sliding: int = 0
    sliding_tokens: int = 0
    state: int = 0

    @classmethod
    def of_request(cls, kv: RequestBytes, block_size: int) -> Pages:
        """The pages of a model."""
        layers = gcd(kv.full, kv.sliding)
        state = ceil(kv.state / (kv.layer * layers * block_size)) if kv.state else 0
        return cls(block_size, kv.full // layers, kv.sliding // layers, kv.sliding_tokens, state)

    @property
    def block(self) -> int:
        """Pages of a block of tokens in all layers."""
        return self.full + self.sliding

    def kept(self, tokens: int) -> int:
        """Pages of a request with `tokens` tokens in its cache."""
        pages = self.state + self.full * -(-tokens // self.block_size)
        if self.sliding:
            pages += self.sliding * -(-min(tokens, self.sliding_tokens) // self.block_size)
        return pages

    def computing(self, computed: int, tokens: int) -> int:
        """The same while `tokens` tokens of a prompt are computed after `computed` ones: the sliding layers hold
        all of those until the step ends.
        """
        pages = self.state + self.full * -(-(computed + tokens) // self.block_size)
        if self.sliding:
            pages += self.sliding * -(-(min(computed, self.sliding_tokens) + tokens) // self.block_size)
        return pages

    def longest(self, total: int, chunk: float) -> int:
        """Tokens of the longest request that `total` pages hold, prompts being computed in steps of `chunk` tokens."""
        left = total - self.state
        blocks, reach = left // self.block, (self.sliding_tokens + chunk) / self.block_size
        if self.sliding and blocks >= reach:
            blocks = (left - self.sliding * ceil(reach)) // self.full if self.full else NEVER
        return max(blocks, 0) * self.block_size
