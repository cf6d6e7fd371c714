"""The decode batch of one instance, in aggregate: nothing here costs time per sequence and step."""

from __future__ import annotations

from heapq import heappop, heappush

from hetkv.simulator.pages import NEVER, Pages
from hetkv.simulator.request import Request


class DecodeBatch:
    """Sequences that gain one token each in every step. `steps` counts the steps so far, `context` is the KV tokens.

    A sequence with `prompt + generated - 1` tokens in its cache needs a new block in the steps in which that number is
    a multiple of `block_size`. As all sequences grow alike, `(tokens - steps) mod block_size` never changes while one
    decodes, and counting sequences by it gives the pages that any number of steps takes. Layers with a window take
    pages until the window is full: that, too, is a step that is known when a sequence joins.
    """

    __slots__ = ("_filling", "_finish", "_full", "_phases", "context", "members", "pages", "steps")

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.members: dict[Request, None] = {}
        self.context = 0
        self.steps = 0
        self._phases = [0] * pages.block_size
        self._filling = [0] * pages.block_size  # of the sequences whose windows are not full
        self._full: list[tuple[int, int, int, Request]] = []  # when their windows are
        self._finish: list[tuple[int, int, int, Request]] = []

    def __len__(self) -> int:
        return len(self.members)

    def join(self, request: Request) -> None:
        """Add a sequence with tokens left to generate."""
        tokens = request.prompt + request.generated - 1
        request.run += 1
        request.finish_step = self.steps + request.output - request.generated
        request.phase = (tokens - self.steps) % self.pages.block_size
        self._phases[request.phase] += 1
        if self.pages.sliding:
            request.full_step = self.steps + self.pages.sliding_tokens - tokens
            if request.full_step > self.steps:
                self._filling[request.phase] += 1
                heappush(self._full, (request.full_step, request.id, request.run, request))
        self.context += tokens
        self.members[request] = None
        heappush(self._finish, (request.finish_step, request.id, request.run, request))

    def leave(self, request: Request) -> None:
        """Remove a sequence and bring its `generated` up to date."""
        del self.members[request]
        request.run += 1  # voids its entry in the finish heap
        request.generated = request.output - (request.finish_step - self.steps)
        self._phases[request.phase] -= 1
        if self.pages.sliding and request.full_step > self.steps:
            self._filling[request.phase] -= 1
        self.context -= request.prompt + request.generated - 1

    def advance(self, steps: int) -> int:
        """Every sequence gains `steps` tokens; returns the tokens generated in all."""
        tokens = steps * len(self.members)
        self.steps += steps
        self.context += tokens
        heap = self._full
        while heap and heap[0][0] <= self.steps:
            _, _, run, request = heappop(heap)
            if run == request.run:
                self._filling[request.phase] -= 1
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

    def to_next_change(self) -> int:
        """Steps until the next sequence is complete, or its window full. The batch must not be empty."""
        heap = self._finish
        while heap[0][2] != heap[0][3].run:
            heappop(heap)
        finish = heap[0][0]
        if self._full:
            finish = min(finish, _next(self._full))
        return finish - self.steps

    def growth(self, steps: int) -> int:
        """Pages that the next `steps` steps take, no more of them than `to_next_change`."""
        taken = self.pages.full * self._crossed(self._phases, len(self.members), steps)
        if self._full:
            taken += self.pages.sliding * self._crossed(self._filling, sum(self._filling), steps)
        return taken

    def _crossed(self, phases: list[int], members: int, steps: int) -> int:
        """Blocks that the next `steps` steps begin."""
        size = self.pages.block_size
        full, rest = divmod(steps, size)
        last = -self.steps % size + 1  # step `s` begins the blocks of phase `-s`, so these are `rest` phases before it
        first = last - rest
        if first >= 0:
            return full * members + sum(phases[first:last])
        return full * members + sum(phases[:last]) + sum(phases[first:])

    def steps_within(self, pages: int, limit: int) -> int:
        """The most steps, up to `limit`, that take no more than `pages`."""
        steps = min(pages // (len(self.members) * self.pages.block) * self.pages.block_size, limit)
        while steps < limit and self.growth(steps + 1) <= pages:
            steps += 1
        return steps


def _next(heap: list[tuple[int, int, int, Request]]) -> int:
    """The step of the first entry that is not void; `NEVER` where all are."""
    while heap and heap[0][2] != heap[0][3].run:
        heappop(heap)
    return heap[0][0] if heap else NEVER
