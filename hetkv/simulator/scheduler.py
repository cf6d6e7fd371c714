"""Which requests an instance runs: vLLM's scheduler (version 1).

In each step running sequences come first, then prompts fill what is left of `max_num_batched_tokens`; when blocks run
out, the sequence admitted last is preempted and recomputed later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import isnan

from hetkv.simulator.batch import DecodeBatch
from hetkv.simulator.events import Events
from hetkv.simulator.pool import Pool
from hetkv.simulator.request import Request
from hetkv.simulator.request_kv import RequestKV
from hetkv.simulator.series import Series

Chunk = tuple[Request, int]
"""A request and how many tokens of its prompt a step computes."""


class Scheduler:
    """The queues, the admitted prompts and the decode batch of one instance.

    `uncomputed(tokens)` is called with each change of the prompt tokens that are still to be computed.
    """

    __slots__ = (
        "batch", "events", "fresh", "joined", "kv", "memory", "pool", "preempted", "prefilling", "queue",
        "queue_length", "ready", "resumed", "taken", "uncomputed",
    )  # fmt: skip

    def __init__(self, pool: Pool, events: Events, memory: RequestKV, uncomputed: Callable[[int], None]) -> None:
        self.pool = pool
        self.events = events
        self.memory = memory
        self.kv = memory.kv
        self.uncomputed = uncomputed
        self.queue: deque[Request] = deque()  # prompts to compute
        self.queue_length = pool.waiting
        self.resumed: deque[Request] = deque()  # preempted here, to be recomputed before anything else
        self.ready: deque[Request] = deque()  # KV delivered, waiting for a place in the batch
        self.prefilling: dict[Request, None] = {}  # admitted, in order of admission
        self.fresh: deque[Request] = deque()  # prompts computed here that decode from the next step on
        self.batch = DecodeBatch(pool.pages)
        self.joined: list[Request] = []  # delivered ones that have not decoded here yet
        self.taken: list[Request] = []  # out of `queue` for the step that is planned
        self.preempted = False  # something was, while the step was planned

    @property
    def places(self) -> int:
        """How many more sequences may run."""
        return self.pool.max_num_seqs - len(self.prefilling) - len(self.fresh) - len(self.batch.members)

    def enqueue(self, request: Request) -> None:
        """Add a prompt at the end of the queue."""
        self.queue.append(request)
        self.queue_length.add(self.events.now, 1)

    def share_queue(self, queue: deque[Request], length: Series) -> None:
        """Take prompts from the head of `queue`, which other instances take from, too."""
        self.queue, self.queue_length = queue, length

    def drop_queue(self) -> list[Request]:
        """Remove and return the prompts in the queue."""
        dropped = list(self.queue)
        self.queue_length.add(self.events.now, -len(dropped))
        self.queue.clear()
        return dropped

    def drop_all(self) -> list[Request]:
        """Remove and return all requests but those of the queue. Blocks are not given back."""
        waiting = len(self.resumed) + len(self.ready)
        dropped = [*self.resumed, *self.ready, *self.prefilling, *self.fresh, *self.batch.members]
        for request in list(self.batch.members):
            self.batch.leave(request)
        self.pool.running.add(self.events.now, waiting - len(dropped))
        self.pool.waiting.add(self.events.now, -waiting)
        for group in (self.resumed, self.ready, self.prefilling, self.fresh, self.joined):
            group.clear()
        self.batch = DecodeBatch(self.pool.pages)
        return dropped

    # -- one step

    def plan_decodes(self) -> None:
        """First part of a step's plan: the batch of the step, with room for one more token of each sequence."""
        while self.fresh:
            self.batch.join(self.fresh.popleft())
        if self.ready:
            self._join_ready()
        self.preempted = False
        most = self.pool.block_pages
        while self.kv.free < most * len(self.batch.members) and self.batch.growth(1) > self.kv.available:
            self._preempt(self._youngest())
            if not self.batch.members:
                self._join_ready()

    def plan_prompts(self) -> list[Chunk]:
        """Second part: prompts admitted before, then new ones while token budget, places and blocks last."""
        self.taken = []
        if not self.prefilling and (self.preempted or not (self.queue or self.resumed)):
            return []
        growth = self.batch.growth(1)
        self.kv.take(growth)
        chunks = self._chunks()
        if not chunks or not self.pool.chunked_prefill:
            self.kv.give(growth)
        return chunks

    def _chunks(self) -> list[Chunk]:
        pool = self.pool
        budget = pool.max_num_batched_tokens
        if pool.chunked_prefill and self.batch.members:
            budget = budget * pool.stages - len(self.batch.members)  # a round: one micro-batch for each stage
        chunks: list[Chunk] = []
        for request in list(self.prefilling):
            if budget <= 0 or request not in self.prefilling:
                break
            tokens = min(request.target - request.computed, budget)
            if not tokens:
                continue  # on its way through the stages
            while not self.memory.grow(request, tokens):
                victim = self._youngest()
                self._preempt(victim)
                if victim is request:
                    return chunks
            chunks.append((request, tokens))
            budget -= tokens
        while budget > 0 and not self.preempted and self.places > 0:
            source = self.resumed or self.queue
            if not source:
                break
            request = source[0]
            tokens = self._admit(request, budget, bool(chunks))
            if not tokens:
                break
            source.popleft()
            if source is self.queue:
                self.taken.append(request)
                self.queue_length.add(self.events.now, -1)
            else:
                pool.waiting.add(self.events.now, -1)
            chunks.append((request, tokens))
            budget -= tokens
        return chunks

    def _admit(self, request: Request, budget: int, full: bool) -> int:
        """Start a prompt: its tokens for this step, 0 where it does not fit. `full`: the step has other work."""
        pool, kv = self.pool, self.kv
        held = self.memory.cached_prefix(request)
        cached = len(held) * kv.hash_tokens
        tokens = request.target - cached
        if pool.chunked_prefill:
            tokens = min(tokens, budget)
        elif tokens > budget and full:
            return 0
        blocks = self.memory.computing(cached, tokens, held)
        kv.hold(held)
        if not kv.take(blocks):
            kv.drop(held)
            return 0
        request.computed, request.held, request.blocks = cached, held, blocks
        self.uncomputed(-cached)
        if isnan(request.scheduled):
            request.scheduled = self.events.now
            request.cached = cached
        self.prefilling[request] = None
        pool.running.add(self.events.now, 1)
        return tokens

    def _join_ready(self) -> None:
        """Requests whose KV was delivered take the free places of the batch."""
        now, count = self.events.now, min(len(self.ready), self.places)
        if count <= 0:
            return
        self.pool.waiting.add(now, -count)
        self.pool.running.add(now, count)
        for _ in range(count):
            request = self.ready.popleft()
            self.batch.join(request)
            self.joined.append(request)

    def _preempt(self, request: Request) -> None:
        self.preempted = True
        if request in self.prefilling:
            del self.prefilling[request]
            self.uncomputed(request.computed)
        else:
            self.batch.leave(request)
            self.memory.sync(request)
            self.uncomputed(request.prompt + request.generated)
        self.memory.free(request)
        request.forget()
        request.preemptions += 1
        self.resumed.appendleft(request)
        now = self.events.now
        self.pool.running.add(now, -1)
        self.pool.waiting.add(now, 1)

    def _youngest(self) -> Request:
        return next(reversed(self.prefilling or self.batch.members))
