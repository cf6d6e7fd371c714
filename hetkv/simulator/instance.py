"""One engine: continuous batching with chunked prefill, paged KV memory and preemption.

The scheduler is vLLM's (version 1): in each step running sequences come first, then prompts fill what is left of
`max_num_batched_tokens`; when blocks run out, the sequence admitted last is preempted and recomputed later. Steps
without prompts are not simulated one by one: `StepLine` gives the time of all steps up to the next completion, and an
arrival that could join cuts that run at the next step boundary. With pipeline stages, steps of prompts alone follow
each other by one stage, as many at once as there are stages; their prompts are computed once the last stage is through.
"""

from __future__ import annotations

from collections import deque
from math import isnan, nan

from hetkv.simulator.batch import DecodeBatch
from hetkv.simulator.events import Events
from hetkv.simulator.kv import KVBlocks
from hetkv.simulator.owner import Owner
from hetkv.simulator.pool import PREFILL, Pool
from hetkv.simulator.request import Request
from hetkv.simulator.series import Series


class Instance:
    """Runs requests. Times are simulated seconds, lengths tokens. The router may make `queue` a central one."""

    def __init__(self, name: str, pool: Pool, events: Events, owner: Owner, hash_tokens: int = 0) -> None:
        self.name = name
        self.pool = pool
        self.events = events
        self.owner = owner
        self.up = True
        self.kv = KVBlocks(pool.kv_blocks, pool.block_size, hash_tokens if pool.prefix_caching else 0)
        self.queue: deque[Request] = deque()  # prompts to compute
        self.queue_length = pool.waiting
        self.resumed: deque[Request] = deque()  # preempted here, to be recomputed before anything else
        self.ready: deque[Request] = deque()  # KV delivered, waiting for a place in the batch
        self.prefilling: dict[Request, None] = {}  # admitted, in order of admission
        self.batch = DecodeBatch(pool.block_size)
        self.reserved: dict[Request, None] = {}  # blocks taken here for KV that is still elsewhere
        self.holding: dict[Request, None] = {}  # prefilled here, KV not yet delivered
        self.requests = 0  # those here or bound for here: what the router balances
        self.prompt_tokens = 0  # still to be computed here
        self._changed: dict[Instance, None] = {}
        self._epoch = 0  # an end of run scheduled in an older epoch is void
        self._busy = False
        self._whole = False  # the run in progress may no longer be cut
        self._start = 0.0
        self._steps = 0  # of the run in progress
        self._growth = 0  # blocks its decode batch takes, accounted for at its end
        self._decodes = False  # the decode batch is part of it
        self._preempted = False  # while it was planned
        self._ends: list[tuple[Request, int]] = []  # prompts that the run in progress completes, with their `run`
        self._joined: list[Request] = []  # delivered ones that have not decoded here yet
        self._fresh: deque[Request] = deque()  # prompts computed here that decode from the next step on
        self._flights = 0  # steps of prompts that the last stage has yet to end
        self._landed = 0.0  # when the latest of them ends
        self._life = 0  # a flight that was begun in an older life is void
        self._settling = False  # a flight's prompts are being handed on: nothing is started meanwhile

    def report_to(self, changed: dict[Instance, None]) -> None:
        """From now on, enter this instance in `changed` whenever `requests`, `prompt_tokens` or `up` change."""
        self._changed = changed

    def _count(self, requests: int, prompt_tokens: int) -> None:
        self.requests += requests
        self.prompt_tokens += prompt_tokens
        self._changed[self] = None

    # -- for the deployment around it

    @property
    def idle(self) -> bool:
        """Up and running nothing."""
        return self.up and not self._busy

    def wake(self) -> None:
        """There may be something new to run: start it now if idle, else at the next step boundary."""
        if self._settling:
            return
        if not self._busy:
            if self.up:
                self._plan()
        elif not self._whole and self._places() > 0:
            self._cut()

    def enqueue(self, request: Request) -> None:
        """Compute this request's prompt here, after those that wait already."""
        self._count(1, request.target)
        request.home = self
        self.queue.append(request)
        self.queue_length.add(self.events.now, 1)
        if len(self.queue) == 1 or not self._busy:
            self.wake()

    def share_queue(self, queue: deque[Request], length: Series) -> None:
        """Take prompts from the head of `queue`, which other instances take from, too."""
        self.queue, self.queue_length = queue, length

    def expect(self, request: Request) -> None:
        """The request's KV will come here; it counts among `requests`."""
        request.peer = self
        self._count(1, 0)

    def expect_no_more(self) -> None:
        """A request that was expected goes elsewhere."""
        self._count(-1, 0)

    def drop_queue(self) -> list[Request]:
        """Remove and return the prompts that wait here."""
        dropped = list(self.queue)
        self.queue_length.add(self.events.now, -len(dropped))
        self.queue.clear()
        return dropped

    def drop_reserved(self) -> list[Request]:
        """Release and return the requests that have reserved room. Only before `fail`: no blocks are given back."""
        dropped = list(self.reserved)
        self.reserved.clear()
        return dropped

    def reserve(self, request: Request) -> bool:
        """Take blocks for KV of the request that will come over a link; False where there is no room."""
        held: tuple[int, ...] = ()
        if self.kv.hash_tokens and request.hashes:
            held = request.hashes[: self.kv.match(request.hashes, request.target)]
        blocks = self._blocks(request.target - (self.pool.first_token_at != PREFILL), held)
        self.kv.hold(held)
        if not self._take_beside_run(blocks):
            self.kv.drop(held)
            return False
        self.reserved[request] = None
        request.granted = True
        request.peer_blocks, request.peer_held = blocks, held
        request.sent = len(held) * self.kv.hash_tokens
        return True

    def unreserve(self, request: Request) -> None:
        """The KV that room was reserved for will not come."""
        del self.reserved[request]
        self.kv.give(request.peer_blocks)
        self.kv.drop(request.peer_held)
        self._room()

    def deliver(self, request: Request) -> None:
        """The KV that room was reserved for is here: decode the request."""
        now = self.events.now
        del self.reserved[request]
        request.home = self
        request.blocks, request.held = request.peer_blocks, request.peer_held
        request.forget_peer()
        request.visible = now
        self._share(request)
        self.ready.append(request)
        self.pool.waiting.add(now, 1)
        if len(self.ready) == 1 or not self._busy:
            self.wake()

    def release(self, request: Request, blocks: int, held: tuple[int, ...]) -> None:
        """The KV of a request that was prefilled here, `blocks` and the prefix `held`, has been delivered."""
        del self.holding[request]
        self._count(-1, 0)
        self.kv.give(blocks)
        self.kv.drop(held)
        self._room()

    def fail(self) -> list[Request]:
        """All KV here is lost. Returns the requests that were here, progress kept as tokens, cache forgotten.

        Those of `drop_queue` and `drop_reserved`, whose KV is not here, are for the owner to route again.
        """
        now = self.events.now
        done = 0
        if self._busy and self._decodes and self._steps > 1:
            line = self.pool.line(len(self.batch))
            done = line.steps_until(self.batch.context, now - self._start, self._steps) - 1
        self.pool.decode_tokens += self.batch.advance(done)
        lost = [*self.resumed, *self.ready, *self.prefilling, *self._fresh, *self.batch.members, *self.holding]
        for request in list(self.batch.members):
            self.batch.leave(request)
            if request.first_token > now:
                request.first_token = nan
        self.pool.running.add(now, -(len(lost) - len(self.resumed) - len(self.ready) - len(self.holding)))
        self.pool.waiting.add(now, -(len(self.resumed) + len(self.ready)))
        for request in lost:
            request.forget()
        for group in (self.resumed, self.ready, self.prefilling, self._fresh, self.holding):
            group.clear()
        self.batch = DecodeBatch(self.pool.block_size)
        self.kv.reset()
        self._ends = []
        self._joined = []
        self._flights, self._landed = 0, 0.0
        self._life += 1
        self._idle()
        self._count(-self.requests, -self.prompt_tokens)
        self.up = False
        self.pool.down.add(now, 1)
        return lost

    def recover(self) -> None:
        """Restarted, with an empty cache."""
        self.up = True
        self._count(0, 0)
        self.pool.down.add(self.events.now, -1)
        self._room()

    # -- one step, or one run of decode steps

    def _plan(self) -> None:
        """Choose what runs next and start it."""
        pool, batch, now = self.pool, self.batch, self.events.now
        while self._fresh:
            batch.join(self._fresh.popleft())
        if self.ready:
            self._join_ready()
        self._preempted = False
        while self.kv.free < len(batch) and batch.growth(1) > self.kv.available:
            self._preempt(self._youngest())
            if not batch:
                self._join_ready()
        chunks: list[tuple[Request, int]] = []
        size = len(batch)
        some = self.prefilling or ((self.queue or self.resumed) and not self._preempted)
        if some and self._flights < pool.stages:
            claim = batch.growth(1)
            self.kv.take(claim)
            chunks = self._schedule()
            if not chunks or not pool.chunked_prefill:
                self.kv.give(claim)
            if not chunks and not size and self.ready:
                self._plan()  # the prompt that had the last place was preempted: what is ready takes it
                return
        self._decodes = size > 0 and (not chunks or pool.chunked_prefill)
        if chunks:
            tokens = sum(n for _, n in chunks)
            pairs = sum(n * r.computed + n * (n + 1) / 2 for r, n in chunks)
            decoding = size if self._decodes else 0
            seconds = pool.model.step_seconds(decoding, batch.context if decoding else 0.0, tokens, pairs)
            first, self._steps, self._growth = seconds, 1, 0
            pool.prefill_tokens += tokens
            if pool.role == PREFILL:
                for request, n in chunks:
                    self.owner.on_chunk(request, n, seconds)
            self._ends = self._advance(chunks)
            if pool.stages > 1:
                seconds = self._fly(seconds, float(pool.model.step_share(decoding, tokens)))
        elif size:
            line = pool.line(size)
            # After a preemption the next step may admit what this one may not.
            self._steps = batch.to_next_finish() if pool.skip_ahead and not self._preempted else 1
            self._growth = batch.growth(self._steps)
            if self._growth > self.kv.free and self._growth > self.kv.available:
                self._steps = batch.steps_within(self.kv.available, self._steps)
                self._growth = batch.growth(self._steps)
            seconds = line.seconds(batch.context, self._steps)
            first = line.seconds(batch.context, 1) if self._joined else seconds
        else:
            self._idle()
            return
        if self._decodes and self._joined:
            for request in self._joined:
                if request in batch.members:
                    request.decode_from = now
                    if isnan(request.first_token):
                        request.first_token = now + first
            self._joined.clear()
        if not self._busy:
            self._busy = True
            pool.busy.add(now, 1)
        self._start = now
        self._whole = self._steps == 1
        self._epoch += 1
        self.events.at(now + seconds, self._end, self._epoch)

    def _end(self, epoch: int) -> None:
        """The run in progress is over."""
        if epoch != self._epoch:
            return
        self._whole = True
        if self._decodes:
            taken = self.kv.take(self._growth)
            assert taken, "a run was planned beyond the free blocks"
            self._growth = 0
            self.pool.decode_tokens += self.batch.advance(self._steps)
            finished = self.batch.pop_finished()
            for request in finished:
                self._sync_blocks(request)
                self._finish(request)
            if finished:
                self.owner.on_room(self)
        ends, self._ends = self._ends, []
        self._decodes = False
        self._computed(ends)
        self._plan()

    def _advance(self, chunks: list[tuple[Request, int]]) -> list[tuple[Request, int]]:
        """Count the tokens of a step that starts now as computed; returns the prompts that it completes."""
        ends = []
        for request, tokens in chunks:
            request.computed += tokens
            self._count(0, -tokens)
            if request.computed == request.target:
                ends.append((request, request.run))
        return ends

    def _computed(self, ends: list[tuple[Request, int]]) -> None:
        """Prompts are through, unless they were preempted meanwhile."""
        for request, run in ends:
            if request.run == run and request in self.prefilling:
                self._prefilled(request)

    def _fly(self, seconds: float, share: float) -> float:
        """The step's tokens are out after `seconds`; returns when the next may start. Flights end in their order."""
        if share == 1:
            return seconds
        interval = share * seconds
        self._landed = max(self.events.now + seconds, self._landed + interval)
        self._flights += 1
        self.events.at(self._landed, self._land, (self._life, self._ends))
        self._ends = []
        return interval

    def _land(self, flight: tuple[int, list[tuple[Request, int]]]) -> None:
        """A step of prompts has left the last stage."""
        life, ends = flight
        if life != self._life:
            return
        self._flights -= 1
        self._settling = True
        self._computed(ends)
        self._settling = False
        if not self._busy:
            self._plan()
        elif self._fresh and not self._whole:
            self._cut()

    def _cut(self) -> None:
        """End the run of decode steps in progress at its next step boundary."""
        self._whole = True
        line = self.pool.line(len(self.batch))
        now = self.events.now
        steps = line.steps_until(self.batch.context, now - self._start, self._steps)
        if steps < self._steps:
            self._steps = steps
            self._growth = self.batch.growth(steps)
            self._epoch += 1
            self.events.at(max(self._start + line.seconds(self.batch.context, steps), now), self._end, self._epoch)

    def _idle(self) -> None:
        self._epoch += 1
        self._decodes = False
        self._growth = self._steps = 0
        if self._busy:
            self._busy = False
            self.pool.busy.add(self.events.now, -1)

    def _join_ready(self) -> None:
        """Requests whose KV was delivered take the free places of the batch."""
        now = self.events.now
        while self.ready and self._places() > 0:
            request = self.ready.popleft()
            self.pool.waiting.add(now, -1)
            self.pool.running.add(now, 1)
            self.batch.join(request)
            self._joined.append(request)

    def _schedule(self) -> list[tuple[Request, int]]:
        """Prompt tokens of the next step: those admitted before, then new ones while budget, places and blocks last."""
        pool = self.pool
        budget = pool.max_num_batched_tokens
        if pool.chunked_prefill and self.batch:
            budget = budget * pool.stages - len(self.batch)  # a round: one micro-batch for each stage
        chunks: list[tuple[Request, int]] = []
        taken = False
        for request in list(self.prefilling):
            if budget <= 0 or request not in self.prefilling:
                break
            tokens = min(request.target - request.computed, budget)
            if not tokens:
                continue  # on its way through the stages
            while not self._grow(request, tokens):
                victim = self._youngest()
                self._preempt(victim)
                if victim is request:
                    return chunks
            chunks.append((request, tokens))
            budget -= tokens
        while budget > 0 and not self._preempted and self._places() > 0:
            source = self.resumed or self.queue
            if not source:
                break
            request = source[0]
            tokens = self._admit(request, budget, bool(chunks))
            if not tokens:
                break
            source.popleft()
            (self.queue_length if source is self.queue else pool.waiting).add(self.events.now, -1)
            chunks.append((request, tokens))
            budget -= tokens
            taken = taken or source is self.queue
        if taken and self.queue:
            self.owner.on_taken()
        return chunks

    def _admit(self, request: Request, budget: int, full: bool) -> int:
        """Start a prompt: its tokens for this step, 0 where it does not fit. `full`: the step has other work."""
        pool, kv = self.pool, self.kv
        held: tuple[int, ...] = ()
        if kv.hash_tokens and request.hashes:
            held = request.hashes[: kv.match(request.hashes, request.target)]
        cached = len(held) * kv.hash_tokens
        tokens = request.target - cached
        if pool.chunked_prefill:
            tokens = min(tokens, budget)
        elif tokens > budget and full:
            return 0
        blocks = self._blocks(cached + tokens, held)
        kv.hold(held)
        if not kv.take(blocks):
            kv.drop(held)
            return 0
        if request.home is not self:  # out of a central queue
            request.home = self
            self._count(1, request.target)
        request.computed, request.held, request.blocks = cached, held, blocks
        self._count(0, -cached)
        if isnan(request.scheduled):
            request.scheduled = self.events.now
            request.cached = cached
        self.prefilling[request] = None
        pool.running.add(self.events.now, 1)
        return tokens

    def _prefilled(self, request: Request) -> None:
        del self.prefilling[request]
        self._share(request)
        pool, now = self.pool, self.events.now
        hand_off = pool.role == PREFILL
        if not hand_off or pool.first_token_at == PREFILL:
            request.generated += 1
            pool.prefill_outputs += 1
            if isnan(request.first_token):
                request.first_token = now
        if request.generated == request.output:
            self._finish(request)
            self.owner.on_room(self)
        elif hand_off:
            pool.running.add(now, -1)
            self.holding[request] = None
            request.prefilled = now
            self.owner.on_prefilled(request)
        else:
            request.decode_from = now
            self._fresh.append(request)

    def _finish(self, request: Request) -> None:
        now = self.events.now
        request.last_token = now
        self._free(request)
        self._count(-1, 0)
        self.pool.running.add(now, -1)
        self.owner.on_finished(request)

    def _preempt(self, request: Request) -> None:
        self._preempted = True
        if request in self.prefilling:
            del self.prefilling[request]
            self._count(0, request.computed)
        else:
            self.batch.leave(request)
            self._sync_blocks(request)
            self._count(0, request.prompt + request.generated)
        self._free(request)
        request.forget()
        request.preemptions += 1
        self.resumed.appendleft(request)
        now = self.events.now
        self.pool.running.add(now, -1)
        self.pool.waiting.add(now, 1)

    def _youngest(self) -> Request:
        return next(reversed(self.prefilling or self.batch.members))

    # -- places and blocks

    def _places(self) -> int:
        return self.pool.max_num_seqs - len(self.prefilling) - len(self._fresh) - len(self.batch)

    def _blocks(self, tokens: int, held: tuple[int, ...]) -> int:
        size = self.kv.block_size
        return self.pool.state_blocks - (-tokens // size) - len(held) * self.kv.hash_tokens // size

    def _grow(self, request: Request, tokens: int) -> bool:
        more = self._blocks(request.computed + tokens, request.held) - request.blocks
        if self.kv.take(more):
            request.blocks += more
            return True
        return False

    def _take_beside_run(self, blocks: int) -> bool:
        """Take blocks while a run of decode steps is in progress that accounts for its own only at its end."""
        spare = self.kv.available - self._growth
        if spare < blocks:
            if self._whole or not self._busy:
                return False
            line, batch = self.pool.line(len(self.batch)), self.batch
            begun = line.steps_until(batch.context, self.events.now - self._start, self._steps)
            if self.kv.available - batch.growth(begun) < blocks:
                return False
            self._cut()
        return self.kv.take(blocks)

    def _sync_blocks(self, request: Request) -> None:
        """A decode batch takes blocks as a whole; work out how many of them are this request's."""
        request.blocks = self._blocks(request.prompt + request.generated - 1, request.held)

    def _share(self, request: Request) -> None:
        if self.kv.hash_tokens and request.hashes:
            held = len(request.held)
            held += self.kv.share(request.hashes, held, min(request.prompt, request.computed))
            request.blocks -= (held - len(request.held)) * self.kv.hash_tokens // self.kv.block_size
            request.held = request.hashes[:held]

    def _free(self, request: Request) -> None:
        self.kv.give(request.blocks)
        self.kv.drop(request.held)
        request.blocks, request.held = 0, ()

    def _room(self) -> None:
        """Blocks became free outside a step: the owner's tickets come first, then whatever waits here."""
        self.owner.on_room(self)
        if self.resumed or self.ready or self.queue:
            self.wake()
