"""What one request keeps in an instance's memory: KV of all tokens, of a window, and states of fixed size."""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import numpy as np


class RequestBytes(NamedTuple):
    """Bytes of one request on one replica, all of its ranks together.

    `layer` is a token's KV in one layer. `full` layers keep every token; `windowed` ones the last `window` tokens,
    those that the next token can see. `state` is what the layers that keep no KV need, whatever the length.
    """

    layer: float
    full: int = 1
    windowed: int = 0
    window: int = 0
    state: float = 0.0

    @property
    def token(self) -> float:
        """A token's KV in all layers."""
        return self.layer * (self.full + self.windowed)

    def bytes(self, tokens: Any) -> Any:
        """Of a request with `tokens` tokens in its cache; a float or an array."""
        return self.layer * (self.full * tokens + self.windowed * np.minimum(tokens, self.window)) + self.state

    def sent(self, start: int, stop: int, tokens: int, scale: float = 1.0) -> float:
        """Of the tokens `start` to `stop` of a prompt of `tokens`: what a decode instance needs of them, KV times
        `scale`. The state is known once the last token is computed, and goes with it.
        """
        visible = max(0, stop - max(start, tokens - self.window)) if self.windowed else 0
        state = self.state if stop == tokens else 0.0
        return self.layer * scale * (self.full * (stop - start) + self.windowed * visible) + state

    def longest(self, room: float, chunk: float) -> float:
        """Tokens of the longest request that fits in `room` bytes, prompts being computed in chunks of `chunk` tokens:
        layers with a window hold the whole chunk until its step ends.
        """
        tokens = (room - self.state) / self.layer
        reach = self.window + chunk
        if not self.windowed or tokens <= reach * (self.full + self.windowed):
            return tokens / (self.full + self.windowed)
        return (tokens - self.windowed * reach) / self.full if self.full else inf

    def merged(self) -> RequestBytes:
        """Of an engine whose layers with a window keep every token."""
        return self._replace(full=self.full + self.windowed, windowed=0, window=0)
