"""The decode batch of one instance, in aggregate: nothing here costs time per sequence and step."""

from __future__ import annotations

from heapq import heappop, heappush

from hetkv.simulator.request import Request


class DecodeBatch:
    """Sequences that gain one token each in every step. `steps` counts the steps so far, `context` is the KV tokens.

    A sequence with `prompt + generated - 1` tokens in its cache needs a new block in the steps in which that number is
    a multiple of `block_size`. As all sequences grow alike, `(tokens - steps) mod block_size` never changes while one
    decodes, and counting sequences by it gives the blocks that any number of steps takes.
    """

    __slots__ = ("_finish", "_phases", "block_size", "context", "members", "steps")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.members: dict[Request, None] = {}
        self.context = 0
        self.steps = 0
        self._phases = [0] * block_size
        self._finish: list[tuple[int, int, int, Request]] = []

    def __len__(self) -> int:
        return len(self.members)

    def join(self, request: Request) -> None:
        """Add a sequence with tokens left to generate."""
        tokens = request.prompt + request.generated - 1
        request.run += 1
        request.finish_step = self.steps + request.output - request.generated
        request.phase = (tokens - self.steps) % self.block_size
        self._phases[request.phase] += 1
        self.context += tokens
        self.members[request] = None
        heappush(self._finish, (request.finish_step, request.id, request.run, request))

    def leave(self, request: Request) -> None:
        """Remove a sequence and bring its `generated` up to date."""
        del self.members[request]
        request.run += 1  # voids its entry in the finish heap
        request.generated = request.output - (request.finish_step - self.steps)
        self._phases[request.phase] -= 1
        self.context -= request.prompt + request.generated - 1

    def advance(self, steps: int) -> int:
        """Every sequence gains `steps` tokens; returns the tokens generated in all."""
        tokens = steps * len(self.members)
        self.steps += steps
        self.context += tokens
        return tokens

    def pop_finished(self) -> list[Request]:
        """Remove and return the sequences that have all their tokens."""
        finished = []
        heap = self._finish
        while heap and heap[0][0] <= self.steps:
            _, _, run, request = heappop(heap)
            if run == request.run:
                self.leave(request)
                finished.append(request)
        return finished

    def to_next_finish(self) -> int:
        """Steps until the next sequence is complete. The batch must not be empty."""
        heap = self._finish
        while heap[0][2] != heap[0][3].run:
            heappop(heap)
        return heap[0][0] - self.steps

    def growth(self, steps: int) -> int:
        """Blocks that the next `steps` steps take."""
        size = self.block_size
        full, rest = divmod(steps, size)
        blocks = full * len(self.members)
        for step in range(self.steps, self.steps + rest):
            blocks += self._phases[-step % size]
        return blocks

    def steps_within(self, blocks: int, limit: int) -> int:
        """The most steps, up to `limit`, that take no more than `blocks`."""
        steps = min(blocks // len(self.members) * self.block_size, limit)
        while steps < limit and self.growth(steps + 1) <= blocks:
            steps += 1
        return steps
