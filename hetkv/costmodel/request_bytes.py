"""What one request keeps in an instance's memory: KV of all tokens, of a sliding window, and states of fixed size."""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import numpy as np


class RequestBytes(NamedTuple):
    """Bytes of one request on one replica, all of its ranks together.

    `layer` is a token's KV in one layer. `full` layers keep every token, `sliding` ones the last `sliding_tokens`:
    those that the next token can see. `state` is what the layers that keep no KV need, whatever the length.
    """

    layer: float
    full: int = 1
    sliding: int = 0
    sliding_tokens: int = 0
    state: float = 0.0

    @property
    def token(self) -> float:
        """A token's KV in all layers."""
        return self.layer * (self.full + self.sliding)

    def bytes(self, tokens: Any) -> Any:
        """Of a request with `tokens` tokens in its cache; a float or an array."""
        return self.layer * (self.full * tokens + self.sliding * np.minimum(tokens, self.sliding_tokens)) + self.state

    def sent(self, start: int, stop: int, tokens: int, scale: float = 1.0) -> float:
        """Of the tokens `start` to `stop` of a prompt of `tokens`: what a decode instance needs of them, KV times
        `scale`. The state is known once the last token is computed, and goes with it.
        """
        visible = max(0, stop - max(start, tokens - self.sliding_tokens)) if self.sliding else 0
        state = self.state if stop == tokens else 0.0
        return self.layer * scale * (self.full * (stop - start) + self.sliding * visible) + state

    def longest(self, room: float, chunk: float) -> float:
        """Tokens of the longest request that fits in `room` bytes, prompts being computed in chunks of `chunk` tokens:
        sliding layers hold the whole chunk until its step ends.
        """
        tokens = (room - self.state) / self.layer
        reach = self.sliding_tokens + chunk
        if not self.sliding or tokens <= reach * (self.full + self.sliding):
            return tokens / (self.full + self.sliding)
        return (tokens - self.sliding * reach) / self.full if self.full else inf

    def merged(self) -> RequestBytes:
        """Of an engine whose sliding layers keep every token."""
        return self._replace(full=self.full + self.sliding, sliding=0, sliding_tokens=0)
