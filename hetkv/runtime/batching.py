"""Which tokens an instance computes next: `Batching`, continuous batching with chunked prefill and preemption.

The rules are those of `hetkv.simulator.scheduler`, which a test holds this to step by step: sequences that decode come
first, then prompts fill what is left of `max_num_batched_tokens`, in their order. Sequences and blocks are admitted
while there are places (`max_num_seqs`) and free blocks. Where blocks run out, the sequence admitted last is preempted:
it gives up its blocks and is computed again before anything that waits. Other than there, a prompt whose KV goes to
another instance takes all its blocks at once and is never preempted: they are being read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from hetkv.runtime.block_manager import BlockManager
from hetkv.runtime.sequence import Sequence


class Limits(NamedTuple):
    """By vLLM's names."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    chunked_prefill: bool = True


class Chunk(NamedTuple):
    """Tokens `start` to `stop` of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """The sequence's next token is chosen after it."""
        return self.stop == len(self.sequence.tokens)


class Batching:
    """Sequences of one instance, by what they wait for. Blocks are taken and given back here alone."""

    def __init__(self, blocks: BlockManager, limits: Limits = Limits()) -> None:  # noqa: B008 - it is immutable
        self.blocks, self.limits = blocks, limits
        self.waiting: deque[Sequence] = deque()
        """Prompts to compute."""
        self.resumed: deque[Sequence] = deque()
        """Preempted, to be computed again before anything that waits."""
        self.expected: deque[Sequence] = deque()
        """KV will come from elsewhere, once there is room."""
        self.receiving: dict[str, Sequence] = {}
        """Blocks are taken, KV is on its way."""
        self.ready: deque[Sequence] = deque()
        """KV is here, there is no place in the batch yet."""
        self.prefilling: dict[str, Sequence] = {}
        """Admitted, in that order."""
        self.decoding: dict[str, Sequence] = {}
        """One token a step, in the order in which they began to."""
        self.holding: dict[str, Sequence] = {}
        """Computed here and decoded elsewhere: blocks are kept until they have been read."""
        self.preemptions = 0
        self._preempted = False

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Sequence]:
        for queue in (self.waiting, self.resumed, self.expected, self.ready):
            yield from queue
        for table in (self.receiving, self.prefilling, self.decoding, self.holding):
            yield from table.values()

    @property
    def busy(self) -> bool:
        """There may be something to compute."""
        return bool(self.decoding or self.prefilling or self.waiting or self.resumed or self.ready)

    def plan(self) -> list[Chunk]:
        """The next step: tokens to decode, then chunks of prompts. `advance` tells that it was computed."""
        self._preempted = False
        self._join()
        while self._growth() > self.blocks.available:
            self._preempt(self._youngest())
            if not self.decoding:
                self._join()
        claim = self.blocks.take(self._growth()) or []  # so that no prompt takes what the decoding ones need
        chunks = self._prompts()
        self.blocks.give(claim)
        if chunks and self.decoding and not self.limits.chunked_prefill:
            return chunks
        steps = []
        for sequence in self.decoding.values():
            self._grow(sequence, len(sequence.tokens))
            steps.append(Chunk(sequence, len(sequence.tokens) - 1, len(sequence.tokens)))
        if not steps and not chunks and self.ready:
            return self.plan()  # the prompt that had the last place was preempted: what is ready takes it
        return steps + chunks

    def advance(self, step: list[Chunk]) -> list[Sequence]:
        """The step was computed; sequences whose next token is due, in its order."""
        due = []
        for sequence, _, stop in step:
            sequence.computed = stop
            if sequence.id in self.prefilling:
                if stop < len(sequence.tokens):
                    continue
                del self.prefilling[sequence.id]
                self.share(sequence)
                (self.holding if sequence.goes_to else self.decoding)[sequence.id] = sequence
            due.append(sequence)
        return due

    def grant(self) -> Iterator[Sequence]:
        """Expected sequences that get their blocks now, in order; `start` of their tokens are here already."""
        while self.expected:
            sequence = self.expected[0]
            if not self._place(sequence, sequence.target):
                return
            self.expected.popleft()
            self.receiving[sequence.id] = sequence
            yield sequence

    def deliver(self, sequence: Sequence, token: int) -> None:
        """The KV of a sequence that was granted is here, and its next token is known: it may decode."""
        del self.receiving[sequence.id]
        sequence.computed = len(sequence.tokens)
        self.share(sequence)
        sequence.tokens.append(token)
        sequence.generated += 1
        self.ready.append(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Do nothing more with the sequence, but keep its blocks until `end`: something still reads or fills them."""
        for queue in (self.waiting, self.resumed, self.expected, self.ready):
            if sequence in queue:
                queue.remove(sequence)
        for table in (self.receiving, self.prefilling, self.decoding):
            table.pop(sequence.id, None)
        self.holding[sequence.id] = sequence

    def end(self, sequence: Sequence) -> None:
        """The sequence is no longer here, whatever it waited for. Nothing reads or fills its blocks."""
        self.hold(sequence)
        del self.holding[sequence.id]
        self._free(sequence)

    def share(self, sequence: Sequence) -> None:
        """Let other sequences have the blocks of its `hashes` that are computed."""
        held = self.blocks.share(sequence.hashes, len(sequence.held), sequence.computed, sequence.blocks)
        sequence.held = sequence.hashes[:held]

    # -- prompts

    def _prompts(self) -> list[Chunk]:
        budget = self.limits.max_num_batched_tokens
        if self.limits.chunked_prefill:
            budget -= len(self.decoding)
        chunks: list[Chunk] = []
        for sequence in list(self.prefilling.values()):
            if budget <= 0 or sequence.id not in self.prefilling:
                break
            stop = min(sequence.target, sequence.computed + budget)
            while not self._grow(sequence, stop):
                victim = self._youngest()
                self._preempt(victim)
                if victim is sequence:
                    return chunks
            chunks.append(Chunk(sequence, sequence.computed, stop))
            budget -= stop - sequence.computed
        while budget > 0 and not self._preempted and self._places() > 0:
            queue = self.resumed or self.waiting
            if not queue or not self._admit(queue[0], budget, bool(chunks)):
                break
            sequence = queue.popleft()
            self.prefilling[sequence.id] = sequence
            stop = sequence.target
            if self.limits.chunked_prefill:
                stop = min(stop, sequence.computed + budget)
            chunks.append(Chunk(sequence, sequence.computed, stop))
            budget -= stop - sequence.computed
        return chunks

    def _admit(self, sequence: Sequence, budget: int, full: bool) -> bool:
        """Take blocks for a prompt's first chunk. `full`: the step has other work."""
        cached = self.blocks.match(sequence.hashes, sequence.target) * self.blocks.unit
        tokens = sequence.target - cached
        if not self.limits.chunked_prefill and tokens > budget and full:
            return False
        if self.limits.chunked_prefill and not sequence.goes_to:
            tokens = min(tokens, budget)
        return self._place(sequence, cached + tokens)

    # -- places and blocks

    def _places(self) -> int:
        return self.limits.max_num_seqs - len(self.prefilling) - len(self.decoding)

    def _join(self) -> None:
        while self.ready and self._places() > 0:
            sequence = self.ready.popleft()
            self.decoding[sequence.id] = sequence

    def _growth(self) -> int:
        """Blocks that the next tokens of all decoding sequences take."""
        return sum(self.blocks.blocks_of(len(s.tokens)) > len(s.blocks) for s in self.decoding.values())

    def _place(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for the first `tokens` of a sequence that has none, shared ones first."""
        held = sequence.hashes[: self.blocks.match(sequence.hashes, sequence.target)]
        shared = self.blocks.hold(held)
        own = self.blocks.take(self.blocks.blocks_of(tokens) - len(shared))
        if own is None:
            self.blocks.drop(held)
            return False
        sequence.held, sequence.blocks = held, shared + own
        sequence.computed = sequence.start = len(held) * self.blocks.unit
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        more = self.blocks.take(max(0, self.blocks.blocks_of(tokens) - len(sequence.blocks)))
        if more is None:
            return False
        sequence.blocks += more
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._preempted = True
        self.preemptions += 1
        self.prefilling.pop(sequence.id, None)
        self.decoding.pop(sequence.id, None)
        self._free(sequence)
        sequence.computed, sequence.target = 0, len(sequence.tokens)
        self.resumed.appendleft(sequence)

    def _youngest(self) -> Sequence:
        prompts = (sequence for sequence in reversed(self.prefilling.values()) if not sequence.goes_to)
        return next(prompts, None) or next(reversed(self.decoding.values()))

    def _free(self, sequence: Sequence) -> None:
        shared = len(sequence.held) * self.blocks.unit // self.blocks.block_size
        self.blocks.give(sequence.blocks[shared:])
        self.blocks.drop(sequence.held)
        sequence.held, sequence.blocks = (), []
