"""A conversation over two different instances, turn by turn: KV goes both ways, and each token's only once.

Each turn the prefiller computes only what neither side has, and sends what the decoder lacks; afterwards the decoder
sends the KV of the tokens that it generated back, so that the prefiller holds the whole conversation before the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import NamedTuple

from hetkv.kv.pool import KVPool
from hetkv.runtime.generation import choose, decode, prefill
from hetkv.runtime.model import Decoder
from hetkv.runtime.paged import BlockAllocator, Pages
from hetkv.runtime.processes import PATIENCE_S
from hetkv.transport.config import TransferConfig
from hetkv.transport.exchange import Exchange
from hetkv.transport.handle import Handle
from hetkv.transport.sender import SendHandle

WAIT_S = 60.0


class Turn(NamedTuple):
    """What one turn did. Tokens are counted once, whatever the number of layers."""

    tokens: list[int]
    """Generated, the end token included."""
    computed: int
    """Tokens that the prefiller computed."""
    sent: int
    """Tokens whose KV went to the decoder."""
    returned: int
    """Tokens whose KV came back."""
    sent_bytes: int
    returned_bytes: int


class Station:
    """One instance of a conversation: a model, a pool, and an `Exchange` over it."""

    def __init__(
        self, model: Decoder, pool: KVPool, *, secret: bytes, instance: str, config: TransferConfig | None = None
    ) -> None:
        self.model, self.pool = model, pool
        self.allocator = BlockAllocator(pool)
        config = config or TransferConfig(lease_s=PATIENCE_S, hold_s=PATIENCE_S)
        self.exchange = Exchange(pool, secret=secret, instance=instance, config=config)
        self.blocks: list[list[int]] = [[] for _ in range(pool.spec.num_groups)]
        self.cached = 0
        """Tokens of the conversation whose KV is in the pool."""

    def reserve(self, num_tokens: int) -> Pages:
        """Pages with room for `num_tokens` tokens of the conversation. Raises `PoolFullError`."""
        self.blocks = self.allocator.extend(self.blocks, num_tokens)
        return Pages(self.pool, self.blocks)

    def sent_bytes(self) -> int:
        """Payload bytes that this side sent so far."""
        return self.exchange.sender.stats()["payload_bytes"]


class Conversation:
    """One conversation between a prefiller and a decoder, whose exchanges are linked here."""

    def __init__(self, prefiller: Station, decoder: Station) -> None:
        self.prefiller, self.decoder = prefiller, decoder
        self.tokens: list[int] = []
        """All turns so far, prompts and answers."""
        self.turns = 0
        decoder.exchange.connect(prefiller.exchange.listen())

    def turn(self, prompt: Sequence[int], max_new_tokens: int, *, chunk: int | None = None) -> Turn:
        """Answer `prompt`, which continues the conversation, greedily. Raises what transfer and model raise."""
        here, there = self.prefiller, self.decoder
        for station in (here, there):  # a turn that failed may have left KV of its prompt
            station.cached = min(station.cached, len(self.tokens))
        self.turns += 1
        text = [*self.tokens, *prompt]
        computed, lacking = len(text) - here.cached, len(text) - there.cached
        before = here.sent_bytes(), there.sent_bytes()
        first = self._forward(text, max_new_tokens, chunk)
        pages = Pages(there.pool, there.blocks)
        answer = list(decode(there.model, first, len(text), pages, max_new_tokens))
        self.tokens = text + answer
        there.cached = len(self.tokens) - 1  # the last token's KV is computed with the next turn
        self._back(len(text))
        return Turn(
            answer,
            computed,
            lacking,
            there.cached - len(text),
            here.sent_bytes() - before[0],
            there.sent_bytes() - before[1],
        )

    def _forward(self, text: list[int], max_new_tokens: int, chunk: int | None) -> int:
        """Prefill what is new and send what the decoder lacks; the first token of the answer."""
        here, there = self.prefiller, self.decoder
        pages = here.reserve(len(text))
        there.reserve(len(text) + max_new_tokens - 1)
        with self._transfer(here, there, len(text), there.cached) as sending:

            def on_layer(layer: int, start: int, stop: int) -> None:
                sending.send_layer(layer, (start, stop))

            for layer in here.pool.layers:
                on_layer(layer, min(there.cached, here.cached), here.cached)
            logits = prefill(here.model, text, pages, start=here.cached, chunk=chunk, on_layer=on_layer)
        here.cached = there.cached = len(text)
        return choose(here.model, logits)

    def _back(self, start: int) -> None:
        """Send the KV of the decoder's own tokens, from `start` on, to the prefiller."""
        here, there = self.prefiller, self.decoder
        if there.cached == start:
            return
        here.reserve(there.cached)
        with self._transfer(there, here, there.cached, start) as sending:
            for layer in there.pool.layers:
                sending.send_layer(layer, (start, there.cached))
        here.cached = there.cached

    @contextmanager
    def _transfer(self, source: Station, destination: Station, num_tokens: int, cached: int) -> Iterator[SendHandle]:
        """Send the KV of tokens `cached` to `num_tokens`; both sides are done on leaving, also where it fails."""
        name = f"turn {self.turns}"
        ends: list[Handle] = []
        try:
            ends.append(
                destination.exchange.receiver.receive(name, destination.blocks, num_tokens, num_cached_tokens=cached)
            )
            sending = source.exchange.sender.send(name, source.blocks, num_tokens)
            ends.insert(0, sending)
            yield sending
            for end in reversed(ends):
                end.wait(WAIT_S)
        except BaseException:
            for end in ends:
                end.abort("the turn failed")
            wait([end.future for end in ends], WAIT_S)  # the next turn uses the same blocks
            raise
